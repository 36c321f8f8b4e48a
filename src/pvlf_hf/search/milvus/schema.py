"""Columns of a gallery as fields of a Milvus collection, and rows in both directions.

A collection has the fields `key`, `id`, `path`, `digest` and `embedding`, and one for each column of metadata:
numbers, texts, booleans, and dates as whole numbers since 1970. The primary key is a digest of the id, since ids may
hold quotes, which pymilvus does not escape in its own requests for keys. A column whose name Milvus does not take gets
a field of another name. What the fields mean is kept in the collection's properties.

Embeddings are FLOAT_VECTOR, or FLOAT16_VECTOR, which Milvus Lite 3.2 does not have.
"""

import base64
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from ...digests import sequence_digest
from ..vectors import StoredVectors, storing_error

MADE_BY, COLUMNS = "pvlf_hf.made_by", "pvlf_hf.columns"
"""Properties of a collection: provenance of the embeddings, and Arrow schema of the metadata."""

OWN = ("id", "path", "digest", "embedding")
KEY = "key"

MOST_BYTES = 65_535
"""Milvus's limit for a text."""

MILVUS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
"""Names that Milvus takes for collections and fields."""

Kind = Literal["text", "boolean", "number", "whole", "date"]
"""Kind of a column; a number may have a fraction."""

STORED: dict[Kind, pa.DataType] = {"text": pa.string(), "boolean": pa.bool_(), "number": pa.float64()}
"""Arrow types of the values that Milvus holds; others are int64."""


StoredAs = Literal["float32", "float16"]
"""Types of the numbers of embeddings that a store holds."""

FIELD_TYPES: dict[StoredAs, str] = {"float32": "FLOAT_VECTOR", "float16": "FLOAT16_VECTOR"}
"""Names of their types of fields in Milvus."""


