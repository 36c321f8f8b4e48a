"""Results of an evaluation, with intervals, on disk and back."""

import json
import platform
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from ..atomic_files import whole
from .metrics import metrics_named
from .significance import bootstrap_interval

RESAMPLES = 2000
"""Draws of a bootstrap interval in `results.json` (ours): its ends then wander by about a twentieth of its width."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Args:
        benchmark: name of the benchmark.
        method: one of `QUERY_METHODS`.
        metrics: fractions in [0, 1], by the protocol's metrics: `recall@k`, `recall_subset@k`, `map@k`,
            `map@10/{semantic aspect}`, `mean`, `mean_of_seven`.
        counts: number of queries and of gallery images.
        protocol: how to read the metrics, see [`~pvlf_hf.data.benchmark.Protocol`].
        dtype: what embeddings and cosines are computed in.
        per_query: one value a query, in the order of the queries: `query_id`, `rank` (0-based, of the target), and
            where the benchmark has them `subset_rank`, `average_precision@k`, `semantic_aspects`; of an average over
            benchmarks also the `benchmark`.
    """

    benchmark: str
    method: str
    metrics: dict[str, float]
    counts: dict[str, int]
    protocol: dict[str, str]
    dtype: str
    per_query: dict[str, tuple[Any, ...]]

    def values(self, metric: str) -> list[float]:
        """One number a query whose mean is the metric: what `pvlf_hf.evaluation.significance` takes.

        Of an average over benchmarks the metric is the mean of the means over each.

        Raises:
            ValueError: if this evaluation has no such metric.
        """
        if metric not in self.metrics:
            raise ValueError(f"no metric {metric!r} of {self.benchmark}; there are {list(self.metrics)}")
        values = metrics_named(self.protocol["metrics"]).values(self.per_query)
        if metric not in values:
            raise ValueError(f"the values of every query for {metric!r} of {self.benchmark} were not kept")
        return values[metric]


def intervals(evaluation: Evaluation, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
    """Bootstrap interval of each metric over queries, see [`~pvlf_hf.evaluation.significance.bootstrap_interval`].

    Those of an average over benchmarks are joined from the intervals of each (MOVER: Zou and Donner, 2008), because
    every benchmark keeps its number of queries.

    Args:
        evaluation: from [`evaluate`] or [`average`].
        confidence: how often such intervals hold the true mean.
    """
    names = dict.fromkeys(evaluation.per_query.get("benchmark", ()))
    parts = [_of_benchmark(evaluation, name) for name in names] or [evaluation]

    def interval(metric: str) -> tuple[float, float]:
        values = [part.values(metric) for part in parts]
        ends = [bootstrap_interval(numbers, confidence, RESAMPLES) for numbers in values]
        if not names:
            return ends[0]
        means = [fmean(numbers) for numbers in values]
        below = sum((mean - low) ** 2 for mean, (low, _) in zip(means, ends, strict=True)) ** 0.5 / len(parts)
        above = sum((high - mean) ** 2 for mean, (_, high) in zip(means, ends, strict=True)) ** 0.5 / len(parts)
        return fmean(means) - below, fmean(means) + above

    return {metric: interval(metric) for metric in evaluation.metrics}


def _of_benchmark(average: Evaluation, name: str) -> Evaluation:
    """Returns an average over benchmarks with the queries of one of them alone."""
    rows = [row for row, benchmark in enumerate(average.per_query["benchmark"]) if benchmark == name]
    columns = {column: tuple(values[row] for row in rows) for column, values in average.per_query.items()}
    return replace(average, per_query=columns)


def write_results(file: str | Path, evaluations: Iterable[Evaluation], **facts: Any) -> None:
    """Writes evaluations and what is needed to repeat them as JSON (UTF-8).

    Beside it, `{name}_per_query.json` keeps the value of every query for later comparisons, see [`read_results`].

    Args:
        file: usually `results.json`.
        evaluations: what [`evaluate`] returned; each is written with 95 % bootstrap intervals over its queries.
        facts: anything else worth keeping: seeds, arguments.
    """
    file, evaluations = Path(file), list(evaluations)
    summaries = [{**asdict(e), "intervals": intervals(e)} for e in evaluations]
    per_query = [summary.pop("per_query") for summary in summaries]
    results = {**facts, "evaluations": summaries, "environment": environment()}
    with whole(file) as partial, whole(_per_query_file(file)) as its_partial:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        its_partial.write_text(json.dumps(per_query) + "\n", encoding="utf-8")
        file.unlink(missing_ok=True)  # it comes last: a run that has it is finished, and both are of one run


def read_results(file: str | Path) -> list[Evaluation]:
    """Evaluations that [`write_results`] wrote, values of every query included.

    Raises:
        ValueError: if the file with the values of every query is not beside it, or is of other results.
    """
    file = Path(file)
    summaries = json.loads(file.read_text(encoding="utf-8"))["evaluations"]
    if not _per_query_file(file).exists():
        raise ValueError(f"{_per_query_file(file)} is missing; evaluate again to get the values of every query")
    per_query = json.loads(_per_query_file(file).read_text(encoding="utf-8"))
    if [e["counts"]["queries"] for e in summaries] != [len(columns["rank"]) for columns in per_query]:
        raise ValueError(f"{_per_query_file(file)} does not belong to {file}; evaluate again")
    names = {field.name for field in fields(Evaluation)} - {"dtype", "per_query"}
    return [
        Evaluation(
            **{name: summary[name] for name in names},
            dtype=recorded_dtype(summary),
            per_query={name: _frozen(values) for name, values in columns.items()},
        )
        for summary, columns in zip(summaries, per_query, strict=True)
    ]


def recorded_dtype(summary: Mapping[str, Any]) -> str:
    """Returns the `dtype` of an evaluation in a results file; earlier files call it `precision`."""
    return summary.get("dtype") or summary.get("precision") or "not recorded"


def _per_query_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}_per_query.json")


def _frozen(values: Any) -> Any:
    """Lists of JSON as the tuples they were written from."""
    return tuple(map(_frozen, values)) if isinstance(values, list) else values


def environment() -> dict[str, str | None]:
    """Versions, device and commit of a result; commit is None where this file is not under git."""
    packages = ("pvlf-hf", "torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy", "pillow")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else torch.accelerator.current_accelerator()
    versions = {"python": platform.python_version(), **{name: version(name) for name in packages}}
    return {**versions, "device": str(device or platform.machine()), "commit": _commit()}


def _commit() -> str | None:
    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )

    try:
        # Installed into a virtual environment inside somebody's repository, that commit is not ours.
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name).returncode == 0
        return git("describe", "--always", "--dirty", "--abbrev=40").stdout.strip() or None if tracked else None
    except FileNotFoundError:
        return None
