"""Compares methods on benchmarks: intervals, paired tests against one method, costs; one protocol to a column.

    pvlf-hf compare PVLF=outputs/pvlf/results.json TransAgg=outputs/transagg/results.json --against TransAgg

A *row* is a method: one run, or several that differ in their seed. A *column* is a metric of a benchmark; all of its
values were measured under one protocol, or it is refused.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .metrics import metrics_named
from .results import Evaluation, intervals, read_results
from .significance import holm, paired_test, seed_interval

USUAL_FOLDERS = ("evaluation", "evaluations", "results", "submissions", "model", "output", "outputs")
"""Names of folders that results of every method are in, and which do not tell methods apart."""

LEVEL = 0.05
"""Probability of a false finding among all tests of a comparison, below which a difference is marked."""


@dataclass(frozen=True)
class Run:
    """Evaluations of one method, as one file holds them.

    Args:
        name: name of the row.
        evaluations: evaluations by benchmark.
        cost: figures by name, such as `parameters` and `query_ms`.
    """

    name: str
    evaluations: dict[str, Evaluation]
    cost: dict[str, Any] = field(default_factory=dict)


class Column(NamedTuple):
    """A metric of a benchmark."""

    benchmark: str
    metric: str


@dataclass(frozen=True)
class Cell:
    """Value of a row in a column.

    Args:
        value: fraction, the mean over runs.
        low: lower end of the 95 % interval: over queries of one run, or over seeds of several.
        high: upper end.
        runs: number of runs.
        difference: value minus that of the row that it is tested against; None without a test.
        p_value: of the paired test over queries; None without a test.
        adjusted: p-value adjusted for all tests of the comparison, see [`holm`].
    """

    value: float
    low: float
    high: float
    runs: int = 1
    difference: float | None = None
    p_value: float | None = None
    adjusted: float | None = None

    @property
    def differs(self) -> bool:
        """Whether the difference is found at the level of all tests together."""
        return self.adjusted is not None and self.adjusted <= LEVEL


@dataclass(frozen=True)
class Comparison:
    """Methods by benchmarks.

    Args:
        columns: metrics of benchmarks.
        rows: cells by column, by the name of the row; a row may lack columns.
        costs: figures by name, by the name of the row.
        protocols: protocol and counts by benchmark.
        against: row that the others are tested against, None for no tests.
    """

    columns: tuple[Column, ...]
    rows: dict[str, dict[Column, Cell]]
    costs: dict[str, dict[str, Any]]
    protocols: dict[str, dict[str, Any]]
    against: str | None = None

    @property
    def tests(self) -> int:
        """Number of tests that p-values are adjusted for."""
        return sum(cell.p_value is not None for cells in self.rows.values() for cell in cells.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the comparison as JSON values."""
        rows = [
            {
                "name": name,
                "cost": self.costs[name],
                "cells": [{**column._asdict(), **asdict(cell)} for column, cell in cells.items()],
            }
            for name, cells in self.rows.items()
        ]
        return {"against": self.against, "tests": self.tests, "rows": rows, "protocols": self.protocols}


def informative_name(*paths: str | Path) -> str:
    """Return the last part of a path that says which method it is of: `"mine"` of `outputs/mine/evaluation`.

    Args:
        paths: paths or Hub names; the first that has such a part counts. Without any, the last part of the last path.
    """
    parts = [[part for part in Path(path).parts if part not in ("/", ".", "..")] for path in paths]
    informative = (part for own in parts for part in reversed(own) if part.casefold() not in USUAL_FOLDERS)
    return next(informative, next((own[-1] for own in reversed(parts) if own), ""))


def read_runs(file: str | Path, name: str | None = None) -> list[Run]:
    """Read the methods of a results file of [`write_results`].

    Args:
        file: usually `results.json`; the values of every query must be beside it.
        name: name of the row; by default that of [`informative_name`], of the model that the file records, or else
            of its folder.

    Returns:
        A run for each method to embed queries: the model's own is called `name`, a baseline `"name: text"`, or `name`
        if it was given and there is no other.

    Raises:
        ValueError: if the file holds no results, or see [`read_results`].
    """
    file = Path(file)
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as results: {error}") from error
    if not isinstance(facts, dict) or "evaluations" not in facts:
        raise ValueError(f"{file} holds no results of `pvlf-hf evaluate`: it has no key 'evaluations'")
    evaluations = read_results(file)
    alone = name is not None and len({evaluation.method for evaluation in evaluations}) == 1
    if name is None:
        recorded = facts.get("arguments", {}).get("model")
        name = informative_name(*([recorded] if recorded else []), file.parent, file.resolve().parent)
    runs: dict[str, Run] = {}
    for evaluation in evaluations:
        row = name if alone or evaluation.method == "composed" else f"{name}: {evaluation.method}"
        cost = facts.get("cost", {}) if evaluation.method == "composed" else {}
        run = runs.setdefault(row, Run(row, {}, dict(cost)))
        if evaluation.benchmark in run.evaluations:
            raise ValueError(
                f"{file} measures {evaluation.benchmark} under two protocols, {evaluation.protocol['name']} and "
                f"{run.evaluations[evaluation.benchmark].protocol['name']}: evaluate each into a folder of its own"
            )
        run.evaluations[evaluation.benchmark] = evaluation
    return list(runs.values())


