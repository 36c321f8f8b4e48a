"""Metrics of every benchmark, by the name that its protocol gives: one table, `METRICS`.

What a rank, recall, average precision or gain is, `definitions.py` says; its functions are handed on here.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..data.benchmark import CIRBenchmark, excluded_rows, gallery_rows, groups_of
from ..embeddings.combined import CombinedQueries
from .definitions import (
    average_precision_at_k,
    gain_at_k,
    hit_counts,
    hits_at_k,
    map_at_k,
    rank_gallery,
    ranks_without,
    recall_at_k,
    trapezoid_precision,
)
from .ranking import positive_ranks, subset_ranks, target_ranks

CIRR_KS = (1, 5, 10, 50)
CIRR_SUBSET_KS = (1, 2, 3)
FASHIONIQ_KS = (10, 50)
CIRCO_KS = (5, 10, 25, 50)
GENECIS_KS = (1, 2, 3)
EDIR_KS = (1, 5, 10)
PINPOINT_KS = (1, 5, 10, 50)
SESSION_KS = (1, 5, 10, 50)
GRADED_KS = (5, 10, 50)

PerQuery = Mapping[str, Sequence[Any]]
"""One value per query in each named column, as `Evaluation.per_query` and `results_per_query.json` hold them."""


def label_ranks(
    query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, benchmark: CIRBenchmark, column: str
) -> Tensor:
    """Rank the images that a column names, each in its query's gallery.

    The gallery of a query is that of its group, or else all images, without a reference that the protocol removes.

    Args:
        query_embeds: (Q, d), any float dtype, or [`CombinedQueries`], in the order of the benchmark's queries.
        gallery_embeds: (N, d), in the order of its gallery.
        benchmark: queries, gallery and protocol.
        column: `target_id`, `target_ids` or `negative_ids`.

    Returns:
        int64 (Q,), or (Q, G) for lists, -1 where padded.

    Raises:
        ValueError: if the benchmark lacks the column, or embeddings do not fit.
    """
    labels, exclude = gallery_rows(benchmark, column), excluded_rows(benchmark)
    if labels.ndim == 1 and "group_id" not in benchmark.queries.column_names:
        return target_ranks(query_embeds, gallery_embeds, labels, exclude).cpu()
    rows = labels[:, None] if labels.ndim == 1 else labels
    ranks = torch.full_like(rows, -1)
    for queries, images in groups_of(benchmark):
        named = queries[(rows[queries] >= 0).any(dim=1)]  # a query may have no negatives
        if len(named):
            own = torch.searchsorted(images, rows[named].clamp(min=0)).where(rows[named] >= 0, -1)
            gallery = gallery_embeds if len(images) == len(gallery_embeds) else gallery_embeds[images]
            left_out = None if exclude is None else exclude[named]
            ranks[named] = positive_ranks(_select(query_embeds, named), gallery, own, left_out).cpu()
    return ranks[:, 0] if labels.ndim == 1 else ranks


def _select(query_embeds: Tensor | CombinedQueries, rows: Tensor) -> Tensor | CombinedQueries:
    if len(rows) == len(query_embeds):
        return query_embeds
    return query_embeds[rows] if isinstance(query_embeds, Tensor) else query_embeds.select(rows)


class BenchmarkMetrics(ABC):
    """The metrics of a benchmark, an entry of `METRICS`.

    A subclass ranks the gallery into per-query columns (`measure`) and says which values of these columns each metric
    is the mean of (`_values`). Metrics that average other metrics are named in `averages`.

    Attributes:
        averages: metrics that are the mean of other metrics, by name.
        server: the evaluation server that scores files of the test split, None if there is none
            (`evaluation/submission.py`).
        reports_average: whether the mean over the benchmark's categories is reported as well.
        headline: metrics that a comparison of methods shows.
    """

    averages: ClassVar[dict[str, tuple[str, ...]]] = {}
    server: ClassVar[str | None] = None
    reports_average: ClassVar[bool] = False
    headline: ClassVar[tuple[str, ...]] = ("recall@1", "recall@10")

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
        return {"rank": tuple(label_ranks(query_embeds, gallery_embeds, benchmark, "target_id").tolist())}

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

    headline = ("recall@10", "recall@50")
    averages: ClassVar = {"mean": ("recall@10", "recall@50")}
    reports_average = True

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        return _hits("recall", per_query["rank"], FASHIONIQ_KS)


class CircoMetrics(BenchmarkMetrics):
    """CIRCO: map@{5,10,25,50} over all positives, recall@{5,10,25,50} of the target that the caption was written for.

    Where the queries have semantic aspects, `map@10/{aspect}` is map@10 over the queries of that aspect.
    """

    headline = ("map@5", "map@10")
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


class LabelMetrics(BenchmarkMetrics):
    """Metrics of all labels of a query: `target_ranks` and `negative_ranks` hold the rank of each.

    Attributes:
        needed: columns of labels that the queries must have.
        kept: further columns of the queries that the metrics group by, where the queries have them.
    """

    needed: ClassVar[tuple[str, ...]] = ("target_ids",)
    kept: ClassVar[tuple[str, ...]] = ()

    def measure(
        self, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, benchmark: CIRBenchmark
    ) -> dict[str, tuple[Any, ...]]:
        """Add the ranks of all labels, and the columns to group by."""
        columns = super().measure(query_embeds, gallery_embeds, benchmark)
        for column in self.needed:
            rows = label_ranks(query_embeds, gallery_embeds, benchmark, column).tolist()
            columns[column.replace("_ids", "_ranks")] = tuple(tuple(r for r in row if r >= 0) for row in rows)
        present = [name for name in self.kept if name in benchmark.queries.column_names]
        return columns | {name: _frozen(benchmark.queries[name][:]) for name in present}


class ICirMetrics(LabelMetrics):
    """i-CIR: average precision over the full ranking of the instance's images.

    `macro_map` is the mean over instances of the mean over their queries, `map` the mean over all queries.
    """

    headline = ("macro_map",)
    kept = ("group_id",)

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        precision = trapezoid_precision(_padded(per_query["target_ranks"])).tolist()
        by_instance = _by(per_query["group_id"], precision)
        return {"macro_map": [fmean(values) for values in by_instance.values()], "map": precision}


class PinPointMetrics(LabelMetrics):
    """PinPoint: the metrics of its scorer, at k = 1, 5, 10, 50.

    `map@k`; `precision@k`; `recall@k`, the share of positives among the first k; `negative_recall@k`, that of
    negatives, of at most k; `map_without_negatives@k` of the ranking without them, and `delta_map@10`, by which that
    is higher; `paraphrase_range` and `paraphrase_std` of precision@10 within groups of paraphrases, one value a group.
    """

    headline = ("map@10", "negative_recall@10")
    needed = ("target_ids", "negative_ids")
    kept = ("paraphrase_group",)

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        positives, negatives = _padded(per_query["target_ranks"]), _padded(per_query["negative_ranks"])
        precisions = average_precision_at_k(positives, PINPOINT_KS)
        without = average_precision_at_k(ranks_without(positives, negatives), PINPOINT_KS)
        values: dict[str, Tensor] = {}
        for k in PINPOINT_KS:
            hits, count, marked = hit_counts(positives, k), (positives >= 0).sum(dim=1), (negatives >= 0).sum(dim=1)
            values[f"map@{k}"] = precisions[k]
            values[f"precision@{k}"], values[f"recall@{k}"] = hits / k, hits / count
            values[f"negative_recall@{k}"] = hit_counts(negatives, k) / marked.clamp(min=1, max=k)
            values[f"map_without_negatives@{k}"] = without[k]
        values["delta_map@10"] = without[10] - precisions[10]
        groups = _by(per_query.get("paraphrase_group", ()), values["precision@10"].tolist())
        several = [torch.tensor(group, dtype=torch.float64) for group in groups.values() if len(group) > 1]
        if several:
            values["paraphrase_range"] = torch.stack([group.max() - group.min() for group in several])
            values["paraphrase_std"] = torch.stack([group.std(correction=0) for group in several])
        return {name: numbers.tolist() for name, numbers in values.items()}


class SessionMetrics(LabelMetrics):
    """Sessions of several turns (CIRCLED): recall of the best-ranked positive, at k = 1, 5, 10, 50.

    `recall@k` over all turns, `recall@10/turn {t}` at one; over sessions, `session_recall@k` at any turn and
    `final_recall@k` at the last.
    """

    headline = ("recall@10", "final_recall@10")
    kept = ("session_id", "turn")

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        best = [min(ranks) for ranks in per_query["target_ranks"]]
        values = _hits("recall", best, SESSION_KS)
        by_turn = _by(per_query["turn"], values["recall@10"])
        values |= {f"recall@10/turn {turn}": by_turn[turn] for turn in sorted(by_turn)}
        turns = _by(per_query["session_id"], list(zip(per_query["turn"], best, strict=True)))
        values |= _hits("session_recall", [min(r for _, r in session) for session in turns.values()], SESSION_KS)
        return values | _hits("final_recall", [max(session)[1] for session in turns.values()], SESSION_KS)


class GeneCisMetrics(BenchmarkMetrics):
    """GeneCIS: recall@{1,2,3} among a query's own images; averages are plain means over its four tasks."""

    headline = ("recall@1",)
    reports_average = True

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        return _hits("recall", per_query["rank"], GENECIS_KS)


