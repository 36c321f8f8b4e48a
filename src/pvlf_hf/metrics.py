"""Ranks and recalls of retrieval: tensors and indices in, ranks and fractions out. Knows no model and no dataset.

Conventions used throughout, with Q queries, N gallery images, S subset members and embedding width d:

- A score is the cosine of a query with a gallery image; higher is better. Products are summed in float64 and rounded
  to float32, whatever the input dtype, because float32 products of *equal* gallery rows differ in the last bit with
  their position in the matrix: ties and ranks would depend on chunk size and hardware.
- A rank is 0-based: the number of gallery images before the target. Equal scores stand in gallery order, as a stable
  sort leaves them. Published evaluations sort with an unstable order; their numbers can differ where scores tie.
- A metric is a fraction in [0, 1]; percent is a matter of rendering.

Example:
    >>> queries, gallery = torch.eye(2), torch.eye(2)
    >>> ranks = target_ranks(queries, gallery, target_index=torch.tensor([0, 0]))
    >>> ranks.tolist(), recall_at_k(ranks, [1, 2])
    ([0, 1], {1: 0.5, 2: 1.0})
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CIRR_KS = (1, 5, 10, 50)
CIRR_SUBSET_KS = (1, 2, 3)


def target_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """Rank of each query's target in the gallery.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        target_index: (Q,) int, position of the target in the gallery.
        exclude_index: (Q,) int, position of a gallery image left out of the query's ranking, such as its reference
            (the CIRR protocol; FashionIQ leaves nothing out).
        chunk_size: queries scored at a time; the ranks do not depend on it, the memory does (about
            `20 * chunk_size * N` bytes).

    Returns:
        (Q,) int64, 0 for a target that comes first.

    Raises:
        ValueError: if widths or numbers of queries differ, an embedding is not finite, an index is outside the
            gallery, or a target is excluded.
    """
    return _chunked_ranks(query_embeds, gallery_embeds, target_index, exclude_index, None, chunk_size)


def subset_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    subset_index: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    chunk_size: int = 128,
) -> Tensor:
    """Rank of each query's target among a few gallery images only: the full ranking, restricted (CIRR's Rsubset).

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        subset_index: (Q, S) int, positions of the members in the gallery in any order, target included, shorter rows
            filled up with -1. The excluded image may be a member or not.
        target_index: (Q,) int, position of the target in the gallery.
        exclude_index: (Q,) int, position of the gallery image left out of the query's ranking.
        chunk_size: queries scored at a time.

    Returns:
        (Q,) int64, 0 for a target that comes first.

    Raises:
        ValueError: as `target_ranks`, and if a row repeats a member or lacks its target.
    """
    return _chunked_ranks(query_embeds, gallery_embeds, target_index, exclude_index, subset_index, chunk_size)


def ranks_from_scores(
    scores: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    subset_index: Tensor | None = None,
) -> Tensor:
    """Rank of each query's target, from scores computed elsewhere (pass the negative of a distance).

    Args:
        scores: (Q, N), higher is better.
        target_index: (Q,) int, see `target_ranks`.
        exclude_index: (Q,) int, see `target_ranks`.
        subset_index: (Q, S) int, see `subset_ranks`; ranks are then among the members only.

    Returns:
        (Q,) int64.

    Raises:
        ValueError: if scores are not a matrix or hold NaN, and for indices as in `target_ranks` and `subset_ranks`.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (queries, gallery), got {tuple(scores.shape)}")
    if (row := _first(scores.isnan().any(dim=1))) is not None:
        raise ValueError(f"scores of query {row} hold NaN; look for it in the embeddings of that query")
    indices = _checked_indices(target_index, exclude_index, subset_index, *scores.shape)
    return _count_ahead(scores, indices.take(slice(None), scores.device))


