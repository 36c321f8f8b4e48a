"""Definitions: the ranking of a gallery, recall, average precision and gain of the ranks of targets.

- A score is the cosine of a query with a gallery image; higher is better. Products are summed in float64 and rounded
  to float32, whatever the input dtype, so that equal gallery rows tie and ranks do not depend on chunk size or
  hardware.
- A rank is 0-based: the number of gallery images before the target. Equal scores keep gallery order, as a stable
  sort leaves them. Published evaluations sort with an unstable order; where scores tie, their numbers can differ
  within the bounds that `target_ranks(..., ties="best")` and `ties="worst"` give.
- A metric is a fraction in [0, 1]; percent is a matter of rendering. Those of every benchmark are in `metrics.py`.

Shapes: Q queries, N gallery images, at most G positives per query, embedding width d.

Example:
    >>> from pvlf_hf.evaluation.ranking import target_ranks
    >>> queries, gallery, target = torch.eye(2), torch.eye(2), 0
    >>> rankings = [rank_gallery(query, gallery).tolist() for query in queries]
    >>> rankings
    [[0, 1], [1, 0]]
    >>> ranks = torch.tensor([ranking.index(target) for ranking in rankings])
    >>> recall_at_k(ranks, [1, 2])
    {1: 0.5, 2: 1.0}
    >>> torch.equal(ranks, target_ranks(queries, gallery, torch.tensor([target, target])))
    True
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from ..embeddings.similarity import check_embeds, check_finite, exact_unit_rows, first_true, pairwise_sum
from .ranking import NOT_RETRIEVED


def rank_gallery(query_embed: Tensor, gallery_embeds: Tensor, exclude: int | None = None) -> Tensor:
    """Rank the gallery for one query in float64: the definition of every rank in this package.

    `evaluation/ranking.py` and `top_k` compute the same, bit for bit, for many queries in a fraction of the time.

    Args:
        query_embed: (d,), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        exclude: gallery position to leave out, such as that of the reference image.

    Returns:
        (N,) int64, or (N - 1,) if one is left out: gallery positions, best first. The index of the target is its rank.

    Raises:
        ValueError: if shapes do not fit or an embedding is not finite.
    """
    check_embeds(query_embed[None], gallery_embeds)
    check_finite("query", query_embed[None])
    check_finite("gallery", gallery_embeds)
    query, gallery = exact_unit_rows(query_embed[None]), exact_unit_rows(gallery_embeds)  # float64
    scores = pairwise_sum(gallery * query).float()  # (N,)
    positions = scores.sort(descending=True, stable=True).indices  # equal scores in gallery order
    return positions if exclude is None else positions[positions != exclude]


def hits_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, Tensor]:
    """Mark the queries whose target is among the first k.

    Args:
        ranks: (Q,) int, 0-based, see `target_ranks`.
        ks: cut-offs, each at least 1.

    Returns:
        `{k: (Q,) bool}` in the order of `ks`.

    Raises:
        ValueError: if there are no queries, a rank is negative or a k is below 1.
    """
    ks = _checked_ks(ks)
    if len(ranks) == 0:
        raise ValueError("ranks is empty: recall needs at least one query")
    if ranks.ndim != 1 or (ranks < 0).any():
        raise ValueError(f"ranks must have shape (queries,) and be 0 or more, got {tuple(ranks.shape)}: {ranks}")
    return {k: ranks < k for k in ks}


def recall_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Return the fraction of queries whose target is among the first k: `{k: fraction}`.

    Arguments and errors are those of `hits_at_k`.
    """
    return {k: int(hits.sum()) / len(hits) for k, hits in hits_at_k(ranks, ks).items()}


def average_precision_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, Tensor]:
    """Return the average precision of each query over its first k images, as CIRCO defines it.

    It is the sum of precision@j over the ranks j <= k that hold a positive, divided by min(positives, k).

    Args:
        ranks: (Q, G) int, ranks of the positives in any order, -1 where padded, see `positive_ranks`.
        ks: cut-offs, each at least 1.

    Returns:
        `{k: (Q,) float64}` in the order of `ks`; the mean over queries is mAP@k, see `map_at_k`.

    Raises:
        ValueError: if there are no queries, a query has no positive or two of the same rank, or a k is below 1.
    """
    ks = _checked_ks(ks)
    ordered, count = _ordered(ranks)
    retrieved = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)  # positives up to and including this one
    precision = retrieved / (ordered.double() + 1)  # (Q, G)
    return {k: (precision * (ordered < k)).sum(dim=1) / count.clamp(max=k) for k in ks}


