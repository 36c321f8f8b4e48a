"""CIRCLED: 22,608 sessions of two to six turns over the images of FashionIQ, CIRR and CIRCO.

Annotations, CC-BY-4.0: <https://huggingface.co/datasets/tk1441/CIRCLED>; the images are those of the three data sets.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..digests import annotations_digest
from . import circo, cirr, fashioniq
from .annotations import (
    check_counts_of,
    check_records,
    check_unique,
    find_file,
    make_benchmark,
    numbered,
    read_records,
)
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice
from .examination import Tree

EXPECTED_COUNTS = {
    "fashioniq_dress_train": (1583, 920, 323, 144, 57),
    "fashioniq_dress_val": (745, 358, 163, 64, 30),
    "fashioniq_shirt_train": (2376, 752, 251, 101, 38),
    "fashioniq_shirt_val": (990, 333, 110, 48, 19),
    "fashioniq_toptee_train": (2253, 1002, 359, 126, 70),
    "fashioniq_toptee_val": (934, 392, 119, 45, 16),
    "cirr_train": (4581, 1496, 513, 219, 65),
    "cirr_val": (718, 166, 41, 23, 11),
    "circo_val": (36, 5, 11, 2, 0),
}
"""Sessions of two, three, four, five and six turns of every subset, of the data set's card."""

SUBSETS = tuple(EXPECTED_COUNTS)

HUB_ID = "tk1441/CIRCLED"

SPLITS = ("val", *SUBSETS)


def load_circled(
    root: str | Path,
    subset: str,
    images: str | Path | None = None,
    allow_missing: bool = False,
    check_counts: bool = True,
) -> CIRBenchmark:
    """Load the sessions of a subset; each turn is a query.

    Args:
        root: has `<subset>.json` (also in `data/`).
        subset: from `SUBSETS`.
        images: folder of the data set that the images belong to, as its own loader takes it; by default `cirr/`,
            `fashioniq/` or `circo/` beside `root`.
        allow_missing: leave out images without a file and the turns that name them as reference or as one of the
            positives, with a warning and a note in the protocol, instead of raising.
        check_counts: raise unless there are the published numbers of sessions, of turns (the queries) and of images of
            the gallery.

    Returns:
        The benchmark. `session_id` and `turn` are the annotation's; `target_ids` its `ground_truth_ids`. The gallery
        is that of the data set's split, from which the reference of the turn is removed, as
        [`~pvlf_hf.search.result.SearchResult.refine`] leaves out the image that it starts from: the ranks are those
        of a session of [`Gallery.search`] and `refine` with the images that the annotation picks.

    Raises:
        ValueError: if the subset is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("subset", subset, SUBSETS)
    root = as_path("root", root)
    base = root.parent / subset.partition("_")[0] if images is None else as_path("images", images)
    file, rows, gallery, folders = read_sessions(root, subset, base)
    if check_counts:
        actual = {"queries": len(rows), "sessions": _sessions(rows), "images": len(gallery)}
        expected = expected_counts(subset)
        check_counts_of(f"circled/{subset}", **{what: (actual[what], n) for what, n in expected.items()})
    protocol = Protocol(
        name=f"circled-{subset.replace('_', '-')}",
        gallery=f"the gallery of {subset.replace('_', ' ')}",
        reference="removed",
        captions="the turn's caption alone",
        metrics="sessions",
        revision=annotations_digest(file),
    )
    return make_benchmark(f"circled/{subset}", rows, gallery, folders, protocol, allow_missing)


def read_sessions(
    root: Path, subset: str, base: Path
) -> tuple[Path, list[dict[str, Any]], Mapping[str, Sequence[str]], list[Path]]:
    """Return the file, the columns of the turns except the images, file names by image id, and the images' folders."""
    file = find_file(root, [f"{subset}.json", f"data/{subset}.json"])
    records = read_records(file, {"session_id": str, "ground_truth_ids": list, "turns": list})
    check_unique(file, "session_id", (record["session_id"] for record in records))
    rows = []
    for record in records:
        where = numbered(record["turns"], f"turn of {record['session_id']}")
        check_records(file, where, {"turn": int, "reference_image_id": int | str, "relative_caption": str})
        if not (targets := [_image_id(i, subset) for i in record["ground_truth_ids"]]):
            raise ValueError(f"{file}: {record['session_id']}: ground_truth_ids is empty")
        for turn in record["turns"]:
            row = {
                "query_id": f"{record['session_id']}/{turn['turn']}",
                "session_id": record["session_id"],
                "turn": turn["turn"],
                "reference_id": _image_id(turn["reference_image_id"], subset),
                "caption": turn["relative_caption"],
            }
            rows.append({**row, "target_id": targets[0], "target_ids": targets})
    gallery, folders = read_gallery(subset, base)
    return file, rows, gallery, folders


