"""Training triplets of a user's own: a table beside a folder of images.

Triplets are a `datasets.Dataset` with the columns of `TRIPLET_COLUMNS`; every training set of this package, and a
user's own folder of images, has this form.
"""

import json
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

from datasets import Dataset, Image, concatenate_datasets

from ..digests import content_digest
from .benchmark import CIRBenchmark, Protocol, first_rows
from .checks import as_path, check_columns, check_rows
from .image_files import check_image_files
from .tables import read_table

logger = logging.getLogger(__name__)

TRIPLET_COLUMNS = ("reference", "caption", "target", "target_id")
"""`reference` and `target`: `datasets.Image`; `caption`: the relative caption; `target_id`: str, equal for targets
that are the same thing, so that they are never each other's negatives."""


def load_triplets(
    file: str | Path, image_folder: str | Path, check_images: bool = True, allow_links: bool = False
) -> Dataset:
    """Load a user's own triplets: a table beside a folder of images.

    Args:
        file: CSV, JSON Lines or Parquet with columns `reference`, `caption`, `target` (file names inside
            `image_folder`), and optionally `target_id`, equal for targets that must not be each other's negatives (by
            default the target's file name); `key`, for `distinct_by`; and `negatives`, a list of file names (in CSV as
            JSON: `["a.jpg", "b.jpg"]`), for `hard_negatives`.
        image_folder: the folder of the images.
        check_images: open every image once, so that a broken one is named now and not hours into training.
        allow_links: follow links that lead out of `image_folder`. Those of the Hub's cache are always followed.

    Returns:
        A dataset with `TRIPLET_COLUMNS`, `reference_id` and `target_image_id`, images decoded lazily. Those two are
        the names of the files, one for each file however the table spells it. Of a table that has them also `key`,
        and `negatives` and `negative_ids`, paths and names of files.

    Raises:
        ValueError: if the file type or a column is wrong, a cell is empty or neither text nor a number, a file name or
            a link leaves the folder, or images are missing or broken; nothing is dropped silently.
    """
    file, image_folder = as_path("file", file), as_path("image_folder", image_folder)
    cells = read_triplet_table(file)
    negatives = [_names_of(file, row, cell) for row, cell in enumerate(cells.pop("negatives", ()))]
    names = sorted({*cells["reference"], *cells["target"], *(name for names in negatives for name in names)})
    file_of = check_image_files(image_folder, names, check_images, allow_links)
    references, targets = ([file_of[name] for name in cells[column]] for column in ("reference", "target"))
    target_ids = cells.get("target_id", targets)
    _warn_of_own_negatives(file, targets, target_ids)
    folder = image_folder.resolve()
    columns: dict[str, Any] = {
        "reference": [str(folder / name) for name in references],
        "reference_id": references,
        "caption": cells["caption"],
        "target": [str(folder / name) for name in targets],
        "target_id": target_ids,
        "target_image_id": targets,
    }
    columns |= {"key": cells["key"]} if "key" in cells else {}
    if negatives:
        columns["negative_ids"] = [[file_of[name] for name in names] for names in negatives]
        columns["negatives"] = [[str(folder / name) for name in names] for names in columns["negative_ids"]]
    return Dataset.from_dict(columns).cast_column("reference", Image()).cast_column("target", Image())


def _names_of(file: Path, row: int, cell: str) -> list[str]:
    """Return the file names in a cell of the column `negatives`."""
    try:
        names = json.loads(cell or "[]")
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(
            f"{file}: column 'negatives', data row {row} (counted from 0) is {cell!r:.80}, but it must be a list of "
            'file names, in CSV as JSON: ["a.jpg", "b.jpg"]'
        )
    return names


def _warn_of_own_negatives(file: Path, targets: list[str], target_ids: list[str]) -> None:
    """Warn of images that are targets under several ids, and so negatives of themselves."""
    ids_of = defaultdict(set)
    for target, target_id in zip(targets, target_ids, strict=True):
        ids_of[target].add(target_id)
    if several := [target for target, ids in ids_of.items() if len(ids) > 1]:
        logger.warning(
            "%s: %d images are targets under more than one target_id, so that they are negatives of themselves, "
            "first: %s; give each image one target_id",
            *(file, len(several), several[:3]),
        )


def read_triplet_table(file: Path) -> dict[str, list[str]]:
    """Read a table of triplets; images are not looked for.

    Args:
        file: see [`load_triplets`].

    Returns:
        The columns `reference`, `caption`, `target` and, where the table has them, `target_id`, `key` and `negatives`,
        as text.

    Raises:
        ValueError: if the file cannot be read or lacks a column, or a cell is empty or neither text nor a number.
    """
    cells = read_table(file, ("reference", "caption", "target"), ("target_id", "key", "negatives"), ("negatives",))
    for column, values in cells.items():
        if empty := [row for row, cell in enumerate(values) if not cell.strip() and column != "negatives"]:
            raise ValueError(
                f"{file}: {column} is empty in {len(empty)} rows, first in data rows {empty[:3]} (counted from 0)"
            )
    return cells


def check_triplets(triplets: Any, what: str = "triplets", streams: bool = False) -> None:
    """Check triplets before work begins: the columns and, except in a stream, every caption and target id.

    Args:
        triplets: a `datasets.Dataset`.
        what: names it in errors.
        streams: take a `datasets.IterableDataset` too.

    Raises:
        ValueError: if it is no data set, a column is missing, a caption is empty or no text, or a target id is
            missing; names row and target id.
    """
    check_columns(triplets, TRIPLET_COLUMNS, what, streams)
    if isinstance(triplets, Dataset):
        check_rows(triplets, what)


def benchmark_from_triplets(name: str, triplets: Dataset) -> CIRBenchmark:
    """Make a benchmark whose gallery is every image that occurs in the triplets, references included.

    Args:
        name: names the benchmark in results.
        triplets: as [`load_triplets`] returns them.
    """
    check_columns(triplets, (*TRIPLET_COLUMNS, "reference_id", "target_image_id"), name)
    row_of = first_rows([*triplets["reference_id"], *triplets["target_image_id"]])
    images = concatenate_datasets(
        [triplets.select_columns(c).rename_column(c, "image") for c in ("reference", "target")]
    )
    gallery = images.select(row_of.values()).add_column("image_id", list(row_of))
    queries = triplets.select_columns(["reference", "reference_id", "caption", "target_image_id"])
    return CIRBenchmark(
        name=name,
        queries=queries.rename_column("target_image_id", "target_id"),
        gallery=gallery,
        protocol=Protocol(name="own", gallery="every image of the triplets", revision=triplets_digest(triplets)),
    )


def triplets_digest(triplets: Dataset) -> str:
    """Return a digest that identifies triplets by their captions and target ids; images are not read."""
    return content_digest(json.dumps(list(triplets[column])).encode() for column in ("caption", "target_id"))
