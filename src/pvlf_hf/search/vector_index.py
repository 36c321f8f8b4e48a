"""Which pictures of a gallery are nearest to a query: exactly, or approximately where there are too many for that."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from ..embeddings.similarity import error_bound, kth_at_least, where_above

IndexName = Literal["exact", "faiss", "milvus"]

SEARCH_WIDTH = 128
"""Neighbours that FAISS's graph search keeps in view, its `efSearch`. Ours: of the ten best of 20,000 random
vectors of width 64, the worst case, this finds 97 %, FAISS's own 16 half."""

COLLECTION = "pvlf_"
"""A Milvus collection is named after the model: this and its fingerprint. A database holds one gallery."""

MILVUS_BATCH, MILVUS_MOST = 1000, 16384
"""Rows sent at once (ours), and the most that Milvus answers at once."""


class VectorIndex(Protocol):
    """Finds what may be nearest; [`Gallery`] orders it by the embeddings themselves."""

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """Gallery rows, int64, in any order, among them the best k (most of them, where approximate).

        Args:
            query: float32 `(d,)`, L2-normalised.
            k: between 1 and the size of the gallery.
        """


class ExactIndex:
    """Compares the query with every picture, in half precision, whose error decides how many are left to choose from.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised; a float16 copy is kept, half their size, and read in half the
            time: comparing takes no longer than reading it.
    """

    def __init__(self, embeds: Tensor) -> None:
        self.halves = embeds.half()

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """See [`VectorIndex`]; all that rounding could have kept out of the best k are among them."""
        cosines = (self.halves @ query.half()).float()[None]  # (1, gallery)
        return where_above(cosines, kth_at_least(cosines, k) - 2 * half_error_bound(len(query)))[1]


def half_error_bound(width: int) -> float:
    """The most that a cosine of half precision numbers can be off from the score, about 1.5e-3.

    To [`error_bound`], for sums in float32, each of three roundings (picture, query, result) adds 2^-11; the tenth
    covers second orders, and numbers below 2^-14, which are off by 2^-25 at most.
    """
    return 3.1 * 2.0**-11 + error_bound(width)


class FaissIndex:
    """FAISS's HNSW graph through `datasets`, in memory; built anew each time, about a minute per 100,000 pictures.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised.

    Raises:
        ImportError: if FAISS is not installed.
    """

    def __init__(self, embeds: Tensor) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ImportError("index='faiss' needs FAISS: pip install faiss-cpu") from error
        graph = faiss.IndexHNSWFlat(embeds.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = SEARCH_WIDTH
        self.rows = Dataset.from_dict({"row": range(len(embeds))})
        self.rows.add_faiss_index_from_external_arrays(embeds.numpy(), "embeds", custom_index=graph)

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """See [`VectorIndex`]; where the graph has a part that a search does not reach, fewer than k."""
        rows = torch.as_tensor(self.rows.search("embeds", query.numpy(), k).indices)
        return rows[rows >= 0].long()


class MilvusIndex:
    """A Milvus database: a local file (Milvus Lite) or a cluster. Takes up what is new and drops what is gone.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised.
        digests: of the pictures, by which the database knows them; equal ones are kept once.
        fingerprint: of the model.
        uri: a file ending in .db, or a cluster's address (`http://user:password@host:19530/database`).

    Raises:
        ImportError: if `pymilvus` (for a file also `milvus-lite`) is not installed.
        ValueError: if the database holds the embeddings of another model.
    """

    def __init__(self, embeds: Tensor, digests: Sequence[str], fingerprint: str, uri: str) -> None:
        try:
            from pymilvus import MilvusClient
        except ImportError as error:
            raise ImportError("index='milvus' needs its client: pip install pymilvus milvus-lite") from error
        self.client = MilvusClient(uri=uri)
        self.rows_of: dict[str, list[int]] = defaultdict(list)
        for row, digest in enumerate(digests):
            self.rows_of[digest].append(row)
        self.collection = COLLECTION + fingerprint
        there = [name for name in self.client.list_collections() if name.startswith(COLLECTION)]
        if other := [name for name in there if name != self.collection]:
            self.client.close()
            raise ValueError(
                f"{uri} holds an index of another model or processor, which must not be mixed: choose another file "
                f"or database, or drop its collection {other[0]}"
            )
        if not there:
            self._create(embeds.shape[1])
        self._synchronise(embeds)

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """See [`VectorIndex`]; at most 16,384 different pictures, which is Milvus's limit."""
        limit = min(k, len(self.rows_of), MILVUS_MOST)
        (hits,) = self.client.search(self.collection, [query.tolist()], limit=limit)
        return torch.tensor([row for hit in hits for row in self.rows_of[hit["digest"]]])

    def _create(self, width: int) -> None:
        from pymilvus import DataType

        schema = self.client.create_schema()
        schema.add_field("digest", DataType.VARCHAR, is_primary=True, max_length=64)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=width)
        index = self.client.prepare_index_params()
        index.add_index("embedding", index_type="AUTOINDEX", metric_type="IP")
        # A search must see what was written just before.
        self.client.create_collection(self.collection, schema=schema, index_params=index, consistency_level="Strong")

    def _synchronise(self, embeds: Tensor) -> None:
        known: set[str] = set()
        iterator = self.client.query_iterator(self.collection, batch_size=MILVUS_MOST, output_fields=["digest"])
        while entries := iterator.next():
            known.update(entry["digest"] for entry in entries)
        iterator.close()
        gone = sorted(known - self.rows_of.keys())
        for start in range(0, len(gone), MILVUS_BATCH):
            self.client.delete(self.collection, ids=gone[start : start + MILVUS_BATCH])
        new = [digest for digest in self.rows_of if digest not in known]
        starts = range(0, len(new), MILVUS_BATCH)
        for start in tqdm(starts, desc=f"indexing {len(new)} pictures", disable=not new):
            batch = new[start : start + MILVUS_BATCH]
            rows = [{"digest": d, "embedding": embeds[self.rows_of[d][0]].tolist()} for d in batch]
            self.client.insert(self.collection, rows)


def check_index(name: str, uri: str | None) -> None:
    """Raises a `ValueError` unless the index exists and has a `uri` where, and only where, it needs one."""
    if name not in get_args(IndexName):
        raise ValueError(f"index={name!r}: choose one of {get_args(IndexName)}")
    if (name == "milvus") != (uri is not None):
        raise ValueError(
            f"index={name!r} with uri={uri!r}: index='milvus' needs a uri, a file ending in .db or a cluster's "
            "address, and the others take none"
        )


def make_index(
    name: IndexName, uri: str | None, embeds: Tensor, digests: Sequence[str], fingerprint: str
) -> VectorIndex:
    """Builds the index of a gallery; arguments as those of the classes above."""
    check_index(name, uri)
    if name == "exact":
        return ExactIndex(embeds)
    if name == "faiss":
        return FaissIndex(embeds)
    return MilvusIndex(embeds, digests, fingerprint, str(uri))


__all__ = ["ExactIndex", "FaissIndex", "IndexName", "MilvusIndex", "VectorIndex", "check_index", "make_index"]
