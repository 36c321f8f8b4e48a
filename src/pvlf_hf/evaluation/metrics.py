"""Ranks and recalls of retrieval: tensors and indices in, ranks and fractions out. Knows no model and no dataset.

Conventions used throughout, with Q queries, N gallery images, S subset members, at most G right answers a query and
embedding width d:

- A score is the cosine of a query with a gallery image; higher is better. Products are summed in float64 and rounded
  to float32, whatever the input dtype, so that equal gallery rows tie and ranks do not depend on chunk size or
  hardware. float32 products settle most ranks; what lies within their error is scored so (`embeddings/similarity.py`).
- A rank is 0-based: the number of gallery images before the target. Equal scores stand in gallery order, as a stable
  sort leaves them. Published evaluations sort with an unstable order; their numbers can differ where scores tie, at
  most as far as `ties="best"` and `ties="worst"` say.
- A metric is a fraction in [0, 1]; percent is a matter of rendering.

Example:
    >>> queries, gallery = torch.eye(2), torch.eye(2)
    >>> ranks = target_ranks(queries, gallery, target_index=torch.tensor([0, 0]))
    >>> ranks.tolist(), recall_at_k(ranks, [1, 2])
    ([0, 1], {1: 0.5, 2: 1.0})
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..embeddings.similarity import (
    CHUNK,
    check_embeds,
    checked_index,
    cosine_tiles,
    error_bound,
    first_true,
    score_pairs,
)

CIRR_KS = (1, 5, 10, 50)
CIRR_SUBSET_KS = (1, 2, 3)
FASHIONIQ_KS = (10, 50)
CIRCO_KS = (5, 10, 25, 50)

Ties = Literal["gallery order", "best", "worst"]
"""Where a target stands among images of the same score: by gallery position, before all of them, or after them."""


NOT_RETRIEVED = torch.iinfo(torch.int64).max
"""Rank of a target that a ranked list does not hold: beyond every cut-off."""


def target_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    chunk_size: int = CHUNK,
    ties: Ties = "gallery order",
) -> Tensor:
    """Rank of each query's target in the gallery.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        target_index: (Q,) int, position of the target in the gallery.
        exclude_index: (Q,) int, position of a gallery image left out of the query's ranking, such as its reference
            (the CIRR protocol; FashionIQ leaves nothing out).
        chunk_size: queries scored at a time, each time against as many images as keep the memory within some 50 MB;
            the ranks do not depend on it.
        ties: where the target stands among images of the same score; "best" and "worst" bound its rank.

    Returns:
        (Q,) int64, 0 for a target that comes first.

    Raises:
        ValueError: if widths or numbers of queries differ, an embedding is not finite, an index is outside the
            gallery, or a target is excluded.
    """
    target, exclude, _ = _checked_indices(target_index, exclude_index, None, len(query_embeds), len(gallery_embeds))
    return _ranks(query_embeds, gallery_embeds, target, exclude, chunk_size, ties)[:, 0]


def positive_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    positive_index: Tensor,
    exclude_index: Tensor | None = None,
    chunk_size: int = CHUNK,
) -> Tensor:
    """Rank of every right answer of each query, where there are several (CIRCO).

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        positive_index: (Q, G) int, positions of the right answers in the gallery in any order, shorter rows filled up
            with -1.
        exclude_index: (Q,) int, position of the gallery image left out of the query's ranking.
        chunk_size: queries scored at a time.

    Returns:
        (Q, G) int64, in the order of `positive_index`, -1 where that is.

    Raises:
        ValueError: as `target_ranks`, and if a row repeats a position or holds none.
    """
    positives = _checked_positions("positive_index", positive_index, len(query_embeds), len(gallery_embeds))
    if (row := first_true((positives < 0).all(dim=1))) is not None:
        raise ValueError(f"positive_index of query {row} holds no position; drop the query")
    exclude = _checked_exclude(exclude_index, positives, len(gallery_embeds))
    return _ranks(query_embeds, gallery_embeds, positives, exclude, chunk_size, "gallery order")


def subset_ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    subset_index: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    ties: Ties = "gallery order",
) -> Tensor:
    """Rank of each query's target among a few gallery images only: the full ranking, restricted (CIRR's Rsubset).

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised.
        gallery_embeds: (N, d), likewise.
        subset_index: (Q, S) int, positions of the members in the gallery in any order, target included, shorter rows
            filled up with -1. The excluded image may be a member or not.
        target_index: (Q,) int, position of the target in the gallery.
        exclude_index: (Q,) int, position of the gallery image left out of the query's ranking.
        ties: where the target stands among images of the same score; "best" and "worst" bound its rank.

    Returns:
        (Q,) int64, 0 for a target that comes first.

    Raises:
        ValueError: as `target_ranks`, and if a row repeats a member or lacks its target.
    """
    check_embeds(query_embeds, gallery_embeds)
    indices = _checked_indices(target_index, exclude_index, subset_index, len(query_embeds), len(gallery_embeds))
    target, exclude, _ = indices.to(query_embeds.device)
    subset = subset_index.to(target)
    row, place = (subset >= 0).nonzero(as_tuple=True)
    scores = torch.full(subset.shape, -torch.inf, device=target.device)
    scores[row, place] = score_pairs(query_embeds, gallery_embeds, row, subset[row, place])
    return _ranks_among(scores, subset, scores[subset == target][:, None], target, exclude, ties)


def ranks_from_scores(
    scores: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    subset_index: Tensor | None = None,
    ties: Ties = "gallery order",
) -> Tensor:
    """Rank of each query's target, from scores computed elsewhere (pass the negative of a distance).

    Args:
        scores: (Q, N), higher is better.
        target_index: (Q,) int, see `target_ranks`.
        exclude_index: (Q,) int, see `target_ranks`.
        subset_index: (Q, S) int, see `subset_ranks`; ranks are then among the members only.
        ties: where the target stands among images of the same score; "best" and "worst" bound its rank.

    Returns:
        (Q,) int64.

    Raises:
        ValueError: if scores are not a matrix or hold NaN, and for indices as in `target_ranks` and `subset_ranks`.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must have shape (queries, gallery), got {tuple(scores.shape)}")
    if (row := first_true(scores.isnan().any(dim=1))) is not None:
        raise ValueError(f"scores of query {row} hold NaN; look for it in the embeddings of that query")
    indices = _checked_indices(target_index, exclude_index, subset_index, *scores.shape)
    target, exclude, subset = indices.to(scores.device)
    positions = torch.arange(scores.shape[1], device=scores.device)[None] if subset is None else subset
    among = scores if subset is None else scores.gather(1, subset.clamp(min=0))
    return _ranks_among(among, positions, scores.gather(1, target), target, exclude, ties)


