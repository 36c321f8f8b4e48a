"""Cosine similarity of queries and a gallery, tile by tile: fast in float32, exact where rounding would decide.

- A *score* is the cosine of a query and an image: products summed pairwise in float64, rounded to float32. It depends
  on the two rows alone, so that equal images tie exactly. The last bit of a float32 matrix product, and now and then
  of a float64 one, depends on the position of a row in the matrix.
- A *tile* holds float32 matrix products, which differ from the scores by at most [`error_bound`]. They settle all but
  a few comparisons in a thousand; the pairs that they do not settle are scored as defined.

Shapes: Q queries, N gallery images, embedding width d; a tile has c queries and n images.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..models.loss_pvlf import exact_unit_rows, pairwise_sum

QUERIES_PER_CHUNK = 512
"""Queries scored at a time (our choice): the fastest of 256 to 2,048."""

COSINES_PER_TILE = 2**21
"""Cosines computed at a time (our choice, tuned): 8 MiB, which stay in the CPU cache between matmul and reduction."""

PAIRS_PER_BATCH = 512
"""Pairs of rows multiplied at a time (our choice, tuned), to stay in the CPU cache as well."""

CROWDED_SHARE = 1 / 100
"""Share of a tile's pairs beyond which scoring the whole tile is faster than scoring pairs (our choice, tuned)."""

COSINES_PER_BLOCK = 64
"""Neighbouring cosines that [`where_above`] skips at once if their maximum is too low (our choice)."""


def error_bound(width: int) -> float:
    """Return the largest difference between a cosine of a tile and the score, about 3e-5 for width 256.

    To first order, in units of u = 2^-24: d for the products and their sum in any order, d + 9 for two rows rounded
    and divided by their norms, 1 for rounding the score (Higham, Accuracy and Stability of Numerical Algorithms, 2002,
    section 3.1). The 6 u added exceed the terms of higher order.
    """
    relative = (2 * width + 16) * 2.0**-24
    return relative / (1 - relative)


