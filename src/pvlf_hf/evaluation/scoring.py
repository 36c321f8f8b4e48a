"""Evaluates a model, or embeddings, on a benchmark by the metrics of its protocol."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from statistics import fmean

from torch import Tensor

from ..data.benchmark import CIRBenchmark, query_ids
from ..embeddings.combined import CombinedQueries
from ..embeddings.embedding_store import EmbeddingStore, dtype_of
from ..embeddings.encoding import QueryMethod, embed, encode_gallery, method_named
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .metrics import metrics_named
from .results import Evaluation


def evaluate(
    model: ComposedRetrievalModel | None,
    processor: ComposedRetrievalProcessor | None,
    benchmark: CIRBenchmark,
    method: QueryMethod = "composed",
    batch_size: int = 64,
    gallery_embeds: Tensor | None = None,
    progress: bool = True,
    store: EmbeddingStore | None = None,
) -> Evaluation:
    """Encode gallery and queries, rank the gallery and compute the metrics, all by the benchmark's protocol.

    If several processes run, each encodes a share and all return the same result.

    Args:
        model: the model; it is put in eval mode and back. None to score the embeddings in the store.
        processor: its processor.
        benchmark: queries and gallery.
        method: how a query is embedded, see `QUERY_METHODS`.
        batch_size: images encoded at once in each process, fewer where a CPU is faster with them.
        gallery_embeds: `(gallery, d)` from [`encode_gallery`] with the same model, to encode the gallery only once
            for several query sets.
        progress: show progress bars.
        store: embeddings on disk: those it holds are not encoded again, the others are added, and those of images that
            have changed since replaced; without a model they are taken as they are.

    Raises:
        ValueError: for an unknown method, a benchmark without targets, a gallery that does not fit the benchmark, a
            store of another model, or a store that lacks embeddings while `model` is None.
    """
    method = method_named(method)
    _check_targets(benchmark)
    embeds = embed(model, processor, benchmark, method, batch_size, gallery_embeds, progress, store)
    dtype = dtype_of(model) if model is not None else store.model["dtype"]  # type: ignore[union-attr,index]
    measured = score(benchmark, *embeds, method, f"embeddings {dtype}, cosines float64 rounded to float32")
    if method != "composed" or (template := getattr(processor, "template", None)) is None:
        return measured
    return replace(measured, protocol={**measured.protocol, "template": template})


def evaluate_all(
    model: ComposedRetrievalModel,
    processor: ComposedRetrievalProcessor,
    benchmarks: Sequence[CIRBenchmark],
    methods: Sequence[QueryMethod] = ("composed",),
) -> list[Evaluation]:
    """Evaluate on several benchmarks by one or several methods; a gallery that they share is encoded only once."""
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
    query_embeds: Tensor | CombinedQueries,
    gallery_embeds: Tensor,
    method: str = "composed",
    dtype: str = "unknown",
) -> Evaluation:
    """Compute the metrics of embeddings, from any model, by the benchmark's protocol.

    Args:
        benchmark: queries with targets, and gallery.
        query_embeds: `(queries, d)` in the order of the queries; need not be normalised.
        gallery_embeds: `(gallery, d)`, likewise.
        method: how the queries were embedded, for the record.
        dtype: dtypes in which embeddings and cosines were computed, for the record.

    Raises:
        ValueError: if the benchmark has no targets or lacks a column, or embeddings do not fit it.
    """
    _check_targets(benchmark)
    if len(gallery_embeds) != len(benchmark.gallery):
        raise ValueError(f"{len(gallery_embeds)} gallery embeddings for {len(benchmark.gallery)} gallery images")
    metrics = metrics_named(benchmark.protocol.metrics)
    columns = metrics.measure(query_embeds, gallery_embeds, benchmark)
    return Evaluation(
        benchmark=benchmark.name,
        method=method,
        metrics=metrics.means(columns),
        counts={"queries": len(benchmark.queries), "gallery": len(benchmark.gallery)},
        protocol=asdict(benchmark.protocol),
        dtype=dtype,
        per_query={"query_id": tuple(query_ids(benchmark)), **columns},
    )


def average(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Average evaluations of one protocol without weights, as FashionIQ reports its three categories.

    Args:
        evaluations: one per category (`"fashioniq/val/dress"` and so on), all by the same method.

    Returns:
        An evaluation of `"fashioniq/val/average"`: metrics are means, counts are sums.

    Raises:
        ValueError: if there is no evaluation, or they differ in method, protocol or metrics.
    """
    if not evaluations:
        raise ValueError("nothing to average: pass one evaluation for each category")
    first = evaluations[0]
    settings = {(e.benchmark.rpartition("/")[0], e.method, e.protocol["name"], tuple(e.metrics)) for e in evaluations}
    if len(settings) > 1:
        raise ValueError(f"only evaluations of one protocol and method can be averaged, got {sorted(settings)}")
    columns = [{**e.per_query, "benchmark": (e.benchmark,) * e.counts["queries"]} for e in evaluations]
    return replace(
        first,
        benchmark=f"{first.benchmark.rpartition('/')[0]}/average",
        metrics={name: fmean(e.metrics[name] for e in evaluations) for name in first.metrics},
        counts={name: sum(e.counts[name] for e in evaluations) for name in first.counts},
        protocol={name: "; ".join(dict.fromkeys(e.protocol[name] for e in evaluations)) for name in first.protocol},
        per_query={name: tuple(value for c in columns for value in c[name]) for name in columns[0]},
    )


def _check_targets(benchmark: CIRBenchmark) -> None:
    if not benchmark.has_targets:
        raise ValueError(
            f"{benchmark.name} has no target_id because a server keeps its labels: embed it with `embed` and write "
            "the file for the server with pvlf_hf.evaluation.submission"
        )


__all__ = [
    "average",
    "evaluate",
    "evaluate_all",
    "score",
]
