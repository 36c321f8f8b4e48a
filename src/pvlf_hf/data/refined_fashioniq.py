"""Refined-FashionIQ: one rewritten caption for pairs of FashionIQ's validation split (CoLLM, CVPR 2025).

FashionIQ's split has 2,017, 2,038 and 1,961 queries of dress, shirt and toptee. Files that have fewer of them are
loaded with a warning, because their authors' number of rows could not be read. The keys `candidate`, `target`,
`captions` and `is_refined` are those that public code reads from this data set. Names of files, and that `captions` is
a list, are not verified: its page could not be read.

Annotations: <https://huggingface.co/datasets/chuonghm/Refined-FashionIQ>; images and galleries are FashionIQ's.
"""

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..digests import annotations_digest
from . import fashioniq
from .annotations import coverage_problem, find_file, make_benchmark, read_records
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice
from .examination import Finding, Tree, first_of, partly_rewritten

logger = logging.getLogger(__name__)

HUB_ID = "chuonghm/Refined-FashionIQ"

SPLITS = ("val",)

FILES = ("refined_fiq.{}val.json", "refined_fashioniq.{}val.json")


def load_refined_fashioniq(
    root: str | Path,
    category: str,
    images: str | Path | None = None,
    only_refined: bool = False,
    allow_missing: bool = False,
    check_counts: bool = True,
) -> CIRBenchmark:
    """Load the validation split of a category; results are averaged over the three.

    Args:
        root: has `refined_fiq.<category>.val.json` or `refined_fiq.val.json` for all categories (also
            `refined_fashioniq...`, and both in `data/`).
        category: `"dress"`, `"shirt"` or `"toptee"`.
        images: FashionIQ's folder, see [`~pvlf_hf.data.fashioniq.load_fashioniq`]; by default `fashioniq/` beside
            `root`.
        only_refined: leave out the queries whose captions are FashionIQ's own (`is_refined` is false).
        allow_missing: see `load_fashioniq`; leave out rows that are no pair of FashionIQ, too, with a warning and a
            note in the protocol, instead of raising.
        check_counts: raise unless FashionIQ's split has its published numbers of queries and images, and warn if the
            file has fewer queries than that.

    Returns:
        The benchmark: the file's pairs that FashionIQ has in this category, a pair of several categories in each. The
        caption is the first of a rewritten pair; FashionIQ's own two are joined as TransAgg does. Gallery and metrics
        as FashionIQ, reference kept.

    Raises:
        ValueError: if the category is unknown, a file is absent or not as published, a row of a category's file is no
            pair of that category, a row of the file for all is none of any, or images are absent.
    """
    check_choice("category", category, fashioniq.CATEGORIES)
    root = as_path("root", root)
    name = f"refined-fashioniq/val/{category}"
    found = read_queries(root, category, images, check_counts, only_refined)
    if found.unknown and not allow_missing:
        raise ValueError(
            f"{name}: {_unknown_problem(found)}, first: {', '.join(first_of(found.unknown))}. Do FashionIQ's files "
            "belong to it? Pass allow_missing=True to leave these rows out."
        )
    protocol = Protocol(
        name="refined-fashioniq" + ("-only-refined" if only_refined else ""),
        gallery="the category's images that val lists",
        reference="kept",
        captions="rewritten" + (", queries with a rewritten one alone" if only_refined else ", or two joined"),
        metrics="fashioniq",
        revision=found.revision,
    )
    benchmark = make_benchmark(name, found.rows, found.gallery, found.folders, protocol, allow_missing)
    if not found.unknown:
        return benchmark
    logger.warning("%s: %s, and are left out: %s", name, _unknown_problem(found), ", ".join(first_of(found.unknown)))
    missing = f"{benchmark.protocol.missing}; {len(found.unknown)} rows that are no pair of FashionIQ"
    return replace(benchmark, protocol=replace(benchmark.protocol, missing=missing))


