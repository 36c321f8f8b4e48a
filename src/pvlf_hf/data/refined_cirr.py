"""Refined-CIRR: captions of CIRR's validation split, rewritten where they were unclear (CoLLM, CVPR 2025).

Annotations: <https://huggingface.co/datasets/chuonghm/Refined-CIRR>; images and gallery are CIRR's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ..digests import annotations_digest
from . import cirr
from .annotations import check_records, check_unique, find_file, make_benchmark, numbered, read_records
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path
from .examination import Tree

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
        check_counts: raise unless CIRR's split has its published numbers of queries and images.

    Returns:
        The benchmark: CIRR's queries that the file names by `pairid`, with the file's captions; metrics as CIRR.

    Raises:
        ValueError: if a file is absent or not as published, or images are absent.
    """
    root = as_path("root", root)
    file, base = find_file(root, FILES), cirr_folder(root, images)
    rows, gallery, revision = rewrite(file, base, {"is_refined": bool}, check_counts, only_refined)
    protocol = Protocol(
        name="refined-cirr-val" + ("-only-refined" if only_refined else ""),
        gallery="every image of CIRR's val split",
        captions="rewritten" + (", queries with a rewritten one alone" if only_refined else " or as annotated"),
        revision=revision,
    )
    folders = [base / folder for folder in cirr.IMAGE_FOLDERS]
    return make_benchmark("refined-cirr/val", rows, gallery, folders, protocol, allow_missing)


def cirr_folder(root: Path, images: str | Path | None) -> Path:
    """Return CIRR's folder: the given one, or else the one beside a data set that rewrites its captions."""
    return root.parent / "cirr" if images is None else as_path("images", images)


def rewrite(
    file: Path, base: Path, fields: Mapping[str, Any], check_counts: bool, only_refined: bool = False
) -> tuple[list[dict[str, Any]], dict[str, list[str]], str]:
    """Put the captions of a file in the place of CIRR's.

    Args:
        file: a JSON list of objects with `pairid` and `caption`.
        base: CIRR's folder.
        fields: further keys that they must have, and their types.
        check_counts: raise unless CIRR's split has its published numbers.
        only_refined: leave out rows whose `is_refined` is false.

    Returns:
        The queries that the file names, in its order, file names by image id, and the revision of all annotations.

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
    return rows, gallery, f"{annotations_digest(file)}, CIRR {revision}"


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines."""
    load = partial(load_refined_cirr, root, allow_missing=True, check_counts=False)
    return [tree_of("refined-cirr/val", root, find_file(root, FILES), {"is_refined": bool}, load)]


def tree_of(name: str, root: Path, file: Path, fields: Mapping[str, Any], load: Callable[[], CIRBenchmark]) -> Tree:
    """Return what the doctor examines of a file that rewrites CIRR's captions; arguments are those of `rewrite`."""
    base = cirr_folder(root, None)
    rows, gallery, _ = rewrite(file, base, fields, check_counts=False)
    folders = [base / folder for folder in cirr.IMAGE_FOLDERS]
    return Tree(name, rows, gallery, folders, load, {"images": cirr.EXPECTED_COUNTS["val"][1]})


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
