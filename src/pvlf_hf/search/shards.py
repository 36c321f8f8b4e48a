"""Shards: embeddings of any number of images as Parquet files, in a folder or an object store.

A location, a folder or an fsspec URL (`s3://bucket/photos`), holds `part-*.parquet`. Columns, in this order:

- `id` string; `path` string, file or URL of the image, null where there is none; `digest` string
- `embedding` fixed_size_list[d] of float, halffloat or int8
- `scale` float, only beside int8: an embedding is `scale * int8`
- `embedding_float16` fixed_size_list[d] of halffloat, only where int8 finds candidates that float16 ranks
- further columns: metadata, for filters

The schema's own metadata holds `pvlf_hf.made_by`, provenance of the embeddings as JSON, and `pvlf_hf.format`. A row
group has at most 16,384 rows. `broken-*.parquet` (`id`, `path`, `reason`) lists images that could not be read.
"""

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from fsspec.implementations.local import LocalFileSystem
from torch import Tensor

from ..atomic_files import cannot_write, whole
from .locations import REACHABLE, Unreadable, files_of, is_damage, open_location, stamp_of
from .vectors import Element, StoredVectors, Vectors, check_vectors, decode_vectors, encode_vectors

MADE_BY, FORMAT, VERSION = b"pvlf_hf.made_by", b"pvlf_hf.format", b"1"

MOST_ROWS = 16_384
"""Rows of a row group at most (our choice): a reader holds one, 16 MiB of float32 at width 256."""

OPENED_AT_ONCE = 16
"""Parts whose footers are read at the same time (our choice); an object store answers each after some 50 ms."""

RESERVED = ("id", "path", "digest", "embedding", "scale", "embedding_float16")
"""Columns that are no metadata."""

ELEMENTS: dict[Element, pa.DataType] = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}

BROKEN = pa.schema({"id": pa.string(), "path": pa.string(), "reason": pa.string()})


class Part(NamedTuple):
    """A file of shards."""

    name: str
    footer: pq.FileMetaData
    schema: pa.Schema
    stamp: str
    """Mark that tells the file from one that has replaced it."""


class Block(NamedTuple):
    """A row group."""

    part: Part
    group: int
    start: int
    """Row of the part at which it starts."""
    first: int
    """Row of all shards at which it starts."""
    rows: int

    def may_hold(self, ids: Sequence[str]) -> bool:
        """Return whether one of some ids, which ascend, may be in the row group, by its statistics."""
        known = self.part.footer.row_group(self.group).column(0).statistics
        if known is None or not known.has_min_max:
            return True
        place = bisect_left(ids, known.min)
        return place < len(ids) and ids[place] <= known.max


def shard_table(
    ids: Sequence[str],
    paths: Sequence[str | None],
    digests: Sequence[str],
    embeds: Tensor,
    vectors: Vectors = "float32",
    metadata: pa.Table | None = None,
) -> pa.Table:
    """Make the table of a part.

    Args:
        ids: names of the images.
        paths: their files or URLs, None where there is none.
        digests: of their files.
        embeds: float32 `(images, d)`.
        vectors: how embeddings are stored, see `pvlf_hf.search.vectors`.
        metadata: further columns, a row an image.

    Raises:
        ValueError: if `vectors` is unknown, an embedding is not finite, or metadata has a column of a reserved name.
    """
    first, _, second = check_vectors(vectors).partition("+")
    stored = encode_vectors(embeds, first)  # type: ignore[arg-type]
    columns: dict[pa.Field, pa.Array] = {
        pa.field("id", pa.string(), nullable=False): pa.array(ids, pa.string()),
        pa.field("path", pa.string()): pa.array(paths, pa.string()),
        pa.field("digest", pa.string(), nullable=False): pa.array(digests, pa.string()),
    }
    columns |= _vector_column("embedding", stored.values)
    if stored.scale is not None:
        columns[pa.field("scale", pa.float32(), nullable=False)] = pa.array(stored.scale.numpy())
    if second:
        columns |= _vector_column("embedding_float16", encode_vectors(embeds, second).values)  # type: ignore[arg-type]
    if metadata is not None and (taken := {*RESERVED} & {*metadata.column_names}):
        raise ValueError(f"the metadata has columns {sorted(taken)}, whose names shards use themselves: rename them")
    further = (
        [] if metadata is None else [(metadata.schema.field(name), metadata[name]) for name in metadata.schema.names]
    )
    arrays = [*columns.values(), *(column for _, column in further)]
    return pa.Table.from_arrays(arrays, schema=pa.schema([*columns, *(field for field, _ in further)]))