def top_k(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    k: int,
    exclude_index: Tensor | None = None,
    chunk_size: int = 128,
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
        exclude_index = _checked_index("exclude_index", exclude_index, len(query_embeds), len(gallery_embeds))
    scores, positions = [], []
    for rows, chunk in _score_chunks(query_embeds, gallery_embeds, chunk_size):
        if exclude_index is not None:
            chunk.scatter_(1, exclude_index[rows, None].to(chunk.device), -torch.inf)
        # torch.topk leaves the order of equal scores open.
        best = chunk.sort(dim=1, descending=True, stable=True)
        scores.append(best.values[:, :k].clone())  # a view would keep the whole chunk alive
        positions.append(best.indices[:, :k].clone())
    return torch.cat(scores), torch.cat(positions)


def recall_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Fraction of queries whose target is among the first k.

    Args:
        ranks: (Q,) int, 0-based, see `target_ranks`.
        ks: cut-offs, each at least 1.

    Returns:
        `{k: fraction}` in the order of `ks`.

    Raises:
        ValueError: if there are no queries or a k is below 1.
    """
    ks = list(ks)
    if len(ranks) == 0:
        raise ValueError("ranks is empty: recall needs at least one query")
    if bad := [k for k in ks if k < 1]:
        raise ValueError(f"recall cut-offs must be at least 1, got {bad}")
    return {k: int((ranks < k).sum()) / len(ranks) for k in ks}


def cirr_metrics(ranks: Tensor, subset_ranks: Tensor | None = None) -> dict[str, float]:
    """The numbers CIRR reports.

    Args:
        ranks: (Q,) int, `target_ranks` over the gallery without the reference.
        subset_ranks: (Q,) int, `subset_ranks` without the reference.

    Returns:
        Fractions `recall@{1,5,10,50}` and, where subset ranks are given, `recall_subset@{1,2,3}` and `mean`, CIRR's
        "Avg" of recall@5 and recall_subset@1.

    Raises:
        ValueError: if the two cover different numbers of queries, or none.
    """
    metrics = {f"recall@{k}": recall for k, recall in recall_at_k(ranks, CIRR_KS).items()}
    if subset_ranks is None:
        return metrics
    if len(subset_ranks) != len(ranks):
        raise ValueError(f"ranks has {len(ranks)} queries and subset_ranks {len(subset_ranks)}; pass the same queries")
    metrics |= {f"recall_subset@{k}": recall for k, recall in recall_at_k(subset_ranks, CIRR_SUBSET_KS).items()}
    metrics["mean"] = (metrics["recall@5"] + metrics["recall_subset@1"]) / 2
    return metrics


class _Indices(NamedTuple):
    """Gallery positions, checked, on the CPU: target (Q,), excluded (Q,), subset members (Q, S)."""

    target: Tensor
    exclude: Tensor | None
    subset: Tensor | None

    def take(self, rows: slice, device: torch.device) -> "_Indices":
        return _Indices(*(None if index is None else index[rows].to(device) for index in self))  # type: ignore[arg-type]


def _chunked_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None,
    subset_index: Tensor | None,
    chunk_size: int,
) -> Tensor:
    indices = _checked_indices(target_index, exclude_index, subset_index, len(query_embeds), len(gallery_embeds))
    chunks = _score_chunks(query_embeds, gallery_embeds, chunk_size)
    return torch.cat([_count_ahead(scores, indices.take(rows, scores.device)) for rows, scores in chunks])


def _count_ahead(scores: Tensor, indices: _Indices) -> Tensor:
    """Number of gallery images (of the subset, if any) that come before the target, for a chunk of c queries."""
    target, exclude, subset = indices
    target_score = scores.gather(1, target[:, None])  # from the same product, so that the target ties with itself
    earlier = torch.arange(scores.shape[1], device=scores.device) < target[:, None]  # (c, N)
    ahead = (scores > target_score) | ((scores == target_score) & earlier)
    if exclude is not None:
        ahead.scatter_(1, exclude[:, None], False)
    if subset is not None:
        ahead = ahead.gather(1, subset.clamp(min=0)) & (subset >= 0)  # (c, S)
    return ahead.sum(dim=1)


def _score_chunks(query_embeds: Tensor, gallery_embeds: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields the rows and the float32 cosines (c, N) of `chunk_size` queries at a time."""
    queries, gallery = _unit_rows("query", query_embeds), _unit_rows("gallery", gallery_embeds)
    if queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"query_embeds are {queries.shape[1]} wide and gallery_embeds {gallery.shape[1]}; "
            "compute both with the same model"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    for start in range(0, len(queries), chunk_size):
        rows = slice(start, start + chunk_size)
        yield rows, (queries[rows] @ gallery.T).float()


def _unit_rows(name: str, embeds: Tensor) -> Tensor:
    if embeds.ndim != 2 or embeds.numel() == 0:
        raise ValueError(
            f"{name}_embeds must have shape (rows, width) and at least one row, got {tuple(embeds.shape)}"
        )
    if (row := _first(~embeds.isfinite().all(dim=1))) is not None:
        raise ValueError(f"{name}_embeds hold NaN or infinity, first at {name} {row}")
    return F.normalize(embeds.double(), dim=1)


def _checked_indices(
    target_index: Tensor,
    exclude_index: Tensor | None,
    subset_index: Tensor | None,
    num_queries: int,
    gallery_size: int,
) -> _Indices:
    target = _checked_index("target_index", target_index, num_queries, gallery_size)
    exclude = subset = None
    if exclude_index is not None:
        exclude = _checked_index("exclude_index", exclude_index, num_queries, gallery_size)
        if (row := _first(target == exclude)) is not None:
            raise ValueError(
                f"query {row}: its target {int(target[row])} is also its excluded image, so it has no rank; "
                "drop the query or exclude nothing"
            )
    if subset_index is not None:
        subset = _checked_subset(subset_index, target, gallery_size)
    return _Indices(target, exclude, subset)


def _checked_index(name: str, index: Tensor, num_queries: int, gallery_size: int) -> Tensor:
    index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
    if index.shape != (num_queries,):
        raise ValueError(f"{name} must have shape ({num_queries},), one a query, got {tuple(index.shape)}")
    if (row := _first((index < 0) | (index >= gallery_size))) is not None:
        raise ValueError(f"{name} of query {row} is {int(index[row])}, outside the gallery of {gallery_size} images")
    return index


def _checked_subset(subset_index: Tensor, target: Tensor, gallery_size: int) -> Tensor:
    subset = torch.as_tensor(subset_index, dtype=torch.int64, device="cpu")
    if subset.ndim != 2 or len(subset) != len(target):
        raise ValueError(f"subset_index must have shape ({len(target)}, members), got {tuple(subset.shape)}")
    if (row := _first(((subset < -1) | (subset >= gallery_size)).any(dim=1))) is not None:
        raise ValueError(
            f"subset_index of query {row} is {subset[row].tolist()}: members must lie in the gallery of "
            f"{gallery_size} images, or be -1 for none"
        )
    if (row := _first(~(subset == target[:, None]).any(dim=1))) is not None:
        raise ValueError(
            f"query {row}: its target {int(target[row])} is not in its subset {subset[row].tolist()}; "
            "add it or drop the query"
        )
    members = subset.sort(dim=1).values
    if (row := _first(((members[:, 1:] == members[:, :-1]) & (members[:, 1:] >= 0)).any(dim=1))) is not None:
        raise ValueError(f"query {row}: its subset {subset[row].tolist()} repeats a member; list it once")
    return subset


def _first(bad: Tensor) -> int | None:
    """Position of the first true entry of a vector."""
    return int(bad.nonzero()[0]) if bad.any() else None
