"""Refined-CIRR: captions of CIRR's validation split, rewritten where they were unclear (CoLLM, CVPR 2025).

The split has 4,181 queries on 2,297 images, see `pvlf_hf.data.cirr`. A file that has fewer of them is loaded with a
warning, because its authors' number of rows could not be read. The name of the file and its keys `pairid`, `caption`
and `is_refined` are those that public code reads.

Annotations: <https://huggingface.co/datasets/chuonghm/Refined-CIRR>; images and gallery are CIRR's.
"""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..digests import annotations_digest
from . import cirr
from .annotations import (
    check_records,
    check_unique,
    coverage_problem,
    find_file,
    make_benchmark,
    numbered,
    read_records,
)
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Tree, partly_rewritten

logger = logging.getLogger(__name__)

HUB_ID = "chuonghm/Refined-CIRR"

SPLITS = ("val",)

FILES = ("refined_cirr.val.json", "data/refined_cirr.val.json")


def load_refined_cirr(
    root: str | Path,
    images: str | Path | None = None,
    only_refined: bool = False,
    allow_missing: bool = False,
    check_counts: bool = True,
) -> CIRBenchmark:
    """Load the validation split.

    Args:
        root: has `refined_cirr.val.json` (also in `data/`).
        images: CIRR's folder, see [`~pvlf_hf.data.cirr.load_cirr`]; by default `cirr/` beside `root`.
        only_refined: leave out the queries whose caption is CIRR's own (`is_refined` is false), as some code does.
        allow_missing: see `load_cirr`.
        check_counts: raise unless CIRR's split has its published numbers of queries and images, and warn if the file
            has fewer queries than that.

    Returns:
        The benchmark: CIRR's queries that the file names by `pairid`, with the file's captions; metrics as CIRR.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    file, base = find_file(root, FILES), cirr_folder(root, images)
    found = rewrite(file, base, {"is_refined": bool}, check_counts, only_refined)
    protocol = Protocol(
        name="refined-cirr-val" + ("-only-refined" if only_refined else ""),
        gallery="every image of CIRR's val split",
        captions="rewritten" + (", queries with a rewritten one alone" if only_refined else " or as annotated"),
        revision=found.revision,
    )
    folders = [base / folder for folder in cirr.IMAGE_FOLDERS]
    return make_benchmark("refined-cirr/val", found.rows, found.gallery, folders, protocol, allow_missing)


def cirr_folder(root: Path, images: str | Path | None) -> Path:
    """Return CIRR's folder: the given one, or else the one beside a data set that rewrites its captions."""
    return root.parent / "cirr" if images is None else as_path("images", images)


class Rewritten(NamedTuple):
    """CIRR's queries with the captions of a file.

    Args:
        rows: columns of the queries that the file names, in its order, but the images.
        gallery: file names by image id.
        revision: digest of all annotations.
        problem: that the file has a part of the split; None if it has all.
    """

    rows: list[dict[str, Any]]
    gallery: dict[str, list[str]]
    revision: str
    problem: str | None


def rewrite(
    file: Path, base: Path, fields: Mapping[str, Any], check_counts: bool, only_refined: bool = False
) -> Rewritten:
    """Put the captions of a file in the place of CIRR's.

    Args:
        file: a JSON list of objects with `pairid` and `caption`.
        base: CIRR's folder.
        fields: further keys that they must have, and their types.
        check_counts: raise unless CIRR's split has its published numbers, and warn if the file has a part of it.
        only_refined: leave out rows whose `is_refined` is false.

    Raises:
        ValueError: if a row is not as published, or names a pair that CIRR's split does not have.
    """
    originals, gallery, revision = cirr.read_annotations(base, "val", check_counts)
    records = read_records(file, {"pairid": int, "caption": str, **fields})
    check_unique(file, "pairid", (record["pairid"] for record in records))
    row_of = {row["query_id"]: row for row in originals}
    if unknown := [record["pairid"] for record in records if str(record["pairid"]) not in row_of]:
        raise ValueError(f"{file}: {len(unknown)} pairid are not of CIRR's val split, first: {unknown[:3]}")
    kept = [record for record in records if not only_refined or record["is_refined"]]
    check_records(file, numbered(kept), {})
    rows = [{**row_of[str(record["pairid"])], "caption": record["caption"]} for record in kept]
    problem = coverage_problem(file, len(records), "CIRR's val split", len(originals))
    if problem and check_counts:
        logger.warning("%s", problem)
    return Rewritten(rows, gallery, f"{annotations_digest(file)}, CIRR {revision}", problem)


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    load = partial(load_refined_cirr, root, allow_missing=True, check_counts=False)
    return [tree_of("refined-cirr/val", root, find_file(root, FILES), {"is_refined": bool}, load)]


def tree_of(name: str, root: Path, file: Path, fields: Mapping[str, Any], load: Callable[[], CIRBenchmark]) -> Tree:
    """Return what the doctor examines of a file that rewrites CIRR's captions; arguments are those of `rewrite`."""
    base = cirr_folder(root, None)
    found = rewrite(file, base, fields, check_counts=False)
    folders = [base / folder for folder in cirr.IMAGE_FOLDERS]
    expected = {"images": cirr.EXPECTED_COUNTS["val"][1]}
    partial_file = partly_rewritten(name, found.problem)
    return Tree(name, found.rows, found.gallery, folders, load, expected, count_findings=partial_file)


PROTOCOLS = {
    "refined-cirr-val": NamedProtocol(
        "Refined-CIRR: CIRR validation, captions rewritten",
        "refined-cirr",
        lambda root, **settings: [load_refined_cirr(root, **settings)],
    ),
    "refined-cirr-val-only-refined": NamedProtocol(
        "... its queries with a rewritten caption alone",
        "refined-cirr",
        lambda root, **settings: [load_refined_cirr(root, only_refined=True, **settings)],
    ),
}
