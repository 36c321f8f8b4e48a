"""Finds the images of a gallery that are nearest to a query: exactly, or approximately where there are too many."""

from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from ..digests import content_digest
from ..embeddings.combined import CombinedScores
from ..embeddings.fastest import fastest
from ..embeddings.similarity import error_bound, full_precision, kth_at_least, top_k, where_above
from .faiss_index import FaissIndex
from .vectors import encode_vectors

LocalIndex = Literal["exact", "faiss"]

IndexName = Literal["exact", "faiss", "milvus"]
"""Index of a gallery: in memory, or a store in Milvus (`pvlf_hf.search.milvus`)."""

GATHERED_SHARE = 1 / 32
"""Share of the gallery below which rows are copied to be compared (our choice, tuned); beyond it all are."""

COPIES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
"""Dtypes of the copy that a query is compared with, by name; the first where no other is measured to be faster."""

Copy = Literal["float32", "float16", "bfloat16", "int8"]
"""Numbers of that copy, as an argument names them."""

MEASURED_ROWS = 2**18
"""Rows with which the dtypes are measured (our choice); for fewer, a search takes milliseconds in any of them."""

ROWS_AT_ONCE = 4096
"""Rows of int8 brought to float32 at a time (our choice): 4 MiB at width 256, which a processor's caches hold."""


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
        chosen = self._chosen(self._cosines(query, rows)[None], k, self._error(len(query), rows))
        return chosen if rows is None else rows[chosen]

    def combined_candidates(self, scores: CombinedScores, k: int, rows: Tensor | None = None) -> Tensor:
        """Return candidates of a query whose scores are combined from two similarities; otherwise as `candidates`.

        A score does not decrease with either similarity, so that the bounds of both bound the score. Where many images
        have one settled score, as the 0 of a product, the first k of them are enough: ties keep the gallery's order.
        """
        bounds = []
        for vector, offset in zip(*scores.parts(0), strict=True):
            length = vector.norm().item()
            error = length * self._error(len(vector), rows) + 1e-6  # the scaled cosines are float32
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
            return self._products(query)
        if len(rows) < GATHERED_SHARE * len(self.compared):
            return self._products(query, rows)
        return self._products(query).index_select(0, rows)

    def _chosen(self, cosines: Tensor, k: int, error: Any) -> Tensor:
        return where_above(cosines, kth_at_least(cosines, k) - 2 * error)[1]

    def _products(self, query: Tensor, rows: Tensor | None = None) -> Tensor:
        return _product(self.compared if rows is None else self.compared.index_select(0, rows), query)

    def _error(self, width: int, rows: Tensor | None) -> float | Tensor:
        """Return the largest error of the cosines, of all or of those of each row."""
        return half_error_bound(width, self.compared.dtype)


class Int8Index(ExactIndex):
    """Exact index whose copy is int8 with a scale for each image: a quarter of the embeddings' size.

    Rounding moves an image by a known distance, by which its cosine with a unit query changes at most. So no image
    that belongs to the best k is missed, and there are more candidates than in float16.

    Args:
        embeds: float32 `(gallery, d)`, L2-normalised.
    """

    def __init__(self, embeds: Tensor) -> None:
        self.compared = torch.empty(embeds.shape, dtype=torch.int8)
        self.scale, self.moved = torch.empty(2, len(embeds))
        for start in range(0, len(embeds), ROWS_AT_ONCE):
            rows, part = slice(start, start + ROWS_AT_ONCE), embeds[start : start + ROWS_AT_ONCE]
            self.compared[rows], scale = encode_vectors(part, "int8")
            assert scale is not None  # of int8
            self.scale[rows] = scale
            self.moved[rows] = (part.double() - scale[:, None].double() * self.compared[rows]).norm(dim=1)
        self.moved *= 1 + torch.finfo(torch.float32).eps  # rounded to float32

    def _products(self, query: Tensor, rows: Tensor | None = None) -> Tensor:
        values, scale = (self.compared, self.scale) if rows is None else (self.compared[rows], self.scale[rows])
        products = torch.empty(len(values))
        for start in range(0, len(values), ROWS_AT_ONCE):
            tile = slice(start, start + ROWS_AT_ONCE)
            torch.mv(values[tile].float(), query, out=products[tile])
        return products.mul_(scale)

    def _chosen(self, cosines: Tensor, k: int, error: Any) -> Tensor:
        return where_above(cosines + error, kth_at_least(cosines - error, k))[1]

    def _error(self, width: int, rows: Tensor | None) -> Tensor:
        # Twice `error_bound`: a moved image may be longer than 1, its product is multiplied by the scale, and sums
        # with this error are rounded.
        return (self.moved if rows is None else self.moved[rows]) + 2 * error_bound(width)


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


def check_index(name: str, uri: str | None = None, milvus: bool = False) -> None:
    """Raise a `ValueError` unless the index exists and has a `uri` where, and only where, it needs one.

    Args:
        name: of the index.
        uri: of a database.
        milvus: whether the index may be one in Milvus.
    """
    names = get_args(IndexName if milvus else LocalIndex)
    if name not in names:
        raise ValueError(f"index={name!r}: choose one of {names}")
    if (name == "milvus") != (uri is not None):
        raise ValueError(
            f"index={name!r} with uri={uri!r}: index='milvus' needs a uri, a file ending in .db or a cluster's "
            "URL, and the others take none"
        )


def check_copy(name: str | None, index: str) -> None:
    """Raise a `ValueError` unless the argument `vectors` is one that this index has.

    Args:
        name: of the numbers that are compared, one of `Copy`; None leaves the choice to the index.
        index: name of the index.
    """
    if name is not None and index != "exact":
        raise ValueError(f"vectors={name!r} is for index='exact', and the index is {index!r}: leave one of them out")
    if name is not None and name not in get_args(Copy):
        raise ValueError(f"vectors={name!r}: choose one of {get_args(Copy)}")


def make_index(name: LocalIndex, embeds: Tensor, file: Path | None = None, vectors: Copy | None = None) -> VectorIndex:
    """Build the index of embeddings float32 `(gallery, d)`, L2-normalised, or load it from the file that keeps it.

    Args:
        name: of the index.
        embeds: of the gallery.
        file: keeps an index that takes long to build.
        vectors: numbers that the exact index compares; by default the fastest.
    """
    if name == "faiss":
        return FaissIndex(embeds, file)
    if vectors == "int8":
        return Int8Index(embeds)
    return ExactIndex(embeds, None if vectors is None else COPIES[vectors])


__all__ = [
    "Copy",
    "ExactIndex",
    "IndexName",
    "Int8Index",
    "LocalIndex",
    "VectorIndex",
    "check_copy",
    "check_index",
    "make_index",
]