def ranks_from_lists(
    ranked: Sequence[Sequence[str]],
    positives: Sequence[Sequence[str]],
    exclude: Sequence[str] | None = None,
    subsets: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """Ranks of right answers in ranked lists of gallery ids, such as a submission file holds.

    Args:
        ranked: for each of the Q queries gallery ids (strings, or integers throughout), best first; a list may end
            before the gallery does.
        positives: the ids of each query's right answers.
        exclude: for each query the id that is taken out of its list, such as its reference; it may not be in it.
        subsets: for each query the ids that its list is restricted to, right answers included (CIRR's Rsubset).

    Returns:
        (Q, G) int64, in the order of `positives`: `NOT_RETRIEVED` for an id that is not in the list, -1 where padded.

    Raises:
        ValueError: if numbers of queries differ or are zero, a list or its right answers are empty or repeat an id,
            ids mix types, or a right answer is excluded or not in the subset.
    """
    counts = {"ranked": ranked, "positives": positives, "exclude": exclude, "subsets": subsets}
    sizes = {name: len(rows) for name, rows in counts.items() if rows is not None}
    if len(set(sizes.values())) > 1 or not ranked:
        raise ValueError(f"pass one row a query, and at least one query; got {sizes} rows")
    rows = []
    for query, (ids, right) in enumerate(zip(ranked, positives, strict=True)):
        left_out = [] if exclude is None else [exclude[query]]
        members = ids if subsets is None else subsets[query]
        _check_list(query, ids, right, left_out, None if subsets is None else members)
        kept = set(members).difference(left_out)
        rank_of = {image_id: rank for rank, image_id in enumerate(i for i in ids if i in kept)}
        rows.append(torch.tensor([rank_of.get(i, NOT_RETRIEVED) for i in right]))
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def recall_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Fraction of queries whose target is among the first k.

    Args:
        ranks: (Q,) int, 0-based, see `target_ranks`.
        ks: cut-offs, each at least 1.

    Returns:
        `{k: fraction}` in the order of `ks`.

    Raises:
        ValueError: if there are no queries, a rank is negative or a k is below 1.
    """
    ks = _checked_ks(ks)
    if len(ranks) == 0:
        raise ValueError("ranks is empty: recall needs at least one query")
    if ranks.ndim != 1 or (ranks < 0).any():
        raise ValueError(f"ranks must have shape (queries,) and be 0 or more, got {tuple(ranks.shape)}: {ranks}")
    return {k: int((ranks < k).sum()) / len(ranks) for k in ks}


def average_precision_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, Tensor]:
    """Average precision of each query over its first k images, as CIRCO defines it.

    The sum of precision@j over the positions j <= k that hold a right answer, divided by min(right answers, k).

    Args:
        ranks: (Q, G) int, ranks of the right answers in any order, -1 where padded, see `positive_ranks`.
        ks: cut-offs, each at least 1.

    Returns:
        `{k: (Q,) float64}` in the order of `ks`; the mean over queries is mAP@k, see `map_at_k`.

    Raises:
        ValueError: if there are no queries, a query has no right answer or two of the same rank, or a k is below 1.
    """
    ks = _checked_ks(ks)
    if ranks.ndim != 2 or ranks.numel() == 0:
        raise ValueError(
            f"ranks must have shape (queries, right answers) and at least one query, got {tuple(ranks.shape)}"
        )
    count = (ranks >= 0).sum(dim=1)  # right answers, retrieved or not
    if (row := first_true(count == 0)) is not None:
        raise ValueError(f"query {row} has no right answer to rank; drop it")
    ordered = ranks.long().where(ranks >= 0, NOT_RETRIEVED).sort(dim=1).values
    if (
        row := first_true(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] < NOT_RETRIEVED)).any(dim=1))
    ) is not None:
        raise ValueError(f"ranks of query {row} are {ranks[row].tolist()}: two right answers cannot share a rank")
    found = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)  # right answers up to and including this one
    precision = found / (ordered.double() + 1)  # (Q, G)
    return {k: (precision * (ordered < k)).sum(dim=1) / count.clamp(max=k) for k in ks}


def map_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Mean over queries of `average_precision_at_k`; arguments and errors are the same.

    Returns:
        `{k: fraction}` in the order of `ks`.
    """
    return {k: float(values.mean()) for k, values in average_precision_at_k(ranks, ks).items()}


def mean_by_aspect(values: Tensor, aspects: Sequence[Sequence[str]]) -> dict[str, float]:
    """Mean of a per-query number over the queries of each aspect (CIRCO's semantic mAP@10 takes AP@10).

    Args:
        values: (Q,), one number a query.
        aspects: for each query the aspects it belongs to, any number of them.

    Returns:
        `{aspect: mean}`, aspects in alphabetical order.

    Raises:
        ValueError: if the two cover different numbers of queries.
    """
    if len(values) != len(aspects):
        raise ValueError(f"{len(values)} values and the aspects of {len(aspects)} queries; pass the same queries")
    rows_of: dict[str, list[int]] = {}
    for row, names in enumerate(aspects):
        for name in set(names):
            rows_of.setdefault(name, []).append(row)
    return {name: float(values[rows_of[name]].double().mean()) for name in sorted(rows_of)}


def cirr_metrics(ranks: Tensor, subset_ranks: Tensor | None = None) -> dict[str, float]:
    """The numbers CIRR reports.

    Args:
        ranks: (Q,) int, `target_ranks` over the gallery without the reference.
        subset_ranks: (Q,) int, `subset_ranks` without the reference.

    Returns:
        Fractions `recall@{1,5,10,50}` and, where subset ranks are given, `recall_subset@{1,2,3}`, `mean`, CIRR's "Avg"
        of recall@5 and recall_subset@1, and `mean_of_seven`, by which TransAgg's code selects a model.

    Raises:
        ValueError: if the two cover different numbers of queries, or none.
    """
    metrics = {f"recall@{k}": recall for k, recall in recall_at_k(ranks, CIRR_KS).items()}
    if subset_ranks is None:
        return metrics
    if len(subset_ranks) != len(ranks):
        raise ValueError(f"ranks has {len(ranks)} queries and subset_ranks {len(subset_ranks)}; pass the same queries")
    metrics |= {f"recall_subset@{k}": recall for k, recall in recall_at_k(subset_ranks, CIRR_SUBSET_KS).items()}
    seven = sum(metrics.values()) / len(metrics)
    mean = (metrics["recall@5"] + metrics["recall_subset@1"]) / 2
    return metrics | {"mean": mean, "mean_of_seven": seven}


def fashioniq_metrics(ranks: Tensor) -> dict[str, float]:
    """The numbers FashionIQ reports for one category; its averages are plain means over the three categories.

    Args:
        ranks: (Q,) int, `target_ranks` over the category's gallery, nothing left out.

    Returns:
        Fractions `recall@{10,50}` and `mean`, of the two.

    Raises:
        ValueError: if there are no queries.
    """
    metrics = {f"recall@{k}": recall for k, recall in recall_at_k(ranks, FASHIONIQ_KS).items()}
    return metrics | {"mean": (metrics["recall@10"] + metrics["recall@50"]) / 2}


def circo_metrics(positive_ranks: Tensor, target_ranks: Tensor) -> dict[str, float]:
    """The numbers CIRCO reports.

    Args:
        positive_ranks: (Q, G) int, `positive_ranks` of all right answers.
        target_ranks: (Q,) int, `target_ranks` of the one that the caption was written for (CIRCO's first).

    Returns:
        Fractions `map@{5,10,25,50}` over all right answers and `recall@{5,10,25,50}` of the target.

    Raises:
        ValueError: if the two cover different numbers of queries, or none, or a query has no right answer.
    """
    if len(positive_ranks) != len(target_ranks):
        raise ValueError(
            f"positive_ranks has {len(positive_ranks)} queries and target_ranks {len(target_ranks)}; "
            "pass the same queries"
        )
    metrics = {f"map@{k}": mean for k, mean in map_at_k(positive_ranks, CIRCO_KS).items()}
    return metrics | {f"recall@{k}": recall for k, recall in recall_at_k(target_ranks, CIRCO_KS).items()}


class _Indices(NamedTuple):
    """Gallery positions, checked: target (Q, 1), excluded (Q,), subset members (Q, S)."""

    target: Tensor
    exclude: Tensor | None
    subset: Tensor | None

    def to(self, device: torch.device) -> "_Indices":
        return _Indices(*(None if index is None else index.to(device) for index in self))  # type: ignore[arg-type]


def _ranks(
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    positives: Tensor,
    exclude: Tensor | None,
    chunk_size: int,
    ties: Ties,
) -> Tensor:
    """(Q, G) number of gallery images before each positive, -1 where that is padding."""
    check_embeds(query_embeds, gallery_embeds)
    positives = positives.to(query_embeds.device)
    row, place = (positives >= 0).nonzero(as_tuple=True)
    scores = torch.full(positives.shape, torch.inf, device=positives.device)
    scores[row, place] = score_pairs(query_embeds, gallery_embeds, row, positives[row, place])
    ranks = torch.zeros_like(positives)
    for rows, columns, cosines in cosine_tiles(query_embeds, gallery_embeds, exclude, chunk_size):
        queries, gallery = query_embeds[rows], gallery_embeds[columns]
        for its_ranks, score, positive in zip(ranks[rows].T, scores[rows].T, positives[rows].T, strict=True):
            its_ranks += _count_before(queries, gallery, cosines, score, positive - columns.start, ties)
    return ranks.where(positives >= 0, -1)


def _count_before(
    queries: Tensor, gallery: Tensor, cosines: Tensor, score: Tensor, positive: Tensor, ties: Ties
) -> Tensor:
    """(c,) number of a tile's images before the one of this score (c,) and position (c,), which may be elsewhere."""
    error = error_bound(queries.shape[1])
    low, high = score - error, score + error
    flags = torch.empty_like(cosines)  # counted several times faster than booleans
    before = torch.gt(cosines, high[:, None], out=flags).sum(dim=1)
    near = torch.ge(cosines, low[:, None], out=flags).sum(dim=1) - before
    itself = (positive >= 0) & (positive < cosines.shape[1])
    (rows,) = (near > itself).nonzero(as_tuple=True)
    cosines = cosines[rows]
    row, column = ((cosines >= low[rows, None]) & (cosines <= high[rows, None])).nonzero(as_tuple=True)
    row = rows[row]
    ahead = _before(score_pairs(queries, gallery, row, column), column, score[row], positive[row], ties)
    return before.long() + row[ahead].bincount(minlength=len(score))


def _ranks_among(
    scores: Tensor, positions: Tensor, score: Tensor, target: Tensor, exclude: Tensor | None, ties: Ties
) -> Tensor:
    """(Q,) number of images of these scores (Q, n) and positions (Q or 1, n) before the target (Q, 1) of that score.

    A position of -1 stands for no image.
    """
    ahead = _before(scores, positions, score, target, ties) & (positions >= 0)
    if exclude is not None:
        ahead &= positions != exclude[:, None]
    return ahead.sum(dim=1)


def _before(scores: Tensor, positions: Tensor, score: Tensor, target: Tensor, ties: Ties) -> Tensor:
    """Whether images stand before a target of a score."""
    if ties not in get_args(Ties):
        raise ValueError(f"ties={ties!r}: choose one of {get_args(Ties)}")
    ahead = scores > score
    if ties != "best":
        ahead |= (scores == score) & (positions != target if ties == "worst" else positions < target)
    return ahead


def _checked_indices(
    target_index: Tensor,
    exclude_index: Tensor | None,
    subset_index: Tensor | None,
    num_queries: int,
    gallery_size: int,
) -> _Indices:
    target = checked_index("target_index", target_index, num_queries, gallery_size)[:, None]
    exclude = _checked_exclude(exclude_index, target, gallery_size)
    if subset_index is None:
        return _Indices(target, exclude, None)
    subset = _checked_positions("subset_index", subset_index, num_queries, gallery_size)
    if (row := first_true(~(subset == target).any(dim=1))) is not None:
        raise ValueError(
            f"query {row}: its target {int(target[row])} is not in its subset {subset[row].tolist()}; "
            "add it or drop the query"
        )
    return _Indices(target, exclude, subset)


def _checked_exclude(exclude_index: Tensor | None, positives: Tensor, gallery_size: int) -> Tensor | None:
    if exclude_index is None:
        return None
    exclude = checked_index("exclude_index", exclude_index, len(positives), gallery_size)
    if (row := first_true((positives == exclude[:, None]).any(dim=1))) is not None:
        raise ValueError(
            f"query {row}: its target {int(exclude[row])} is also its excluded image, so it has no rank; "
            "drop the query or exclude nothing"
        )
    return exclude


def _checked_positions(name: str, index: Tensor, num_queries: int, gallery_size: int) -> Tensor:
    """As `checked_index`, for (Q, members) positions, filled up with -1."""
    index = torch.as_tensor(index, dtype=torch.int64, device="cpu")
    if index.ndim != 2 or len(index) != num_queries:
        raise ValueError(f"{name} must have shape ({num_queries}, members), got {tuple(index.shape)}")
    if (row := first_true(((index < -1) | (index >= gallery_size)).any(dim=1))) is not None:
        raise ValueError(
            f"{name} of query {row} is {index[row].tolist()}: members must lie in the gallery of "
            f"{gallery_size} images, or be -1 for none"
        )
    ordered = index.sort(dim=1).values
    if (row := first_true(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(dim=1))) is not None:
        raise ValueError(f"{name} of query {row} is {index[row].tolist()}, which repeats a member; list it once")
    return index


def _check_list(
    query: int,
    ids: Sequence[str],
    right: Sequence[str],
    left_out: Sequence[str],
    members: Sequence[str] | None,
) -> None:
    for name, listed in (("ranked list", ids), ("list of right answers", right)):
        if len(listed) == 0:
            raise ValueError(f"query {query}: its {name} is empty; drop the query or mend the list")
        if len(set(listed)) < len(listed):
            repeated = next(i for i in listed if listed.count(i) > 1)
            raise ValueError(f"query {query}: its {name} repeats {repeated!r}; list it once")
    if len(kinds := {type(i).__name__ for i in chain(ids, right, left_out, members or ())}) > 1:
        raise ValueError(f"query {query}: its ids are of types {sorted(kinds)} and would not match; use one type")
    if excluded := set(right).intersection(left_out):
        raise ValueError(f"query {query}: its target {excluded.pop()!r} is also its excluded image; drop the query")
    if members is not None and (missing := [i for i in right if i not in members]):
        raise ValueError(f"query {query}: its target {missing[0]!r} is not in its subset; add it or drop the query")


def _checked_ks(ks: Iterable[int]) -> list[int]:
    ks = list(ks)
    if bad := [k for k in ks if k < 1]:
        raise ValueError(f"cut-offs must be at least 1, got {bad}")
    return ks