def _vector_column(name: str, values: Tensor) -> dict[pa.Field, pa.Array]:
    numbers = values.contiguous().numpy()
    element = pa.field("element", pa.from_numpy_dtype(numbers.dtype), nullable=False)
    kind = pa.list_(element, numbers.shape[1])
    return {
        pa.field(name, kind, nullable=False): pa.FixedSizeListArray.from_arrays(pa.array(numbers.ravel()), type=kind)
    }


def write_part(location: str | Path, name: str, table: pa.Table, made_by: Mapping[str, str]) -> None:
    """Write a part, which is there in whole or not at all, also after a kill.

    Args:
        location: folder or fsspec URL; a folder is made.
        name: file name, `part-....parquet`; one that exists is replaced.
        table: of [`shard_table`].
        made_by: provenance of the embeddings ([`images_made_by`]).

    Raises:
        OSError: if it cannot be written.
        ValueError: if the name is none of a part.
    """
    if not (name.startswith("part-") and name.endswith(".parquet")):
        raise ValueError(f"name={name!r}: parts are named part-*.parquet")
    known = {MADE_BY: json.dumps(dict(made_by), sort_keys=True), FORMAT: VERSION}
    _write(location, name, table.replace_schema_metadata(known))


def write_broken(location: str | Path, name: str, broken: Sequence[tuple[str, str | None, str]]) -> None:
    """Write id, path and reason of images that could not be read, as `broken-*.parquet`; errors as [`write_part`]."""
    columns = [pa.array(values, pa.string()) for values in zip(*broken, strict=True)] or [
        pa.array([], pa.string())
    ] * 3
    _write(location, name, pa.Table.from_arrays(columns, schema=BROKEN))


def _write(location: str | Path, name: str, table: pa.Table) -> None:
    files, root = open_location(location)
    # Int8 takes a byte as a dictionary's index, and four where plain; floats do not repeat, nor compress.
    vectors = [field for field in table.schema if pa.types.is_fixed_size_list(field.type)]
    plain = {f"{field.name}.list.element" for field in vectors}
    small = [f"{field.name}.list.element" for field in vectors if field.type.value_type == pa.int8()]
    others = [name for name in table.schema.names if f"{name}.list.element" not in plain]
    options: dict[str, Any] = {
        "row_group_size": MOST_ROWS,
        "use_dictionary": [*others, *small],
        "compression": {**dict.fromkeys(others, "zstd"), **dict.fromkeys(plain, "none")},
        "write_statistics": others,
    }
    if isinstance(files, LocalFileSystem):
        # A worker that was taken to be dead may write it beside its successor.
        with whole(Path(root) / name, several=True) as partial:
            pq.write_table(table, partial, **options)
        return
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    try:
        files.pipe_file(f"{root}/{name}", sink.getvalue().to_pybytes())
    except Exception as error:  # each kind of store raises its own
        raise cannot_write(f"{name} in {location}", error) from error


def read_broken(location: str | Path) -> pa.Table:
    """Read id, path and reason of all images that could not be read."""
    files, root = open_location(location)
    tables = []
    for name in files_of(location, "broken-*.parquet"):
        with files.open(f"{root}/{name}", "rb") as opened:
            tables.append(pq.ParquetFile(opened).read())
    return pa.concat_tables(tables) if tables else BROKEN.empty_table()


