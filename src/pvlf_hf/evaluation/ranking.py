"""Ranks of targets: from embeddings by fast tiles, from score matrices, and from ranked lists of ids.

The definition is [`~pvlf_hf.evaluation.metrics.rank_gallery`], a plain float64 sort. Every function here returns the
index that the target has in that ranking, bit for bit, in a fraction of the time: float32 products settle most
comparisons, and pairs within their error are scored again as defined (`embeddings/similarity.py`).

Shapes: Q queries, N gallery images, S subset members, at most G positives per query, embedding width d.

Example:
    >>> target_ranks(torch.eye(2), torch.eye(2), target_index=torch.tensor([0, 0])).tolist()
    [0, 1]
"""

from collections.abc import Sequence
from itertools import chain
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..embeddings.combined import CombinedQueries
from ..embeddings.similarity import (
    QUERIES_PER_CHUNK,
    check_embeds,
    checked_index,
    cosine_tiles,
    error_bound,
    first_true,
    score_pairs,
)

Ties = Literal["gallery order", "best", "worst"]
"""Rank of a target among images of the same score: by gallery position, before all of them, or after all of them."""

NOT_RETRIEVED = torch.iinfo(torch.int64).max
"""Rank of a target that a ranked list lacks: beyond every cut-off."""


def target_ranks(
    query_embeds: Tensor | CombinedQueries,
    gallery_embeds: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    chunk_size: int = QUERIES_PER_CHUNK,
    ties: Ties = "gallery order",
) -> Tensor:
    """Return the rank of each query's target in the gallery.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised; or [`CombinedQueries`].
        gallery_embeds: (N, d), likewise.
        target_index: (Q,) int, gallery position of each target.
        exclude_index: (Q,) int, gallery position that the query's ranking leaves out, such as its reference image
            (CIRR's protocol; FashionIQ leaves nothing out).
        chunk_size: queries scored at a time, each time against as many images as keep the memory within some 50 MB;
            the ranks do not depend on it.
        ties: rank of the target among images of the same score; "best" and "worst" bound it.

    Returns:
        (Q,) int64, 0 for a target that comes first.

    Raises:
        ValueError: if widths or numbers of queries differ, an embedding is not finite, an index is outside the
            gallery, or a target is excluded.
    """
    target, exclude, _ = _checked_indices(target_index, exclude_index, None, len(query_embeds), len(gallery_embeds))
    return _ranks(query_embeds, gallery_embeds, target, exclude, chunk_size, ties)[:, 0]


def positive_ranks(
    query_embeds: Tensor | CombinedQueries,
    gallery_embeds: Tensor,
    positive_index: Tensor,
    exclude_index: Tensor | None = None,
    chunk_size: int = QUERIES_PER_CHUNK,
) -> Tensor:
    """Return the rank of every positive of each query, for benchmarks with several positives per query (CIRCO).

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised; or [`CombinedQueries`].
        gallery_embeds: (N, d), likewise.
        positive_index: (Q, G) int, gallery positions of the positives in any order, shorter rows padded with -1.
        exclude_index: (Q,) int, gallery position that the query's ranking leaves out.
        chunk_size: queries scored at a time.

    Returns:
        (Q, G) int64, in the order of `positive_index`, -1 where padded.

    Raises:
        ValueError: as `target_ranks`, and if a row repeats a position or holds none.
    """
    positives = _checked_positions("positive_index", positive_index, len(query_embeds), len(gallery_embeds))
    if (row := first_true((positives < 0).all(dim=1))) is not None:
        raise ValueError(f"positive_index of query {row} holds no position; drop the query")
    exclude = _checked_exclude(exclude_index, positives, len(gallery_embeds))
    return _ranks(query_embeds, gallery_embeds, positives, exclude, chunk_size, "gallery order")


