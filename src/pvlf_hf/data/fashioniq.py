"""FashionIQ: 30,134 pairs of fashion products in three categories, with two relative captions for each pair.

Annotations: <https://github.com/XiaoxiaoGuo/fashion-iq>. The images are Amazon's; some are no longer online.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset, concatenate_datasets

from ..digests import annotations_digest
from .annotations import (
    check_counts_of,
    check_unique,
    find_file,
    make_benchmark,
    make_triplets,
    read_json,
    read_records,
)
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice, check_list
from .examination import Finding, Tree, first_of

CATEGORIES = ("dress", "shirt", "toptee")

SPLITS = ("train", "val", "test")

GALLERIES = ("original", "union")
"""Choices of gallery: `"original"` ranks the images that the split lists, as the field reports; `"union"` only those
that a query names as reference or target (the "VAL split"), which are fewer, so that numbers come out higher."""

CAPTION_STYLES = {
    "and": "the two joined as TransAgg does, 'First and second'",
    "and-reversed": "the two joined as TransAgg does, the second first",
    "both-mean": "the two joined in both orders, embeddings averaged",
    "and-reversed-as-written": "the two joined as Pic2Word does, 'second and first', punctuation and capitals kept",
    "first": "the first of the two",
    "separate": "each of the two by itself, embeddings averaged",
}
"""Ways to make a query's text of its two captions, with their descriptions. Those that average return lists. If one
caption of a pair is blank, `"first"` and `"separate"` use the other one alone."""

EXPECTED_COUNTS = {
    "train": {"dress": (5985, 11452), "shirt": (5988, 19036), "toptee": (6027, 16121)},
    "val": {"dress": (2017, 3817), "shirt": (2038, 6346), "toptee": (1961, 5373)},
    "test": {"dress": (2024, 3818), "shirt": (2038, 6346), "toptee": (2056, 5374)},
}
"""Queries and gallery images (`gallery="original"`) of every split."""

EXPECTED_UNION = {"dress": 2628, "shirt": 3089, "toptee": 2902}
"""Gallery images of the validation split with `gallery="union"`."""

_USUAL = ("val", "original", "and", "kept")
"""Default choices, which the name of a protocol leaves out."""

_ENDINGS = ("png", "jpg", "jpeg")

IMAGE_FOLDERS = ("images", ".")


def load_fashioniq(
    root: str | Path,
    category: str,
    split: str = "val",
    gallery: str = "original",
    captions: str = "and",
    reference: Literal["removed", "kept"] = "kept",
    allow_missing: bool = False,
    check_counts: bool = True,
) -> CIRBenchmark:
    """Load a split of one category for evaluation; results are averaged over the three.

    Args:
        root: has `captions/` (or `json/`), `image_splits/`, and the images in `images/`, in folders by category in
            there, or directly; PNG or JPEG, each as it is found.
        category: from `CATEGORIES`.
        split: from `SPLITS`; the targets of `"test"` are not published, so it has no `target_id`.
        gallery: from `GALLERIES`.
        captions: from `CAPTION_STYLES`.
        reference: whether a query's reference is `"kept"` in its ranking, as in most papers, or `"removed"` (CoVR).
        allow_missing: leave out images without a file and the queries that name them, with a warning and a note in
            the protocol, instead of raising.
        check_counts: raise unless the split has its published numbers of queries and images.

    Returns:
        The benchmark; ids are the products' ASINs.

    Raises:
        ValueError: if a choice is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("gallery", gallery, GALLERIES)
    check_choice("captions", captions, tuple(CAPTION_STYLES))
    check_choice("reference", reference, ("kept", "removed"))
    if gallery == "union" and split == "test":
        raise ValueError("gallery='union' is made of references and targets, and test has no targets; use 'original'")
    root = as_path("root", root)
    rows, images, revision = read_annotations(root, category, split, captions, check_counts)
    if gallery == "union":
        named = {row[column] for row in rows for column in ("reference_id", "target_id")}
        images = {asin: names for asin, names in images.items() if asin in named}
        if check_counts and split == "val":
            check_counts_of(f"union of fashioniq/val/{category}", images=(len(images), EXPECTED_UNION[category]))
    choices = [choice for choice in (split, gallery, captions, reference) if choice not in _USUAL]
    protocol = Protocol(
        name="-".join(["fashioniq", *choices]),
        gallery=f"the category's images that {split} " + ("lists" if gallery == "original" else "names in queries"),
        reference=reference,
        captions=f"{captions}: {CAPTION_STYLES[captions]}",
        metrics="fashioniq",
        revision=revision,
    )
    folders = [root / folder for folder in IMAGE_FOLDERS]
    return make_benchmark(f"fashioniq/{split}/{category}", rows, images, folders, protocol, allow_missing)


def load_fashioniq_train(
    root: str | Path,
    categories: Sequence[str] = CATEGORIES,
    captions: str = "and",
    allow_missing: bool = False,
    check_counts: bool = True,
) -> Dataset:
    """Load the training triplets (the paper's zero-shot models do not use them).

    Args:
        root: see [`load_fashioniq`].
        categories: from `CATEGORIES`, one after the other.
        captions: from `CAPTION_STYLES`, one that makes a single text.
        allow_missing: leave out triplets whose images are absent, with a warning, instead of raising.
        check_counts: see [`load_fashioniq`].

    Returns:
        Columns `reference`, `target` (`datasets.Image`, decoded lazily), `reference_id`, `target_id` (ASINs, equal
        where the target is the same product), `caption`.

    Raises:
        ValueError: as [`load_fashioniq`], or if the captions are not a single text.
    """
    check_choice("captions of training", captions, ("and", "and-reversed", "and-reversed-as-written", "first"))
    check_list("categories", categories)
    root = as_path("root", root)
    folders = [root / folder for folder in IMAGE_FOLDERS]
    parts = []
    for category in categories:
        rows, images, _ = read_annotations(root, category, "train", captions, check_counts)
        parts.append(make_triplets(f"fashioniq/train/{category}", rows, images, folders, allow_missing))
    return concatenate_datasets(parts)