def expected_counts(subset: str) -> dict[str, int]:
    """Return the published numbers of sessions, of their turns and of images of the gallery of a subset."""
    by_turns = EXPECTED_COUNTS[subset]
    name, *parts = subset.split("_")
    if name == "circo":
        images = circo.EXPECTED_IMAGES
    elif name == "cirr":
        images = cirr.EXPECTED_COUNTS[parts[0]][1]
    else:
        images = fashioniq.EXPECTED_COUNTS[parts[1]][parts[0]][1]
    turns = sum(length * sessions for length, sessions in enumerate(by_turns, 2))
    return {"sessions": sum(by_turns), "queries": turns, "images": images}


def _sessions(rows: list[dict[str, Any]]) -> int:
    return len({row["session_id"] for row in rows})


def _image_id(value: int | str, subset: str) -> str:
    """Return an id as the data set's own loader spells it: CIRCO's is a number, also written as a file name."""
    text = str(value).removesuffix(".png").removesuffix(".jpg")
    return text.lstrip("0") or "0" if subset.startswith("circo") else text


def read_gallery(subset: str, base: Path) -> tuple[Mapping[str, Sequence[str]], list[Path]]:
    """Return file names by image id, and the folders of the images, of the data set that a subset is made of."""
    name, _, split = subset.partition("_")
    if name == "cirr":
        _, images, _ = cirr.read_annotations(base, split, check_counts=False)
        return images, [base / folder for folder in cirr.IMAGE_FOLDERS]
    if name == "circo":
        return circo.read_images(find_file(base, circo.IMAGE_LISTS)), [base / f for f in circo.IMAGE_FOLDERS]
    category, _, split = split.partition("_")
    _, images, _ = fashioniq.read_annotations(base, category, split, "and", check_counts=False)
    return images, [base / folder for folder in fashioniq.IMAGE_FOLDERS]


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: a subset, or all of `"val"`."""
    subsets = [subset for subset in SUBSETS if subset.endswith("_val")] if split == "val" else [split]
    trees = []
    for subset in subsets:
        _, rows, images, folders = read_sessions(root, subset, root.parent / subset.partition("_")[0])
        load = partial(load_circled, root, subset, allow_missing=True, check_counts=False)
        expected, counted = expected_counts(subset), {"sessions": _sessions(rows)}
        trees.append(Tree(f"circled/{subset}", rows, images, folders, load, expected, counted=counted))
    return trees


def _protocol(subset: str, summary: str) -> NamedProtocol:
    return NamedProtocol(summary, "circled", lambda root, **settings: [load_circled(root, subset, **settings)])


PROTOCOLS = {
    "circled-cirr-val": _protocol("cirr_val", "CIRCLED, sessions over CIRR validation"),
    "circled-fashioniq-dress-val": _protocol("fashioniq_dress_val", "... over FashionIQ validation, dress"),
    "circled-fashioniq-shirt-val": _protocol("fashioniq_shirt_val", "... shirt"),
    "circled-fashioniq-toptee-val": _protocol("fashioniq_toptee_val", "... toptee"),
    "circled-circo-val": _protocol("circo_val", "... over CIRCO validation"),
}