def subset_ranks(
    query_embeds: Tensor | CombinedQueries,
    gallery_embeds: Tensor,
    subset_index: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    ties: Ties = "gallery order",
) -> Tensor:
    """Return the rank of each query's target among a few gallery images only, as CIRR's recall_subset needs it.

    Args:
        query_embeds: (Q, d), any float dtype, need not be normalised; or [`CombinedQueries`].
        gallery_embeds: (N, d), likewise.
        subset_index: (Q, S) int, gallery positions of the members in any order, target included, shorter rows padded
            with -1. The excluded image may be a member or not.
        target_index: (Q,) int, gallery position of each target.
        exclude_index: (Q,) int, gallery position that the query's ranking leaves out.
        ties: rank of the target among images of the same score; "best" and "worst" bound it.

    Returns:
        (Q,) int64, 0 for a target that comes first.

    Raises:
        ValueError: as `target_ranks`, and if a row repeats a member or lacks its target.
    """
    if isinstance(query_embeds, Tensor):
        check_embeds(query_embeds, gallery_embeds)
    indices = _checked_indices(target_index, exclude_index, subset_index, len(query_embeds), len(gallery_embeds))
    if isinstance(query_embeds, CombinedQueries):
        return _combined_ranks(query_embeds, gallery_embeds, *indices, ties)[:, 0]
    target, exclude, _ = indices.to(query_embeds.device)
    subset = subset_index.to(target)
    row, column = (subset >= 0).nonzero(as_tuple=True)
    scores = torch.full(subset.shape, -torch.inf, device=target.device)
    scores[row, column] = score_pairs(query_embeds, gallery_embeds, row, subset[row, column])
    return _ranks_among(scores, subset, scores[subset == target][:, None], target, exclude, ties)


