"""Definitions: the ranking of a gallery, recall, average precision, and the metrics of every benchmark.

- A score is the cosine of a query with a gallery image; higher is better. Products are summed in float64 and rounded
  to float32, whatever the input dtype, so that equal gallery rows tie and ranks do not depend on chunk size or
  hardware.
- A rank is 0-based: the number of gallery images before the target. Equal scores keep gallery order, as a stable
  sort leaves them. Published evaluations sort with an unstable order; where scores tie, their numbers can differ
  within the bounds that `target_ranks(..., ties="best")` and `ties="worst"` give.
- A metric is a fraction in [0, 1]; percent is a matter of rendering. It is defined once, in `METRICS`.

Shapes: Q queries, N gallery images, at most G positives per query, embedding width d.

Example:
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

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..data.benchmark import CIRBenchmark, excluded_rows, gallery_rows
from ..embeddings.combined import CombinedQueries
from ..embeddings.similarity import check_embeds, check_finite, exact_unit_rows, first_true, pairwise_sum
from .ranking import NOT_RETRIEVED, positive_ranks, subset_ranks, target_ranks

CIRR_KS = (1, 5, 10, 50)
CIRR_SUBSET_KS = (1, 2, 3)
FASHIONIQ_KS = (10, 50)
CIRCO_KS = (5, 10, 25, 50)


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
    retrieved = torch.arange(1, ranks.shape[1] + 1, device=ranks.device)  # positives up to and including this one
    precision = retrieved / (ordered.double() + 1)  # (Q, G)
    return {k: (precision * (ordered < k)).sum(dim=1) / count.clamp(max=k) for k in ks}


def map_at_k(ranks: Tensor, ks: Iterable[int]) -> dict[int, float]:
    """Return the mean average precision over queries: `{k: fraction}`.

    Arguments and errors are those of `average_precision_at_k`.
    """
    return {k: float(values.mean()) for k, values in average_precision_at_k(ranks, ks).items()}


# ---- metrics by benchmark ----

PerQuery = Mapping[str, Sequence[Any]]
"""One value per query in each named column, as `Evaluation.per_query` and `results_per_query.json` hold them."""


class BenchmarkMetrics(ABC):
    """The metrics of a benchmark, an entry of `METRICS`.

    A subclass ranks the gallery into per-query columns (`measure`) and says which values of these columns each metric
    is the mean of (`_values`). Metrics that average other metrics are named in `averages`.

    Attributes:
        averages: metrics that are the mean of other metrics, by name.
        server: the evaluation server that scores files of the test split, None if there is none
            (`evaluation/submission.py`).
        reports_average: whether the mean over the benchmark's categories is reported as well.
    """

    averages: ClassVar[dict[str, tuple[str, ...]]] = {}
    server: ClassVar[str | None] = None
    reports_average: ClassVar[bool] = False

    def measure(
        self, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, benchmark: CIRBenchmark
    ) -> dict[str, tuple[Any, ...]]:
        """Rank the gallery for every query.

        Args:
            query_embeds: (Q, d), any float dtype, or [`CombinedQueries`], in the order of the benchmark's queries.
            gallery_embeds: (N, d), in the order of its gallery.
            benchmark: queries with targets, gallery and protocol.

        Returns:
            Per-query columns, each of length Q: `rank` (0-based, of the target), and others by benchmark.

        Raises:
            ValueError: if the benchmark lacks a column that the metrics need, or embeddings do not fit.
        """
        target = gallery_rows(benchmark, "target_id")
        ranks = target_ranks(query_embeds, gallery_embeds, target, excluded_rows(benchmark))
        return {"rank": tuple(ranks.tolist())}

    @abstractmethod
    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        """Return the numbers that each metric is the mean of, for all metrics but `averages`."""

    def values(self, per_query: PerQuery) -> dict[str, list[float]]:
        """Return the numbers whose mean is the metric, by metric: one per query unless the metric says otherwise.

        Args:
            per_query: columns from `measure`, or from a results file.

        Raises:
            ValueError: if columns differ in length or hold no query.
        """
        values = self._checked_values(per_query)
        for name, parts in self._complete_averages(values):
            values[name] = [fmean(numbers) for numbers in zip(*(values[part] for part in parts), strict=True)]
        return values

    def means(self, per_query: PerQuery) -> dict[str, float]:
        """Return the metrics, fractions in [0, 1]; arguments and errors are those of `values`."""
        means = {
            name: float(torch.tensor(numbers, dtype=torch.float64).mean())
            for name, numbers in self._checked_values(per_query).items()
        }
        for name, parts in self._complete_averages(means):
            means[name] = sum(means[part] for part in parts) / len(parts)
        return means

    def _checked_values(self, per_query: PerQuery) -> dict[str, list[float]]:
        sizes = {name: len(column) for name, column in per_query.items()}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"columns must have one value per query, at least one query; got lengths {sizes}")
        return self._values(per_query)

    def _complete_averages(self, metrics: Mapping[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
        return [(name, parts) for name, parts in self.averages.items() if metrics.keys() >= set(parts)]


class CirrMetrics(BenchmarkMetrics):
    """CIRR: recall@{1,5,10,50}, and where the queries have subsets recall_subset@{1,2,3} and averages.

    `mean` is CIRR's "Avg" of recall@5 and recall_subset@1; TransAgg's code selects a model by `mean_of_seven`.
    """

    averages: ClassVar = {
        "mean": ("recall@5", "recall_subset@1"),
        "mean_of_seven": (*(f"recall@{k}" for k in CIRR_KS), *(f"recall_subset@{k}" for k in CIRR_SUBSET_KS)),
    }
    server = "cirr"

    def measure(
        self, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, benchmark: CIRBenchmark
    ) -> dict[str, tuple[Any, ...]]:
        """Add `subset_rank`, the rank of the target among the members of its subset, if the queries have subsets."""
        columns = super().measure(query_embeds, gallery_embeds, benchmark)
        if "subset_ids" in benchmark.queries.column_names:
            subset, target = gallery_rows(benchmark, "subset_ids"), gallery_rows(benchmark, "target_id")
            ranks = subset_ranks(query_embeds, gallery_embeds, subset, target, excluded_rows(benchmark))
            columns["subset_rank"] = tuple(ranks.tolist())
        return columns

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        if "rank" in per_query:  # CIRR's server scores the two rankings in files of their own
            values |= _hits("recall", per_query["rank"], CIRR_KS)
        if "subset_rank" in per_query:
            values |= _hits("recall_subset", per_query["subset_rank"], CIRR_SUBSET_KS)
        return values


class FashionIQMetrics(BenchmarkMetrics):
    """FashionIQ: recall@{10,50} and their `mean`, for a category; averages are plain means over three categories."""

    averages: ClassVar = {"mean": ("recall@10", "recall@50")}
    reports_average = True

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        return _hits("recall", per_query["rank"], FASHIONIQ_KS)


class CircoMetrics(BenchmarkMetrics):
    """CIRCO: map@{5,10,25,50} over all positives, recall@{5,10,25,50} of the target that the caption was written for.

    Where the queries have semantic aspects, `map@10/{aspect}` is map@10 over the queries of that aspect.
    """

    server = "circo"

    def measure(
        self, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, benchmark: CIRBenchmark
    ) -> dict[str, tuple[Any, ...]]:
        """Add `average_precision@k`, and `semantic_aspects` if the queries have them."""
        columns = super().measure(query_embeds, gallery_embeds, benchmark)
        positives = gallery_rows(benchmark, "target_ids")
        columns |= self.precisions(positive_ranks(query_embeds, gallery_embeds, positives, excluded_rows(benchmark)))
        if "semantic_aspects" in benchmark.queries.column_names:
            columns["semantic_aspects"] = tuple(map(tuple, benchmark.queries["semantic_aspects"]))
        return columns

    @staticmethod
    def precisions(positive_ranks: Tensor) -> dict[str, tuple[float, ...]]:
        """Return the per-query columns `average_precision@k` for ranks of all positives (Q, G), -1 where padded."""
        precisions = average_precision_at_k(positive_ranks, CIRCO_KS)
        return {f"average_precision@{k}": tuple(values.tolist()) for k, values in precisions.items()}

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        values = {f"map@{k}": list(per_query[f"average_precision@{k}"]) for k in CIRCO_KS}
        values |= _hits("recall", per_query["rank"], CIRCO_KS)
        by_aspect: dict[str, list[float]] = {}
        if "semantic_aspects" in per_query:
            for value, aspects in zip(values["map@10"], per_query["semantic_aspects"], strict=True):
                for aspect in set(aspects):
                    by_aspect.setdefault(aspect, []).append(value)
        return values | {f"map@10/{aspect}": by_aspect[aspect] for aspect in sorted(by_aspect)}


METRICS: dict[str, BenchmarkMetrics] = {
    "cirr": CirrMetrics(),
    "fashioniq": FashionIQMetrics(),
    "circo": CircoMetrics(),
}
"""Metrics by the name that a protocol gives them, `Protocol.metrics`."""


def metrics_named(name: str) -> BenchmarkMetrics:
    """Return the entry of `METRICS`.

    Raises:
        ValueError: if there is no entry of this name.
    """
    if name not in METRICS:
        raise ValueError(f"unknown metrics {name!r}; a protocol's metrics are one of {list(METRICS)}")
    return METRICS[name]


def _hits(metric: str, ranks: Sequence[int], ks: Iterable[int]) -> dict[str, list[float]]:
    hits = hits_at_k(torch.as_tensor(ranks), ks)
    return {f"{metric}@{k}": values.double().tolist() for k, values in hits.items()}


def _checked_ks(ks: Iterable[int]) -> list[int]:
    ks = list(ks)
    if bad := [k for k in ks if k < 1]:
        raise ValueError(f"cut-offs must be at least 1, got {bad}")
    return ks


__all__ = [
    "METRICS",
    "BenchmarkMetrics",
    "average_precision_at_k",
    "hits_at_k",
    "map_at_k",
    "metrics_named",
    "rank_gallery",
    "recall_at_k",
]
