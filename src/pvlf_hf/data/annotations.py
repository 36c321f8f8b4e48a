"""Reads published data sets: their JSON annotations, and their images in any of the usual folder layouts."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import pyarrow as pa
from datasets import Dataset, Image

from .benchmark import LIST_COLUMNS, CIRBenchmark, Protocol
from .image_files import escapes_folder
from .tables import object_of

logger = logging.getLogger(__name__)


def find_file(root: Path, paths: Sequence[str]) -> Path:
    """Return the first of the paths below `root` that is a file; raise a `ValueError` that lists them if none is."""
    tried = [root / path for path in paths]
    for file in tried:
        if file.is_file():
            return file
    raise ValueError(f"{tried[0].name} is not under {root}; looked for {[str(file) for file in tried]}")


def read_json(file: Path, expected: type | Any) -> Any:
    """Read JSON (UTF-8) that must be of a type, such as `dict` or `list[str]`.

    Raises:
        ValueError: names the file, and the position where it is not JSON, or a key that is given twice.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=object_of)
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error}); download it again") from error
    except json.JSONDecodeError as error:
        near = error.doc[max(error.pos - 30, 0) : error.pos + 30]
        raise ValueError(f"{file}: not JSON, or cut off: {error}, near {near!r}; download it again") from error
    except (ValueError, RecursionError) as error:  # a repeated key, a number or nesting beyond the parser's limits
        raise ValueError(f"{file}: {error}") from error
    if not _fits(content, expected):
        raise ValueError(f"{file}: holds a {type(content).__name__}, expected {_describe(expected)}")
    return content


