"""Divides images to be encoded into parts, the same in every run: image files, Parquet or WebDataset.

They lie in a folder or an object store. A part becomes one file of shards. Its name holds its number and a digest of
its inputs and of what encodes them: a later run knows which parts are done, and a part that changed has a new name.
"""

import io
import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from transformers.utils import logging

from ..digests import sequence_digest
from ..models.image_formats_pvlf import recognise, refusal
from .image_folder import find_images, image_endings, is_hidden
from .locations import REACHABLE, Unreadable, is_damage, open_location
from .shards import OPENED_AT_ONCE, RESERVED

logger = logging.get_logger(__name__)

CELLS_AT_ONCE = 64
"""Images of a Parquet file that are read at a time (our choice)."""

TEXTS = (pa.types.is_string, pa.types.is_large_string)

CONTENTS = (pa.types.is_binary, pa.types.is_large_binary)

PLAIN = (*TEXTS, pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_temporal)
"""Types of columns that become metadata."""

NO_CONTENT = (
    "it is a link or a special file, without content in the archive: pack images by `tar --dereference "
    "--hard-dereference`"
)
"""Reason for images in archives that are no files."""

STATES = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created")
"""Names by which stores tell the state of a file, the first that there is counts."""


class Cell(NamedTuple):
    """An image that is to be encoded, undecoded."""

    id: str
    path: str | None
    content: bytes | None
    """Content of the file, None where it is to be read from the path."""
    values: dict[str, Any]
    """Its metadata."""
    refusal: str | None = None
    """Reason that it cannot be read."""


class PlannedPart(NamedTuple):
    """Images that become one file of shards."""

    name: str
    """File name of the shards, `part-....parquet`."""
    plan: dict[str, Any]
    """Files, rows or row groups to read, as JSON can say it."""

    @property
    def broken_name(self) -> str:
        """File name of the list of images that cannot be read."""
        return "broken-" + self.name.removeprefix("part-")


class Sources(NamedTuple):
    """Images that were found, in parts."""

    parts: list[PlannedPart]
    skipped: dict[str, str]
    """Files that look like images and are not decoded, by their names in the folder, with the reason."""
    left_out: Counter[str]
    """Numbers of other files by ending, which are no images, for all that the endings tell."""


class Listing(NamedTuple):
    """Files below a location; none in hidden and system folders."""

    files: AbstractFileSystem
    root: str
    states: dict[str, str]
    """Size and state of each file, by its path, in order."""

    def ending(self, *endings: str) -> list[str]:
        """Return the paths of files by their endings."""
        return [path for path in self.states if _ending(path) in endings]

    def name(self, path: str) -> str:
        """Return the name of a file in the location."""
        return path.removeprefix(self.root).lstrip("/") or PurePosixPath(path).name

    def url(self, path: str) -> str:
        """Return the path of a file as others find it: its URL in a store."""
        return path if isinstance(self.files, LocalFileSystem) else self.files.unstrip_protocol(path)


def find_parts(
    source: str | Path,
    rows: int,
    settings: Sequence[str],
    image_column: str = "image",
    id_column: str = "image_id",
) -> Sources:
    """List the images of a location, in parts of at most `rows` images, or of one row group or archive.

    In a folder and in archives, content tells what is an image; in an object store the endings of the names do.

    Args:
        source: folder or fsspec URL that holds image files, `*.parquet` with a column of images, or `*.tar` of a
            WebDataset; or one such file. Image files are named by their path in it, those of an archive by that of the
            archive and their own. Numbers, texts and dates beside the images of Parquet files are their metadata;
            texts beside those of an archive are not.
        rows: images of a part at most, where the source allows it.
        settings: all that embeddings depend on beside the images.
        image_column: column of Parquet files: of images as `datasets` writes them, their content, or absolute paths
            and URLs.
        id_column: column of Parquet files that names the images.

    Raises:
        ValueError: if there are no images, or files of several kinds, or a Parquet file has no such column or other
            columns than the first.
    """
    listing = _list(source)
    kinds = {".parquet": listing.ending(".parquet"), ".tar": listing.ending(".tar")}
    kinds["image"] = listing.ending(*image_endings()[0])
    if len(held := [kind for kind, paths in kinds.items() if paths]) > 1:
        raise ValueError(f"{source} holds {' and '.join(held)} files: pass a location that holds one kind")
    skipped: dict[str, str] = {}
    left_out = Counter(map(_ending, {*listing.states} - {path for paths in kinds.values() for path in paths}))
    if kinds[".parquet"]:
        plans = _parquet_plans(listing, kinds[".parquet"], rows, {"image": image_column, "id": id_column})
    elif kinds[".tar"]:
        plans = [
            {"kind": "tar", "file": listing.url(path), "name": listing.name(path), "state": listing.states[path]}
            for path in kinds[".tar"]
        ]
    else:
        paths = kinds["image"]
        if isinstance(listing.files, LocalFileSystem):
            images = find_images(Path(listing.root))
            paths, skipped, left_out = [str(file) for file in images.files], images.skipped, Counter()
        else:
            not_decoded = image_endings()[1]
            unread = listing.ending(*not_decoded)
            skipped = {listing.name(path): refusal(not_decoded[_ending(path)]) for path in unread}
            left_out -= Counter(map(_ending, unread))
        plans = _file_plans(listing, paths, rows)
    if not plans:
        first = f", first of those that are not decoded: {[*skipped.items()][:3]}" if skipped else ""
        raise ValueError(
            f"{source} holds no images, Parquet files or .tar archives of images{first}: pass the location that does"
        )
    digests = (sequence_digest(*settings, json.dumps(plan))[:16] for plan in plans)
    named = zip(digests, plans, strict=True)
    parts = [PlannedPart(f"part-{n:06d}-{one}.parquet", plan) for n, (one, plan) in enumerate(named)]
    return Sources(parts, skipped, left_out)


