"""Brings a Milvus store in line with embedded images: what it has under the same id and digest is not touched.

The next images are read when the server has answered for those before, and a run that was interrupted goes on where it
stopped. To remove other images, a run remembers 8 bytes for each that stays.

Example:
    ```python
    store, filled = bring_in_line(from_shards("s3://bucket/photos"), StoreAddress("photos.db", "photos"))
    ```
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor
from tqdm.auto import tqdm

from ...digests import id_number
from ..gallery_files import GalleryTable
from ..shard_sets import repeated_rows
from ..shards import EmbeddingShards
from .schema import embedding_column
from .store import MilvusStore, StoreAddress, check_maker, create_store, open_store

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
    rows: int
    """Number of the images."""


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
    finish: Callable[[], None] | None = None,
) -> Filled:
    """Write embedded images that the store does not have as they are.

    Args:
        store: to write to.
        batches: the images, a few thousand rows each.
        remove_others: remove the images that no batch has.
        write: writes the rows of a table; by default as upserts.
        finish: writes what `write` has held back; others are removed after it.

    Raises:
        ValueError: if a batch does not fit the store, or has an id twice or that of an earlier one. Ids are told apart
            by 8 bytes of a digest: among 10^8 a wrong refusal has a probability of 0.0003.
        OSError: if the server does not answer or has no space.
    """
    written = kept = 0
    seen = _SeenIds()
    for name, batch in batches:
        try:
            batch = store.schema.fitted(batch)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        ids = batch["id"].to_pylist()
        if repeated := seen.add(ids):
            raise ValueError(
                f"{name}: the id {repeated[0]!r} occurs twice in it, or in an earlier batch too: rename or drop one "
                "of the images; batches before this one are written"
            )
        changed = batch.filter(differing(batch.drop_columns("embedding"), store.look_up(ids)))
        (write or store.write)(changed)
        written, kept = written + len(changed), kept + len(batch) - len(changed)
    if finish is not None:
        finish()
    removed = remove_all_but(store, seen.runs) if remove_others else 0
    store.flush()
    return Filled(written, kept, removed)


def bring_in_line(images: EmbeddedImages, address: StoreAddress, progress: bool = True) -> tuple[MilvusStore, Filled]:
    """Make a store hold embedded images (`from_shards`, `from_table`), and no others; it is made if there is none.

    Raises:
        ValueError: if another model made what it holds, or an image does not fit it.
        OSError: if the server does not answer or has no space.
    """
    store = open_store(address) or create_store(address, images.width, images.columns, images.made_by)
    check_maker(store, images.made_by)

    def batches() -> Iterator[tuple[str, pa.Table]]:
        with tqdm(total=images.rows, desc=f"filling {store.name}", unit="image", disable=not progress) as bar:
            for name, batch in images.batches():
                yield name, batch
                bar.update(len(batch))

    try:
        return store, fill_store(store, batches(), remove_others=True)
    except BaseException:
        store.database.close()
        raise


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

    columns = None if metadata is None else metadata.schema
    return EmbeddedImages(embeds.shape[1], made_by, columns, batches, len(embeds))


def from_shards(location: str | Path) -> EmbeddedImages:
    """Return the images of shards (`pvlf_hf.search.shards`) for a store, read row group by row group.

    An image that repeats the id and the content of another is left out.

    Raises:
        ValueError: if the shards cannot be read, or an id has two digests; it names file and row.
    """
    shards = EmbeddingShards(location)
    repeated = repeated_rows([shards])
    columns = pa.schema([shards.schema.field(column) for column in shards.metadata_names])
    rows = len(shards) - len(repeated)
    return EmbeddedImages(shards.width, shards.made_by, columns, partial(_batches_of, shards, repeated), rows)


def _batches_of(shards: EmbeddingShards, repeated: np.ndarray) -> Iterator[tuple[str, pa.Table]]:
    names = ["id", "path", "digest", *shards.metadata_names]
    for block in shards.blocks:
        group = shards.read(block, [*names, *shards.embedding_columns])
        for start in range(0, len(group), ROWS):
            batch = group.slice(start, ROWS)
            columns = {name: batch.column(name) for name in names}
            columns["embedding"] = embedding_column(shards.embeddings(batch))
            rows = block.first + start + np.arange(len(batch))
            kept = pa.array(~np.isin(rows, repeated))
            yield f"{block.part.name}, counted from its row {block.start + start}", pa.table(columns).filter(kept)


class _SeenIds:
    """Ids of the batches so far, 8 bytes each, in sorted runs, each longer than the next, so that there are few.

    Attributes:
        runs: int64 numbers made from the ids.
    """

    def __init__(self) -> None:
        self.runs = [_numbers([])]

    def add(self, ids: Sequence[str]) -> list[str]:
        """Remember the ids of a batch, and return those that were there or occur twice in it."""
        numbers = _numbers(ids)
        found = np.zeros(len(ids), dtype=bool)
        for run in filter(len, self.runs):
            found |= run[np.searchsorted(run, numbers) % len(run)] == numbers
        _, firsts = np.unique(numbers, return_index=True)
        found[np.setdiff1d(np.arange(len(ids)), firsts)] = True
        self.runs.append(np.sort(numbers))
        while len(self.runs) > 1 and len(self.runs[-2]) <= len(self.runs[-1]):
            self.runs[-2:] = [np.sort(np.concatenate(self.runs[-2:]))]
        return [ids[place] for place in np.flatnonzero(found).tolist()]


def _numbers(ids: Iterable[str]) -> np.ndarray:
    return np.fromiter(map(id_number, ids), np.int64)


__all__ = ["EmbeddedImages", "Filled", "bring_in_line", "fill_store", "from_shards", "from_table"]