def compose_captions(captions: Sequence[str], style: str = "and") -> str | list[str]:
    """Make the text of a query of its two captions, by one of `CAPTION_STYLES`; one caption may be blank."""
    first, second = captions
    forward, backward = _join(first, second), _join(second, first)
    with_text = [caption for caption in captions if has_text(caption)]
    texts: dict[str, str | list[str]] = {
        "and": forward,
        "and-reversed": backward,
        "and-reversed-as-written": f"{second} and {first}",
        "both-mean": [forward, backward],
        "first": with_text[0],
        "separate": with_text,
    }
    return texts[style]


def has_text(caption: str) -> bool:
    """Return whether a caption holds more than punctuation."""
    return bool(caption.strip(".?, "))


def _join(first: str, second: str) -> str:
    """Join two captions as TransAgg and CLIP4Cir do.

    `capitalize` also lower-cases all but the first letter of the first caption.
    """
    return f"{first.strip('.?, ').capitalize()} and {second.strip('.?, ')}"


def read_annotations(
    root: Path, category: str, split: str, style: str, check_counts: bool
) -> tuple[list[dict[str, Any]], dict[str, list[str]], str]:
    """Return queries, possible file names by ASIN, and the revision of a split."""
    check_choice("category", category, CATEGORIES)
    check_choice("split", split, SPLITS)
    captions = find_file(root, [f"{folder}/cap.{category}.{split}.json" for folder in ("captions", "json")])
    listing = find_file(root, [f"image_splits/split.{category}.{split}.json"])
    target = {} if split == "test" else {"target": str}
    records = read_records(captions, {"candidate": str, "captions": list, **target})
    rows = []
    for number, record in enumerate(records):
        pair = record["captions"]
        if len(pair) != 2 or not all(isinstance(c, str) for c in pair) or not any(map(has_text, pair)):
            raise ValueError(f"{captions}: row {number}: captions must be two, one at least with text, not {pair}")
        row = {"reference_id": record["candidate"], "caption": compose_captions(pair, style)}
        rows.append({**row, "target_id": record["target"]} if target else row)
    asins = read_json(listing, list[str])
    check_unique(listing, "images", asins)
    if check_counts:
        queries, images = EXPECTED_COUNTS[split][category]
        check_counts_of(f"fashioniq/{split}/{category}", queries=(len(rows), queries), images=(len(asins), images))
    stems = {asin: (asin, f"{category}/{asin}") for asin in asins}
    names = {asin: [f"{stem}.{ending}" for stem in stems[asin] for ending in _ENDINGS] for asin in asins}
    return rows, names, annotations_digest(captions, listing)


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: the three categories."""
    return [_read_tree(root, category, split) for category in CATEGORIES]


def _read_tree(root: Path, category: str, split: str) -> Tree:
    rows, images, _ = read_annotations(root, category, split, "and", check_counts=False)
    texts, _, _ = read_annotations(root, category, split, "separate", check_counts=False)
    name = f"fashioniq/{split}/{category}"
    blank = [number for number, row in enumerate(texts) if len(row["caption"]) < 2]
    finding = Finding(
        *("warning", "blank caption", name, f"{len(blank)} rows have one caption and not two"),
        "their text says half of what others do, and begins or ends with 'and'",
        first_of(f"row {number}" for number in blank),
    )
    return Tree(
        name,
        rows,
        images,
        [root / folder for folder in IMAGE_FOLDERS],
        lambda: load_fashioniq(root, category, split, allow_missing=True, check_counts=False),
        dict(zip(("queries", "images"), EXPECTED_COUNTS[split][category], strict=True)),
        findings=(finding,) if blank else (),
    )


def _protocol(summary: str, **choices: Any) -> NamedProtocol:
    def load(root: Path, **settings: Any) -> list[CIRBenchmark]:
        return [load_fashioniq(root, category, **choices, **settings) for category in CATEGORIES]

    return NamedProtocol(summary, "fashioniq", load)


PROTOCOLS = {
    "fashioniq": _protocol("FashionIQ validation as TransAgg and most papers"),
    "fashioniq-union": _protocol("... gallery of the queries' images alone (VAL split)", gallery="union"),
    "fashioniq-removed": _protocol("... reference removed, as CoVR", reference="removed"),
    "fashioniq-both-mean": _protocol("... captions joined in both orders, averaged, as SEARLE", captions="both-mean"),
    "fashioniq-and-reversed": _protocol("... second caption first", captions="and-reversed"),
    "fashioniq-and-reversed-as-written": _protocol(
        "... second caption first, nothing stripped, as Pic2Word and Context-I2W", captions="and-reversed-as-written"
    ),
    "fashioniq-first": _protocol("... first caption alone", captions="first"),
    "fashioniq-separate": _protocol("... each caption by itself, averaged", captions="separate"),
}
