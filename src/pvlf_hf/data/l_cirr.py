"""L-CIRR: long texts for the pairs of CIRR's validation split.

Annotations, CC-BY-4.0: <https://huggingface.co/datasets/JunYeong825/L-CIRR>; images and gallery are CIRR's. BLIP reads
the first 35 tokens of a text, CLIP the first 77.
"""

from functools import partial
from pathlib import Path

from . import cirr
from .annotations import find_file, make_benchmark
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Tree
from .refined_cirr import cirr_folder, rewrite, tree_of

HUB_ID = "JunYeong825/L-CIRR"

SPLITS = ("val",)

FILES = tuple(f"{folder}{name}" for folder in ("", "captions/", "data/") for name in ("cap.rc2.val.json", "val.json"))


def load_l_cirr(
    root: str | Path, images: str | Path | None = None, allow_missing: bool = False, check_counts: bool = True
) -> CIRBenchmark:
    """Load the validation split.

    Args:
        root: has `cap.rc2.val.json` or `val.json` (also in `captions/` or `data/`): a list of objects with CIRR's
            `pairid` and the long `caption`.
        images: CIRR's folder, see [`~pvlf_hf.data.cirr.load_cirr`]; by default `cirr/` beside `root`.
        allow_missing: see `load_cirr`.
        check_counts: raise unless CIRR's split has its published numbers of queries and images.

    Returns:
        The benchmark: CIRR's queries that the file names, with the long captions; metrics as CIRR.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    base = cirr_folder(root, images)
    rows, gallery, revision = rewrite(find_file(root, FILES), base, {}, check_counts)
    protocol = Protocol(
        name="l-cirr-val", gallery="every image of CIRR's val split", captions="long, as annotated", revision=revision
    )
    folders = [base / folder for folder in cirr.IMAGE_FOLDERS]
    return make_benchmark("l-cirr/val", rows, gallery, folders, protocol, allow_missing)


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    load = partial(load_l_cirr, root, allow_missing=True, check_counts=False)
    return [tree_of("l-cirr/val", root, find_file(root, FILES), {}, load)]


PROTOCOLS = {
    "l-cirr-val": NamedProtocol(
        "L-CIRR: CIRR validation with long texts", "l-cirr", lambda root, **settings: [load_l_cirr(root, **settings)]
    ),
}
