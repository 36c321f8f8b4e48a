"""Pages of results: offset, score cut-off, and near-duplicates folded into the best of them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Ranked = Callable[[int], tuple[Tensor, Tensor]]
"""Returns scores and gallery rows of the best n images, best first; fewer where there are fewer."""

Embeddings = Callable[[Tensor], Tensor]
"""Returns the embeddings of gallery rows: float32 `(rows, d)`, L2-normalised."""


class Hit(NamedTuple):
    """An image that was found, and the rows of near-duplicates that are folded into it."""

    row: int
    score: float
    folded: list[int]


def ranking_without(scores: Tensor, rows: Tensor, left_out: Sequence[int]) -> Ranked:
    """Return the ranking of what was found, best first, without some rows; -inf scores what was not found."""
    found = (scores > -torch.inf) & ~torch.isin(rows, torch.tensor(left_out, dtype=torch.int64))
    return lambda number: (scores[found][:number], rows[found][:number])


def page_of(
    ranked: Ranked,
    embeddings: Embeddings,
    k: int,
    offset: int = 0,
    min_score: float | None = None,
    fold: float | None = None,
) -> list[Hit]:
    """Return the results from `offset` on, at most k.

    Args:
        ranked: the ranking.
        embeddings: of rows that the ranking named.
        k: at least 1.
        offset: results that earlier pages have shown.
        min_score: leave out what scores less.
        fold: cosine from which an image is a near-duplicate of one that is ranked before it, and folded into that.
    """
    needed = offset + k
    width = needed if fold is None else 2 * needed
    while True:
        scores, rows = ranked(width)
        exhausted = len(rows) < width
        if min_score is not None and len(scores) and scores[-1] < min_score:
            enough = int((scores >= min_score).sum())
            scores, rows, exhausted = scores[:enough], rows[:enough], True
        hits, more = fold_duplicates(scores, rows, embeddings, needed, fold)
        if fold is None or more or exhausted:
            return hits[offset:]
        width *= 2


def fold_duplicates(
    scores: Tensor, rows: Tensor, embeddings: Embeddings, needed: int, fold: float | None
) -> tuple[list[Hit], bool]:
    """Return the first `needed` results and whether there are more; near-duplicates of a result belong to it."""
    found = zip(rows.tolist(), scores.tolist(), strict=True)
    if fold is None:
        return [Hit(row, score, []) for row, score in found][:needed], len(rows) > needed
    hits: list[Hit] = []
    embeds = embeddings(rows)
    kept = embeds[:0]
    for (row, score), embed in zip(found, embeds, strict=True):
        cosines = kept @ embed
        if len(cosines) and cosines.max() >= fold:
            hits[int(cosines.argmax())].folded.append(row)
        elif len(hits) == needed:
            return hits, True
        else:
            hits.append(Hit(row, score, []))
            kept = torch.cat([kept, embed[None]])
    return hits, False


__all__ = ["Hit", "page_of", "ranking_without"]
