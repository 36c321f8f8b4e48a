"""Ranks a gallery for one query: candidates of the index, scored again by the embeddings themselves.

By the exact index the results are the best k of the rows that may be found, whatever the query and the filter. FAISS
proposes candidates among all images; where a filter leaves some out it is not used, and every row that passes is
scored.
"""

import torch
from torch import Tensor

from ..embeddings.combined import CombinedScores
from ..embeddings.similarity import top_k
from .vector_index import ExactIndex, VectorIndex

FIRST_WIDTH = 256
"""Number of candidates first requested from an approximate index, for each half of a combined query (our choice)."""


def nearest(
    index: VectorIndex, embeds: Tensor, query: Tensor | CombinedScores, k: int, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Find the best k images, equal ones in the order of the gallery.

    Args:
        index: of the gallery.
        embeds: float32 `(gallery, d)`, L2-normalised.
        query: an embedding float32 `(d,)`, compared by cosine, or scores of one query that is none.
        k: at least 1; fewer are returned where fewer may be found.
        rows: int64, ascending: gallery rows that may be found; None for all.

    Returns:
        Scores float32 and gallery rows int64, best first.
    """
    if rows is not None and not len(rows):
        return torch.empty(0), rows
    k = min(k, len(embeds) if rows is None else len(rows))
    found = candidates(index, len(embeds), query, k, rows).sort().values
    if isinstance(query, CombinedScores):
        best = query.of_images(0, found).sort(descending=True, stable=True)
        return best.values[:k], found[best.indices[:k]]
    scores, order = top_k(query[None], embeds[found], min(k, len(found)))
    return scores[0], found[order[0]]


def candidates(index: VectorIndex, size: int, query: Tensor | CombinedScores, k: int, rows: Tensor | None) -> Tensor:
    """Return rows of a gallery of `size` images, in any order, among them the best k; arguments as [`nearest`]."""
    if isinstance(index, ExactIndex):
        if isinstance(query, CombinedScores):
            return index.combined_candidates(query, k, rows)
        return index.candidates(query, k, rows)
    if rows is not None:
        return rows
    if isinstance(query, CombinedScores):
        return from_both_sides(index, size, query, k)
    return index.candidates(query, k)


def from_both_sides(index: VectorIndex, size: int, scores: CombinedScores, k: int) -> Tensor:
    """Return the images nearest to either half of a query, as many as settle the best k (Fagin's threshold).

    An image that neither half has among its candidates is no more similar to them than the last of these, so its score
    is at most theirs combined. More candidates are requested until the k-th best score is above that, or the index has
    no more: the result is as exact as the index.
    """
    width, before = max(FIRST_WIDTH, 4 * k), 0
    while True:
        found = [index.candidates((v / v.norm()).float(), min(width, size)) for v in scores.parts(0)[0]]
        rows = torch.cat(found).unique()
        if len(rows) == size or len(rows) == before:
            return rows
        floors = [scores.similarities(0, one)[side].min() for side, one in enumerate(found)]
        kth = scores.of_images(0, rows).topk(min(k, len(rows))).values[-1]
        if len(rows) >= k and kth > scores.combine(*floors).float():
            return rows
        width, before = 4 * width, len(rows)


__all__ = ["nearest"]