class EmbeddingShards:
    """Embeddings at a location, read in pieces; nothing of them stays in memory but where each row group is.

    Args:
        location: folder or fsspec URL that holds `part-*.parquet`; parts are in the order of their names.
        names: parts to open, by default all.

    Attributes:
        made_by: provenance of the embeddings ([`images_made_by`]).
        width: d.
        element: type of the stored numbers.
        vectors: how embeddings are stored, see `pvlf_hf.search.vectors`.
        schema: columns.
        metadata_names: columns of metadata, which filters refer to.
        blocks: row groups, in order.

    Raises:
        ValueError: if there are no parts, one is cut short or is none, or they differ in width, element type, columns
            or the model that made them. The error names the file.
    """

    def __init__(self, location: str | Path, names: Sequence[str] | None = None) -> None:
        self.location = str(location)
        self._files, self._root = open_location(location)
        names = files_of(location, "part-*.parquet") if names is None else sorted(names)
        if not names:
            raise ValueError(
                f"{location} holds no part-*.parquet: pass the folder or URL that holds shards; `pvlf-hf index "
                "--engine ray` or pvlf_hf.search.shards.write_part writes them"
            )
        with ThreadPoolExecutor(min(OPENED_AT_ONCE, len(names))) as pool:
            self.parts = list(pool.map(self._open_part, names))
        self.schema = self.parts[0].schema
        self.width, self.vectors = _layout(self._named(names[0]), self.schema)
        self.element: Element = self.vectors.partition("+")[0]  # type: ignore[assignment]
        self.made_by = self._made_by(self.parts[0])
        for part in self.parts[1:]:
            self._check_like_first(part)
        self.metadata_names = [name for name in self.schema.names if name not in RESERVED]
        self._checked: defaultdict[int, set[str]] = defaultdict(set)

    @cached_property
    def blocks(self) -> list[Block]:
        """Row groups, in order."""
        blocks: list[Block] = []
        first = 0
        for part in self.parts:
            start = 0
            for group in range(part.footer.num_row_groups):
                rows = part.footer.row_group(group).num_rows
                if rows > MOST_ROWS:
                    raise ValueError(
                        f"{self._named(part.name)}: row group {group} has {rows:,} rows, more than {MOST_ROWS:,}, "
                        "which memory is planned for: write it with row_group_size=16384"
                    )
                if rows:  # a part of which no image could be read has none
                    blocks.append(Block(part, group, start, first, rows))
                first, start = first + rows, start + rows
        return blocks

    def read(self, block: Block, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Read a row group, or some of its columns.

        Raises:
            Unreadable: if the file is damaged, an id, digest or embedding is missing, or an embedding is not
                finite, which is checked when a column is first read; or it was removed or replaced since the shards
                were opened, so that its rows are no longer those that were counted.
        """
        part, where = (
            block.part,
            f"{self._named(block.part.name)}, rows {block.start} to {block.start + block.rows - 1}",
        )
        try:
            with self._source(part.name) as opened:
                file = pq.ParquetFile(opened, metadata=part.footer)
                table = file.read_row_group(block.group, columns=columns, use_threads=False)
        except Exception as error:  # each kind of store raises its own
            self.check_unchanged(part)
            remedy = "delete the file and have it written again" if is_damage(error) else REACHABLE
            raise Unreadable(f"{where} cannot be read ({error}): {remedy}") from error
        self.check_unchanged(part)
        (batch,) = table.combine_chunks().to_batches() or [pa.RecordBatch.from_pylist([], schema=table.schema)]
        if unchecked := {*batch.schema.names} - self._checked[block.first]:
            self._check(block, batch, unchecked)
            self._checked[block.first] |= unchecked
        return batch

    def check_unchanged(self, part: Part) -> None:
        """Raise [`Unreadable`] if the file of a part is no longer the one that was opened."""
        try:
            same = stamp_of(self._files, f"{self._root}/{part.name}") == part.stamp
        except FileNotFoundError:
            same = False
        except Exception as error:  # each kind of store raises its own
            raise Unreadable(f"{self._named(part.name)} cannot be reached ({error}): try again later") from error
        if not same:
            raise Unreadable(
                f"{self._named(part.name)} was replaced or removed since these shards were opened: open them again "
                "(a server: start it again)"
            )

    def batches(self, columns: Sequence[str] | None = None, rows: int = MOST_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield all rows in order, some columns or all, at most `rows` at a time and never of two row groups."""
        for block in self.blocks:
            batch = self.read(block, columns)
            for start in range(0, len(batch), rows):
                yield batch.slice(start, rows)

    def stored(self, batch: pa.RecordBatch, column: str = "embedding") -> StoredVectors:
        """Return the vectors of a batch as they are stored, to be read only.

        Args:
            batch: rows with the column, and `scale` beside int8.
            column: `"embedding"`, or `"embedding_float16"` where it exists.
        """
        kept = batch.column(column)
        values = _numbers(kept.flatten()).view(len(batch), self.width)
        scaled = kept.type.value_type == pa.int8()
        return StoredVectors(values, _numbers(batch.column("scale")) if scaled else None)

    def embeddings(self, batch: pa.RecordBatch) -> Tensor:
        """Return the embeddings of a batch: float32 `(rows, d)`; of float16, where int8 is beside it."""
        column = "embedding_float16" if "embedding_float16" in batch.schema.names else "embedding"
        return decode_vectors(self.stored(batch, column))

    def fragments(self) -> list[Any]:
        """Return the parts as `pyarrow.dataset` filters them, without reading row groups that cannot pass."""
        import pyarrow.dataset as ds  # brings pandas, which a search without a filter does not wait for
        from pyarrow.fs import FSSpecHandler, PyFileSystem
        from pyarrow.fs import LocalFileSystem as ArrowFiles

        local = isinstance(self._files, LocalFileSystem)
        files = ArrowFiles() if local else PyFileSystem(FSSpecHandler(self._files))
        return [ds.ParquetFileFormat().make_fragment(f"{self._root}/{part.name}", files) for part in self.parts]

    @property
    def embedding_columns(self) -> list[str]:
        """Columns that [`~EmbeddingShards.embeddings`] needs."""
        if self.vectors == "int8+float16":
            return ["embedding_float16"]
        return ["embedding", "scale"] if self.element == "int8" else ["embedding"]

    def __len__(self) -> int:
        return sum(part.footer.num_rows for part in self.parts)

    def __repr__(self) -> str:
        return f"EmbeddingShards({self.location!r}: {len(self):,} images in {len(self.parts)} parts, {self.vectors})"

    def _named(self, name: str) -> str:
        return f"{self.location.rstrip('/')}/{name}"

    def _source(self, name: str) -> Any:
        """Open a file; one of this machine is mapped, so that its pages are not copied."""
        path = f"{self._root}/{name}"
        return pa.memory_map(path) if isinstance(self._files, LocalFileSystem) else self._files.open(path, "rb")

    def _open_part(self, name: str) -> Part:
        try:
            stamp = stamp_of(self._files, f"{self._root}/{name}")
            with self._source(name) as opened:
                file = pq.ParquetFile(opened)
                return Part(name, file.metadata, file.schema_arrow, stamp)
        except Exception as error:  # each kind of store raises its own
            if not is_damage(error):
                raise Unreadable(f"{self._named(name)} cannot be read ({error}): {REACHABLE}") from error
            raise ValueError(
                f"{self._named(name)} was cut short or is no Parquet file ({str(error).splitlines()[0]}): delete it "
                "and have it written again"
            ) from error

    def _made_by(self, part: Part) -> dict[str, str]:
        kept = part.schema.metadata or {}
        if kept.get(FORMAT) != VERSION or MADE_BY not in kept:
            raise ValueError(
                f"{self._named(part.name)} does not say what made its embeddings ({MADE_BY.decode()}, format "
                f"{VERSION.decode()}): write it by pvlf_hf.search.shards.write_part"
            )
        return json.loads(kept[MADE_BY])

    def _check_like_first(self, part: Part) -> None:
        name, first = self._named(part.name), self.parts[0]
        width, vectors = _layout(name, part.schema)
        if width != self.width:
            raise ValueError(
                f"{name} holds embeddings of width {width}, and {first.name} of {self.width}: keep shards of one "
                "model in a location"
            )
        if vectors != self.vectors:
            raise ValueError(f"{name} holds {vectors} vectors, and {first.name} {self.vectors}: rewrite one of them")
        if self._made_by(part) != self.made_by:
            raise ValueError(
                f"{name} was made by another model, processor or dtype than {first.name}, and must not be mixed with "
                "it: keep shards of one model in a location"
            )
        if not part.schema.equals(self.schema):
            different = {*map(str, part.schema)} ^ {*map(str, self.schema)} or {"their order"}
            raise ValueError(f"{name} has other columns than {first.name}, they differ in {sorted(different)}")

    def _check(self, block: Block, batch: pa.RecordBatch, names: set[str]) -> None:
        for name in ({*RESERVED} - {"path"}) & names:
            column = batch.column(name)
            if column.null_count:
                bad, reason = pc.is_null(column), "no value"
            elif name in ("id", "digest"):
                continue
            else:
                numbers = column if name == "scale" else column.flatten()
                if pa.types.is_integer(numbers.type) or (finite := _numbers(numbers).isfinite()).all():
                    continue
                bad = pa.array((~finite.view(len(batch), -1).all(dim=1)).numpy())
                reason = "NaN or infinity"
            row = block.start + pc.index(bad, True).as_py()
            raise Unreadable(
                f"{self._named(block.part.name)}, row {row}: {reason} in column {name!r}; have the file written again"
            )


def _numbers(column: pa.Array) -> Tensor:
    """Return the numbers of a column, which must not be changed: they stay where Arrow read them to."""
    return torch.from_dlpack(column)


def _layout(name: str, schema: pa.Schema) -> tuple[int, Vectors]:
    """Return the width of the embeddings of a part, and how they are stored; raise a `ValueError` if it is none."""
    wanted = ["id", "path", "digest", "embedding"]
    if schema.names[:4] != wanted:
        raise ValueError(f"{name} starts with columns {schema.names[:4]}, and shards with {wanted}")
    if other := [column for column in wanted[:3] if schema.field(column).type != pa.string()]:
        raise ValueError(f"{name}: column {other[0]!r} is {schema.field(other[0]).type}, not string")
    kind = schema.field("embedding").type
    element = next(
        (e for e, typed in ELEMENTS.items() if pa.types.is_fixed_size_list(kind) and kind.value_type == typed), None
    )
    if element is None:
        raise ValueError(
            f"{name}: column 'embedding' is {kind}, not a fixed_size_list of float, halffloat or int8: write it by "
            "pvlf_hf.search.shards.write_part"
        )
    if (element == "int8") != ("scale" in schema.names) or (
        element == "int8" and schema.field("scale").type != pa.float32()
    ):
        raise ValueError(f"{name}: int8 embeddings need a float column 'scale', and others have none")
    if "embedding_float16" not in schema.names:
        return kind.list_size, element
    if element != "int8" or schema.field("embedding_float16").type.list_size != kind.list_size:
        raise ValueError(f"{name}: 'embedding_float16' belongs beside int8 embeddings of the same width")
    return kind.list_size, "int8+float16"


__all__ = ["EmbeddingShards", "read_broken", "shard_table", "write_broken", "write_part"]
