"""CIRCO: queries on the 123,403 unlabelled images of COCO 2017, with all their positives marked.

Annotations: <https://github.com/miccunifi/CIRCO>; images and their list: "unlabeled2017" of COCO.
"""

from pathlib import Path
from typing import Any, Literal

from ..digests import annotations_digest
from .annotations import (
    check_counts_of,
    check_records,
    check_unique,
    find_file,
    make_benchmark,
    numbered,
    read_json,
    read_records,
)
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice
from .examination import Tree

EXPECTED_COUNTS = {"val": 220, "test": 800}
"""Queries of every split."""

EXPECTED_IMAGES = 123403
"""Images of the gallery, which is the same for both splits."""

SPLITS = tuple(EXPECTED_COUNTS)

IMAGE_LISTS = tuple(
    f"{folder}image_info_unlabeled2017.json"
    for folder in ("COCO2017_unlabeled/annotations/", "COCO2017_unlabeled/", "annotations/", "")
)

IMAGE_FOLDERS = ("COCO2017_unlabeled/unlabeled2017", "unlabeled2017", "COCO2017_unlabeled", "images", ".")


def load_circo(
    root: str | Path,
    split: str = "val",
    reference: Literal["removed", "kept"] = "kept",
    allow_missing: bool = False,
    check_counts: bool = True,
    with_images: bool = True,
) -> CIRBenchmark:
    """Load a split for evaluation.

    Args:
        root: has `annotations/<split>.json` (also directly) and `COCO2017_unlabeled/` with the images in
            `unlabeled2017/` and their list, `annotations/image_info_unlabeled2017.json` (both also a level higher).
        split: `"val"` or `"test"`; a server keeps the targets of `"test"`, so it has no `target_id`.
        reference: whether a query's reference is `"kept"` in its ranking, as on the official server, or `"removed"`.
        allow_missing: leave out images without a file and the queries that name them as reference or as one of the
            positives, with a warning and a note in the protocol, instead of raising.
        check_counts: raise unless split and gallery have their published numbers of queries and images.
        with_images: look for the images; without, image columns hold None, and rankings of others can be scored.

    Returns:
        The benchmark. Ids are COCO's numbers in digits (`"271520"`). `caption` is the relative caption alone, without
        the `shared_concept`; `target_id` the first positive, `target_ids` all (`gt_img_ids`); `query_id` the
        annotation's `id`; `semantic_aspects`, a list of strings, where the file has them.

    Raises:
        ValueError: if a choice is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("split", split, SPLITS)
    check_choice("reference", reference, ("kept", "removed"))
    root = as_path("root", root)
    annotations = find_file(root, [f"annotations/{split}.json", f"{split}.json"])
    listing = find_file(root, IMAGE_LISTS)
    rows, images = read_queries(annotations, has_targets=split == "val"), read_images(listing)
    if check_counts:
        check_counts_of(
            f"circo/{split}", queries=(len(rows), EXPECTED_COUNTS[split]), images=(len(images), EXPECTED_IMAGES)
        )
    protocol = Protocol(
        name=f"circo-{split}" + ("-removed" if reference == "removed" else ""),
        gallery="COCO unlabeled2017",
        reference=reference,
        captions="relative caption alone",
        metrics="circo",
        revision=annotations_digest(annotations, listing),
    )
    folders = [root / folder for folder in IMAGE_FOLDERS]
    return make_benchmark(f"circo/{split}", rows, images, folders, protocol, allow_missing, with_images=with_images)


def read_queries(file: Path, has_targets: bool) -> list[dict[str, Any]]:
    """Return the columns of the queries except the images, checked row by row."""
    fields: dict[str, Any] = {"id": int, "reference_img_id": int, "relative_caption": str}
    if has_targets:
        fields |= {"target_img_id": int, "gt_img_ids": list[int]}
    records = read_records(file, fields)
    check_unique(file, "id", (record["id"] for record in records))
    rows: list[dict[str, Any]] = [
        {
            "query_id": str(record["id"]),
            "reference_id": str(record["reference_img_id"]),
            "caption": record["relative_caption"],
        }
        for record in records
    ]
    if has_targets:
        for row, record in zip(rows, records, strict=True):
            row["target_id"] = str(record["target_img_id"])
            row["target_ids"] = [str(i) for i in record["gt_img_ids"]]
    if "semantic_aspects" in records[0]:
        check_records(file, numbered(records), {"semantic_aspects": list[str]})
        for row, record in zip(rows, records, strict=True):
            row["semantic_aspects"] = record["semantic_aspects"]
    return rows


def read_images(file: Path) -> dict[str, list[str]]:
    """Return file names by image id."""
    content = read_json(file, dict)
    check_records(file, {"the object": content}, {"images": list})
    check_records(file, numbered(content["images"], "image"), {"id": int, "file_name": str})
    check_unique(file, "images", (image["id"] for image in content["images"]))
    return {str(image["id"]): [image["file_name"]] for image in content["images"]}


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: a split and its gallery of 123,403 images."""
    file = find_file(root, [f"annotations/{split}.json", f"{split}.json"])
    return [
        Tree(
            f"circo/{split}",
            read_queries(file, has_targets=split == "val"),
            read_images(find_file(root, IMAGE_LISTS)),
            [root / folder for folder in IMAGE_FOLDERS],
            lambda: load_circo(root, split, allow_missing=True, check_counts=False),
            {"queries": EXPECTED_COUNTS[split], "images": EXPECTED_IMAGES},
        )
    ]


def _protocol(summary: str, **choices: Any) -> NamedProtocol:
    return NamedProtocol(summary, "circo", lambda root, **settings: [load_circo(root, **choices, **settings)])


PROTOCOLS = {
    "circo-val": _protocol("CIRCO validation, reference kept, as its server"),
    "circo-val-removed": _protocol("... reference removed, as CoVR and SEIZE", reference="removed"),
    "circo-test": _protocol("CIRCO test, for its server", split="test"),
}