class Queries(NamedTuple):
    """Queries of a category.

    Args:
        file: file of the rewritten captions.
        rows: columns of the queries but the images.
        gallery: possible file names by ASIN.
        folders: folders that may hold the images.
        revision: digest of all annotations.
        unknown: rows of the file that are no pair of FashionIQ, by their number, candidate and target.
        problem: that the file has a part of the split; None if it has all.
    """

    file: Path
    rows: list[dict[str, Any]]
    gallery: dict[str, list[str]]
    folders: list[Path]
    revision: str
    unknown: list[str]
    problem: str | None


def _unknown_problem(found: Queries) -> str:
    return f"{len(found.unknown)} rows of {found.file} are no pair of FashionIQ's validation split"


def read_queries(
    root: Path, category: str, images: str | Path | None, check_counts: bool, only_refined: bool = False
) -> Queries:
    """Return the queries of a category; a file for all categories is compared with the pairs of all."""
    base = root.parent / "fashioniq" if images is None else as_path("images", images)
    own, gallery, revision = fashioniq.read_annotations(base, category, "val", "and", check_counts)
    names = [name.format(part) for part in (f"{category}.", "") for name in FILES]
    file = find_file(root, [f"{folder}{name}" for name in names for folder in ("", "data/")])
    fields = {"candidate": str, "target": str, "captions": list[str], "is_refined": bool}
    pairs = _pairs(own)
    known, named = set(pairs), set()
    rows, unknown = [], []
    if not file.name.endswith(f".{category}.val.json"):
        for other in fashioniq.CATEGORIES:
            known |= _pairs(fashioniq.read_annotations(base, other, "val", "and", check_counts)[0])
    for number, record in enumerate(read_records(file, fields)):
        captions, is_refined = record["captions"], record["is_refined"]
        if not captions or (not is_refined and len(captions) != 2):
            raise ValueError(f"{file}: row {number}: captions must be one rewritten, or two, not {captions}")
        pair = record["candidate"], record["target"]
        if pair not in known:
            unknown.append(f"row {number} ({', '.join(pair)})")
        if pair in pairs:
            named.add(pair)
        if pair in pairs and (is_refined or not only_refined):
            caption = captions[0] if is_refined else fashioniq.compose_captions(captions)
            rows.append({"reference_id": pair[0], "caption": caption, "target_id": pair[1]})
    if not rows:
        raise ValueError(f"{file}: no row is a pair of FashionIQ's {category} in {base}")
    problem = coverage_problem(file, len(named), f"FashionIQ's {category} (by different pairs)", len(pairs))
    if problem and check_counts:
        logger.warning("%s", problem)
    folders = [base / folder for folder in fashioniq.IMAGE_FOLDERS]
    revision = f"{annotations_digest(file)}, FashionIQ {revision}"
    return Queries(file, rows, gallery, folders, revision, unknown, problem)


def _pairs(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(row["reference_id"], row["target_id"]) for row in rows}


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: the three categories."""
    trees = []
    for category in fashioniq.CATEGORIES:
        found = read_queries(root, category, None, check_counts=False)
        load = partial(load_refined_fashioniq, root, category, allow_missing=True, check_counts=False)
        expected = {"images": fashioniq.EXPECTED_COUNTS["val"][category][1]}
        name = f"refined-fashioniq/val/{category}"
        unknown = Finding(
            *("error", "unlisted", name, _unknown_problem(found), "loading stops there, unless they are left out"),
            first_of(found.unknown),
        )
        findings, partial_file = (unknown,) if found.unknown else (), partly_rewritten(name, found.problem)
        rows, gallery, folders = found.rows, found.gallery, found.folders
        trees.append(
            Tree(name, rows, gallery, folders, load, expected, findings=findings, count_findings=partial_file)
        )
    return trees


def _load(root: Path, **settings: Any) -> list[CIRBenchmark]:
    return [load_refined_fashioniq(root, category, **settings) for category in fashioniq.CATEGORIES]


PROTOCOLS = {
    "refined-fashioniq": NamedProtocol(
        "Refined-FashionIQ: FashionIQ validation, captions rewritten", "refined-fashioniq", _load
    ),
    "refined-fashioniq-only-refined": NamedProtocol(
        "... its queries with a rewritten caption alone", "refined-fashioniq", partial(_load, only_refined=True)
    ),
}