class EdirMetrics(BenchmarkMetrics):
    """EDIR: recall@{1,5,10}, and `recall@1/{subcategory}` over the queries of each subcategory."""

    headline = ("recall@1",)

    def measure(
        self, query_embeds: Tensor | CombinedQueries, gallery_embeds: Tensor, benchmark: CIRBenchmark
    ) -> dict[str, tuple[Any, ...]]:
        """Add `category`."""
        columns = super().measure(query_embeds, gallery_embeds, benchmark)
        return columns | {"category": tuple(benchmark.queries["category"])}

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        values = _hits("recall", per_query["rank"], EDIR_KS)
        by_category = _by(per_query["category"], values["recall@1"])
        return values | {f"recall@1/{category}": by_category[category] for category in sorted(by_category)}


class GradedMetrics(LabelMetrics):
    """Graded labels (CIRR's `target_soft`): ndcg@{5,10,50}, and negative_recall@{5,10,50} as PinPoint's."""

    headline = ("ndcg@10",)
    needed = ("target_ids", "negative_ids")
    kept = ("target_grades",)

    def _values(self, per_query: PerQuery) -> dict[str, list[float]]:
        ranks, negatives = _padded(per_query["target_ranks"]), _padded(per_query["negative_ranks"])
        marked = (negatives >= 0).sum(dim=1)
        values = {f"ndcg@{k}": v for k, v in gain_at_k(ranks, _padded(per_query["target_grades"]), GRADED_KS).items()}
        for k in GRADED_KS:
            values[f"negative_recall@{k}"] = hit_counts(negatives, k) / marked.clamp(min=1, max=k)
        return {name: numbers.tolist() for name, numbers in values.items()}


METRICS: dict[str, BenchmarkMetrics] = {
    "cirr": CirrMetrics(),
    "fashioniq": FashionIQMetrics(),
    "circo": CircoMetrics(),
    "icir": ICirMetrics(),
    "pinpoint": PinPointMetrics(),
    "sessions": SessionMetrics(),
    "genecis": GeneCisMetrics(),
    "edir": EdirMetrics(),
    "graded": GradedMetrics(),
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


def _by(keys: Sequence[Any], values: Sequence[Any]) -> dict[Any, list[Any]]:
    """Return values in lists by key, in the order of first occurrence; none without keys."""
    groups: dict[Any, list[Any]] = {}
    for key, value in zip(keys, values, strict=bool(keys)):
        groups.setdefault(key, []).append(value)
    return groups


def _padded(rows: Sequence[Sequence[float]]) -> Tensor:
    """Return rows of different length as one tensor, padded with -1."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)


def _frozen(column: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(value) if isinstance(value, list) else value for value in column)


__all__ = [
    "METRICS",
    "BenchmarkMetrics",
    "average_precision_at_k",
    "hits_at_k",
    "label_ranks",
    "map_at_k",
    "metrics_named",
    "rank_gallery",
    "recall_at_k",
]
