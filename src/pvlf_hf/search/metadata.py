"""Metadata of a gallery: columns that came with the images, row by row beside its ids, to be filtered by.

They come from a table (CSV, Parquet or JSON lines) whose column `file_name` names the images as the gallery does, the
convention of `datasets`' image folders, from a data set's own columns, or from EXIF.
"""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from PIL import ExifTags
from transformers.utils import logging

from ..models.image_processing_pvlf import open_image
from .gallery_files import read_columns

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

KEY = "file_name"
RESERVED = ("id", "path", "digest")

EXIF = pa.schema(
    {
        "exif_date": pa.timestamp("s"),
        "exif_width": pa.int64(),
        "exif_height": pa.int64(),
        "exif_latitude": pa.float64(),
        "exif_longitude": pa.float64(),
    }
)
"""Columns that are read from the images' own headers: when and where taken, and the size as it is shown."""

READERS: dict[str, Any] = {
    ".csv": partial(pyarrow.csv.read_csv, convert_options=pyarrow.csv.ConvertOptions(strings_can_be_null=True)),
    ".parquet": pq.read_table,
    ".json": pyarrow.json.read_json,
    ".jsonl": pyarrow.json.read_json,
}


def read_metadata(source: str | Path | pa.Table) -> pa.Table:
    """Read a table of metadata.

    Raises:
        ValueError: if the file does not exist, cannot be read, lacks `file_name`, or repeats one of its names.
    """
    if isinstance(source, pa.Table):
        return _checked(source)
    file = Path(source)
    if file.suffix.lower() not in READERS or not file.is_file():
        raise ValueError(f"metadata={str(source)!r}: pass a file that ends in {', '.join(READERS)}")
    try:
        return _checked(READERS[file.suffix.lower()](file))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"the metadata {file} cannot be read: {error}") from error


def _checked(table: pa.Table) -> pa.Table:
    """Return a table of metadata, `file_name` as text, or raise as [`read_metadata`]."""
    if KEY not in table.column_names:
        raise ValueError(
            f"the metadata has columns {table.column_names} and no {KEY!r}: name the column that holds the images' "
            "names in the folder so"
        )
    if refused := sorted({*RESERVED, *EXIF.names} & {*table.column_names}):
        raise ValueError(f"the metadata has columns {refused}, whose names the gallery uses itself: rename them")
    table = table.set_column(table.column_names.index(KEY), KEY, table[KEY].cast(pa.string()))
    if repeated := _repeated(table[KEY]):
        raise ValueError(f"the metadata names {repeated[:3]} more than once: keep one row an image")
    return table


def metadata_of(folder: Path) -> pa.Table | None:
    """Return the metadata of a kept gallery, None if it has none."""
    table = read_columns(folder)
    names = [] if table is None else [name for name in table.column_names if name not in RESERVED]
    return table.select(names) if table is not None and names else None


def dataset_metadata(dataset: "Dataset", ids: Sequence[str], left_out: Sequence[str]) -> pa.Table | None:
    """Return the plain columns of a data set (numbers, texts, dates, classes by name), None if it has none."""
    from datasets import ClassLabel, Value

    columns: dict[str, Any] = {}
    for name, feature in dataset.features.items():
        if name in (*left_out, *RESERVED, KEY) or (isinstance(feature, Value) and "binary" in feature.dtype):
            continue
        if isinstance(feature, ClassLabel):
            columns[name] = pa.array([None if v is None else feature.int2str(v) for v in dataset[name]], pa.string())
        elif isinstance(feature, Value):
            columns[name] = dataset.select_columns(name).with_format("arrow")[:][name]
    return pa.table({KEY: pa.array(ids, pa.string()), **columns}) if columns else None


def align(table: pa.Table, ids: Sequence[str], known: Sequence[str] = ()) -> pa.Table:
    """Bring the rows of a table of metadata in the order of a gallery; what does not fit is counted and named.

    Args:
        table: from [`read_metadata`].
        ids: of the gallery's images.
        known: names of images that are there but could not be read.

    Raises:
        ValueError: if it names none of the images.
    """
    places = pc.index_in(pa.array(ids, pa.string()), value_set=table[KEY].combine_chunks())
    if places.null_count == len(ids):
        raise ValueError(
            f"the metadata names none of the {len(ids)} images: its {KEY} are like {table[KEY][:3].to_pylist()}, the "
            f"images' {list(ids[:3])}"
        )
    strangers = sorted({*table[KEY].to_pylist()} - {*ids} - {*known}, key=str)
    bare = [image_id for image_id, place in zip(ids, places.to_pylist(), strict=True) if place is None]
    if strangers:
        logger.warning(f"{len(strangers)} rows of the metadata have no image, first: {strangers[:3]}")
    if bare:
        logger.warning(f"{len(bare)} images have no row in the metadata, first: {bare[:3]}; their values are null")
    return table.take(places).drop_columns([KEY])


