"""The outcome of an evaluation: metrics, values of every query, intervals, and the files that hold them."""

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
from ..embeddings.encoding import FORMER_NAME
from .metrics import metrics_named
from .significance import bootstrap_interval

RESAMPLES = 2000
"""Bootstrap resamples for an interval in `results.json` (our choice): its ends vary by about a 20th of its width."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Args:
        benchmark: name of the benchmark and split, e.g. `"cirr/val"`.
        method: how queries were embedded, one of `QUERY_METHODS`.
        metrics: fractions in [0, 1] by name, e.g. `recall@k`, `recall_subset@k`, `map@k`, `map@10/{semantic aspect}`,
            `mean`, `mean_of_seven`, `macro_map`; defined in `pvlf_hf.evaluation.metrics.METRICS`.
        counts: number of queries and of gallery images.
        protocol: how the metrics were measured, see [`~pvlf_hf.data.benchmark.Protocol`]; with `template` where the
            model puts captions into a sentence.
        dtype: dtypes in which embeddings and cosines were computed.
        per_query: columns of one value per query, in the order of the queries: `query_id`, `rank` (0-based, of the
            target), and, if the metrics need them, `subset_rank`, `average_precision@k`, `semantic_aspects`,
            `target_ranks` and `negative_ranks` of all labels, and columns to group by, such as `group_id`; an average
            over benchmarks also has `benchmark`.
    """

    benchmark: str
    method: str
    metrics: dict[str, float]
    counts: dict[str, int]
    protocol: dict[str, str]
    dtype: str
    per_query: dict[str, tuple[Any, ...]]

    def values(self, metric: str) -> list[float]:
        """Return one number per query, whose mean is the metric, as `pvlf_hf.evaluation.significance` takes them.

        The metric of an average over benchmarks is not the mean of these numbers, but of the means over each.

        Args:
            metric: a key of `metrics`. For `map@10/{aspect}`, numbers cover the queries of that aspect only; for
                metrics of groups, such as `macro_map` and `session_recall@k`, there is one number per group.

        Raises:
            ValueError: if this evaluation has no such metric, or lacks the values of every query.
        """
        if metric not in self.metrics:
            raise ValueError(f"no metric {metric!r} of {self.benchmark}; there are {list(self.metrics)}")
        values = metrics_named(self.protocol["metrics"]).values(self.per_query)
        if metric not in values:
            raise ValueError(f"the values of every query for {metric!r} of {self.benchmark} were not kept")
        return values[metric]


def intervals(
    evaluation: Evaluation, confidence: float = 0.95, metrics: Iterable[str] | None = None
) -> dict[str, tuple[float, float]]:
    """Return the bootstrap interval over queries of each metric.

    The intervals of an average over benchmarks combine those of each benchmark (MOVER: Zou and Donner, 2008), because
    every benchmark keeps its number of queries.

    Args:
        evaluation: from [`evaluate`] or [`average`].
        confidence: probability that an interval covers the true mean.
        metrics: metrics of the evaluation; by default all.

    Returns:
        Lower and upper end by metric, see [`~pvlf_hf.evaluation.significance.bootstrap_interval`].
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

    return {metric: interval(metric) for metric in (evaluation.metrics if metrics is None else metrics)}


def _of_benchmark(average: Evaluation, name: str) -> Evaluation:
    """Restrict an average over benchmarks to the queries of one of them."""
    rows = [row for row, benchmark in enumerate(average.per_query["benchmark"]) if benchmark == name]
    columns = {column: tuple(values[row] for row in rows) for column, values in average.per_query.items()}
    return replace(average, per_query=columns)


def write_results(file: str | Path, evaluations: Iterable[Evaluation], **facts: Any) -> None:
    """Write evaluations as JSON (UTF-8), with versions, device and commit.

    `{name}_per_query.json` beside it keeps the values of every query for later comparisons, see [`read_results`].

    Args:
        file: usually `results.json`.
        evaluations: from [`evaluate`]; each is written with 95 % bootstrap intervals over its queries.
        facts: other top-level entries that help to repeat the run, such as seeds and arguments.
    """
    file, evaluations = Path(file), list(evaluations)
    summaries = [{**asdict(e), "intervals": intervals(e)} for e in evaluations]
    per_query = [summary.pop("per_query") for summary in summaries]
    results = {**facts, "evaluations": summaries, "environment": environment()}
    with whole(file) as partial, whole(_per_query_file(file)) as partial_per_query:
        partial.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        partial_per_query.write_text(json.dumps(per_query) + "\n", encoding="utf-8")
        file.unlink(missing_ok=True)  # renamed into place last: if it exists, both files are of one finished run


def read_results(file: str | Path) -> list[Evaluation]:
    """Read the evaluations that [`write_results`] wrote, with the values of every query.

    Raises:
        ValueError: if the file with the values of every query is missing or belongs to other results.
    """
    file = Path(file)
    summaries = json.loads(file.read_text(encoding="utf-8"))["evaluations"]
    if not _per_query_file(file).exists():
        raise ValueError(f"{_per_query_file(file)} is missing; evaluate again to get the values of every query")
    per_query = json.loads(_per_query_file(file).read_text(encoding="utf-8"))
    if [e["counts"]["queries"] for e in summaries] != [len(columns["rank"]) for columns in per_query]:
        raise ValueError(f"{_per_query_file(file)} does not belong to {file}; evaluate again")
    names = {field.name for field in fields(Evaluation)} - {"method", "dtype", "per_query"}
    return [
        Evaluation(
            **{name: summary[name] for name in names},
            method="composed" if summary["method"] == FORMER_NAME else summary["method"],
            dtype=recorded_dtype(summary),
            per_query={name: _frozen(values) for name, values in columns.items()},
        )
        for summary, columns in zip(summaries, per_query, strict=True)
    ]


def recorded_dtype(summary: Mapping[str, Any]) -> str:
    """Return the `dtype` of an evaluation in a results file, which earlier versions wrote as `precision`."""
    return summary.get("dtype") or summary.get("precision") or "not recorded"


def _per_query_file(file: Path) -> Path:
    return file.with_name(f"{file.stem}_per_query.json")


def _frozen(values: Any) -> Any:
    """Turn the lists of JSON into the tuples that were written."""
    return tuple(map(_frozen, values)) if isinstance(values, list) else values


def environment() -> dict[str, str | None]:
    """Return versions, device and commit for a results file; the commit is None outside a git checkout."""
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
        # Untracked in a virtual environment inside another repository, whose commit says nothing about this package.
        tracked = git("ls-files", "--error-unmatch", Path(__file__).name).returncode == 0
        return git("describe", "--always", "--dirty", "--abbrev=40").stdout.strip() or None if tracked else None
    except FileNotFoundError:
        return None
