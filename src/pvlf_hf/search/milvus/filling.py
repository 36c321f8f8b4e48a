"""Brings a Milvus store in line with embedded images: what it has under the same id and digest is not touched.

The next images are read when the server has answered for those before, and a run that was interrupted goes on where it
stopped. To remove other images, a run remembers 8 bytes for each that stays.

Example:
    ```python
    images, address = from_shards("s3://bucket/photos"), StoreAddress("photos.db", "photos")
    gallery = MilvusGallery.of_embedded(images, address, model, processor)
    ```
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from ...digests import id_number
from ..gallery_files import GalleryTable
from ..shard_sets import repeated_rows
from ..shards import EmbeddingShards
from .schema import embedding_column
from .store import MilvusStore

ROWS = 4096
"""Rows that are compared with the store's at a time (our choice)."""

Batches = Iterable[tuple[str, pa.Table]]
"""Tables of `id`, `path`, `digest`, `embedding` and metadata, each after a name by which errors refer to it."""


class EmbeddedImages(NamedTuple):
    """Embedded images that a store is to hold."""

    width: int
    made_by: dict[str, str]
    columns: pa.Schema | None
    """Arrow schema of the metadata."""
    batches: Callable[[], Batches]


class Filled(NamedTuple):
    """Outcome of filling a store: numbers of images written, found as they were, and removed."""

    written: int
    kept: int
    removed: int


def fill_store(
    store: MilvusStore,
    batches: Batches,
    remove_others: bool = False,
    write: Callable[[pa.Table], None] | None = None,
) -> Filled:
    """Write embedded images that the store does not have as they are.

    Args:
        store: to write to.
        batches: the images, a few thousand rows each.
        remove_others: remove the images that no batch has.
        write: writes the rows of a table; by default as upserts.

    Raises:
        ValueError: if a batch does not fit the store.
        OSError: if the server does not answer or has no space.
    """
    written = kept = 0
    keep = [_numbers([])]
    for name, batch in batches:
        try:
            batch = store.schema.fitted(batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        ids = batch["id"].to_pylist()
        changed = batch.filter(differing(batch.drop_columns("embedding"), store.look_up(ids)))
        (write or store.write)(changed)
        written, kept = written + len(changed), kept + len(batch) - len(changed)
        keep.append(_numbers(ids))
    removed = remove_all_but(store, keep) if remove_others else 0
    store.flush()
    return Filled(written, kept, removed)


def differing(wanted: pa.Table, known: pa.Table) -> pa.Array:
    """Return which rows of a table are not among others, found by id, as they are."""
    found = {row["id"]: row for row in known.to_pylist()}
    return pa.array([found.get(row["id"]) != row for row in wanted.to_pylist()], pa.bool_())


def remove_all_but(store: MilvusStore, keep: Sequence[np.ndarray | Sequence[str]]) -> int:
    """Remove the images whose ids are not among those to keep, which the store has; return how many."""
    numbers = np.unique(np.concatenate([part if isinstance(part, np.ndarray) else _numbers(part) for part in keep]))
    removed = 0
    if len(store) == len(numbers):
        return removed
    for rows in store.stream(["id"]):
        ids = [row["id"] for row in rows]
        gone = [ids[place] for place in np.flatnonzero(~np.isin(_numbers(ids), numbers))]
        store.remove(gone)
        removed += len(gone)
    return removed


def from_table(
    table: GalleryTable, embeds: Tensor, metadata: pa.Table | None, made_by: dict[str, str]
) -> EmbeddedImages:
    """Return the content of a gallery's files as images for a store."""

    def batches() -> Iterator[tuple[str, pa.Table]]:
        for start in range(0, len(embeds), ROWS):
            rows = slice(start, start + ROWS)
            columns = {name: pa.array(values[rows], pa.string()) for name, values in table._asdict().items()}
            if metadata is not None:
                columns |= {name: metadata[name].slice(start, ROWS) for name in metadata.column_names}
            yield f"rows from {start}", pa.table({**columns, "embedding": embedding_column(embeds[rows])})

    return EmbeddedImages(embeds.shape[1], made_by, None if metadata is None else metadata.schema, batches)


def from_shards(location: str | Path) -> EmbeddedImages:
    """Return the images of shards (`pvlf_hf.search.shards`) for a store, read row group by row group.

    Raises:
        ValueError: if the shards cannot be read, or an id has two digests; it names file and row.
    """
    shards = EmbeddingShards(location)
    repeated_rows([shards])
    columns = pa.schema([shards.schema.field(column) for column in shards.metadata_names])
    return EmbeddedImages(shards.width, shards.made_by, columns, partial(_batches_of, shards))


def _batches_of(shards: EmbeddingShards) -> Iterator[tuple[str, pa.Table]]:
    names = ["id", "path", "digest", *shards.metadata_names]
    for block in shards.blocks:
        group = shards.read(block, [*names, *shards.embedding_columns])
        for start in range(0, len(group), ROWS):
            batch = group.slice(start, ROWS)
            columns = {name: batch.column(name) for name in names}
            columns["embedding"] = embedding_column(shards.embeddings(batch))
            yield f"{block.part.name}, counted from its row {block.start + start}", pa.table(columns)


def _numbers(ids: Iterable[str]) -> np.ndarray:
    return np.fromiter(map(id_number, ids), np.int64)


__all__ = ["EmbeddedImages", "Filled", "fill_store", "from_shards", "from_table"]