def cosine_tiles(
    query_embeds: Tensor, gallery_embeds: Tensor, exclude_index: Tensor | None, chunk_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield tiles: query slice, gallery slice and float32 cosines (c, n), -inf where excluded; gallery slices ascend.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        exclude_index: (Q,) int64, gallery position that the query's ranking leaves out.
        chunk_size: c; n is chosen so that a tile has about `COSINES_PER_TILE` cosines.

    Raises:
        ValueError: if widths differ, an embedding is not finite, or the chunk size is below 1.
    """
    check_embeds(query_embeds, gallery_embeds)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    queries = _unit_rows("query", query_embeds, 0)
    width = max(1, COSINES_PER_TILE // min(chunk_size, len(queries)))
    for start in range(0, len(gallery_embeds), width):
        columns = slice(start, min(start + width, len(gallery_embeds)))
        gallery = _unit_rows("gallery", gallery_embeds[columns], start)
        for first in range(0, len(queries), chunk_size):
            rows = slice(first, first + chunk_size)
            with full_precision():
                cosines = queries[rows] @ gallery.T
            if exclude_index is not None:
                column = exclude_index[rows].to(cosines.device) - start
                (row,) = ((column >= 0) & (column < len(gallery))).nonzero(as_tuple=True)
                cosines[row, column[row]] = -torch.inf
            yield rows, columns, cosines


def score_pairs(query_embeds: Tensor, gallery_embeds: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return the scores of pairs of a query and an image, the faster of two ways to the same numbers.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        rows: (pairs,) int64, query of each pair.
        columns: (pairs,) int64, gallery position of each pair.

    Returns:
        (pairs,) float32.

    Raises:
        ValueError: if an embedding of a pair is not finite.
    """
    size = len(query_embeds) * len(gallery_embeds)
    if CROWDED_SHARE * size < len(rows) and size <= 2 * COSINES_PER_TILE:
        return _score_tile(query_embeds, gallery_embeds)[rows, columns]
    return _score_pairs(query_embeds, gallery_embeds, rows, columns)


def _score_pairs(query_embeds: Tensor, gallery_embeds: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Score pairs by the definition."""
    scores = []
    # Normalise each query once if there are fewer queries than pairs in a batch.
    units = exact_unit_rows(query_embeds) if len(query_embeds) <= min(PAIRS_PER_BATCH, len(rows)) else None
    for row, column in zip(rows.split(PAIRS_PER_BATCH), columns.split(PAIRS_PER_BATCH), strict=True):
        queries = exact_unit_rows(query_embeds[row]) if units is None else units[row]
        scores.append(pairwise_sum(queries * exact_unit_rows(gallery_embeds[column])).float())
    if torch.cat(scores).isnan().any():
        check_finite("query", query_embeds)
        check_finite("gallery", gallery_embeds)
    return torch.cat(scores)


def _score_tile(query_embeds: Tensor, gallery_embeds: Tensor) -> Tensor:
    """Score all pairs of a tile (c, n): a float64 product; by the definition where the order of sums may matter."""
    products = exact_unit_rows(query_embeds) @ exact_unit_rows(gallery_embeds).T
    error = query_embeds.shape[1] * 2.0**-50
    scores, upper = (products - error).float(), (products + error).float()
    rows, columns = (scores != upper).nonzero(as_tuple=True)
    scores[rows, columns] = _score_pairs(query_embeds, gallery_embeds, rows, columns)
    return scores


def kth_at_least(cosines: Tensor, k: int) -> Tensor:
    """Return a lower bound on the kth highest cosine of each row, close to it: (c, n) -> (c,).

    It is the kth highest maximum over blocks of columns, which takes one pass; -inf for rows of fewer than k cosines.
    """
    size = max(1, cosines.shape[1] // (8 * k))
    blocks = cosines[:, : cosines.shape[1] // size * size].unflatten(1, (-1, size))
    if blocks.shape[1] < k:
        return cosines.new_full((len(cosines),), -torch.inf)
    return blocks.amax(dim=2).topk(k).values[:, -1]


def where_above(cosines: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows and columns, in row-major order, of the cosines (c, n) above their row's threshold (c,)."""
    if padding := -cosines.shape[1] % COSINES_PER_BLOCK:
        cosines = torch.nn.functional.pad(cosines, (0, padding), value=-torch.inf)
    blocks = cosines.unflatten(1, (-1, COSINES_PER_BLOCK))
    row, block = (blocks.amax(dim=2) > threshold[:, None]).nonzero(as_tuple=True)
    hit, offset = (blocks[row, block] > threshold[row, None]).nonzero(as_tuple=True)
    return row[hit], block[hit] * COSINES_PER_BLOCK + offset


@contextmanager
def full_precision() -> Iterator[None]:
    """Multiply float32 matrices in float32 within the block, even if TF32 or bfloat16 products are allowed."""
    backends = (torch.backends.mkldnn.matmul, torch.backends.cuda.matmul)  # type: ignore[attr-defined]
    allowed = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, allowed, strict=True):
            backend.fp32_precision = precision


def check_embeds(query_embeds: Tensor, gallery_embeds: Tensor) -> None:
    """Raise a `ValueError` unless both are matrices of the same width."""
    for name, embeds in (("query", query_embeds), ("gallery", gallery_embeds)):
        if embeds.ndim != 2 or embeds.numel() == 0:
            raise ValueError(
                f"{name}_embeds must have shape (rows, width) and at least one row, got {tuple(embeds.shape)}"
            )
    if query_embeds.shape[1] == 2 * gallery_embeds.shape[1]:
        raise ValueError(
            f"query_embeds are {query_embeds.shape[1]} wide and gallery_embeds {gallery_embeds.shape[1]}: these are "
            "queries of a composition other than an inner product ('product'), whose scores the model computes; pass "
            "the model, or wrap them in pvlf_hf.embeddings.combined.CombinedQueries with its `combine`"
        )
    if query_embeds.shape[1] != gallery_embeds.shape[1]:
        raise ValueError(
            f"query_embeds are {query_embeds.shape[1]} wide and gallery_embeds {gallery_embeds.shape[1]}; "
            "compute both with the same model"
        )


def check_finite(name: str, embeds: Tensor, start: int = 0) -> None:
    """Raise a `ValueError` that names the first row with NaN or infinity; `start` is the position of row 0."""
    bad = ~embeds.isfinite().all(dim=1)
    if bad.any():
        raise ValueError(f"{name}_embeds hold NaN or infinity, first at {name} {start + int(bad.nonzero()[0])}")


def _unit_rows(name: str, embeds: Tensor, start: int) -> Tensor:
    """Return the rows in float32, divided by their norms; errors count rows from `start`."""
    norms = torch.linalg.vector_norm(embeds.float(), dim=1, keepdim=True)
    if not norms.isfinite().all():
        check_finite(name, embeds, start)
        return exact_unit_rows(embeds).float()  # squares overflow float32
    return embeds.float() / norms.clamp(min=1e-12)


def top_k(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    k: int,
    exclude_index: Tensor | None = None,
    chunk_size: int = QUERIES_PER_CHUNK,
) -> tuple[Tensor, Tensor]:
    """Return the best k gallery images of each query, best first, ties in gallery order.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        k: how many images to return.
        exclude_index: (Q,) int, gallery position that the query's ranking leaves out.
        chunk_size: queries scored at a time.

    Returns:
        Scores (Q, k) float32 and gallery positions (Q, k) int64.

    Raises:
        ValueError: if k is not between 1 and the number of images a query may return, and as in `target_ranks`.
    """
    available = len(gallery_embeds) - (exclude_index is not None)
    if not 1 <= k <= available:
        raise ValueError(
            f"k is {k}, but each query has {available} gallery images to return; pass 1 <= k <= {available}"
        )
    if exclude_index is not None:
        exclude_index = checked_index("exclude_index", exclude_index, len(query_embeds), len(gallery_embeds))
    best = TopK(query_embeds, k)
    best.add(gallery_embeds, torch.arange(len(gallery_embeds), device=query_embeds.device), exclude_index, chunk_size)
    return best.scores, best.positions


class TopK:
    """Best k images of each query among those that were added, in any number of parts.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        k: how many images to keep.

    Attributes:
        scores: (Q, k) float32, best first, -inf beyond the number of images that were added.
        positions: (Q, k) int64; ties are in the order in which images were added.
    """

    def __init__(self, query_embeds: Tensor, k: int) -> None:
        self.queries, self.k = query_embeds, k
        self.scores = torch.full((len(query_embeds), k), -torch.inf, device=query_embeds.device)
        self.positions = torch.zeros_like(self.scores, dtype=torch.int64)

    def add(
        self,
        gallery_embeds: Tensor,
        positions: Tensor,
        exclude_index: Tensor | None = None,
        chunk_size: int = QUERIES_PER_CHUNK,
    ) -> None:
        """Add images.

        Args:
            gallery_embeds: (n, d), any float dtype, need not be normalised.
            positions: (n,) int64, what `positions` calls them.
            exclude_index: (Q,) int64, row of `gallery_embeds` that the query leaves out.
            chunk_size: queries scored at a time.

        Raises:
            ValueError: as in `target_ranks`.
        """
        error = error_bound(self.queries.shape[-1])
        for rows, columns, cosines in cosine_tiles(self.queries, gallery_embeds, exclude_index, chunk_size):
            threshold = self.scores[rows, -1]
            if threshold.isinf().any():
                threshold = torch.maximum(threshold, kth_at_least(cosines, self.k) - error)
            row, column = where_above(cosines, threshold - error)
            if len(row):
                scores = score_pairs(self.queries[rows], gallery_embeds[columns], row, column)
                self._keep(rows.start, row, scores, positions[columns][column])

    def _keep(self, start: int, row: Tensor, scores: Tensor, positions: Tensor) -> None:
        """Merge candidates of queries, counted from `start`, with the best so far: a stable sort leaves ties as is."""
        query, group, counts = row.unique_consecutive(return_inverse=True, return_counts=True)
        offset = self.k + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[group]
        merged = scores.new_full((len(query), self.k + int(counts.max())), -torch.inf)
        merged_positions = torch.zeros_like(merged, dtype=torch.int64)
        query = query + start
        merged[:, : self.k], merged_positions[:, : self.k] = self.scores[query], self.positions[query]
        merged[group, offset], merged_positions[group, offset] = scores, positions
        best = merged.sort(dim=1, descending=True, stable=True)
        self.scores[query] = best.values[:, : self.k]
        self.positions[query] = merged_positions.gather(1, best.indices[:, : self.k])


def checked_index(name: str, index: Tensor, num_queries: int, gallery_size: int) -> Tensor:
    """Return one gallery position per query as int64 (Q,) on the CPU; raise a `ValueError` for any other index."""
    index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
    if index.shape != (num_queries,):
        raise ValueError(f"{name} must have shape ({num_queries},), one per query, got {tuple(index.shape)}")
    if (row := first_true((index < 0) | (index >= gallery_size))) is not None:
        raise ValueError(f"{name} of query {row} is {int(index[row])}, outside the gallery of {gallery_size} images")
    return index


def first_true(bad: Tensor) -> int | None:
    """Return the index of the first true entry of a vector, None if there is none."""
    return int(bad.nonzero()[0]) if bad.any() else None


__all__ = [
    "TopK",
    "check_embeds",
    "check_finite",
    "cosine_tiles",
    "error_bound",
    "exact_unit_rows",
    "kth_at_least",
    "pairwise_sum",
    "score_pairs",
    "top_k",
    "where_above",
]
