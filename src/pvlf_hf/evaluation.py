"""Ranks a benchmark's gallery for its queries: model, processor, data and metrics joined into numbers."""

import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .benchmark import CIRBenchmark
from .embedding_store import EmbeddingStore, dtype_of
from .encoding import QueryMethod, check_method, embed, encode_gallery
from .metrics import (
    CIRCO_KS,
    average_precision_at_k,
    circo_metrics,
    cirr_metrics,
    fashioniq_metrics,
    mean_by_aspect,
    positive_ranks,
    subset_ranks,
    target_ranks,
)
from .modeling_pvlf import PVLFModel
from .processing_pvlf import PVLFProcessor
from .significance import bootstrap_interval
from .whole_files import whole

RESAMPLES = 2000
"""Draws of a bootstrap interval in `results.json` (ours): its ends then wander by about a twentieth of its width."""

_MEANS = {  # what `cirr_metrics` and `fashioniq_metrics` average
    ("cirr", "mean"): ("recall@5", "recall_subset@1"),
    ("cirr", "mean_of_seven"): (*(f"recall@{k}" for k in (1, 5, 10, 50)), *(f"recall_subset@{k}" for k in (1, 2, 3))),
    ("fashioniq", "mean"): ("recall@10", "recall@50"),
}


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Args:
        benchmark: name of the benchmark.
        method: one of `QUERY_METHODS`.
        metrics: fractions in [0, 1], by the protocol's metrics: `recall@k`, `recall_subset@k`, `map@k`,
            `map@10/{semantic aspect}`, `mean`, `mean_of_seven`.
        counts: number of queries and of gallery images.
        protocol: how to read the metrics, see [`~pvlf_hf.benchmark.Protocol`].
        precision: what embeddings and cosines are computed in.
        per_query: one value a query, in the order of the queries: `query_id`, `rank` (0-based, of the target), and
            where the benchmark has them `subset_rank`, `average_precision@k`, `semantic_aspects`; of an average over
            benchmarks also the `benchmark`.
    """

    benchmark: str
    method: str
    metrics: dict[str, float]
    counts: dict[str, int]
    protocol: dict[str, str]
    precision: str
    per_query: dict[str, tuple[Any, ...]]

    def values(self, metric: str) -> list[float]:
        """One number a query whose mean is the metric: what `pvlf_hf.significance` takes.

        Of an average over benchmarks the metric is the mean of the means over each.

        Raises:
            ValueError: if this evaluation has no such metric.
        """
        if metric not in self.metrics:
            raise ValueError(f"no metric {metric!r} of {self.benchmark}; there are {list(self.metrics)}")
        if parts := _MEANS.get((self.protocol["metrics"], metric)):
            return [fmean(values) for values in zip(*map(self.values, parts), strict=True)]
        name, _, k = metric.partition("@")
        if name == "map":
            k, _, aspect = k.partition("/")
            precisions = self.per_query[f"average_precision@{k}"]
            aspects = self.per_query["semantic_aspects"] if aspect else ((aspect,) for _ in precisions)
            return [value for value, its in zip(precisions, aspects, strict=True) if aspect in its]
        ranks = self.per_query["subset_rank" if name == "recall_subset" else "rank"]
        return [float(rank < int(k)) for rank in ranks]


def evaluate(
    model: PVLFModel | None,
    processor: PVLFProcessor | None,
    benchmark: CIRBenchmark,
    method: QueryMethod = "pvlf",
    batch_size: int = 64,
    gallery_embeds: Tensor | None = None,
    progress: bool = True,
    store: EmbeddingStore | None = None,
) -> Evaluation:
    """Encodes gallery and queries, ranks them and measures the ranking, all by the benchmark's protocol.

    Under several processes each encodes a share and all return the same result.

    Args:
        model: the model; it is put in eval mode for the time being. None to score what is in the store.
        processor: its processor.
        benchmark: queries and gallery.
        method: how a query is embedded, see `QUERY_METHODS`.
        batch_size: images encoded at once in each process.
        gallery_embeds: `(gallery, d)` from [`encode_gallery`] with the same model, to encode the gallery only once
            for several query sets.
        progress: show progress bars.
        store: embeddings kept on disk: what is there is not encoded again, what is not is added.

    Raises:
        ValueError: for an unknown method, a benchmark without targets, a gallery that does not fit the benchmark, a
            store of another model, or one that lacks something and no model.
    """
    check_method(method)
    _check_targets(benchmark)
    embeds = embed(model, processor, benchmark, method, batch_size, gallery_embeds, progress, store)
    dtype = dtype_of(model) if model is not None else store.model["dtype"]  # type: ignore[union-attr,index]
    return score(benchmark, *embeds, method, f"embeddings {dtype}, cosines float64 rounded to float32")


def evaluate_all(
    model: PVLFModel,
    processor: PVLFProcessor,
    benchmarks: Sequence[CIRBenchmark],
    methods: Sequence[QueryMethod] = ("pvlf",),
) -> list[Evaluation]:
    """Evaluates on benchmarks by one or several methods, encoding a gallery that they share only once."""
    galleries: dict[str, Tensor] = {}
    evaluations = []
    for method, benchmark in product(methods, benchmarks):
        key = benchmark.gallery._fingerprint
        if key not in galleries:
            galleries[key] = encode_gallery(model, processor, benchmark.gallery)
        evaluations.append(evaluate(model, processor, benchmark, method, gallery_embeds=galleries[key]))
    return evaluations


def score(
    benchmark: CIRBenchmark,
    query_embeds: Tensor,
    gallery_embeds: Tensor,
    method: str = "pvlf",
    precision: str = "unknown",
) -> Evaluation:
    """Ranks and measures embeddings, of whatever model, by the benchmark's protocol.

    Args:
        benchmark: queries with targets, and gallery.
        query_embeds: `(queries, d)` in the order of the rows; need not be normalised.
        gallery_embeds: `(gallery, d)`, likewise.
        method: names how the queries were embedded.
        precision: likewise, in words.

    Raises:
        ValueError: if the benchmark has no targets, or embeddings do not fit it.
    """
    _check_targets(benchmark)
    if len(gallery_embeds) != len(benchmark.gallery):
        raise ValueError(f"{len(gallery_embeds)} gallery embeddings for {len(benchmark.gallery)} gallery images")
    target, exclude = gallery_rows(benchmark, "target_id"), excluded_rows(benchmark)
    ranks = target_ranks(query_embeds, gallery_embeds, target, exclude)
    per_query: dict[str, tuple[Any, ...]] = {"query_id": tuple(query_ids(benchmark)), "rank": tuple(ranks.tolist())}
    if benchmark.protocol.metrics == "fashioniq":
        metrics = fashioniq_metrics(ranks)
    elif benchmark.protocol.metrics == "circo":
        positives = positive_ranks(query_embeds, gallery_embeds, gallery_rows(benchmark, "target_ids"), exclude)
        metrics = circo_metrics(positives, ranks)
        precisions = average_precision_at_k(positives, CIRCO_KS)
        per_query |= {f"average_precision@{k}": tuple(values.tolist()) for k, values in precisions.items()}
        if "semantic_aspects" in benchmark.queries.column_names:
            aspects = [tuple(its) for its in benchmark.queries["semantic_aspects"]]
            metrics |= {f"map@10/{aspect}": mean for aspect, mean in mean_by_aspect(precisions[10], aspects).items()}
            per_query["semantic_aspects"] = tuple(aspects)
    elif "subset_ids" in benchmark.queries.column_names:
        in_subset = subset_ranks(query_embeds, gallery_embeds, gallery_rows(benchmark, "subset_ids"), target, exclude)
        metrics = cirr_metrics(ranks, in_subset)
        per_query["subset_rank"] = tuple(in_subset.tolist())
    else:
        metrics = cirr_metrics(ranks)
    counts = {"queries": len(benchmark.queries), "gallery": len(benchmark.gallery)}
    return Evaluation(benchmark.name, method, metrics, counts, asdict(benchmark.protocol), precision, per_query)


def average(evaluations: Sequence[Evaluation]) -> Evaluation:
    """The unweighted mean over benchmarks of one protocol, as FashionIQ reports its three categories.

    Args:
        evaluations: of `"fashioniq/val/dress"` and so on, by the same method.

    Returns:
        An evaluation of `"fashioniq/val/average"`: metrics are means, counts are sums.

    Raises:
        ValueError: if there is none, or they differ in method, protocol or metrics.
    """
    if not evaluations:
        raise ValueError("nothing to average: pass one evaluation for each category")
    first = evaluations[0]
    kinds = {(e.benchmark.rpartition("/")[0], e.method, e.protocol["name"], tuple(e.metrics)) for e in evaluations}
    if len(kinds) > 1:
        raise ValueError(f"only evaluations of one protocol and method can be averaged, got {sorted(kinds)}")
    columns = [{**e.per_query, "benchmark": (e.benchmark,) * e.counts["queries"]} for e in evaluations]
    return replace(
        first,
        benchmark=f"{first.benchmark.rpartition('/')[0]}/average",
        metrics={name: fmean(e.metrics[name] for e in evaluations) for name in first.metrics},
        counts={name: sum(e.counts[name] for e in evaluations) for name in first.counts},
        protocol={name: "; ".join(dict.fromkeys(e.protocol[name] for e in evaluations)) for name in first.protocol},
        per_query={name: tuple(value for c in columns for value in c[name]) for name in columns[0]},
    )


def intervals(evaluation: Evaluation, confidence: float = 0.95) -> dict[str, tuple[float, float]]:
    """Bootstrap interval of each metric over queries, see [`~pvlf_hf.significance.bootstrap_interval`].

    Those of an average over benchmarks are joined from the intervals of each (MOVER: Zou and Donner, 2008), because
    every benchmark keeps its number of queries.

    Args:
        evaluation: from [`evaluate`] or [`average`].
        confidence: how often such intervals hold the true mean.
    """
    groups = evaluation.per_query.get("benchmark", ())
    names = tuple(dict.fromkeys(groups))

    def interval(metric: str) -> tuple[float, float]:
        values = evaluation.values(metric)
        if not names:
            return bootstrap_interval(values, confidence, RESAMPLES)
        parts = [[v for v, its in zip(values, groups, strict=True) if its == name] for name in names]
        ends = [bootstrap_interval(part, confidence, RESAMPLES) for part in parts]
        means = [fmean(part) for part in parts]
        below = sum((mean - low) ** 2 for mean, (low, _) in zip(means, ends, strict=True)) ** 0.5 / len(parts)
        above = sum((high - mean) ** 2 for mean, (_, high) in zip(means, ends, strict=True)) ** 0.5 / len(parts)
        return fmean(means) - below, fmean(means) + above

    return {metric: interval(metric) for metric in evaluation.metrics}


def query_ids(benchmark: CIRBenchmark) -> list[str]:
    """What results and submission files call the queries: `query_id`, or else the row."""
    if "query_id" in benchmark.queries.column_names:
        return list(benchmark.queries["query_id"])
    return [str(row) for row in range(len(benchmark.queries))]


def excluded_rows(benchmark: CIRBenchmark) -> Tensor | None:
    """int64 `(queries,)`, the gallery row that each query's ranking leaves out; None if it leaves out nothing."""
    return gallery_rows(benchmark, "reference_id") if benchmark.protocol.reference == "removed" else None