class StoreSchema(NamedTuple):
    """Columns of a store: width and numbers of the embeddings, and the metadata with the fields that hold it."""

    width: int
    columns: pa.Schema
    fields: tuple[str, ...]
    vectors: StoredAs = "float32"

    @classmethod
    def of(cls, width: int, columns: pa.Schema | None, vectors: StoredAs = "float32") -> "StoreSchema":
        """Lay out columns of metadata.

        Raises:
            ValueError: if Milvus cannot hold a column.
        """
        columns = pa.schema([pa.field(c.name, _plain_type(c)) for c in columns or ()])
        fields = tuple(_field_name(place, name) for place, name in enumerate(columns.names))
        return cls(width, columns, fields, vectors)

    @classmethod
    def read(cls, properties: dict[str, str], fields: Iterable[dict[str, Any]]) -> "StoreSchema":
        """Read what a collection says that it holds."""
        embedding = next(field for field in fields if field["name"] == "embedding")
        vectors = next(vectors for vectors, kind in FIELD_TYPES.items() if embedding["type"].name == kind)
        columns = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(properties[COLUMNS])))
        return cls.of(int(embedding["params"]["dim"]), columns, vectors)

    @property
    def vector_bytes(self) -> int:
        """Bytes of an embedding."""
        return self.width * np.dtype(self.vectors).itemsize

    def field_of(self, column: str) -> str:
        """Return the field that holds a column."""
        return self.fields[self.columns.get_field_index(column)]

    def properties(self, made_by: dict[str, str]) -> dict[str, str]:
        """Return the properties of the collection that say what it holds."""
        columns = base64.b64encode(self.columns.serialize().to_pybytes()).decode()
        return {MADE_BY: json.dumps(made_by), COLUMNS: columns}

    def milvus(self, client: Any) -> Any:
        """Return the collection's schema as Milvus takes it."""
        from pymilvus import DataType

        schema = client.create_schema(enable_dynamic_field=False)
        text = {"datatype": DataType.VARCHAR, "max_length": MOST_BYTES}
        schema.add_field(KEY, datatype=DataType.VARCHAR, max_length=32, is_primary=True)
        schema.add_field("id", **text)
        schema.add_field("path", nullable=True, **text)
        schema.add_field("digest", datatype=DataType.VARCHAR, max_length=64)
        schema.add_field("embedding", datatype=DataType[FIELD_TYPES[self.vectors]], dim=self.width)
        kinds = {"text": text, "number": {"datatype": DataType.DOUBLE}, "boolean": {"datatype": DataType.BOOL}}
        for field, column in zip(self.fields, self.columns, strict=True):
            schema.add_field(field, nullable=True, **kinds.get(kind_of(column.type), {"datatype": DataType.INT64}))
        return schema

    def rows(self, batch: pa.Table) -> list[dict[str, Any]]:
        """Return the rows of a table that fits as Milvus takes them."""
        columns = {name: batch[name].to_pylist() for name in OWN[:3]}
        columns = {KEY: keys_of(columns["id"]), **columns}
        for field, column in zip(self.fields, self.columns, strict=True):
            columns[field] = as_stored(batch[column.name].combine_chunks()).to_pylist()
        names = [*columns, "embedding"]
        embeds = embeddings_of(batch, self.width).numpy().astype(self.vectors)
        return [dict(zip(names, row, strict=True)) for row in zip(*columns.values(), embeds, strict=True)]

    def table(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        """Return rows that Milvus answered as a table; `embedding` only where they have it."""
        columns: dict[str, Any] = {name: pa.array([row[name] for row in rows], pa.string()) for name in OWN[:3]}
        for field, column in zip(self.fields, self.columns, strict=True):
            stored = STORED.get(kind_of(column.type), pa.int64())
            values = pa.array([row[field] for row in rows], stored)
            columns[column.name] = (values.cast(pa.int32()) if _is_short(column.type) else values).cast(column.type)
        if rows and "embedding" in rows[0]:
            columns["embedding"] = embedding_column(self.embeddings(rows))
        return pa.table(columns)

    def embeddings(self, rows: Sequence[dict[str, Any]]) -> np.ndarray:
        """Return the embeddings of rows that Milvus answered, as they are stored: float32 or float16 `(rows, d)`."""
        cells = [row["embedding"] for row in rows]
        if self.vectors == "float32":
            return np.asarray(cells, dtype=np.float32).reshape(-1, self.width)
        # pymilvus gives the bytes of float16 alone from a search, and in a list from a query.
        halves = b"".join(cell if isinstance(cell, bytes) else cell[0] for cell in cells)
        return np.frombuffer(halves, "<f2").reshape(-1, self.width)

    def asked(self, query: Tensor) -> tuple[list[float] | np.ndarray, float]:
        """Return a query `(d,)` as Milvus takes it, and the most by which that changes its cosine with an image.

        Milvus compares float16 with float16 only, and rounding a query to it can change the order of images.
        """
        if self.vectors == "float32":
            return query.tolist(), 0.0
        unit = query.double() / query.double().norm().clamp(min=1e-12)
        halves = unit.half()
        return halves.numpy(), float(storing_error(StoredVectors(halves[None], None)))

    def cast(self, metadata: pa.Table) -> pa.Table:
        """Return columns of metadata in the order and of the types of the store.

        Raises:
            ValueError: if columns differ, or a value does not fit its type.
        """
        if sorted(metadata.column_names) != sorted(self.columns.names):
            raise ValueError(
                f"the store has the columns of metadata {self.columns.names} and these images "
                f"{metadata.column_names}: give the images the same columns, or choose another name for a new store"
            )
        columns = {column.name: _cast(metadata, column.name, column.type) for column in self.columns}
        return pa.table(columns) if columns else metadata

    def fitted(self, batch: pa.Table) -> pa.Table:
        """Return a table with the columns of the store and of its types, or say what does not fit.

        Raises:
            ValueError: if columns differ, a value does not fit its type or is not finite, a text is too long, a width
                is another, an embedding is too large or too small for float16, or an id occurs twice with different
                digests.
        """
        metadata = self.cast(batch.select([name for name in batch.column_names if name not in OWN]))
        columns = {name: _cast(batch, name, pa.string()) for name in OWN[:3]}
        columns |= {name: metadata[name].combine_chunks() for name in metadata.column_names}
        for name, values in columns.items():
            bad, reason = _unstorable(name, values)
            if pc.any(bad).as_py():
                row = pc.index(bad, True).as_py()
                value = str(values[row])
                raise ValueError(f"row {row} ({columns['id'][row]!s:.80}) has {name!r} = {value[:40]!r}: {reason}")
        embeds = embeddings_of(batch, self.width)
        _check_repeats(columns["id"], columns["digest"])
        if self.vectors == "float32":
            return pa.table({**columns, "embedding": batch["embedding"]})
        halves = embeds.half()
        bad = ~(halves.isfinite().all(dim=1) & halves.any(dim=1))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"row {row} ({columns['id'][row]}) is too large or too small for float16: divide embeddings by their "
                "norms, or choose another name for a new store of vectors='float32'"
            )
        return pa.table({**columns, "embedding": embedding_column(halves)})


def keys_of(ids: Iterable[str]) -> list[str]:
    """Return the primary keys of images."""
    return [sequence_digest(image_id) for image_id in ids]


def kind_of(typed: pa.DataType) -> Kind:
    """Return the kind of a column."""
    if pa.types.is_string(typed):
        return "text"
    if pa.types.is_boolean(typed):
        return "boolean"
    if pa.types.is_floating(typed):
        return "number"
    return "whole" if pa.types.is_integer(typed) else "date"


