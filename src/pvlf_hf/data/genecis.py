"""GeneCIS: focus on or change an object or an attribute, each query with its own few candidates (CVPR 2023).

Annotations, CC-BY-NC-4.0: <https://github.com/facebookresearch/genecis>; images: COCO val2017 and Visual Genome 1.2.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import PIL.Image
from datasets import Dataset, Image, concatenate_datasets

from ..digests import annotations_digest, sequence_digest
from ..models.image_processing_pvlf import open_image
from .annotations import check_counts_of, check_records, find_file, make_benchmark, read_records
from .benchmark import CIRBenchmark, NamedProtocol, Protocol
from .checks import as_path, check_choice
from .examination import Tree

SPLITS = ("val",)

EXPECTED_COUNTS = {"focus_attribute": 2000, "change_attribute": 2112, "focus_object": 1960, "change_object": 1960}
"""Queries of every task; those of the attribute tasks are the paper's."""

TASKS = tuple(EXPECTED_COUNTS)

FOLDERS = ("", "genecis/", "annotations/", "caption/")

IMAGE_FOLDERS = {"object": (".", "coco2017", "images"), "attribute": (".", "Visual_Genome", "images")}

SUBFOLDERS = {"object": ("val2017/", ""), "attribute": ("VG_All/", "VG_100K/", "VG_100K_2/", "")}
"""Folders of COCO's and of Visual Genome's images within `IMAGE_FOLDERS`."""

DILATION = 0.7
"""Share of its width and height by which a box is widened on each side before an image is cropped."""


def load_genecis(root: str | Path, task: str, allow_missing: bool = False, check_counts: bool = True) -> CIRBenchmark:
    """Load a task; results are averaged over the four.

    Args:
        root: has `<task>.json` (also in `genecis/`, `annotations/` or `caption/`), and the images: of the object tasks
            COCO's in `val2017/`, of the attribute tasks Visual Genome's in `VG_100K/` and `VG_100K_2/`, or all in
            `VG_All/` (also one level deeper, in `coco2017/` and `Visual_Genome/`).
        task: from `TASKS`.
        allow_missing: leave out images without a file and the queries that name them as reference or as target, with
            a warning and a note in the protocol, instead of raising.
        check_counts: raise unless the task has its published number of queries.

    Returns:
        The benchmark. Every query is a group: the target, then its other candidates, which are ranked alone. Images of
        the attribute tasks are cropped to their box as the official code does, and padded to a black square. A
        candidate that is given twice is ranked twice.

    Raises:
        ValueError: if the task is unknown, a file is absent or not as published, or images are absent.
    """
    check_choice("task", task, TASKS)
    root = as_path("root", root)
    found = read_annotations(root, task)
    if check_counts:
        check_counts_of(f"genecis/{task}", queries=(len(found.rows), EXPECTED_COUNTS[task]))
    protocol = Protocol(
        name="genecis",
        gallery="the query's own candidates",
        reference="outside",
        captions="the condition alone",
        metrics="genecis",
        revision=annotations_digest(found.file),
    )
    benchmark = make_benchmark(
        f"genecis/{task}",
        *(found.rows, found.images, image_folders(root, task), protocol, allow_missing),
        found.references,
        found.groups,
    )
    if not found.boxes:
        return benchmark
    queries, gallery = (
        crop(dataset, column, [found.boxes[i] for i in dataset[ids][:]])
        for dataset, column, ids in (
            (benchmark.queries, "reference", "reference_id"),
            (benchmark.gallery, "image", "image_id"),
        )
    )
    return replace(benchmark, queries=queries, gallery=gallery)


class Annotations(NamedTuple):
    """Content of the file of a task.

    Args:
        file: the file.
        rows: columns of the queries but the images.
        references: possible file names by id of a reference.
        images: possible file names by id of a candidate.
        groups: by id of a candidate, the queries that it is one of.
        boxes: by id, left, top, width and height of the part of the image that counts; empty for object tasks.
    """

    file: Path
    rows: list[dict[str, Any]]
    references: dict[str, list[str]]
    images: dict[str, list[str]]
    groups: dict[str, list[str]]
    boxes: dict[str, list[float]]


def read_annotations(root: Path, task: str) -> Annotations:
    """Read the queries of a task."""
    file = find_file(root, [f"{folder}{task}.json" for folder in FOLDERS])
    records = read_records(file, {"condition": str, "reference": dict, "target": dict, "gallery": list})
    found = Annotations(file, [], {}, {}, {}, {})
    sizes = {len(record["gallery"]) for record in records}
    if len(sizes) > 1:
        raise ValueError(f"{file}: galleries of {sorted(sizes)} images, but those of a task have one size")
    for number, record in enumerate(records):
        candidates = [record["target"], *record["gallery"]]
        images = {f"image {n}": image for n, image in enumerate([record["reference"], *candidates])}
        check_records(file, {f"row {number}, {where}": image for where, image in images.items()}, _fields(task))
        reference = _image_id(record["reference"], found.boxes)
        found.references[reference] = _names(record["reference"])
        ids: list[str] = []
        for image in candidates:
            image_id = _image_id(image, found.boxes)
            again = f"{image_id} again" if image_id in ids else image_id
            while again in ids:
                again += " again"
            found.boxes.update({again: found.boxes[image_id]} if image_id in found.boxes else {})
            found.images[again] = _names(image)
            found.groups.setdefault(again, []).append(str(number))
            ids.append(again)
        row = {"query_id": str(number), "reference_id": reference, "caption": record["condition"]}
        found.rows.append({**row, "target_id": ids[0], "group_id": str(number)})
    return found