def _list(source: str | Path) -> Listing:
    files, root = open_location(source)
    try:
        found = files.find(root, detail=True)
    except Exception as error:  # each kind of store raises its own
        raise ValueError(
            f"{source} cannot be listed ({error}): check the path, the login and its rights; if it is busy, try later"
        ) from error
    listing = Listing(files, root, {path: _state(info) for path, info in sorted(found.items())})
    hidden = {path for path in found if is_hidden(Path(listing.name(path)))}
    kinds = (*image_endings()[0], *image_endings()[1], ".parquet", ".tar")
    if left_out := sorted(hidden & {*listing.ending(*kinds)}):
        logger.warning(f"left out {len(left_out)} files in hidden or system folders, first: {left_out[:3]}")
    return listing._replace(states={path: state for path, state in listing.states.items() if path not in hidden})


def _ending(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _state(info: Mapping[str, Any]) -> str:
    return f"{info['size']} {next((info[key] for key in STATES if key in info), '')}"


def _file_plans(listing: Listing, paths: Sequence[str], rows: int) -> list[dict[str, Any]]:
    def state(path: str) -> str:
        try:  # what a link leads to is not listed
            return listing.states.get(path) or _state(listing.files.info(path))
        except OSError:  # a broken link
            return ""

    return [
        {
            "kind": "files",
            "names": [listing.name(path) for path in some],
            "paths": [listing.url(path) for path in some],
            "states": [state(path) for path in some],
        }
        for some in (paths[start : start + rows] for start in range(0, len(paths), rows))
    ]


def _parquet_plans(listing: Listing, paths: Sequence[str], rows: int, columns: dict[str, str]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(min(OPENED_AT_ONCE, len(paths))) as pool:
        opened = [*zip(paths, pool.map(partial(_opened, listing.files, columns=columns), paths), strict=True)]
    first, (whole, _) = opened[0]
    expected = _metadata_of(whole, columns)
    for path, (schema, _) in opened:
        if different := {*map(str, _metadata_of(schema, columns))} ^ {*map(str, expected)}:
            raise ValueError(f"{path} has other columns than {first}: they differ in {sorted(different)}")
    if left_out := sorted({*whole.names} - {*expected.names} - {*columns.values()}):
        logger.warning(
            f"columns {left_out} of {first} do not become metadata: they are no numbers, texts or dates, or have the "
            f"name of one of {RESERVED}"
        )
    return [
        {"kind": "parquet", "file": listing.url(path), "groups": some, "state": listing.states[path], **columns}
        for path, (_, counts) in opened
        for some in _grouped(counts, rows)
    ]


def _opened(files: AbstractFileSystem, path: str, columns: dict[str, str]) -> tuple[pa.Schema, list[int]]:
    """Return the schema of a Parquet file and the rows of its row groups; raise a `ValueError` if it does not fit."""
    try:
        with files.open(path, "rb") as opened:
            file = pq.ParquetFile(opened)
            schema, footer = file.schema_arrow, file.metadata
    except Exception as error:  # each kind of store raises its own
        if not is_damage(error):
            raise Unreadable(f"{path} cannot be read ({error}): {REACHABLE}") from error
        raise ValueError(
            f"{path} cannot be read, is no Parquet file or was cut short ({str(error).splitlines()[0]}): replace it, "
            "or take it away"
        ) from error
    if missing := [name for name in columns.values() if name not in schema.names]:
        raise ValueError(
            f"{path} has no column {missing[0]!r}, it has {schema.names}: pass image_column and id_column "
            "(--image-column, --id-column)"
        )
    kind = schema.field(columns["image"]).type
    as_datasets = pa.types.is_struct(kind) and {"bytes", "path"} <= {field.name for field in kind}
    if not as_datasets and not any(fits(kind) for fits in (*TEXTS, *CONTENTS)):
        raise ValueError(
            f"{path}: column {columns['image']!r} is {kind}: it must hold images as `datasets` writes them, their "
            "content, or absolute paths and URLs"
        )
    return schema, [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def _grouped(counts: Sequence[int], rows: int) -> Iterator[list[int]]:
    """Yield row groups that follow each other, as many as have no more rows, but at least one."""
    groups: list[int] = []
    for group, count in enumerate(counts):
        if groups and sum(counts[one] for one in groups) + count > rows:
            yield groups
            groups = []
        groups.append(group)
    if groups:
        yield groups


def _metadata_of(schema: pa.Schema, columns: Mapping[str, str]) -> pa.Schema:
    taken = {columns["image"], columns["id"], *RESERVED}
    plain = (field for field in schema if field.name not in taken and any(fits(field.type) for fits in PLAIN))
    return pa.schema([pa.field(field.name, field.type) for field in plain])


def metadata_schema(plan: Mapping[str, Any]) -> pa.Schema:
    """Return the columns of metadata that a part's images come with."""
    if plan["kind"] != "parquet":
        return pa.schema([])
    files, path = open_location(plan["file"])
    with files.open(path, "rb") as opened:
        return _metadata_of(pq.read_schema(opened), plan)


def read_cells(plan: Mapping[str, Any], left_out: Counter[str]) -> Iterator[Cell]:
    """Yield the images of a part, undecoded.

    Args:
        plan: of the part.
        left_out: counts what else an archive holds but folders, by ending; hidden images as `hidden .jpg`.

    Raises:
        ValueError: if its file cannot be read, or a row has no id.
    """
    if plan["kind"] == "files":
        yield from (Cell(name, path, None, {}) for name, path in zip(plan["names"], plan["paths"], strict=True))
        return
    files, path = open_location(plan["file"])
    try:
        with files.open(path, "rb") as opened:
            yield from (
                _cells_of_archive(plan, opened, left_out) if plan["kind"] == "tar" else _cells_of_rows(plan, opened)
            )
    except Exception as error:  # each kind of store raises its own
        if isinstance(error, ValueError) and not is_damage(error):
            raise  # of a row, which it names
        remedy = "replace it, or take it away" if is_damage(error) else REACHABLE
        raise Unreadable(f"{plan['file']} cannot be read ({error}): {remedy}") from error


def _cells_of_rows(plan: Mapping[str, Any], opened: Any) -> Iterator[Cell]:
    file = pq.ParquetFile(opened)
    names = _metadata_of(file.schema_arrow, plan).names
    row = sum(file.metadata.row_group(group).num_rows for group in range(plan["groups"][0]))
    columns = [plan["image"], plan["id"], *names]
    for batch in file.iter_batches(CELLS_AT_ONCE, row_groups=plan["groups"], columns=columns, use_threads=False):
        for values in batch.to_pylist():
            image, name = values[plan["image"]], values[plan["id"]]
            if name is None:
                raise ValueError(f"{plan['file']}, row {row}: no {plan['id']!r}: name the image, or drop the row")
            if not isinstance(image, dict):
                image = {"path": image} if isinstance(image, str) else {"bytes": image}
            path, content = image.get("path"), image.get("bytes")
            yield Cell(str(name), None if content else path, content, {one: values[one] for one in names})
            row += 1


def _cells_of_archive(plan: Mapping[str, Any], opened: Any, left_out: Counter[str]) -> Iterator[Cell]:
    decoded, not_decoded = image_endings()
    with tarfile.open(fileobj=opened, mode="r|*") as archive:
        for member in archive:
            if member.isdir():
                continue
            file = archive.extractfile(member) if member.isfile() else None
            ending, content = _ending(member.name), b"" if file is None else file.read()
            is_image = ending in decoded or ending in not_decoded or recognise(io.BytesIO(content)) is not None
            if not is_image or is_hidden(Path(member.name)):
                left_out[f"hidden {ending}" if is_image else ending] += 1
                continue
            # What a link leads to has gone by, as an archive is read from front to back.
            refusal = None if file is not None else NO_CONTENT
            yield Cell(f"{plan['name']}/{member.name}", None, content, {}, refusal)


__all__ = ["Cell", "PlannedPart", "Sources", "find_parts", "metadata_schema", "read_cells"]
