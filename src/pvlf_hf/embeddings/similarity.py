"""Cosines of queries with a gallery, a tile at a time: fast in float32, exact where that decides something.

With Q queries, N gallery images, embedding width d, and tiles of c queries by n images:

- The *score* of a query and an image is the cosine of the two, its products summed pairwise in float64, rounded to
  float32. It depends on its two rows alone, so that equal images tie exactly; of float32 products of equal rows, and
  of float64 ones now and then, the last bit differs with their place in the matrix.
- A tile holds float32 products instead, which are off by at most [`error_bound`]: they settle all but a few scores in
  thousands, and the few are computed as defined.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

TILE = 2**21
"""Cosines computed at a time (ours, measured): 8 MiB, which caches hold between the product and what reads it."""

PAIRS = 512
"""Pairs of rows multiplied at a time (ours, measured), for the same reason."""

CROWDED = 1 / 100
"""Share of a tile beyond which scoring all of it is faster than scoring pairs (ours, measured)."""

BLOCK = 64
"""Neighbouring cosines of which only the highest is looked at first (ours)."""


def error_bound(width: int) -> float:
    """The most that a cosine of a tile can be off from the score.

    In units u = 2^-24 and to first order, of which the rest is below the 6 u added: d for the products and their sum
    in any order, (d + 9) for two rows rounded and divided by their norms, 1 for rounding the score (Higham, Accuracy
    and Stability of Numerical Algorithms, 2002, section 3.1). About 3e-5 for the width 256.
    """
    relative = (2 * width + 16) * 2.0**-24
    return relative / (1 - relative)


def cosine_tiles(
    query_embeds: Tensor, gallery_embeds: Tensor, exclude_index: Tensor | None, chunk_size: int
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields rows, columns and float32 cosines (c, n); -inf where excluded. Columns ascend.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        exclude_index: (Q,) int64, gallery position that a query leaves out.
        chunk_size: c; n is chosen so that a tile has about `TILE` cosines.

    Raises:
        ValueError: if widths differ, an embedding is not finite, or the chunk size is below 1.
    """
    check_embeds(query_embeds, gallery_embeds)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    queries = _unit_rows("query", query_embeds, 0)
    width = max(1, TILE // min(chunk_size, len(queries)))
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
    """Scores of pairs.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        rows: (pairs,) int64, query of each pair.
        columns: (pairs,) int64, gallery position of each pair.

    Returns:
        float32 (pairs,).

    Raises:
        ValueError: if an embedding of a pair is not finite.
    """
    size = len(query_embeds) * len(gallery_embeds)
    if CROWDED * size < len(rows) and size <= 2 * TILE:
        return _score_tile(query_embeds, gallery_embeds)[rows, columns]
    return _score_pairs(query_embeds, gallery_embeds, rows, columns)


def _score_pairs(query_embeds: Tensor, gallery_embeds: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The definition."""
    scores = []
    few = exact_unit_rows(query_embeds) if len(query_embeds) <= min(PAIRS, len(rows)) else None
    for row, column in zip(rows.split(PAIRS), columns.split(PAIRS), strict=True):
        queries = exact_unit_rows(query_embeds[row]) if few is None else few[row]
        scores.append(pairwise_sum(queries * exact_unit_rows(gallery_embeds[column])).float())
    if torch.cat(scores).isnan().any():
        check_finite("query", query_embeds)
        check_finite("gallery", gallery_embeds)
    return torch.cat(scores)


def _score_tile(query_embeds: Tensor, gallery_embeds: Tensor) -> Tensor:
    """(c, n): a float64 product, and the definition where the order of its sums may decide the rounding."""
    products = exact_unit_rows(query_embeds) @ exact_unit_rows(gallery_embeds).T
    error = query_embeds.shape[1] * 2.0**-50
    scores, above = (products - error).float(), (products + error).float()
    rows, columns = (scores != above).nonzero(as_tuple=True)
    scores[rows, columns] = _score_pairs(query_embeds, gallery_embeds, rows, columns)
    return scores


def kth_at_least(cosines: Tensor, k: int) -> Tensor:
    """A number for each row that at least k of its cosines reach: (c, n) -> (c,), close to the kth highest.

    The kth highest maximum of blocks, which costs one pass; -inf for rows of fewer than k cosines.
    """
    size = max(1, cosines.shape[1] // (8 * k))
    blocks = cosines[:, : cosines.shape[1] // size * size].unflatten(1, (-1, size))
    if blocks.shape[1] < k:
        return cosines.new_full((len(cosines),), -torch.inf)
    return blocks.amax(dim=2).topk(k).values[:, -1]


def above(cosines: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, in their order, of the cosines (c, n) that exceed their row's `least` (c,)."""
    if short := -cosines.shape[1] % BLOCK:
        cosines = torch.nn.functional.pad(cosines, (0, short), value=-torch.inf)
    blocks = cosines.unflatten(1, (-1, BLOCK))
    row, block = (blocks.amax(dim=2) > least[:, None]).nonzero(as_tuple=True)
    hit, place = (blocks[row, block] > least[row, None]).nonzero(as_tuple=True)
    return row[hit], block[hit] * BLOCK + place


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products of float32 numbers, whatever shortcut (TF32, bfloat16) is allowed elsewhere."""
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
    """Raises a `ValueError` unless both are matrices of one width."""
    for name, embeds in (("query", query_embeds), ("gallery", gallery_embeds)):
        if embeds.ndim != 2 or embeds.numel() == 0:
            raise ValueError(
                f"{name}_embeds must have shape (rows, width) and at least one row, got {tuple(embeds.shape)}"
            )
    if query_embeds.shape[1] != gallery_embeds.shape[1]:
        raise ValueError(
            f"query_embeds are {query_embeds.shape[1]} wide and gallery_embeds {gallery_embeds.shape[1]}; "
            "compute both with the same model"
        )


def check_finite(name: str, embeds: Tensor, start: int = 0) -> None:
    """Raises a `ValueError` that names the first row with NaN or infinity; `start` is the position of row 0."""
    bad = ~embeds.isfinite().all(dim=1)
    if bad.any():
        raise ValueError(f"{name}_embeds hold NaN or infinity, first at {name} {start + int(bad.nonzero()[0])}")


def _unit_rows(name: str, embeds: Tensor, start: int) -> Tensor:
    """float32, normalised; `start` is the position of the first row in the embeddings that an error names."""
    norms = torch.linalg.vector_norm(embeds.float(), dim=1, keepdim=True)
    if not norms.isfinite().all():
        check_finite(name, embeds, start)
        return exact_unit_rows(embeds).float()  # squares beyond float32
    return embeds.float() / norms.clamp(min=1e-12)


def exact_unit_rows(embeds: Tensor) -> Tensor:
    """Returns the rows (n, d) in float64, divided by their norms; zeros stay zeros."""
    rows = embeds.double()
    return rows / pairwise_sum(rows * rows).sqrt().clamp(min=1e-12)[:, None]


def pairwise_sum(rows: Tensor) -> Tensor:
    """(n, d) -> (n,), halves added to each other: unlike a library's sum, in an order that only d decides."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rest = rows[:, 2 * half :]  # one column, where d is odd
        rows = rows[:, :half] + rows[:, half : 2 * half]
        rows = torch.cat([rows, rest], dim=1) if rest.numel() else rows
    return rows[:, 0]


CHUNK = 512
"""Queries scored at a time (ours): of 256 to 2,048 the fastest."""


def top_k(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    k: int,
    exclude_index: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """The best k gallery images of each query, best first, ties in gallery order.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        k: how many images to return.
        exclude_index: (Q,) int, position of the gallery image left out of the query's ranking.
        chunk_size: queries scored at a time.

    Returns:
        Cosines (Q, k) float32 and gallery positions (Q, k) int64.

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
    scores = torch.full((len(query_embeds), k), -torch.inf, device=query_embeds.device)
    positions = torch.zeros_like(scores, dtype=torch.int64)
    error = error_bound(query_embeds.shape[-1])
    for rows, columns, cosines in cosine_tiles(query_embeds, gallery_embeds, exclude_index, chunk_size):
        least = scores[rows, -1]  # what an image has to exceed
        if least.isinf().any():
            least = torch.maximum(least, kth_at_least(cosines, k) - error)
        row, column = above(cosines, least - error)
        if not len(row):
            continue
        found = score_pairs(query_embeds[rows], gallery_embeds[columns], row, column)
        # Those of each query in a row, behind its best so far: a stable sort leaves ties in gallery order.
        hit, group, counts = row.unique_consecutive(return_inverse=True, return_counts=True)
        place = k + torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[group]
        merged = scores.new_full((len(hit), k + int(counts.max())), -torch.inf)
        merged_positions = torch.zeros_like(merged, dtype=torch.int64)
        hit += rows.start
        merged[:, :k], merged_positions[:, :k] = scores[hit], positions[hit]
        merged[group, place], merged_positions[group, place] = found, column + columns.start
        best = merged.sort(dim=1, descending=True, stable=True)
        scores[hit] = best.values[:, :k]
        positions[hit] = merged_positions.gather(1, best.indices[:, :k])
    return scores, positions


def checked_index(name: str, index: Tensor, num_queries: int, gallery_size: int) -> Tensor:
    index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
    if index.shape != (num_queries,):
        raise ValueError(f"{name} must have shape ({num_queries},), one a query, got {tuple(index.shape)}")
    if (row := first_true((index < 0) | (index >= gallery_size))) is not None:
        raise ValueError(f"{name} of query {row} is {int(index[row])}, outside the gallery of {gallery_size} images")
    return index


def first_true(bad: Tensor) -> int | None:
    """Position of the first true entry of a vector."""
    return int(bad.nonzero()[0]) if bad.any() else None


__all__ = [
    "above",
    "check_embeds",
    "check_finite",
    "cosine_tiles",
    "error_bound",
    "exact_unit_rows",
    "kth_at_least",
    "pairwise_sum",
    "score_pairs",
    "top_k",
]