def carry_over(kept: pa.Table, ids: Sequence[str]) -> pa.Table | None:
    """Return the metadata that a kept gallery had (`id` beside it), for the images of its successor."""
    names = [name for name in kept.column_names if name not in (*RESERVED, *EXIF.names)]
    if not names:
        return None
    places = pc.index_in(pa.array(ids, pa.string()), value_set=kept["id"].combine_chunks())
    if places.null_count:
        logger.warning(
            f"{places.null_count} new images have no metadata: index with the table again to give them some"
        )
    return kept.select(names).take(places)


def read_exif(cells: Sequence[dict[str, Any]], digests: Sequence[str], kept: pa.Table | None) -> pa.Table:
    """Read the columns `EXIF` of images, except where a kept gallery has those of the same file."""
    known: dict[str, dict[str, Any]] = {}
    if kept is not None and {*EXIF.names} <= {*kept.column_names}:
        known = dict(zip(kept["digest"].to_pylist(), kept.select(EXIF.names).to_pylist(), strict=True))
    rows = [known.get(digest) or exif_of(cell) for cell, digest in zip(cells, digests, strict=True)]
    return pa.Table.from_pylist(rows, schema=EXIF)


def exif_of(cell: dict[str, Any]) -> dict[str, Any]:
    """Read date, size and location of an image from its header; null where it does not say."""
    row: dict[str, Any] = dict.fromkeys(EXIF.names)
    with suppress(Exception), open_image(cell["path"] if cell["bytes"] is None else cell["bytes"]) as image:
        exif = image.getexif()
        turned = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        row["exif_width"], row["exif_height"] = image.size[::-1] if turned else image.size
        taken = exif.get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.DateTimeOriginal) or exif.get(ExifTags.Base.DateTime)
        with suppress(ValueError, TypeError):
            row["exif_date"] = datetime.strptime(str(taken).strip("\0 "), "%Y:%m:%d %H:%M:%S")
        gps = exif.get_ifd(ExifTags.IFD.GPSInfo)
        with suppress(KeyError, TypeError, ValueError, ZeroDivisionError):
            latitude = _degrees(gps[ExifTags.GPS.GPSLatitude], gps[ExifTags.GPS.GPSLatitudeRef])
            longitude = _degrees(gps[ExifTags.GPS.GPSLongitude], gps[ExifTags.GPS.GPSLongitudeRef])
            row["exif_latitude"], row["exif_longitude"] = latitude, longitude
    return row


def gather_metadata(
    ids: Sequence[str],
    digests: Sequence[str],
    cells: Sequence[dict[str, Any]],
    kept: pa.Table | None,
    given: pa.Table | None,
    exif: bool,
    unread: Sequence[str],
) -> pa.Table | None:
    """Return the metadata of a gallery's images, None if there is none.

    Args:
        ids: of the images.
        digests: of their files.
        cells: their files, as `datasets` keeps an undecoded image.
        kept: table of the gallery that was kept in the same place.
        given: table that the caller passed; without it what was kept is carried over.
        exif: whether to read `EXIF`; what was kept of it is kept up to date anyway.
        unread: names of images that cannot be read.
    """
    parts = []
    if given is not None:
        parts.append(align(given, ids, unread))
    elif kept is not None:
        parts.append(carry_over(kept, ids))
    if exif or (kept is not None and {*EXIF.names} <= {*kept.column_names}):
        parts.append(read_exif(cells, digests, kept))
    columns = {name: part[name] for part in parts if part is not None for name in part.column_names}
    return pa.table(columns) if columns else None


def _degrees(value: Any, reference: str) -> float:
    degrees, minutes, seconds = map(float, value)
    return (degrees + minutes / 60 + seconds / 3600) * (-1 if reference.strip("\0 ") in ("S", "W") else 1)


def _repeated(column: pa.ChunkedArray) -> list[str]:
    counts = pc.value_counts(column)
    return [one["values"] for one in counts.to_pylist() if one["counts"] > 1]


__all__ = ["EXIF", "dataset_metadata", "gather_metadata", "metadata_of", "read_metadata"]
