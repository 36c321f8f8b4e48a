"""CIRR: 36,554 queries on natural photographs of NLVR2, in groups of six look-alikes.

Annotations: branch `cirr_dataset` of <https://github.com/Cuberick-Orion/CIRR>. The images are requested from NLVR2.
"""

from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from ..digests import annotations_digest
from .annotations import (
    check_counts_of,
    check_records,
    check_unique,
    find_file,
    make_benchmark,
    make_triplets,
    numbered,
    read_json,
    read_records,
)
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice
from .examination import Tree

EXPECTED_COUNTS = {"train": (28225, 16939), "val": (4181, 2297), "test1": (4148, 2315)}
"""Queries and gallery images of every split."""

SPLITS = tuple(EXPECTED_COUNTS)

IMAGE_FOLDERS = (".", "img_raw", "images", "NLVR2/images")


def load_cirr(
    root: str | Path,
    split: str = "val",
    allow_missing: bool = False,
    check_counts: bool = True,
    labels: Literal["hard", "graded"] = "hard",
    with_images: bool = True,
) -> CIRBenchmark:
    """Load a split for evaluation.

    Args:
        root: has `cirr/captions/` and `cirr/image_splits/` (also without `cirr/`), and the images, `dev/`, `test1/`
            and `train/<number>/` (also in `img_raw/`, `images/` or `NLVR2/images/`).
        split: `"val"`, `"test1"` (a server keeps its targets, so it has no `target_id`) or `"train"`.
        allow_missing: leave out images without a file and the queries that name them as reference, target or member
            of the subset, with a warning and a note in the protocol, instead of raising.
        check_counts: raise unless the split has its published numbers of queries and images.
        labels: `"hard"`, the one target as the field reports; or `"graded"`, all images that people judged
            (`target_soft`): the target counts 1, others of a grade above 0 as much as that; those below are negatives.
        with_images: look for the images; without, image columns hold None, and rankings of others can be scored.

    Returns:
        The benchmark. The gallery is every image of the split, whether a query names it or not. `target_id` is the
        annotation's `target_hard`; `subset_ids` its six `members`; `query_id` its `pairid`. Captions are as annotated;
        TransAgg lower-cases them, which makes no difference to the uncased tokenizers of BLIP and CLIP.

    Raises:
        ValueError: if the split is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("split", split, SPLITS)
    check_choice("labels", labels, ("hard", "graded"))
    root = as_path("root", root)
    rows, images, revision = read_annotations(root, split, check_counts)
    _check_subsets(f"cirr/{split}", rows)
    if labels == "graded":
        rows = _graded(_captions_file(root, split), rows)
    protocol = Protocol(
        name=f"cirr-{split}" + ("-graded" if labels == "graded" else ""),
        gallery=f"every image of the {split} split",
        captions="as annotated, not lower-cased",
        metrics="graded" if labels == "graded" else "cirr",
        revision=revision,
    )
    folders = [root / folder for folder in IMAGE_FOLDERS]
    return make_benchmark(f"cirr/{split}", rows, images, folders, protocol, allow_missing, with_images=with_images)


def load_cirr_train(root: str | Path, allow_missing: bool = False, check_counts: bool = True) -> Dataset:
    """Load the training triplets (the paper's zero-shot models do not use them).

    Args:
        root: see [`load_cirr`].
        allow_missing: leave out triplets whose images are absent, with a warning, instead of raising.
        check_counts: see [`load_cirr`].

    Returns:
        Columns `reference`, `target` (`datasets.Image`, decoded lazily), `reference_id`, `target_id`, `caption`.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    rows, images, _ = read_annotations(root, "train", check_counts)
    triplets = [{column: row[column] for column in ("reference_id", "caption", "target_id")} for row in rows]
    return make_triplets("cirr/train", triplets, images, [root / f for f in IMAGE_FOLDERS], allow_missing)


def read_annotations(
    root: Path, split: str, check_counts: bool
) -> tuple[list[dict[str, Any]], dict[str, list[str]], str]:
    """Return queries, file names by image id, and the revision of a split."""
    captions = _captions_file(root, split)
    gallery = find_file(root, [f"{folder}image_splits/split.rc2.{split}.json" for folder in ("cirr/", "")])
    rows = read_queries(captions, has_targets=split != "test1")
    files = read_json(gallery, dict)
    check_records(gallery, {"the object": files}, dict.fromkeys(files, str))
    if check_counts:
        queries, images = EXPECTED_COUNTS[split]
        check_counts_of(f"cirr/{split}", queries=(len(rows), queries), images=(len(files), images))
    return (
        rows,
        {name: [file.removeprefix("./")] for name, file in files.items()},
        annotations_digest(captions, gallery),
    )


def read_queries(file: Path, has_targets: bool) -> list[dict[str, Any]]:
    """Return the columns of the queries except the images, checked row by row."""
    # target_soft is not used: 37 of the hard targets of val are not in it.
    target = {"target_hard": str} if has_targets else {}
    records = read_records(file, {"pairid": int, "reference": str, "caption": str, "img_set": dict, **target})
    check_unique(file, "pairid", (record["pairid"] for record in records))
    check_records(file, numbered([record["img_set"] for record in records], "img_set of row"), {"members": list[str]})
    return [
        {
            "query_id": str(record["pairid"]),
            "reference_id": record["reference"],
            "caption": record["caption"],
            **({"target_id": record["target_hard"]} if has_targets else {}),
            "subset_ids": record["img_set"]["members"],
        }
        for record in records
    ]


def _captions_file(root: Path, split: str) -> Path:
    return find_file(root, [f"{folder}captions/cap.rc2.{split}.json" for folder in ("cirr/", "")])


def _graded(file: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `target_ids`, `target_grades` and `negative_ids` to the queries of a file; the reference has no label."""
    graded = []
    for row, record in zip(rows, read_records(file, {"target_soft": dict, "target_hard": str}), strict=True):
        check_records(
            file, {row["query_id"]: record["target_soft"]}, dict.fromkeys(record["target_soft"], int | float)
        )
        grades = {**record["target_soft"], row["target_id"]: 1.0}  # 37 of the hard targets of val are not in it
        grades.pop(row["reference_id"], None)
        positives = {image_id: float(grade) for image_id, grade in grades.items() if grade > 0}
        labels = {"target_ids": list(positives), "target_grades": list(positives.values())}
        graded.append({**row, **labels, "negative_ids": [i for i, grade in grades.items() if grade <= 0]})
    return graded


def _check_subsets(name: str, rows: list[dict[str, Any]]) -> None:
    """Raise a `ValueError` unless subsets are six images, the reference among them.

    Every benchmark checks that the target is one of them too.
    """
    if bad := [
        r["query_id"] for r in rows if len({*r["subset_ids"]}) != 6 or r["reference_id"] not in r["subset_ids"]
    ]:
        raise ValueError(
            f"{name}: {len(bad)} queries whose img_set is not six different images, the reference among them; "
            f"first pairid: {bad[:3]}"
        )


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    rows, images, _ = read_annotations(root, split, check_counts=False)
    return [
        Tree(
            f"cirr/{split}",
            rows,
            images,
            [root / folder for folder in IMAGE_FOLDERS],
            lambda: load_cirr(root, split, allow_missing=True, check_counts=False),
            dict(zip(("queries", "images"), EXPECTED_COUNTS[split], strict=True)),
        )
    ]


def _protocol(summary: str, **choices: Any) -> NamedProtocol:
    return NamedProtocol(summary, "cirr", lambda root, **settings: [load_cirr(root, **choices, **settings)])


PROTOCOLS = {
    "cirr-val": _protocol("CIRR validation, reference removed"),
    "cirr-val-graded": _protocol("... labels graded by several people (nDCG)", labels="graded"),
    "cirr-test1": _protocol("CIRR test, for its server", split="test1"),
}
