"""Protocols by name: the benchmarks that a table of results is measured on, and how they are loaded.

pvlf-hf evaluate --model MODEL --data_root DATA --output_dir OUT --protocols cirr-val fashioniq circo-val
"""

from pathlib import Path
from types import ModuleType

from . import (
    circled,
    circo,
    cirr,
    edir,
    fashioniq,
    genecis,
    icir,
    l_cirr,
    laion_cir,
    pinpoint,
    refined_cirr,
    refined_fashioniq,
)
from .benchmark import CIRBenchmark, NamedProtocol
from .checks import as_path
from .emoji_cir.captions import TIERS
from .emoji_cir.dataset import load_emoji_cir

DATA_SETS: dict[str, ModuleType] = {
    "laion-cir": laion_cir,
    "cirr": cirr,
    "fashioniq": fashioniq,
    "circo": circo,
    "icir": icir,
    "pinpoint": pinpoint,
    "circled": circled,
    "genecis": genecis,
    "refined-cirr": refined_cirr,
    "refined-fashioniq": refined_fashioniq,
    "l-cirr": l_cirr,
    "edir": edir,
}
"""Published data sets by name. Each module has `SPLITS`, `PROTOCOLS` ([`NamedProtocol`] by name), and `read_trees`,
which reads a split for the doctor, and `HUB_ID` if it is on the Hub; the command line (`pvlf_hf_cli.Subject`) lists
the same names."""


HUB_IDS: dict[str, str] = {name: module.HUB_ID for name, module in DATA_SETS.items() if hasattr(module, "HUB_ID")}
"""Ids of the data sets that are on the Hub."""


def _emoji(root: Path, allow_missing: bool, check_counts: bool) -> list[CIRBenchmark]:
    return [load_emoji_cir("test", tier) for tier in TIERS]


PROTOCOLS: dict[str, NamedProtocol] = {
    "emoji-cir": NamedProtocol("EmojiCIR test in its three tiers of captions; no files needed", "", _emoji),
    **{name: protocol for data_set in DATA_SETS.values() for name, protocol in data_set.PROTOCOLS.items()},
}
"""Protocols that [`load_protocol`] loads, by name."""


def load_protocol(
    name: str, data_root: str | Path = ".", allow_missing: bool = False, check_counts: bool = True
) -> list[CIRBenchmark]:
    """Load the benchmarks of a protocol: one, or a data set's categories, tasks or tiers.

    Args:
        name: from `PROTOCOLS`.
        data_root: has a folder for each data set, of the name in `DATA_SETS`, laid out as their loaders say.
        allow_missing: leave out images without a file and their queries, and record it, instead of raising.
        check_counts: raise unless splits have their published numbers of queries and images.

    Raises:
        ValueError: if the name is unknown, the data set's folder does not exist, or as its loader.
    """
    if name not in list(PROTOCOLS):
        raise ValueError(f"unknown protocol {name!r}; choose from\n{describe_protocols()}")
    protocol = PROTOCOLS[name]
    root = as_path("data_root", data_root) / protocol.folder
    if protocol.folder and not root.is_dir():
        raise ValueError(f"{root} is not a folder; protocol {name} looks for its data there, link or move it")
    return protocol.load(root, allow_missing=allow_missing, check_counts=check_counts)


def describe_protocols() -> str:
    """Return a line for each protocol."""
    width = max(map(len, PROTOCOLS))
    return "\n".join(f"{name:{width}}  {protocol.summary}" for name, protocol in PROTOCOLS.items())


__all__ = [
    "DATA_SETS",
    "HUB_IDS",
    "PROTOCOLS",
    "NamedProtocol",
    "describe_protocols",
    "load_protocol",
]
