"""Refined-FashionIQ: one rewritten caption for pairs of FashionIQ's validation split (CoLLM, CVPR 2025).

Annotations: <https://huggingface.co/datasets/chuonghm/Refined-FashionIQ>; images and galleries are FashionIQ's.
"""

from functools import partial
from pathlib import Path
from typing import Any

from ..digests import annotations_digest
from . import fashioniq
from .annotations import find_file, make_benchmark, read_records
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice
from .examination import Tree

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
        allow_missing: see `load_fashioniq`.
        check_counts: raise unless FashionIQ's split has its published numbers of queries and images.

    Returns:
        The benchmark: the file's pairs that FashionIQ has in this category. The caption is the first of a rewritten
        pair; FashionIQ's own two are joined as TransAgg does. Gallery and metrics as FashionIQ, reference kept.

    Raises:
        ValueError: if the category is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("category", category, fashioniq.CATEGORIES)
    root = as_path("root", root)
    rows, gallery, folders, revision = read_queries(root, category, images, check_counts, only_refined)
    protocol = Protocol(
        name="refined-fashioniq" + ("-only-refined" if only_refined else ""),
        gallery="the category's images that val lists",
        reference="kept",
        captions="rewritten" + (", queries with a rewritten one alone" if only_refined else ", or two joined"),
        metrics="fashioniq",
        revision=revision,
    )
    return make_benchmark(f"refined-fashioniq/val/{category}", rows, gallery, folders, protocol, allow_missing)


def read_queries(
    root: Path, category: str, images: str | Path | None, check_counts: bool, only_refined: bool = False
) -> tuple[list[dict[str, Any]], dict[str, list[str]], list[Path], str]:
    """Return queries, possible file names by ASIN, the folders of the images, and the revision of a category."""
    base = root.parent / "fashioniq" if images is None else as_path("images", images)
    own, gallery, revision = fashioniq.read_annotations(base, category, "val", "and", check_counts)
    names = [name.format(part) for part in (f"{category}.", "") for name in FILES]
    file = find_file(root, [f"{folder}{name}" for name in names for folder in ("", "data/")])
    fields = {"candidate": str, "target": str, "captions": list[str], "is_refined": bool}
    pairs = {(row["reference_id"], row["target_id"]) for row in own}
    rows = []
    for number, record in enumerate(read_records(file, fields)):
        captions, is_refined = record["captions"], record["is_refined"]
        if not captions or (not is_refined and len(captions) != 2):
            raise ValueError(f"{file}: row {number}: captions must be one rewritten, or two, not {captions}")
        if (record["candidate"], record["target"]) in pairs and (is_refined or not only_refined):
            caption = captions[0] if is_refined else fashioniq.compose_captions(captions)
            row = {"reference_id": record["candidate"], "caption": caption, "target_id": record["target"]}
            rows.append(row)
    if not rows:
        raise ValueError(f"{file}: no row is a pair of FashionIQ's {category} in {base}")
    folders = [base / folder for folder in fashioniq.IMAGE_FOLDERS]
    return rows, gallery, folders, f"{annotations_digest(file)}, FashionIQ {revision}"


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: the three categories."""
    trees = []
    for category in fashioniq.CATEGORIES:
        rows, gallery, folders, _ = read_queries(root, category, None, check_counts=False)
        load = partial(load_refined_fashioniq, root, category, allow_missing=True, check_counts=False)
        expected = {"images": fashioniq.EXPECTED_COUNTS["val"][category][1]}
        trees.append(Tree(f"refined-fashioniq/val/{category}", rows, gallery, folders, load, expected))
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