def as_stored(values: pa.Array) -> pa.Array:
    """Turn the values of a column into what Milvus holds."""
    stored = STORED.get(kind_of(values.type), pa.int64())
    return (values.cast(pa.int32()) if _is_short(values.type) else values).cast(stored)


def embedding_column(embeds: Tensor | np.ndarray | Sequence[Sequence[float]]) -> pa.Array:
    """Return embeddings `(rows, d)` as a column of float16, where they are, or float32."""
    numbers = np.asarray(embeds)
    numbers = numbers if numbers.dtype == np.float16 else numbers.astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(numbers.reshape(-1)), numbers.shape[1])


def embeddings_of(batch: pa.Table, width: int) -> Tensor:
    """Return the embeddings of a table: float32 `(rows, width)`, to be read only.

    Raises:
        ValueError: if they are of another width, missing, not finite or 0.
    """
    column = batch["embedding"].combine_chunks()
    if not pa.types.is_fixed_size_list(column.type) or column.type.list_size != width:
        raise ValueError(
            f"the embeddings are {column.type} and the store's {width} numbers wide: embed the images by the model "
            "that filled the store, or choose another name"
        )
    embeds = column.flatten().to_numpy(zero_copy_only=False).astype(np.float32).reshape(-1, width)
    bad = ~(np.isfinite(embeds).all(axis=1) & embeds.any(axis=1)) if not column.null_count else column.is_null()
    if np.any(bad):
        row = int(np.flatnonzero(bad)[0])
        raise ValueError(f"row {row} ({batch['id'][row]}) has no finite embedding other than 0: embed the image again")
    return torch.from_numpy(embeds)


def _plain_type(column: pa.Field) -> pa.DataType:
    """Return the type that a column is kept in."""
    typed = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_large_string(typed) or pa.types.is_null(typed) or str(typed) == "string_view":
        return pa.string()
    if pa.types.is_floating(typed):
        return pa.float64()
    plain = (pa.types.is_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_date, pa.types.is_timestamp)
    if any(check(typed) for check in (*plain, pa.types.is_time)):
        return typed
    raise ValueError(
        f"column {column.name!r} of the metadata is {typed}, which a Milvus store does not hold: it takes numbers, "
        "texts, booleans and dates; turn it into one of them, or leave it out"
    )


def _field_name(place: int, column: str) -> str:
    free = MILVUS_NAME.fullmatch(column) and column not in (KEY, *OWN) and not re.fullmatch(r"_.*|column_\d+", column)
    return column if free else f"column_{place}"


def _is_short(typed: pa.DataType) -> bool:
    """Return whether it is a date of 32 bits, which Arrow casts to 32 bits only."""
    return kind_of(typed) == "date" and typed.bit_width == 32


def _cast(batch: pa.Table, name: str, typed: pa.DataType) -> pa.Array:
    column = batch[name].combine_chunks()
    try:
        return column if column.type == typed else column.cast(typed)
    except pa.ArrowException as error:
        raise ValueError(
            f"column {name!r} is {column.type} and the store's is {typed} ({str(error).splitlines()[0]}): give it "
            "values of that type, or choose another name for a new store"
        ) from error


def _unstorable(name: str, values: pa.Array) -> tuple[pa.Array, str]:
    """Return where Milvus does not take the values of a column, and why."""
    if name in ("id", "digest") and values.null_count:
        return values.is_null(), "each image needs one"
    if pa.types.is_string(values.type):
        return pc.greater(pc.binary_length(values), MOST_BYTES), f"Milvus takes texts of {MOST_BYTES:,} bytes at most"
    if pa.types.is_floating(values.type):
        return pc.invert(pc.is_finite(values)), "Milvus takes finite numbers; leave the value out"
    if values.type == pa.uint64():
        return pc.greater(values, pa.scalar(2**63 - 1, pa.uint64())), "Milvus takes whole numbers below 2^63"
    return pa.array([], pa.bool_()), ""


def _check_repeats(ids: pa.Array, digests: pa.Array) -> None:
    if pc.count_distinct(ids).as_py() == len(ids):
        return
    first: dict[str, int] = {}
    for row, image_id in enumerate(ids.to_pylist()):
        other = first.setdefault(image_id, row)
        if digests[other] != digests[row]:
            raise ValueError(
                f"rows {other} and {row} have the id {image_id!r} and different digests, {digests[other]} and "
                f"{digests[row]}: rename one of the images, or drop it"
            )


__all__ = ["StoreSchema", "StoredAs", "as_stored", "embedding_column", "embeddings_of", "keys_of", "kind_of"]