def map_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Return the mean average precision over queries: `{k: fraction}`.

    Arguments and errors are those of `average_precision_at_k`.
    """
    return {k: float(values.mean()) for k, values in average_precision_at_k(ranks, ks).items()}


def trapezoid_precision(ranks: Tensor) -> Tensor:
    """Return the average precision of each query over the full ranking, as i-CIR's scorer computes it.

    It is the area under precision over recall by the trapezoidal rule: each positive adds the mean of the precisions
    before and at its rank. The scorer divides by the number of positives plus 1e-5, and so does this.

    Args:
        ranks: (Q, G) int, ranks of the positives in any order, -1 where padded, see `positive_ranks`.

    Returns:
        (Q,) float64; the mean over queries is i-CIR's mAP.

    Raises:
        ValueError: as `average_precision_at_k`.
    """
    ordered, count = _ordered(ranks)
    position = torch.arange(ranks.shape[1], dtype=torch.float64, device=ranks.device)  # positives before this one
    rank = ordered.double()
    before = (position / rank).where(rank > 0, 1.0)
    area = (before + (position + 1) / (rank + 1)) / 2
    return area.where(ordered < NOT_RETRIEVED, 0.0).sum(dim=1) / (count.double() + 1e-5)


def gain_at_k(ranks: Tensor, grades: Tensor, ks: Iterable[int]) -> dict[int, Tensor]:
    """Return the normalised discounted cumulative gain of each query over its first k images (nDCG@k).

    Each graded image adds its grade, divided by log2(rank + 2); the sum is divided by that of the best ranking.

    Args:
        ranks: (Q, G) int, ranks of the graded images in any order, -1 where padded.
        grades: (Q, G) their grades, above 0; ignored where padded.
        ks: cut-offs, each at least 1.

    Returns:
        `{k: (Q,) float64}` in the order of `ks`.

    Raises:
        ValueError: as `average_precision_at_k`.
    """
    ks = _checked_ks(ks)
    _ordered(ranks)
    grades = grades.double().where(ranks >= 0, 0.0)
    best = grades.sort(dim=1, descending=True).values
    ideal_ranks = torch.arange(ranks.shape[1], device=ranks.device)
    discount, ideal = (1 / torch.log2(r.double() + 2) for r in (ranks.clamp(min=0), ideal_ranks))
    return {
        k: (grades * discount * (ranks < k)).sum(dim=1) / (best * ideal * (ideal_ranks < k)).sum(dim=1) for k in ks
    }


def hit_counts(ranks: Tensor, k: int) -> Tensor:
    """Return how many ranks (Q, G), -1 where padded, are among the first k: float64 (Q,)."""
    return ((ranks >= 0) & (ranks < k)).sum(dim=1).double()


def ranks_without(ranks: Tensor, others: Tensor) -> Tensor:
    """Return the ranks (Q, G) that images would have if others, of ranks (Q, M), were taken out; -1 is padding."""
    before = (others[:, None, :] >= 0) & (others[:, None, :] < ranks[:, :, None])
    return (ranks - before.sum(dim=2)).where(ranks >= 0, -1)


def _ordered(ranks: Tensor) -> tuple[Tensor, Tensor]:
    """Return ranks in ascending order, padding as `NOT_RETRIEVED` at the end, and the number of positives (Q,)."""
    if ranks.ndim != 2 or ranks.numel() == 0:
        raise ValueError(
            f"ranks must have shape (queries, positives) and at least one query, got {tuple(ranks.shape)}"
        )
    count = (ranks >= 0).sum(dim=1)  # positives, retrieved or not
    if (row := first_true(count == 0)) is not None:
        raise ValueError(f"query {row} has no positive to rank; drop it")
    ordered = ranks.long().where(ranks >= 0, NOT_RETRIEVED).sort(dim=1).values
    shared = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < NOT_RETRIEVED)).any(dim=1)
    if (row := first_true(shared)) is not None:
        raise ValueError(f"ranks of query {row} are {ranks[row].tolist()}: two positives cannot share a rank")
    return ordered, count


def _checked_ks(ks: Iterable[int]) -> list[int]:
    ks = list(ks)
    if bad := [k for k in ks if k < 1]:
        raise ValueError(f"cut-offs must be at least 1, got {bad}")
    return ks


__all__ = [
    "average_precision_at_k",
    "gain_at_k",
    "hit_counts",
    "hits_at_k",
    "map_at_k",
    "rank_gallery",
    "ranks_without",
    "recall_at_k",
    "trapezoid_precision",
]
