"""Exact scores of queries that are no embeddings: two similarities, combined ([`ComposedRetrievalModel.combine`]).

A *score* is defined as in `similarity.py`: products are summed pairwise in float64, the two similarities of a pair are
combined in float64, and the result is rounded to float32. It depends on the rows and the gallery's mean alone.

Shapes: Q queries, N gallery images, embedding width d.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.interface_pvlf import halves
from .similarity import check_finite, checked_index, exact_unit_rows, pairwise_sum, top_k

Combine = Callable[[Tensor, Tensor], Tensor]

SCORES_PER_TILE = 2**22
"""Pairs scored at a time (our choice): 64 MiB of similarities in float64."""

ROWS_PER_BLOCK = 2**16
"""Gallery images that are brought to float64 at a time (our choice)."""


@dataclass(frozen=True)
class CombinedQueries:
    """Queries whose scores are combined from two similarities; ranking and [`top_k_of`] take them as embeddings.

    Args:
        embeds: (Q, 2d), image and text side by side.
        combine: makes a score of the similarities with the two.
    """

    embeds: Tensor
    combine: Combine

    def __len__(self) -> int:
        return len(self.embeds)

    def select(self, rows: Tensor) -> "CombinedQueries":
        """Return some of the queries."""
        return CombinedQueries(self.embeds[rows], self.combine)

    def against(self, gallery_embeds: Tensor, mean: Tensor | None = None) -> "CombinedScores":
        """Prepare scoring against a gallery (N, d), whose mean (d,) may be known.

        Raises:
            ValueError: if widths do not fit or an embedding is not finite.
        """
        if self.embeds.shape[1] != 2 * gallery_embeds.shape[1]:
            raise ValueError(
                f"queries of image and text side by side are {self.embeds.shape[1]} wide, which is not twice the "
                f"gallery's {gallery_embeds.shape[1]}: compute both with the same model"
            )
        check_finite("query", self.embeds)
        return CombinedScores(self, gallery_embeds, gallery_mean(gallery_embeds) if mean is None else mean)


class CombinedScores:
    """Scores of queries against a gallery, made by [`CombinedQueries.against`].

    Attributes:
        vectors: float64 (Q, 2, d), see [`halves`].
        offsets: float64 (Q, 2).
    """

    def __init__(self, queries: CombinedQueries, gallery_embeds: Tensor, mean: Tensor) -> None:
        self.combine, self.gallery = queries.combine, gallery_embeds
        self.vectors, self.offsets = halves(queries.embeds.double(), mean)

    def of_images(self, query: int, rows: Tensor) -> Tensor:
        """Score some gallery images for one query, by the definition: (rows,) float32."""
        scores = [
            self._defined(self.vectors[query], self.offsets[query], block) for block in rows.split(ROWS_PER_BLOCK)
        ]
        return torch.cat(scores)

    def similarities(self, query: int, rows: Tensor) -> Tensor:
        """Return the two similarities of some gallery images with one query: float64 (2, rows)."""
        images = exact_unit_rows(self.gallery[rows])
        return torch.stack([pairwise_sum(images * v) - o for v, o in zip(*self.parts(query), strict=True)])

    def parts(self, query: int) -> tuple[Tensor, Tensor]:
        """Return vectors (2, d) and offsets (2,) of one query."""
        return self.vectors[query], self.offsets[query]

    def tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield slices of queries and their scores of the whole gallery, (c, N) float32."""
        units = torch.cat([exact_unit_rows(block) for block in self.gallery.split(ROWS_PER_BLOCK)])
        size = max(1, SCORES_PER_TILE // len(units))
        for start in range(0, len(self.vectors), size):
            rows = slice(start, start + size)
            yield rows, self._tile(self.vectors[rows], self.offsets[rows], units)

    def _tile(self, vectors: Tensor, offsets: Tensor, units: Tensor) -> Tensor:
        """Score a tile by float64 products; by the definition where the order of their sums may matter."""
        similarities = vectors @ units.T - offsets[..., None]  # (c, 2, N)
        error = vectors.shape[-1] * 2.0**-49  # of vectors no longer than 2
        low, high = (self.combine(*(similarities + sign * error).unbind(dim=1)).float() for sign in (-1, 1))
        for query in (low != high).any(dim=1).nonzero()[:, 0].tolist():
            (columns,) = (low[query] != high[query]).nonzero(as_tuple=True)
            low[query, columns] = self._defined(vectors[query], offsets[query], columns)
        return low

    def _defined(self, vectors: Tensor, offsets: Tensor, columns: Tensor) -> Tensor:
        images = exact_unit_rows(self.gallery[columns])
        image, text = (pairwise_sum(images * vector) for vector in vectors)
        return self.combine(image - offsets[0], text - offsets[1]).float()


def gallery_mean(embeds: Tensor) -> Tensor:
    """Return the mean of embeddings (N, d), each divided by its norm: float64 (d,)."""
    sums = [exact_unit_rows(block).sum(dim=0) for block in embeds.split(ROWS_PER_BLOCK)]
    return torch.stack(sums).sum(dim=0) / len(embeds)


def top_k_of(
    queries: Tensor | CombinedQueries, gallery_embeds: Tensor, k: int, exclude_index: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the best k gallery images of each query; arguments and errors as [`top_k`]."""
    if isinstance(queries, Tensor):
        return top_k(queries, gallery_embeds, k, exclude_index)
    available = len(gallery_embeds) - (exclude_index is not None)
    if not 1 <= k <= available:
        raise ValueError(f"k is {k}, but each query has {available} gallery images to return: pass 1 to {available}")
    if exclude_index is not None:
        exclude_index = checked_index("exclude_index", exclude_index, len(queries), len(gallery_embeds))
    found = []
    for rows, scores in queries.against(gallery_embeds).tiles():
        if exclude_index is not None:
            scores = scores.scatter(1, exclude_index[rows, None].to(scores.device), -torch.inf)
        best = scores.sort(dim=1, descending=True, stable=True)
        found.append((best.values[:, :k], best.indices[:, :k]))
    return torch.cat([scores for scores, _ in found]), torch.cat([positions for _, positions in found])


__all__ = ["Combine", "CombinedQueries", "CombinedScores", "gallery_mean", "top_k_of"]
