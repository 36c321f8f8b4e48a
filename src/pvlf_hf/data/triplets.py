"""Training triplets: a user's own, and how rows become batches.

Triplets are a `datasets.Dataset` with the columns of `TRIPLET_COLUMNS`; every training set of this package, and a
user's own folder of images, is brought to this shape.
"""

import json
from pathlib import Path

from datasets import Dataset, Image, concatenate_datasets, load_dataset

from ..digests import content_digest
from .benchmark import CIRBenchmark, Protocol, check_columns
from .image_files import check_image_files

TRIPLET_COLUMNS = ("reference", "caption", "target", "target_id")
"""`reference` and `target`: `datasets.Image`; `caption`: the relative caption; `target_id`: str, equal for targets
that are the same thing, so that they are never each other's negatives."""


def load_triplets(
    file: str | Path, image_folder: str | Path, check_images: bool = True, allow_links: bool = False
) -> Dataset:
    """Loads a user's own triplets: a table beside a folder of images.

    Args:
        file: CSV, JSON Lines or Parquet with columns `reference`, `caption`, `target` (file names inside
            `image_folder`), and optionally `target_id`, equal for targets that must not be each other's negatives (by
            default the target's file name).
        image_folder: where the images are.
        check_images: open every image once, so that a broken one is named now and not hours into training.
        allow_links: follow links that lead out of `image_folder`. Those of the Hub's cache are always followed.

    Returns:
        A dataset with `TRIPLET_COLUMNS`, `reference_id` and `target_image_id` (the file names), images decoded lazily.

    Raises:
        ValueError: if the file type or a column is wrong, a cell is empty, a file name or a link leaves the
            folder, or images are missing or broken; nothing is dropped silently.
    """
    file, image_folder = Path(file), Path(image_folder).resolve()
    cells = read_triplet_table(file)
    for column, values in cells.items():
        if empty := [row for row, cell in enumerate(values) if not cell.strip()]:
            raise ValueError(
                f"{file}: {column} is empty in {len(empty)} rows, first in data rows {empty[:3]} (counted from 0)"
            )
    references, targets = cells["reference"], cells["target"]
    check_image_files(image_folder, sorted({*references, *targets}), check_images, allow_links)
    columns = {
        "reference": [str(image_folder / name) for name in references],
        "reference_id": references,
        "caption": cells["caption"],
        "target": [str(image_folder / name) for name in targets],
        "target_id": cells.get("target_id", targets),
        "target_image_id": targets,
    }
    return Dataset.from_dict(columns).cast_column("reference", Image()).cast_column("target", Image())


def read_triplet_table(file: Path) -> dict[str, list[str]]:
    """Reads the cells of a table of triplets as they are, blank ones too.

    Args:
        file: see [`load_triplets`].

    Returns:
        The columns `reference`, `caption`, `target` and, if there, `target_id`; what is no text is turned into it.

    Raises:
        ValueError: if the file cannot be read or lacks a column.
    """
    readers = {".csv": "csv", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
    if file.suffix not in readers:
        raise ValueError(f"{file}: cannot read {file.suffix or 'a file without ending'}; use one of {list(readers)}")
    if not file.is_file():
        raise ValueError(f"{file}: no such file; it should list reference, caption and target of each triplet")
    # Left alone, pandas reads names made of digits as numbers, and the caption "None" as no caption.
    as_text = {"converters": dict.fromkeys(TRIPLET_COLUMNS, str), "keep_default_na": False, "index_col": False}
    options = as_text if file.suffix == ".csv" else {}
    try:
        table = load_dataset(readers[file.suffix], data_files=str(file), split="train", **options)
    except Exception as error:  # the readers wrap whatever they meet in an error that does not say what
        reason = error.__cause__ or error
        raise ValueError(
            f"{file}: cannot be read ({reason}). It must be UTF-8, have a header and at least one row, and captions "
            "with commas must be quoted."
        ) from error
    check_columns(table, ("reference", "caption", "target"), str(file))
    if images := [name for name in TRIPLET_COLUMNS if isinstance(table.features.get(name), Image)]:
        raise ValueError(f"{file}: {images} hold images, not file names: pass its folder to load_hub_triplets")
    return {
        column: ["" if cell is None else str(cell) for cell in table[column]]
        for column in TRIPLET_COLUMNS
        if column in table.column_names
    }


def benchmark_from_triplets(name: str, triplets: Dataset) -> CIRBenchmark:
    """A benchmark whose gallery is every picture that occurs in the triplets, references included.

    Args:
        name: names the benchmark in results.
        triplets: as [`load_triplets`] returns them.
    """
    check_columns(triplets, (*TRIPLET_COLUMNS, "reference_id", "target_image_id"), name)
    ids = [*triplets["reference_id"], *triplets["target_image_id"]]
    first_row = {image_id: row for row, image_id in reversed(list(enumerate(ids)))}
    pictures = concatenate_datasets(
        [triplets.select_columns(c).rename_column(c, "image") for c in ("reference", "target")]
    )
    gallery = pictures.select(first_row.values()).add_column("image_id", list(first_row))
    queries = triplets.select_columns(["reference", "reference_id", "caption", "target_image_id"])
    return CIRBenchmark(
        name=name,
        queries=queries.rename_column("target_image_id", "target_id"),
        gallery=gallery,
        protocol=Protocol(name="own", gallery="every picture of the triplets"),
    )


def triplets_digest(triplets: Dataset) -> str:
    """Which triplets, by their captions and target ids; pictures are not read."""
    return content_digest(json.dumps(list(triplets[column])).encode() for column in ("caption", "target_id"))
