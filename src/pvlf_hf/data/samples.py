"""Training data of methods that need no triplets: images, captions, or images with their captions.

Samples are a `datasets.Dataset` with some of the columns of `SAMPLE_COLUMNS`.
"""

import logging
from pathlib import Path

from datasets import Dataset, Features, Image

from .checks import as_path, check_columns
from .image_files import check_image_files
from .tables import read_table

logger = logging.getLogger(__name__)

SAMPLE_COLUMNS = ("image", "caption", "concept")
"""`image`: `datasets.Image`; `caption`: str, describes the image by itself; `concept`: str, names what is seen in it,
by the very words of the caption."""


def load_samples(
    file: str | Path,
    columns: tuple[str, ...],
    image_folder: str | Path | None = None,
    check_images: bool = True,
    allow_links: bool = False,
) -> Dataset:
    """Load samples of a user's own: a table beside a folder of images.

    Args:
        file: CSV, JSON Lines or Parquet with the columns.
        columns: those of `SAMPLE_COLUMNS` that are needed; cells of `image` are file names inside `image_folder`.
        image_folder: the folder of the images; needed for the column `image`.
        check_images: open every image once, so that a broken one is named now and not hours into training.
        allow_links: follow links that lead out of `image_folder`.

    Returns:
        A dataset with the columns, images decoded lazily, and `image_id`, the name of each image's file.

    Raises:
        ValueError: if the file or a column is missing, a cell is empty, or images are missing or broken.
    """
    file = as_path("file", file)
    cells = read_table(file, columns)
    for column, values in cells.items():
        if empty := [row for row, cell in enumerate(values) if not cell.strip()]:
            raise ValueError(
                f"{file}: {column} is empty in {len(empty)} rows, first in data rows {empty[:3]} (counted from 0)"
            )
    if "image" not in columns:
        return Dataset.from_dict(cells)
    if image_folder is None:
        raise ValueError(f"{file}: its column image names files: pass image_folder, the folder that holds them")
    folder = as_path("image_folder", image_folder)
    file_of = check_image_files(folder, sorted({*cells["image"]}), check_images, allow_links)
    names = [file_of[name] for name in cells["image"]]
    columns_of_images = {"image": [str(folder.resolve() / name) for name in names], "image_id": names}
    return Dataset.from_dict({**cells, **columns_of_images}).cast_column("image", Image())


def image_sets(samples: Dataset, size: int = 5) -> Dataset:
    """Return sets of images of one concept (PALAVRA trains on sets of 5).

    Args:
        samples: with `image`, `caption` and `concept`.
        size: images of a set.

    Returns:
        A row for each `size` images of a concept: `image_0`, `image_1`, ..., and the first one's `caption` and
        `concept`. Images beyond the last full set of their concept are left out; a log message says how many.

    Raises:
        ValueError: if no concept has so many images.
    """
    check_columns(samples, SAMPLE_COLUMNS, "samples")
    rows_of: dict[str, list[int]] = {}
    for row, concept in enumerate(samples["concept"][:]):
        rows_of.setdefault(concept, []).append(row)
    sets = [rows[i : i + size] for rows in rows_of.values() for i in range(0, len(rows) - size + 1, size)]
    if not sets:
        most = max(map(len, rows_of.values()), default=0)
        raise ValueError(f"samples: no concept has the {size} images of a set, but {most} at most")
    if left := len(samples) - size * len(sets):
        logger.warning(
            "%d of %d images are in no set of %d images of their concept and do not train: name more images by the "
            "same concept to use them",
            left,
            len(samples),
            size,
        )
    cells = samples.with_format(None).cast_column("image", Image(mode=samples.features["image"].mode, decode=False))
    texts = samples.select([rows[0] for rows in sets]).select_columns(["caption", "concept"])
    columns = {f"image_{i}": cells.select([rows[i] for rows in sets])["image"][:] for i in range(size)}
    features = Features({**texts.features, **dict.fromkeys(columns, samples.features["image"])})
    return Dataset.from_dict({**texts.to_dict(), **columns}, features)


__all__ = ["SAMPLE_COLUMNS", "image_sets", "load_samples"]