def read_records(file: Path, fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read a JSON list of objects, see [`check_records`]."""
    records = read_json(file, list)
    check_records(file, numbered(records), fields)
    return records


def numbered(records: Sequence[Any], what: str = "row") -> dict[str, Any]:
    """Return objects by their names in errors: `"row 0"`, `"row 1"`."""
    return {f"{what} {number}": record for number, record in enumerate(records)}


def check_records(file: Path, records: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """Check objects read from a file.

    Args:
        file: named in errors.
        records: the objects by their names in errors, such as `"row 3"`.
        fields: the keys they must have and the types of their values, such as `str` (not blank) or `list[int]`.

    Raises:
        ValueError: names file, row and key.
    """
    if not records:
        raise ValueError(f"{file}: has no rows")
    for where, record in records.items():
        if not isinstance(record, dict):
            raise ValueError(f"{file}: {where} is {record!r:.80}, expected an object with {list(fields)}")
        for key, expected in fields.items():
            if key not in record:
                raise ValueError(f"{file}: {where} has no {key!r}; it has {list(record)}")
            if not _fits(record[key], expected):
                raise ValueError(f"{file}: {where}: {key} is {record[key]!r:.80}, expected {_describe(expected)}")


def _fits(value: object, expected: Any) -> bool:
    if get_origin(expected) is list:
        return isinstance(value, list) and all(_fits(item, get_args(expected)[0]) for item in value)
    if isinstance(value, bool):  # an int to Python, but not to JSON
        return expected is bool
    return isinstance(value, expected) and (not isinstance(value, str) or bool(value.strip()))


def _describe(expected: Any) -> str:
    return (
        "text that is not blank"
        if expected is str
        else expected.__name__
        if isinstance(expected, type)
        else str(expected)
    )


def check_unique(file: Path, what: str, ids: Iterable[Any]) -> None:
    """Raise a `ValueError` that names the first ids that repeat."""
    if repeated := [i for i, count in Counter(ids).items() if count > 1]:
        raise ValueError(f"{file}: {len(repeated)} {what} are given more than once, first: {repeated[:3]}")


def check_counts_of(name: str, **actual_and_expected: tuple[int, int]) -> None:
    """Raise a `ValueError` unless actual and expected counts, such as `queries=(220, 220)`, are equal."""
    for what, (actual, expected) in actual_and_expected.items():
        if actual != expected:
            raise ValueError(
                f"{name}: {actual} {what}, but the published annotations have {expected}. "
                "Pass check_counts=False if the data is meant to be partial."
            )


def coverage_problem(file: Path, named: int, split: str, queries: int) -> str | None:
    """Return what is wrong with a file that rewrites the captions of a split, if it does not have every query.

    Its authors publish no number of rows that could be checked.

    Args:
        file: the file.
        named: queries of the split that it has.
        split: name of the split.
        queries: queries of the split.
    """
    if named == queries:
        return None
    return (
        f"{file} has {named} of the {queries} queries of {split}. How many the published file has is not verified; "
        "see that it was downloaded whole"
    )


def make_benchmark(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    gallery: Mapping[str, Sequence[str]],
    folders: Sequence[Path],
    protocol: Protocol,
    allow_missing: bool,
    outside: Mapping[str, Sequence[str]] | None = None,
    groups: Mapping[str, Sequence[str]] | None = None,
    with_images: bool = True,
) -> CIRBenchmark:
    """Join annotated queries and the image files of a gallery.

    Args:
        name: name of the benchmark.
        rows: the columns of the queries except `reference` and `reference_2`.
        gallery: by image id, the file names it may have, relative to one of the folders.
        folders: folders that may hold the images; the one that has most of them is used.
        protocol: the benchmark's protocol; `missing` is filled in here.
        allow_missing: leave out images without a file, and the queries that name one anywhere: as reference, as a
            target or as a member of the subset. Negatives without a file are taken off their lists.
        outside: reference images that are not in the gallery, as `gallery`.
        groups: by image id, the groups that it is ranked in; where only some images are in a gallery.
        with_images: look for the files; without, image columns hold None, and rankings can be scored but not made.

    Raises:
        ValueError: if a query names an image that is not in the gallery, none of the images is found, or some are
            not and `allow_missing` is False.
    """
    listed = {**(outside or {}), **gallery}
    _check_listed(name, rows, listed)
    kept: Sequence[Mapping[str, Any]] = rows
    paths: Mapping[str, str | None] = dict.fromkeys(listed)
    if with_images:
        kept, paths = _with_files(name, rows, listed, folders, allow_missing)
    images = {i: paths[i] for i in gallery if i in paths}
    if len(images) < len(gallery) or len(kept) < len(rows):
        missing = f"{len(gallery) - len(images)} gallery images, {len(rows) - len(kept)} queries"
        logger.warning("%s: left out because files are missing: %s", name, missing)
        protocol = replace(protocol, missing=missing)
    columns = _columns(kept)
    if "negative_ids" in columns:
        columns["negative_ids"] = [[i for i in ids if i in images] for ids in columns["negative_ids"]]
    references: dict[str, list[Any]] = {"reference": [paths[i] for i in columns["reference_id"]]}
    if "reference_2_id" in columns:
        references["reference_2"] = [None if i is None else paths[i] for i in columns["reference_2_id"]]
    cells: dict[str, list[Any]] = {"image": list(images.values()), "image_id": list(images)}
    if groups is not None:
        cells["group_ids"] = [list(groups[i]) for i in images]
    return CIRBenchmark(name, _dataset({**references, **columns}, *references), _dataset(cells, "image"), protocol)


def make_triplets(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[str, Sequence[str]],
    folders: Sequence[Path],
    allow_missing: bool,
) -> Dataset:
    """Join annotated triplets and their image files.

    Args:
        name: name of the data set in errors.
        rows: `reference_id`, `caption` and `target_id` of each triplet.
        images: by image id, the file names it may have; images of no triplet are not looked for.
        folders: see [`make_benchmark`].
        allow_missing: leave out triplets without their files.

    Returns:
        A dataset with `TRIPLET_COLUMNS` and `reference_id`, images decoded lazily.

    Raises:
        ValueError: as [`make_benchmark`].
    """
    _check_listed(name, rows, images)
    named = {i: images[i] for row in rows for i in named_images(row)}
    kept, paths = _with_files(name, rows, named, folders, allow_missing)
    if len(kept) < len(rows):
        lost = len(rows) - len(kept)
        logger.warning("%s: %d of %d triplets left out because files are missing", name, lost, len(rows))
    files = {column: [paths[row[f"{column}_id"]] for row in kept] for column in ("reference", "target")}
    return _dataset({**files, **_columns(kept)}, "reference", "target")


def _check_listed(name: str, rows: Sequence[Mapping[str, Any]], images: Mapping[str, Sequence[str]]) -> None:
    """Raise a `ValueError` if a row names an image that is not listed."""
    every = (i for row in rows for i in (*named_images(row), *row.get("negative_ids", ())))
    if unknown := list(dict.fromkeys(i for i in every if i not in images)):
        raise ValueError(
            f"{name}: {len(unknown)} images that the captions name are not in the gallery, first: {unknown[:3]}. "
            "Do the two annotation files belong together?"
        )


def _with_files(
    name: str,
    rows: Sequence[Mapping[str, Any]],
    images: Mapping[str, Sequence[str]],
    folders: Sequence[Path],
    allow_missing: bool,
) -> tuple[list[Mapping[str, Any]], dict[str, str]]:
    """Return the rows whose images all have a file, and by image id the paths of images that have one."""
    if outside := [n for names in images.values() for n in names if escapes_folder(folders[0], n)]:
        raise ValueError(f"{name}: {len(outside)} image names leave their folder, first: {outside[:3]}")
    folder, paths = max(((f, paths_in(f, images)) for f in folders), key=lambda candidate: len(candidate[1]))
    missing = [i for i in images if i not in paths]
    if missing and paths and not allow_missing:
        raise ValueError(
            f"{name}: {len(missing)} of {len(images)} images have no file in {folder}, first: {missing[:3]}. "
            "Pass allow_missing=True to leave them out, and with them the rows that name them."
        )
    kept = [row for row in rows if all(i in paths for i in named_images(row))]
    if not kept:
        names = " or ".join(images[missing[0]])
        raise ValueError(
            f"{name}: no row has its images; looked for {names} and others in {[str(f) for f in folders]}"
        )
    return kept, paths


def paths_in(folder: Path, images: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """Return by image id the paths of images that are in a folder.

    Each folder is listed once, because 123,403 requests to a file server take long. Links are followed, because people
    keep images on other disks. Names that lead out of the folder are left out.
    """

    @cache
    def names_in(below: str) -> set[str]:
        subfolder = folder / below
        return {entry.name for entry in os.scandir(subfolder)} if subfolder.is_dir() else set()

    paths = {}
    for image_id, names in images.items():
        for name in names:
            below, _, own_name = name.rpartition("/")
            if not escapes_folder(folder, name) and own_name in names_in(below):
                paths[image_id] = f"{folder}/{name}"
                break
    return paths


def named_images(row: Mapping[str, Any]) -> Iterable[str]:
    """Yield the ids of all images that a query or triplet cannot do without, with repetitions: all but negatives."""
    yield from (row[c] for c in ("reference_id", "reference_2_id", "target_id") if row.get(c) is not None)
    yield from (i for column in ("target_ids", "subset_ids") for i in row.get(column, ()))


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    return {column: [row[column] for row in rows] for column in rows[0]}


def _dataset(columns: Mapping[str, list[Any]], *images: str) -> Dataset:
    lists = {c: pa.array(columns[c], pa.list_(pa.string())) for c in (*LIST_COLUMNS, "group_ids") if c in columns}
    dataset = Dataset.from_dict({**columns, **lists})  # typed, because all lists of a column may be empty
    for column in images:
        dataset = dataset.cast_column(column, Image())
    return dataset