def compare(runs: Iterable[Run], against: str | None = None, metrics: Sequence[str] | None = None) -> Comparison:
    """Compare methods.

    Args:
        runs: runs; those of one name are one row, and may differ in nothing but their seed.
        against: row that the others are tested against, query by query.
        metrics: metrics to show, where a benchmark has them; by default `headline` of each benchmark's.

    Raises:
        ValueError: if there is nothing to compare, there is no such row or metric, or two runs measured a benchmark
            under different protocols or on different queries.
    """
    rows: dict[str, list[Run]] = {}
    for run in runs:
        rows.setdefault(run.name, []).append(run)
    if not rows:
        raise ValueError("nothing to compare: pass at least one file of results")
    if against is not None and against not in rows:
        raise ValueError(f"no row {against!r} to test against; there are {list(rows)}")
    firsts = _check_protocols([run for own in rows.values() for run in own])
    columns = tuple(
        Column(benchmark, metric)
        for benchmark, first in firsts.items()
        for metric in (metrics or metrics_named(first.protocol["metrics"]).headline)
        if metric in first.metrics
    )
    if unknown := [metric for metric in metrics or () if metric not in {column.metric for column in columns}]:
        raise ValueError(f"no benchmark has the metrics {unknown}")
    cells = {name: _cells(own, columns) for name, own in rows.items()}
    if against is not None:
        _test(rows, cells, against)
    return Comparison(
        columns,
        cells,
        {name: _mean_cost(own) for name, own in rows.items()},
        {b: {**_protocol(first), "counts": first.counts} for b, first in firsts.items()},
        against,
    )


def _check_protocols(runs: Sequence[Run]) -> dict[str, Evaluation]:
    """Return the first evaluation of each benchmark; raise unless all others were measured as it was."""
    firsts: dict[str, tuple[str, Evaluation]] = {}
    for run in runs:
        for benchmark, evaluation in run.evaluations.items():
            name, first = firsts.setdefault(benchmark, (run.name, evaluation))
            mine, theirs = (_protocol(one) | _sizes(one) for one in (evaluation, first))
            if different := [key for key in {**theirs, **mine} if mine.get(key) != theirs.get(key)]:
                pairs = "; ".join(f"{key} {theirs.get(key)!r} and {mine.get(key)!r}" for key in sorted(different))
                raise ValueError(
                    f"{name} and {run.name} measured {benchmark} under two protocols, which do not compare: {pairs}. "
                    "Evaluate both under one, or compare each with rows of its own"
                )
            if evaluation.per_query["query_id"] != first.per_query["query_id"]:
                raise ValueError(f"{name} and {run.name} measured {benchmark} on different queries: evaluate again")
    return {benchmark: first for benchmark, (_, first) in firsts.items()}


def _sizes(evaluation: Evaluation) -> dict[str, str]:
    """Return the numbers of queries and gallery images, in which data sets of one name may differ."""
    return {f"number of {what}": f"{number:,}" for what, number in evaluation.counts.items()}


def _protocol(evaluation: Evaluation) -> dict[str, str]:
    """Return what makes numbers comparable: the protocol but a model's own template."""
    return {key: value for key, value in evaluation.protocol.items() if key != "template"}


def _cells(runs: Sequence[Run], columns: Sequence[Column]) -> dict[Column, Cell]:
    cells = {}
    for column in columns:
        own = [run.evaluations[column.benchmark] for run in runs if column.benchmark in run.evaluations]
        values = [evaluation.metrics[column.metric] for evaluation in own if column.metric in evaluation.metrics]
        if not values:
            continue
        several = len(values) > 1
        ends = seed_interval(values) if several else intervals(own[0], metrics=[column.metric])[column.metric]
        cells[column] = Cell(fmean(values), *ends, len(values))
    return cells


def _test(rows: Mapping[str, Sequence[Run]], cells: dict[str, dict[Column, Cell]], against: str) -> None:
    """Add the tests of every other row, their p-values adjusted together."""
    pairs = [(name, column) for name in rows for column in cells[name] if name != against and column in cells[against]]
    tests = [paired_test(_per_query(rows[name], c), _per_query(rows[against], c)) for name, c in pairs]
    adjusted = holm([test.p_value for test in tests]) if tests else []
    for (name, column), test, p_value in zip(pairs, tests, adjusted, strict=True):
        cell = cells[name][column]
        difference = cell.value - cells[against][column].value
        cells[name][column] = Cell(cell.value, cell.low, cell.high, cell.runs, difference, test.p_value, p_value)


def _per_query(runs: Sequence[Run], column: Column) -> NDArray[np.float64]:
    """Return one number per query, the mean over runs, whose mean is the row's value."""
    own = [run.evaluations[column.benchmark] for run in runs if column.benchmark in run.evaluations]
    values = np.mean([evaluation.values(column.metric) for evaluation in own], axis=0)
    parts = own[0].per_query.get("benchmark")
    if parts is None:
        return values
    # An average over categories weighs each category the same, whatever its number of queries.
    sizes = {part: parts.count(part) for part in parts}
    return values * np.array([len(parts) / (len(sizes) * sizes[part]) for part in parts])


def _mean_cost(runs: Sequence[Run]) -> dict[str, Any]:
    """Average numbers over runs; keep other facts of the first."""
    costs = [run.cost for run in runs if run.cost]
    if not costs:
        return {}
    numbers = {k: v for k, v in costs[0].items() if isinstance(v, int | float) and all(k in cost for cost in costs)}
    return {**costs[0], **{key: fmean(cost[key] for cost in costs) for key in numbers if len(costs) > 1}}


__all__ = ["Cell", "Column", "Comparison", "Run", "compare", "read_runs"]
