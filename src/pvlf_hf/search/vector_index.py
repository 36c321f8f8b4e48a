"""Finds the images of a gallery that are nearest to a query: exactly, or approximately where there are too many."""

from collections import defaultdict
from collections.abc import Sequence
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol, get_args
from urllib.parse import urlsplit

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..digests import content_digest
from ..embeddings.combined import CombinedScores
from ..embeddings.fastest import fastest
from ..embeddings.similarity import error_bound, full_precision, kth_at_least, top_k, where_above

IndexName = Literal["exact", "faiss", "milvus"]

SEARCH_WIDTH = 128
"""Length of the candidate list of FAISS's graph search, its `efSearch` (our choice). Of the ten best of 20,000 random
vectors of width 64, the worst case, this finds 97 %; FAISS's default of 16 finds half."""

GATHERED_SHARE = 1 / 32
"""Share of the gallery below which rows are copied to be compared (our choice, tuned); beyond it all are."""

COPIES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes of the copy that a query is compared with, by name; the first where no other is measured to be faster."""

MEASURED_ROWS = 2**18
"""Rows with which the dtypes are measured (our choice); for fewer, a search takes milliseconds in any of them."""

COLLECTION = "pvlf_"
"""Prefix of a Milvus collection's name; the model's fingerprint and the gallery's id follow."""

MILVUS_BATCH, MILVUS_MOST = 1000, 16384
"""Rows per request (our choice), and Milvus's limit of rows per answer."""


class VectorIndex(Protocol):
    """An index that proposes candidates; [`Gallery`] ranks them by the embeddings themselves."""

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """Return gallery rows, int64, in any order, among them the best k (most of them, where approximate).

        Args:
            query: float32 `(d,)`, L2-normalised.
            k: between 1 and the size of the gallery.
        """


class ExactIndex:
    """Exact index: compares every image with the query in low precision and keeps all that its error could hide.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised. A copy in half precision is kept, half their size, and read in
            half the time: comparing takes no longer than reading it.
        dtype: dtype of the copy, one of `COPIES`, which makes no difference to results; float32 needs no copy. By
            default the fastest for this gallery on this processor.
    """

    def __init__(self, embeds: Tensor, dtype: torch.dtype | None = None) -> None:
        self.compared = embeds.to(fastest_copy(embeds) if dtype is None else dtype)

    def candidates(self, query: Tensor, k: int, rows: Tensor | None = None) -> Tensor:
        """Return candidates, see [`VectorIndex`], with all that rounding could have kept out of the best k.

        With `rows` int64, ascending, they are of these gallery rows only.
        """
        cosines = self._cosines(query, rows)[None]
        chosen = where_above(cosines, kth_at_least(cosines, k) - 2 * self._error(len(query)))[1]
        return chosen if rows is None else rows[chosen]

    def combined_candidates(self, scores: CombinedScores, k: int, rows: Tensor | None = None) -> Tensor:
        """Return candidates of a query whose scores are combined from two similarities; otherwise as `candidates`.

        A score does not decrease with either similarity, so that the bounds of both bound the score. Where many images
        have one settled score, as the 0 of a product, the first k of them are enough: ties keep the gallery's order.
        """
        bounds = []
        for vector, offset in zip(*scores.parts(0), strict=True):
            length = vector.norm().item()
            error = length * self._error(len(vector)) + 1e-6  # the scaled cosines are float32
            similarity = length * self._cosines((vector / length).float(), rows) - offset.float()
            bounds.append((similarity - error, similarity + error))
        low, high = (scores.combine(*sides) for sides in zip(*bounds, strict=True))
        low, high = low - 1e-5 * low.abs(), high + 1e-5 * high.abs()  # rounding of `combine`
        kth = low.topk(min(k, len(low))).values[-1]
        chosen = (high > kth) | ((high == kth) & (low < high))
        chosen[((high == kth) & (low == high)).nonzero()[:k, 0]] = True
        found = chosen.nonzero()[:, 0]
        return found if rows is None else rows[found]

    def _cosines(self, query: Tensor, rows: Tensor | None) -> Tensor:
        """Compare in the precision of the copy: float32 `(rows,)`, or of the whole gallery."""
        if rows is None:
            return _product(self.compared, query)
        if len(rows) < GATHERED_SHARE * len(self.compared):
            return _product(self.compared.index_select(0, rows), query)
        return _product(self.compared, query).index_select(0, rows)

    def _error(self, width: int) -> float:
        return half_error_bound(width, self.compared.dtype)


