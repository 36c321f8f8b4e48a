"""Keeps a gallery in a Milvus collection: ids, paths, digests, metadata and embeddings; nothing of it stays in memory.

Several galleries share a database, each in a collection of its own, and several clients may write to one at the same
time: an image is a row with a key made from its id, which a write replaces whole.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from os import urandom
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers.utils import logging

from ...digests import sequence_digest
from ...embeddings.similarity import exact_unit_rows
from .connection import SERVE, MilvusDatabase
from .schema import COLUMNS, KEY, MADE_BY, MILVUS_NAME, StoredAs, StoreSchema, embedding_column, keys_of

logger = logging.get_logger(__name__)

Consistency = Literal["Strong", "Bounded", "Session", "Eventually"]

BATCH_BYTES, BATCH_ROWS = 8 * 2**20, 4096
"""Most that one request writes (our choice): an eighth of the 64 MiB that a server takes."""

LOOKUP = 1024
"""Rows that one request looks up (our choice)."""

MOST_RESULTS, ANSWER_BYTES = 16_384, 64 * 2**20
"""Milvus's limit of the results of a search, and the most embeddings that one answer carries (our choice)."""

INT8_INDEX = "For int8 in the index, and scores by the embeddings, pass index_type='HNSW_SQ' or 'IVF_SQ8'"
"""Remedy in place of vectors of int8, and in Milvus Lite of float16."""

LITE_INDEXES = ("FLAT", "AUTOINDEX", "HNSW", "HNSW_SQ", "IVF_FLAT", "IVF_SQ8")
"""Index types of Milvus Lite 3.2, which takes every other name without a word and then compares all images."""


@dataclass(frozen=True)
class MilvusOptions:
    """Options of a store.

    Args:
        index_type: of the embeddings, when the collection is made: `FLAT` (exact), `AUTOINDEX`, `HNSW`, `IVF_FLAT`,
            ...; a server knows more than Milvus Lite. None takes `FLAT` in Milvus Lite and `AUTOINDEX` on a server.
            [`store_recall`] measures what an index finds. `HNSW_SQ` and `IVF_SQ8` keep int8 in the index, which
            proposes images that are scored by the embeddings.
        index_params: of the index, `{"M": 32, "efConstruction": 200}`.
        search_params: of each search, `{"ef": 128}`.
        consistency: what a search sees: all that was written before (`"Strong"`), or sooner, and less.
        timeout: seconds for which a request to a server is repeated.
        vectors: numbers of the embeddings, when the collection is made: `"float32"`, which None takes, or `"float16"`,
            half the size, which a server stores and Milvus Lite 3.2 does not. Scores are of the stored embeddings.

    Raises:
        ValueError: if `vectors` is none that Milvus stores.
    """

    index_type: str | None = None
    index_params: dict[str, Any] = field(default_factory=dict)
    search_params: dict[str, Any] = field(default_factory=dict)
    consistency: Consistency = "Strong"
    timeout: float = 60.0
    vectors: StoredAs | None = None

    def __post_init__(self) -> None:
        if self.vectors not in (None, *get_args(StoredAs)):
            raise ValueError(f"vectors={self.vectors!r}: a Milvus store holds 'float32' or 'float16'. {INT8_INDEX}")


class StoreAddress(NamedTuple):
    """Place of a store: a database, the name of a collection in it, and how both are used."""

    uri: str
    name: str
    options: MilvusOptions = MilvusOptions()

    def __str__(self) -> str:
        return f"{self.name} in {self.uri.rpartition('@')[2]}"  # without the password