def ranks_from_scores(
    scores: Tensor,
    target_index: Tensor,
    exclude_index: Tensor | None = None,
    subset_index: Tensor | None = None,
    ties: Ties = "gallery order",
) -> Tensor:
    """Return the rank of each query's target by scores computed elsewhere (pass the negative of a distance).

    Args:
        scores: (Q, N), higher is better.
        target_index: (Q,) int, see `target_ranks`.
        exclude_index: (Q,) int, see `target_ranks`.
        subset_index: (Q, S) int, see `subset_ranks`; ranks are then among the members only.
        ties: rank of the target among images of the same score; "best" and "worst" bound it.

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
    """Return the ranks of positives in ranked lists of gallery ids, such as a submission file holds.

    Args:
        ranked: for each of the Q queries gallery ids (strings, or integers throughout), best first; a list may be
            shorter than the gallery.
        positives: the ids of each query's positives.
        exclude: for each query an id to take out of its list, such as its reference; it need not be in the list.
        subsets: for each query the ids that its list is restricted to, positives included (CIRR's Rsubset).

    Returns:
        (Q, G) int64, in the order of `positives`: `NOT_RETRIEVED` for an id that is not in the list, -1 where padded.

    Raises:
        ValueError: if numbers of queries differ or are zero, a list or its positives are empty or repeat an id, ids
            mix types, or a positive is excluded or not in the subset.
    """
    counts = {"ranked": ranked, "positives": positives, "exclude": exclude, "subsets": subsets}
    sizes = {name: len(rows) for name, rows in counts.items() if rows is not None}
    if len(set(sizes.values())) > 1 or not ranked:
        raise ValueError(f"pass one row per query, and at least one query; got {sizes} rows")
    rows = []
    for query, (ids, positive_ids) in enumerate(zip(ranked, positives, strict=True)):
        excluded = [] if exclude is None else [exclude[query]]
        members = ids if subsets is None else subsets[query]
        _check_list(query, ids, positive_ids, excluded, None if subsets is None else members)
        kept = set(members).difference(excluded)
        rank_of = {image_id: rank for rank, image_id in enumerate(i for i in ids if i in kept)}
        rows.append(torch.tensor([rank_of.get(i, NOT_RETRIEVED) for i in positive_ids]))
    return pad_sequence(rows, batch_first=True, padding_value=-1)


class _Indices(NamedTuple):
    """Checked gallery positions: targets (Q, 1), excluded images (Q,), subset members (Q, S)."""

    target: Tensor
    exclude: Tensor | None
    subset: Tensor | None

    def to(self, device: torch.device) -> "_Indices":
        return _Indices(*(None if index is None else index.to(device) for index in self))  # type: ignore[arg-type]


def _ranks(
    query_embeds: Tensor | CombinedQueries,
    gallery_embeds: Tensor,
    positives: Tensor,
    exclude: Tensor | None,
    chunk_size: int,
    ties: Ties,
) -> Tensor:
    """Count the gallery images before each positive: (Q, G), -1 where padded."""
    if isinstance(query_embeds, CombinedQueries):
        return _combined_ranks(query_embeds, gallery_embeds, positives, exclude, None, ties)
    check_embeds(query_embeds, gallery_embeds)
    positives = positives.to(query_embeds.device)
    row, column = (positives >= 0).nonzero(as_tuple=True)
    scores = torch.full(positives.shape, torch.inf, device=positives.device)
    scores[row, column] = score_pairs(query_embeds, gallery_embeds, row, positives[row, column])
    ranks = torch.zeros_like(positives)
    for rows, columns, cosines in cosine_tiles(query_embeds, gallery_embeds, exclude, chunk_size):
        queries, gallery = query_embeds[rows], gallery_embeds[columns]
        for rank, score, positive in zip(ranks[rows].T, scores[rows].T, positives[rows].T, strict=True):
            rank += _count_before(queries, gallery, cosines, score, positive - columns.start, ties)
    return ranks.where(positives >= 0, -1)


def _combined_ranks(
    queries: CombinedQueries,
    gallery_embeds: Tensor,
    positives: Tensor,
    exclude: Tensor | None,
    subset: Tensor | None,
    ties: Ties,
) -> Tensor:
    """Count the images before each positive of queries that are no embeddings, by all scores: (Q, G), -1 where padded.

    With `subset` (Q, S), padded with -1, only its members count.
    """
    ranks, everything = positives.clone(), torch.arange(len(gallery_embeds))[None]
    for rows, scores in queries.against(gallery_embeds).tiles():
        scores = scores.cpu()
        positions = everything if subset is None else subset[rows]
        among = scores if subset is None else scores.gather(1, positions.clamp(min=0))
        for rank, positive in zip(ranks[rows].T, positives[rows].T, strict=True):
            target = positive[:, None]
            score = scores.gather(1, target.clamp(min=0))
            left_out = None if exclude is None else exclude[rows]
            rank.copy_(_ranks_among(among, positions, score, target, left_out, ties))
    return ranks.where(positives >= 0, -1)


def _count_before(
    queries: Tensor, gallery: Tensor, cosines: Tensor, score: Tensor, positive: Tensor, ties: Ties
) -> Tensor:
    """Count a tile's images before one positive per query, which may lie in another tile.

    Args:
        queries: (c, d) embeddings.
        gallery: (n, d) embeddings of the tile's images.
        cosines: (c, n) float32, within `error_bound` of the scores.
        score: (c,) of the positives.
        positive: (c,) positions of the positives, relative to the tile.
        ties: see `target_ranks`.
    """
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
    """Count the images before each target: (Q,).

    Args:
        scores: (Q, n) of the images.
        positions: (Q, n) or (1, n) of the images in the gallery; -1 is padding.
        score: (Q, 1) of the target.
        target: (Q, 1), gallery position of the target.
        exclude: (Q,), gallery position left out.
        ties: see `target_ranks`.
    """
    ahead = _before(scores, positions, score, target, ties) & (positions >= 0)
    if exclude is not None:
        ahead &= positions != exclude[:, None]
    return ahead.sum(dim=1)


def _before(scores: Tensor, positions: Tensor, score: Tensor, target: Tensor, ties: Ties) -> Tensor:
    """Return which images, by score and gallery position, rank before a target of this score and position."""
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
    """Return (Q, members) gallery positions, padded with -1, as int64 on the CPU, or raise as `checked_index`."""
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
    positives: Sequence[str],
    excluded: Sequence[str],
    members: Sequence[str] | None,
) -> None:
    for name, listed in (("ranked list", ids), ("list of positives", positives)):
        if len(listed) == 0:
            raise ValueError(f"query {query}: its {name} is empty; drop the query or fix the list")
        if len(set(listed)) < len(listed):
            repeated = next(i for i in listed if listed.count(i) > 1)
            raise ValueError(f"query {query}: its {name} repeats {repeated!r}; list it once")
    if len(types := {type(i).__name__ for i in chain(ids, positives, excluded, members or ())}) > 1:
        raise ValueError(f"query {query}: its ids are of types {sorted(types)} and would not match; use one type")
    if both := set(positives).intersection(excluded):
        raise ValueError(f"query {query}: its target {both.pop()!r} is also its excluded image; drop the query")
    if members is not None and (missing := [i for i in positives if i not in members]):
        raise ValueError(f"query {query}: its target {missing[0]!r} is not in its subset; add it or drop the query")


__all__ = [
    "NOT_RETRIEVED",
    "Ties",
    "positive_ranks",
    "ranks_from_lists",
    "ranks_from_scores",
    "subset_ranks",
    "target_ranks",
]