def _product(images: Tensor, query: Tensor) -> Tensor:
    """Return the products of a query `(d,)` with images `(rows, d)`, in float32: `(rows,)`."""
    if images.dtype != torch.float32:
        return (images @ query.to(images.dtype)).float()
    with full_precision():  # two columns: MKL's product with one was slower than a pass over memory on an AMD EPYC
        return (images @ torch.stack([query, query], dim=1))[:, 0]


def half_error_bound(width: int, dtype: torch.dtype = torch.float16) -> float:
    """Return the largest error of a cosine computed in a dtype: about 1.5e-3 in float16, 0.012 in bfloat16.

    To [`error_bound`], for sums in float32, each of three roundings (image, query, result) adds at most half a unit in
    the last place, u = 2^-11 or 2^-8: for unit vectors x and y, |x| . |y| <= 1, so that a relative error u of every
    factor is at most u in the cosine. The factor 3.1 instead of 3 covers terms of second order, 3 u^2, and in float16
    numbers below 2^-14, whose error is at most 2^-25; bfloat16 has float32's exponents. In float32 nothing is rounded.
    """
    return error_bound(width) + (0 if dtype == torch.float32 else 3.1 * torch.finfo(dtype).eps / 2)


def fastest_copy(embeds: Tensor) -> torch.dtype:
    """Return the dtype in which a gallery is searched fastest, measured on its own first rows.

    Comparing in bfloat16 may be faster and leaves more candidates to be scored, how many depends on the gallery.
    """
    if len(embeds) < MEASURED_ROWS:
        return next(iter(COPIES.values()))
    sample = embeds[:MEASURED_ROWS]
    index_of = cache(partial(ExactIndex, sample))

    def search(dtype: torch.dtype) -> None:
        query = sample[len(sample) // 2]
        found = index_of(dtype).candidates(query, 50)
        top_k(query[None], sample[found], 50)

    digest = content_digest([sample[:64].numpy().tobytes()])[:12]
    ways = {name: partial(search, dtype) for name, dtype in COPIES.items()}
    return COPIES[fastest(f"copy to search gallery {digest} of width {embeds.shape[1]}", ways)]


class FaissIndex:
    """FAISS's HNSW graph through `datasets`, in memory; rebuilt on each load, a minute per 100,000 images.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised.

    Raises:
        ImportError: if FAISS is not installed.
    """

    def __init__(self, embeds: Tensor) -> None:
        try:
            import faiss
            from datasets import Dataset
        except ImportError as error:
            raise ImportError("index='faiss' needs FAISS: pip install faiss-cpu") from error
        graph = faiss.IndexHNSWFlat(embeds.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
        graph.hnsw.efSearch = SEARCH_WIDTH
        self.rows = Dataset.from_dict({"row": range(len(embeds))})
        self.rows.add_faiss_index_from_external_arrays(embeds.numpy(), "embeds", custom_index=graph)

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """Return candidates, see [`VectorIndex`]; fewer than k where a search does not reach a part of the graph."""
        rows = torch.as_tensor(self.rows.search("embeds", query.numpy(), k).indices)
        return rows[rows >= 0].long()


class MilvusIndex:
    """A collection in a Milvus database: a local file (Milvus Lite) or a cluster.

    New images of the gallery are added to the collection, and images that it no longer has are deleted.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised.
        digests: of the images, the primary key of the collection; equal images are kept once.
        client: the database, from [`connect`].
        collection: name of the gallery's own collection, from [`collection_of`].
    """

    def __init__(self, embeds: Tensor, digests: Sequence[str], client: Any, collection: str) -> None:
        self.client, self.collection = client, collection
        self.rows_of: dict[str, list[int]] = defaultdict(list)
        for row, digest in enumerate(digests):
            self.rows_of[digest].append(row)
        if not client.has_collection(collection):
            self._create(embeds.shape[1])
        self._synchronise(embeds)

    def candidates(self, query: Tensor, k: int) -> Tensor:
        """Return candidates, see [`VectorIndex`]; at most 16,384 different images, which is Milvus's limit.

        Raises:
            ValueError: if another process has changed the collection since.
        """
        limit = min(k, len(self.rows_of), MILVUS_MOST)
        (hits,) = self.client.search(self.collection, [query.tolist()], limit=limit)
        if not hits or any(hit["digest"] not in self.rows_of for hit in hits):
            raise ValueError(
                f"the Milvus collection {self.collection} was changed since this gallery was opened: load the gallery "
                "again"
            )
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
        for start in tqdm(starts, desc=f"adding {len(new)} images to Milvus", disable=not new):
            batch = new[start : start + MILVUS_BATCH]
            rows = [{"digest": d, "embedding": embeds[self.rows_of[d][0]].tolist()} for d in batch]
            self.client.insert(self.collection, rows)


def check_index(name: str, uri: str | None) -> None:
    """Raise a `ValueError` unless the index exists and has a `uri` where, and only where, it needs one."""
    if name not in get_args(IndexName):
        raise ValueError(f"index={name!r}: choose one of {get_args(IndexName)}")
    if (name == "milvus") != (uri is not None):
        raise ValueError(
            f"index={name!r} with uri={uri!r}: index='milvus' needs a uri, a file ending in .db or a cluster's "
            "URL, and the others take none"
        )


def connect(uri: str, fingerprint: str) -> Any:
    """Open a Milvus database; called before encoding, so that no embedding is computed that cannot be stored.

    Args:
        uri: a file ending in .db, or a cluster's URL (`http://user:password@host:19530/database`).
        fingerprint: of the model whose embeddings the database is to hold.

    Returns:
        a `pymilvus.MilvusClient`.

    Raises:
        ImportError: if `pymilvus` (for a file also `milvus-lite`) is not installed.
        ValueError: if the database cannot be opened, or holds embeddings of another model.
    """
    uri, is_file = str(uri), "://" not in str(uri)
    if find_spec("pymilvus") is None or (is_file and find_spec("milvus_lite") is None):
        raise ImportError("index='milvus' needs its client: pip install pymilvus milvus-lite")
    name = uri if is_file else urlsplit(uri).hostname  # without the password
    if is_file and not uri.endswith(".db"):
        raise ValueError(f"uri={uri!r}: name a file that ends in .db, or a cluster's URL, such as http://host:19530")
    if is_file and not Path(uri).absolute().parent.is_dir():
        raise ValueError(f"uri={uri!r}: there is no folder {Path(uri).absolute().parent}; make it first")
    from pymilvus import MilvusClient

    remedy = (
        "one process at a time can use a Milvus file: end the other, choose another file, or run a cluster"
        if is_file
        else "check the URL, the login, and that the cluster is running"
    )
    try:
        client = MilvusClient(uri=uri)
        collections = client.list_collections()
    except Exception as error:  # the client raises errors of gRPC and of Milvus Lite
        raise ValueError(f"the Milvus database {name} cannot be opened ({error}): {remedy}") from error
    if other := [c for c in collections if c.startswith(COLLECTION) and not c.startswith(COLLECTION + fingerprint)]:
        client.close()
        raise ValueError(
            f"{name} holds an index of another model or processor, which must not be mixed: choose another file "
            f"or database, or drop its collection {other[0]}"
        )
    return client


def collection_of(fingerprint: str, gallery_id: str) -> str:
    """Return the name of a gallery's collection: several galleries of one model share a database."""
    return f"{COLLECTION}{fingerprint}_{gallery_id}"


def make_index(
    name: IndexName, embeds: Tensor, digests: Sequence[str], client: Any = None, collection: str = ""
) -> VectorIndex:
    """Build the index of a gallery; arguments as those of the classes above."""
    if name == "exact":
        return ExactIndex(embeds)
    if name == "faiss":
        return FaissIndex(embeds)
    return MilvusIndex(embeds, digests, client, collection)


__all__ = [
    "ExactIndex",
    "FaissIndex",
    "IndexName",
    "MilvusIndex",
    "VectorIndex",
    "check_index",
    "collection_of",
    "connect",
    "make_index",
]