class MilvusStore:
    """Images of a gallery in a collection; made by [`open_store`] or [`create_store`].

    Attributes:
        database: the connection.
        name: of the collection.
        schema: width of the embeddings, and columns of the metadata.
        made_by: provenance of the embeddings ([`images_made_by`]).
        options: of the store.
    """

    def __init__(
        self, database: MilvusDatabase, address: StoreAddress, schema: StoreSchema, made_by: dict[str, str]
    ) -> None:
        self.database, self.name, self.options = database, address.name, address.options
        self.schema, self.made_by = schema, made_by
        database.collection = self.name
        self._fields = ["id", "path", "digest", *schema.fields]

    @property
    def client(self) -> Any:
        """The `pymilvus.MilvusClient`."""
        return self.database.client

    @property
    def most_results(self) -> int:
        """Most results of one search."""
        return min(MOST_RESULTS, ANSWER_BYTES // self.schema.vector_bytes)

    def __len__(self) -> int:
        (counted,) = self._ask("count the images", "query", filter="", output_fields=["count(*)"])
        return int(counted["count(*)"])

    def look_up(self, ids: Sequence[str], embeddings: bool = False) -> pa.Table:
        """Return the rows of ids that the store has, in any order: `id`, `path`, `digest` and metadata."""
        fields = [*self._fields, *(["embedding"] if embeddings else [])]
        found: list[dict[str, Any]] = []
        for start in range(0, len(ids), LOOKUP):
            keys = keys_of(ids[start : start + LOOKUP])
            found += self._ask("look up images", "get", ids=keys, output_fields=fields)
        return self.schema.table(found)

    def embeddings_by_digest(self, digests: Iterable[str]) -> dict[str, np.ndarray]:
        """Return the embeddings of files that the store has under any id: float32 `(d,)` each."""
        wanted, fields = sorted(set(digests)), ["digest", "embedding"]
        found: dict[str, np.ndarray] = {}
        for start in range(0, len(wanted), LOOKUP):
            listed = ", ".join(f'"{digest}"' for digest in wanted[start : start + LOOKUP])
            rows = self._ask("look up digests", "query", filter=f"digest in [{listed}]", output_fields=fields)
            embeds = self.schema.embeddings(rows).astype(np.float32)
            found |= {row["digest"]: embed for row, embed in zip(rows, embeds, strict=True)}
        return found

    def stream(self, fields: Sequence[str], condition: str = "") -> Iterator[list[dict[str, Any]]]:
        """Yield all rows that meet a condition, some fields of each, in the order of their keys."""
        wide = self.schema.vector_bytes if "embedding" in fields else 0
        size = max(1, min(MOST_RESULTS, ANSWER_BYTES // (wide + 256)))
        iterator = self._ask(
            "read the images", "query_iterator", batch_size=size, filter=condition, output_fields=[KEY, *fields]
        )
        with closing(iterator), self.database.doing("read the images"):
            while rows := iterator.next():
                yield rows

    def some_ids(self, number: int) -> list[str]:
        """Return the ids of random images: those whose keys, which are digests, follow a random one, in a circle."""
        start = sequence_digest(urandom(16))
        found: dict[str, str] = {}
        for condition in (f'{KEY} >= "{start}"', f'{KEY} < "{start}"'):
            if (missing := number - len(found)) > 0:
                rows = self._ask("choose images", "query", filter=condition, limit=missing, output_fields=[KEY, "id"])
                found |= {row[KEY]: row["id"] for row in rows}
        return list(found.values())

    def read(self) -> pa.Table:
        """Return all rows, in the order of their ids: `id`, `path`, `digest`, metadata and `embedding`."""
        parts = [self.schema.table(rows) for rows in self.stream([*self._fields, "embedding"])]
        return pa.concat_tables(parts).sort_by("id") if parts else self.schema.table([])

    def mean(self) -> Tensor:
        """Return the mean of the embeddings, each divided by its norm: float64 `(d,)`; reads all of them."""
        total, count = torch.zeros(self.schema.width, dtype=torch.float64), 0
        for rows in self.stream(["embedding"]):
            embeds = torch.from_numpy(self.schema.embeddings(rows).astype(np.float32))
            total, count = total + exact_unit_rows(embeds).sum(dim=0), count + len(rows)
        return total / max(count, 1)

    def nearest(self, query: Tensor, limit: int, condition: str = "") -> pa.Table:
        """Return the images nearest to a query, as the index finds them: `id`, `path` and `embedding`.

        Args:
            query: float32 `(d,)`.
            limit: at most `most_results`.
            condition: expression of Milvus that they meet.
        """
        (hits,) = self._ask(
            f"search with the filter {condition!r}" if condition else "search",
            "search",
            data=[self.schema.asked(query)[0]],
            filter=condition,
            limit=limit,
            anns_field="embedding",
            search_params={"metric_type": "COSINE", "params": self.options.search_params},
            output_fields=["id", "path", "embedding"],
        )
        rows = [hit["entity"] for hit in hits]
        columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("id", "path")}
        return pa.table({**columns, "embedding": embedding_column(self.schema.embeddings(rows))})

    def write(self, table: pa.Table) -> None:
        """Add images, or replace those of the same ids, in as many requests as are needed, one after the other.

        Args:
            table: `id`, `path`, `digest`, `embedding` and the columns of metadata.

        Raises:
            ValueError: if it does not fit the store, see [`StoreSchema.fitted`].
            OSError: if the server does not answer or has no space; all requests before are kept.
        """
        table = self.schema.fitted(table)
        size = max(1, min(BATCH_ROWS, BATCH_BYTES * len(table) // max(table.nbytes, 1)))
        for start in range(0, len(table), size):
            rows = self.schema.rows(table.slice(start, size))
            self._change(f"store {len(rows)} images", "upsert", rows)

    def remove(self, ids: Sequence[str]) -> None:
        """Remove images; ids that the store does not have make no difference."""
        for start in range(0, len(ids), LOOKUP):
            keys = keys_of(ids[start : start + LOOKUP])
            self._change(f"remove {len(keys)} images", "delete", keys)

    def flush(self) -> None:
        """Have the server write what it has received to its files, and index it."""
        self._change("flush", "flush")

    def drop(self) -> None:
        """Delete the collection with all that it holds."""
        self._change(f"drop {self.name}", "drop_collection")

    def _ask(self, what: str, method: str, **arguments: Any) -> Any:
        """Call a method of the client that reads."""
        arguments |= {"consistency_level": self.options.consistency, "timeout": self.database.deadline}
        return self.database.request(what, lambda client: getattr(client, method)(self.name, **arguments))

    def _change(self, what: str, method: str, *arguments: Any) -> None:
        """Call a method of the client that writes."""

        def send(client: Any) -> None:
            with self.database.writing():
                getattr(client, method)(self.name, *arguments, timeout=self.database.deadline)

        self.database.request(what, send)


def open_store(address: StoreAddress) -> MilvusStore | None:
    """Open a store, None where the database has none of its name.

    Raises:
        ImportError: if Milvus's client is not installed.
        ValueError: if the database cannot be opened, the name is none that Milvus takes, or something else has it.
    """
    name = address.name
    if not MILVUS_NAME.fullmatch(name):
        raise ValueError(f"name={name!r}: a store's name has letters, digits and _, and begins with no digit")
    database = MilvusDatabase(address.uri, address.options.timeout)
    try:
        with database.doing(f"open {name}"):
            if not database.client.has_collection(name, timeout=database.deadline):
                database.close()
                return None
            facts = database.client.describe_collection(name, timeout=database.deadline)
        properties = facts["properties"]
        if not {MADE_BY, COLUMNS} <= {*properties}:
            raise ValueError(f"the collection {name} in {database.name} was not made by pvlf_hf: choose another name")
        schema = StoreSchema.read(properties, facts["fields"])
        if address.options.vectors not in (None, schema.vectors):
            raise ValueError(
                f"{name} in {database.name} stores {schema.vectors} vectors, not {address.options.vectors}: leave "
                "vectors out, or choose another name for a new store"
            )
        _complete(database, address)
    except BaseException:
        database.close()
        raise
    return MilvusStore(database, address, schema, json.loads(properties[MADE_BY]))


def check_maker(store: MilvusStore, made_by: dict[str, str]) -> None:
    """Raise a `ValueError`, and close the store, if embeddings made by a model do not belong into it."""
    if store.made_by != made_by:
        store.database.close()
        raise ValueError(
            f"{store.database.name} holds an index of another model or processor as {store.name!r}, which must not be "
            "mixed: use the one that made it, choose another file, database or name, or drop this collection"
        )


def names_of_stores(address: StoreAddress) -> list[str]:
    """Return the names of all collections of an address's database; errors as [`open_store`]."""
    database = MilvusDatabase(address.uri, address.options.timeout)
    try:
        with database.doing("list what it holds"):
            return sorted(database.client.list_collections(timeout=database.deadline))
    finally:
        database.close()


def create_store(address: StoreAddress, width: int, columns: pa.Schema | None, made_by: dict[str, str]) -> MilvusStore:
    """Make an empty store; one that another client makes at the same time is opened instead.

    Args:
        address: of the store.
        width: of the embeddings.
        columns: of the metadata.
        made_by: provenance of the embeddings.

    Raises:
        ValueError: if Milvus cannot hold a column or vectors of that kind, or refuses the index.
    """
    schema = StoreSchema.of(width, columns, address.options.vectors or "float32")
    database = MilvusDatabase(address.uri, address.options.timeout)
    if database.is_lite and (wanted := address.options.index_type) not in (None, *LITE_INDEXES):
        database.close()
        raise ValueError(
            f"index_type={wanted!r}: Milvus Lite has {', '.join(LITE_INDEXES)}; choose one of them, or use a "
            "server of Milvus, which has more"
        )
    try:
        with database.doing(f"make {address.name}"), database.writing():
            database.client.create_collection(
                address.name,
                schema=schema.milvus(database.client),
                consistency_level=address.options.consistency,
                properties=schema.properties(made_by),
                timeout=database.deadline,
            )
        _complete(database, address)
    except ValueError as error:
        database.close()
        other = open_store(address)
        if other is None and database.is_lite and schema.vectors != "float32":
            raise ValueError(
                f"vectors={schema.vectors!r} cannot be stored by Milvus Lite ({error}): use a server of Milvus, or "
                f"leave vectors out. {INT8_INDEX}"
            ) from error
        if other is None or other.schema != schema or other.made_by != made_by:
            raise
        return other
    if database.is_lite and not database.is_file:
        logger.warning(
            f"{database.name} is Milvus Lite, which does not order simultaneous writes itself: start it by {SERVE}"
        )
    return MilvusStore(database, address, schema, made_by)


def _complete(database: MilvusDatabase, address: StoreAddress) -> None:
    """Make the index of a collection where a kill has left it without, and load it."""
    name, client, options = address.name, database.client, address.options
    index_type = options.index_type or ("FLAT" if database.is_lite else "AUTOINDEX")
    with database.doing(f"make the index {index_type} of {name}"), database.writing():
        if not client.list_indexes(name, field_name="embedding"):
            index = client.prepare_index_params()
            # Milvus Lite takes them in a field of their own only, as pymilvus no longer sends them; servers take both.
            params = {"params": options.index_params} if options.index_params else {}
            index.add_index("embedding", index_type, metric_type="COSINE", params=params)
            client.create_index(name, index, timeout=database.deadline)
        kept = client.describe_index(name, "embedding")["index_type"]
        if options.index_type not in (None, kept):
            raise ValueError(
                f"{name} in {database.name} has the index {kept}, not {options.index_type}: leave index_type out, or "
                "choose another name for a new store"
            )
        client.load_collection(name, timeout=database.deadline)


__all__ = [
    "MilvusOptions",
    "MilvusStore",
    "StoreAddress",
    "check_maker",
    "create_store",
    "names_of_stores",
    "open_store",
]
