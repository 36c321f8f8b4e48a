"""L-CIRR: long texts for the pairs of CIRR's validation split.

**The layout of its files is not verified.** The data set's page could not be read when this loader was written, so
file names and keys are those of CIRR and of Refined-CIRR ([`LAYOUT`]). A file of another layout raises an error that
says so. Compare the first captions with the page before a number is reported.

Annotations, CC-BY-4.0: <https://huggingface.co/datasets/JunYeong825/L-CIRR>; images and gallery are CIRR's, whose
validation split has 4,181 queries on 2,297 images. BLIP reads the first 35 tokens of a text, CLIP the first 77.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from . import cirr
from .annotations import find_file, make_benchmark
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Finding, Tree
from .refined_cirr import Rewritten, cirr_folder, rewrite, tree_of

HUB_ID = "JunYeong825/L-CIRR"

SPLITS = ("val",)

FILES = tuple(f"{folder}{name}" for folder in ("", "captions/", "data/") for name in ("cap.rc2.val.json", "val.json"))

LAYOUT = (
    "a JSON list of objects with CIRR's 'pairid' and the long 'caption', each pairid once, in one of "
    f"{', '.join(FILES)}; images and gallery from CIRR's own folder"
)
"""Layout that is expected."""


def load_l_cirr(
    root: str | Path, images: str | Path | None = None, allow_missing: bool = False, check_counts: bool = True
) -> CIRBenchmark:
    """Load the validation split.

    Args:
        root: has `cap.rc2.val.json` or `val.json` (also in `captions/` or `data/`): a list of objects with CIRR's
            `pairid` and the long `caption`. This layout is not verified, see above.
        images: CIRR's folder, see [`~pvlf_hf.data.cirr.load_cirr`]; by default `cirr/` beside `root`.
        allow_missing: see `load_cirr`.
        check_counts: raise unless CIRR's split has its published numbers of queries and images, and warn if the file
            has fewer queries than that.

    Returns:
        The benchmark: CIRR's queries that the file names, with the long captions; metrics as CIRR.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    base = cirr_folder(root, images)
    found = _read(root, base, check_counts)
    protocol = Protocol(
        name="l-cirr-val",
        gallery="every image of CIRR's val split",
        captions="long, as annotated",
        revision=found.revision,
    )
    folders = [base / folder for folder in cirr.IMAGE_FOLDERS]
    return make_benchmark("l-cirr/val", found.rows, found.gallery, folders, protocol, allow_missing)


@contextmanager
def _naming_the_layout() -> Iterator[None]:
    """Say in an error about the annotations that their layout is not verified, and what it is expected to be."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error}. The layout of L-CIRR is not verified; expected is {LAYOUT}") from error


def _read(root: Path, base: Path, check_counts: bool) -> Rewritten:
    cirr.read_annotations(base, "val", check_counts)  # raises where CIRR's own files are at fault
    with _naming_the_layout():
        return rewrite(find_file(root, FILES), base, {}, check_counts)


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    load = partial(load_l_cirr, root, allow_missing=True, check_counts=False)
    unverified = Finding(
        *("note", "layout", "l-cirr/val", f"the layout of the published files is not verified; expected is {LAYOUT}"),
        "compare the first captions with the data set's page before a number is reported",
    )
    cirr.read_annotations(cirr_folder(root, None), "val", check_counts=False)
    with _naming_the_layout():
        tree = tree_of("l-cirr/val", root, find_file(root, FILES), {}, load)
    return [replace(tree, findings=(unverified,))]


PROTOCOLS = {
    "l-cirr-val": NamedProtocol(
        "L-CIRR: CIRR validation with long texts; its file layout is not verified",
        "l-cirr",
        lambda root, **settings: [load_l_cirr(root, **settings)],
    ),
}