def _fields(task: str) -> dict[str, Any]:
    if task.endswith("object"):
        return {"val_image_id": int}
    return {"image_id": int | str, "instance_bbox": list}


def _image_id(image: Mapping[str, Any], boxes: dict[str, list[float]]) -> str:
    """Return the id of an image, with its box where it has one, which is added to `boxes`."""
    if "val_image_id" in image:
        return str(image["val_image_id"])
    box = image["instance_bbox"]
    if len(box) != 4 or not all(isinstance(side, int | float) for side in box) or min(box[2:]) <= 0:
        raise ValueError(
            f"instance_bbox of image {image['image_id']} is {box!r:.80}, expected left, top, width, height"
        )
    image_id = f"{image['image_id']} {' '.join(map(str, box))}"
    boxes[image_id] = box
    return image_id


def _names(image: Mapping[str, Any]) -> list[str]:
    if "val_image_id" in image:
        return [f"{folder}{image['val_image_id']:012d}.jpg" for folder in SUBFOLDERS["object"]]
    return [f"{folder}{image['image_id']}.jpg" for folder in SUBFOLDERS["attribute"]]


def image_folders(root: Path, task: str) -> list[Path]:
    """Return the folders that may hold a task's images."""
    return [root / folder for folder in IMAGE_FOLDERS[task.partition("_")[2]]]


def crop(dataset: Dataset, column: str, boxes: Sequence[Sequence[float]]) -> Dataset:
    """Crop the images of a column, each to its box (left, top, width, height), widened and padded to a square.

    The crops are kept in the cache of `datasets`, under a digest of the images' paths and dates, and of the boxes.
    """
    plain = dataset.select_columns(column).cast_column(column, Image(decode=False))
    paths = [cell["path"] for cell in plain[column][:]]
    parts = [(path, Path(path).stat().st_mtime_ns, list(box)) for path, box in zip(paths, boxes, strict=True)]
    file = Path(datasets.config.HF_DATASETS_CACHE, "pvlf_hf-genecis", f"{sequence_digest(json.dumps(parts))}.arrow")
    file.parent.mkdir(parents=True, exist_ok=True)
    cut = partial(_crop_row, column=column, boxes=list(map(list, boxes)))
    crops = plain.map(cut, with_indices=True, cache_file_name=str(file)).cast_column(column, Image())
    return concatenate_datasets([crops, dataset.remove_columns(column)], axis=1)


def _crop_row(row: dict[str, Any], number: int, column: str, boxes: list[list[float]]) -> dict[str, Any]:
    with open_image(row[column]["path"]) as image:
        left, top, width, height = boxes[number]
        left, top = max(0, left - DILATION * width), max(0, top - DILATION * height)
        right, bottom = left + (1 + DILATION) * width, top + (1 + DILATION) * height
        part = image.convert("RGB").crop((left, top, min(image.width, right), min(image.height, bottom)))
    square = PIL.Image.new("RGB", (max(part.size),) * 2)
    square.paste(part, ((square.width - part.width) // 2, (square.height - part.height) // 2))
    content = BytesIO()
    square.save(content, "PNG")
    return {column: {"bytes": content.getvalue(), "path": None}}


def read_trees(root: Path, split: str) -> list[Tree]:
    """Read what the doctor examines: the four tasks, with whole images in the place of crops."""
    trees = []
    for task in TASKS:
        found = read_annotations(root, task)
        load = partial(load_genecis, root, task, allow_missing=True, check_counts=False)
        images = {_whole(i): names for i, names in {**found.references, **found.images}.items()}
        rows = [{**row, **{c: _whole(row[c]) for c in ("reference_id", "target_id")}} for row in found.rows]
        expected = {"queries": EXPECTED_COUNTS[task]}
        trees.append(Tree(f"genecis/{task}", rows, images, image_folders(root, task), load, expected))
    return trees


def _whole(image_id: str) -> str:
    """Return the id of the whole image: without a box, and "again"."""
    return image_id.partition(" ")[0]


PROTOCOLS = {
    "genecis": NamedProtocol(
        "GeneCIS, its four tasks, each query with its own candidates",
        "genecis",
        lambda root, **settings: [load_genecis(root, task, **settings) for task in TASKS],
    ),
}
