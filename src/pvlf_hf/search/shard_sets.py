"""Makes shards of shards and galleries: samples, merges and converts them, a part in memory at a time."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ..digests import id_number
from .filters import Filter, passing_rows
from .gallery_files import GalleryTable, is_gallery, kept_provenance, new_gallery_id, read_gallery, write_gallery
from .locations import files_of
from .metadata import metadata_of
from .query import check_positive
from .shards import Block, EmbeddingShards, shard_table, write_part
from .vectors import Vectors, check_vectors

ROWS_PER_PART = 65_536
"""Images of a part (our choice): 32 MiB of float16 at width 256."""


def sample_shards(shards: EmbeddingShards, number: int, seed: int = 0) -> pa.Table:
    """Return random rows, in order, with all columns; all rows where there are no more."""
    number = min(check_positive("number", number), len(shards))
    chosen = torch.randperm(len(shards), generator=torch.Generator().manual_seed(seed))[:number].sort().values
    found = []
    for block in shards.blocks:
        held = chosen[(chosen >= block.first) & (chosen < block.first + block.rows)] - block.first
        if len(held):
            found.append(shards.read(block).take(pa.array(held.numpy())))
    return pa.Table.from_batches(found)


def merge_shards(
    sources: Sequence[EmbeddingShards],
    location: str | Path,
    vectors: Vectors | None = None,
    filter: Filter | None = None,
    rows: int = ROWS_PER_PART,
) -> EmbeddingShards:
    """Write the images of several shards into one location; an id that occurs again with the same digest is dropped.

    Args:
        sources: shards of one model, with the same columns of metadata.
        location: folder or fsspec URL that holds no parts yet.
        vectors: how embeddings are stored; by default as in the first of the sources.
        filter: condition on columns of metadata that images must meet.
        rows: images of a part.

    Returns:
        The shards that were written.

    Raises:
        ValueError: if the sources are of two models or differ in columns, the location holds parts, no image passes
            the filter, or an id has two digests.
    """
    if not sources:
        raise ValueError("sources is empty: pass at least one EmbeddingShards")
    first, rows = sources[0], check_positive("rows", rows)
    vectors = check_vectors(vectors or first.vectors)
    _check_empty(location)
    for other in sources[1:]:
        if other.made_by != first.made_by:
            raise ValueError(
                f"{other.location} was made by another model, processor or dtype than {first.location}: they must not "
                "be mixed"
            )
        if _metadata_fields(other) != _metadata_fields(first):
            raise ValueError(
                f"{other.location} has the metadata {_metadata_fields(other)}, and {first.location} "
                f"{_metadata_fields(first)}: give both the same columns"
            )
    kept = _kept_images(sources, vectors, filter, repeated_rows(sources))
    for number, table in enumerate(_in_parts(kept, rows)):
        write_part(location, f"part-{number:05d}.parquet", table, first.made_by)
    if not files_of(location, "part-*.parquet"):
        raise ValueError(f"no image of the shards passes the filter {filter!s:.200}: widen it")
    return EmbeddingShards(location)


def gallery_to_shards(
    folder: str | Path, location: str | Path, vectors: Vectors = "float32", rows: int = ROWS_PER_PART
) -> EmbeddingShards:
    """Write the two files of a gallery as shards; other arguments, result and errors as [`merge_shards`]."""
    folder, rows, vectors = Path(folder), check_positive("rows", rows), check_vectors(vectors)
    table, embeds = read_gallery(folder)
    _check_empty(location)
    metadata, made_by = metadata_of(folder), kept_provenance(folder)
    assert made_by is not None  # the gallery was read
    for number, start in enumerate(range(0, len(embeds), rows)):
        part = slice(start, start + rows)
        columns = None if metadata is None else metadata.slice(start, rows)
        one = shard_table(table.id[part], table.path[part], table.digest[part], embeds[part], vectors, columns)
        write_part(location, f"part-{number:05d}.parquet", one, made_by)
    return EmbeddingShards(location)


def shards_to_gallery(shards: EmbeddingShards, folder: str | Path) -> None:
    """Write shards as the two files of a gallery, whose embeddings are float32 and fit in memory; open it by `load`.

    Raises:
        ValueError: if the folder holds a gallery, or an id occurs twice.
    """
    folder = Path(folder)
    if is_gallery(folder):
        raise ValueError(f"{folder} holds a gallery already: choose another folder")
    if len(repeated := repeated_rows([shards])):
        raise ValueError(f"{_place(shards, int(repeated[0]))} repeats an id: merge_shards drops such rows")
    batches = list(shards.batches([*("id", "path", "digest"), *shards.metadata_names]))
    columns = pa.Table.from_batches(batches).replace_schema_metadata(None)
    embeds = torch.cat([shards.embeddings(batch) for batch in shards.batches(shards.embedding_columns)])
    table = GalleryTable(**columns.select([*GalleryTable._fields]).to_pydict())
    metadata = columns.select(shards.metadata_names) if shards.metadata_names else None
    write_gallery(folder, table, embeds, shards.made_by, new_gallery_id(), metadata)


def repeated_rows(sources: Sequence[EmbeddingShards]) -> np.ndarray:
    """Return the rows, counted through all sources, whose id and digest occurred before: int64, ascending.

    It takes some 50 bytes of memory for each image.

    Raises:
        ValueError: if an id has two digests; the error names file and row of both.
    """
    batches = (batch.column(0).to_pylist() for shards in sources for batch in shards.batches(["id"]))
    numbers = np.concatenate([np.fromiter(map(id_number, ids), np.int64, len(ids)) for ids in batches])
    order = np.argsort(numbers, kind="stable")
    equal = numbers[order[1:]] == numbers[order[:-1]]
    suspects = np.unique(np.concatenate([order[1:][equal], order[:-1][equal]]))
    seen: dict[str, tuple[str, str]] = {}
    repeated = []
    start = 0
    for shards in sources:
        for block in shards.blocks:
            low, high = np.searchsorted(suspects, [start + block.first, start + block.first + block.rows])
            columns = shards.read(block, ["id", "digest"]) if low < high else None
            for row in suspects[low:high]:
                one = columns.slice(row - start - block.first, 1).to_pylist()[0]  # type: ignore[union-attr]
                where = _place_in(shards, block, row - start)
                digest, before = seen.setdefault(one["id"], (one["digest"], where))
                if digest != one["digest"]:
                    raise ValueError(
                        f"{where} and {before} have the id {one['id']!r} and different digests: two images, of which "
                        "one must be renamed or left out"
                    )
                if before != where:
                    repeated.append(row)
        start += len(shards)
    return np.array(repeated, dtype=np.int64)


def _kept_images(
    sources: Sequence[EmbeddingShards], vectors: Vectors, filter: Filter | None, dropped: np.ndarray
) -> Iterator[pa.Table]:
    """Yield the images that are kept, a row group at a time."""
    start = 0
    for shards in sources:
        for block in shards.blocks:
            batch = shards.read(block)
            kept = np.ones(len(batch), dtype=bool)
            if filter is not None:
                metadata = pa.Table.from_batches([batch]).select(shards.metadata_names)
                kept[:] = False
                kept[passing_rows(filter, metadata if shards.metadata_names else None)] = True
            kept[dropped[(dropped >= start) & (dropped < start + block.rows)] - start] = False
            start += block.rows
            if kept.any():
                yield _stored_as(shards, batch.filter(pa.array(kept)), vectors)


def _stored_as(shards: EmbeddingShards, batch: pa.RecordBatch, vectors: Vectors) -> pa.Table:
    table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
    if vectors == shards.vectors:
        return table
    ids, paths, digests = (batch.column(name).to_pylist() for name in ("id", "path", "digest"))
    metadata = table.select(shards.metadata_names) if shards.metadata_names else None
    return shard_table(ids, paths, digests, shards.embeddings(batch), vectors, metadata)


def _in_parts(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of as many rows, the last of what is left."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, rows)
            waiting = [joined.slice(rows)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)


def _check_empty(location: str | Path) -> None:
    if files_of(location, "part-*.parquet"):
        raise ValueError(f"{location} holds parts already: choose a location without")


def _metadata_fields(shards: EmbeddingShards) -> dict[str, str]:
    return {name: str(shards.schema.field(name).type) for name in shards.metadata_names}


def _place(shards: EmbeddingShards, row: int) -> str:
    block = next(block for block in shards.blocks if block.first <= row < block.first + block.rows)
    return _place_in(shards, block, row)


def _place_in(shards: EmbeddingShards, block: Block, row: int) -> str:
    return f"{shards.location}/{block.part.name}, row {block.start + row - block.first}"


__all__ = ["gallery_to_shards", "merge_shards", "repeated_rows", "sample_shards", "shards_to_gallery"]