def _check_targets(benchmark: CIRBenchmark) -> None:
    if not benchmark.has_targets:
        raise ValueError(
            f"{benchmark.name} has no target_id, its labels are on a server: rank it with `embed` and write the file "
            "for the server with pvlf_hf.submission"
        )


def gallery_rows(benchmark: CIRBenchmark, column: str) -> Tensor:
    """Gallery rows of the ids in a column: int64 `(queries,)`, or `(queries, most)` filled up with -1 for lists."""
    row_of = {image_id: row for row, image_id in enumerate(benchmark.gallery["image_id"])}
    if column in ("target_ids", "subset_ids"):
        if column not in benchmark.queries.column_names:
            raise ValueError(f"{benchmark.name}: its protocol's metrics need the column {column}")
        rows = [torch.tensor([row_of[i] for i in ids]) for ids in benchmark.queries[column]]
        return pad_sequence(rows, batch_first=True, padding_value=-1)
    return torch.tensor([row_of[i] for i in benchmark.queries[column]])


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
    names = [field.name for field in fields(Evaluation) if field.name != "per_query"]
    return [
        Evaluation(**{n: e[n] for n in names}, per_query={name: _frozen(its) for name, its in columns.items()})
        for e, columns in zip(summaries, per_query, strict=True)
    ]


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


__all__ = [
    "Evaluation",
    "average",
    "environment",
    "evaluate",
    "evaluate_all",
    "intervals",
    "read_results",
    "score",
    "write_results",
]
