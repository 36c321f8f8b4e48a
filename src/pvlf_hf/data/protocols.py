"""Protocols by name: the benchmarks that a table of results is measured on, and how they are loaded.

pvlf-hf evaluate --model MODEL --data_root DATA --output_dir OUT --protocols cirr-val fashioniq circo-val
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .benchmark import CIRBenchmark
from .checks import as_path
from .circo import load_circo
from .cirr import load_cirr
from .emoji_cir.captions import TIERS
from .emoji_cir.dataset import load_emoji_cir
from .fashioniq import CATEGORIES, load_fashioniq


class NamedProtocol(NamedTuple):
    """Entry of `PROTOCOLS`.

    Args:
        summary: a line that describes it.
        folder: the data set's folder in the data root; empty where the data is a package.
        load: function of the folder, `allow_missing` and `check_counts` that returns the benchmarks.
    """

    summary: str
    folder: str
    load: Callable[..., list[CIRBenchmark]]


def _emoji(root: Path, allow_missing: bool, check_counts: bool) -> list[CIRBenchmark]:
    return [load_emoji_cir("test", tier) for tier in TIERS]


def _cirr(root: Path, **settings: Any) -> list[CIRBenchmark]:
    return [load_cirr(root, **settings)]


def _fashioniq(root: Path, **settings: Any) -> list[CIRBenchmark]:
    return [load_fashioniq(root, category, **settings) for category in CATEGORIES]


def _circo(root: Path, **settings: Any) -> list[CIRBenchmark]:
    return [load_circo(root, **settings)]


PROTOCOLS = {
    "emoji-cir": NamedProtocol("EmojiCIR test in its three tiers of captions; no files needed", "", _emoji),
    "cirr-val": NamedProtocol("CIRR validation, reference removed", "cirr", _cirr),
    "cirr-test1": NamedProtocol("CIRR test, for its server", "cirr", partial(_cirr, split="test1")),
    "fashioniq": NamedProtocol("FashionIQ validation as TransAgg and most papers", "fashioniq", _fashioniq),
    "fashioniq-union": NamedProtocol(
        "... gallery of the queries' images alone (VAL split)", "fashioniq", partial(_fashioniq, gallery="union")
    ),
    "fashioniq-removed": NamedProtocol(
        "... reference removed, as CoVR", "fashioniq", partial(_fashioniq, reference="removed")
    ),
    "fashioniq-both-mean": NamedProtocol(
        "... captions joined in both orders, averaged, as SEARLE",
        "fashioniq",
        partial(_fashioniq, captions="both-mean"),
    ),
    "fashioniq-and-reversed": NamedProtocol(
        "... second caption first", "fashioniq", partial(_fashioniq, captions="and-reversed")
    ),
    "fashioniq-and-reversed-as-written": NamedProtocol(
        "... second caption first, nothing stripped, as Pic2Word and Context-I2W",
        "fashioniq",
        partial(_fashioniq, captions="and-reversed-as-written"),
    ),
    "fashioniq-first": NamedProtocol("... first caption alone", "fashioniq", partial(_fashioniq, captions="first")),
    "fashioniq-separate": NamedProtocol(
        "... each caption by itself, averaged", "fashioniq", partial(_fashioniq, captions="separate")
    ),
    "circo-val": NamedProtocol("CIRCO validation, reference kept, as its server", "circo", _circo),
    "circo-val-removed": NamedProtocol(
        "... reference removed, as CoVR and SEIZE", "circo", partial(_circo, reference="removed")
    ),
    "circo-test": NamedProtocol("CIRCO test, for its server", "circo", partial(_circo, split="test")),
}
"""Protocols that [`load_protocol`] loads, by name."""


def load_protocol(
    name: str, data_root: str | Path = ".", allow_missing: bool = False, check_counts: bool = True
) -> list[CIRBenchmark]:
    """Load the benchmarks of a protocol: one, or FashionIQ's three categories, or EmojiCIR's three tiers.

    Args:
        name: from `PROTOCOLS`.
        data_root: has a folder for each data set: `cirr/`, `fashioniq/`, `circo/`, laid out as their loaders say.
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
    "PROTOCOLS",
    "NamedProtocol",
    "describe_protocols",
    "load_protocol",
]
