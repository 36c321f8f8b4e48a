"""Ranks a benchmark's gallery for its queries: model, processor, data and metrics joined into numbers."""

import json
import platform
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from .data import CIRBenchmark
from .metrics import cirr_metrics, subset_ranks, target_ranks
from .modeling_pvlf import PVLFModel
from .processing_pvlf import PVLFProcessor

QueryMethod = Literal["pvlf", "image", "text", "image+text"]

QUERY_METHODS: tuple[QueryMethod, ...] = ("pvlf", "image", "text", "image+text")
"""How a query becomes an embedding: by the model, or one of the paper's baselines (Tables 1-2): the reference image's
embedding alone, the caption's alone, or the sum of the two, normalised."""


@dataclass(frozen=True)
class Evaluation:
    """The outcome of one evaluation.

    Args:
        benchmark: name of the benchmark.
        method: one of `QUERY_METHODS`.
        metrics: fractions in [0, 1]: `recall@k`, and with subsets `recall_subset@k` and `mean`.
        counts: number of queries and of gallery images.
        protocol: how to read the metrics.
        ranks: 0-based rank of every query's target, in the order of the queries.
        subset_ranks: likewise among the subset, empty without subsets.
    """

    benchmark: str
    method: str
    metrics: dict[str, float]
    counts: dict[str, int]
    protocol: dict[str, str]
    ranks: tuple[int, ...]
    subset_ranks: tuple[int, ...]


def evaluate(
    model: PVLFModel,
    processor: PVLFProcessor,
    benchmark: CIRBenchmark,
    method: QueryMethod = "pvlf",
    batch_size: int = 64,
    gallery_embeds: Tensor | None = None,
    progress: bool = True,
) -> Evaluation:
    """Encodes gallery and queries and ranks them, the reference left out (the CIRR protocol).

    Under several processes each encodes a share and all return the same result.

    Args:
        model: the model; it is put in eval mode for the time being.
        processor: its processor.
        benchmark: queries and gallery.
        method: how a query is embedded, see `QUERY_METHODS`.
        batch_size: images encoded at once in each process.
        gallery_embeds: `(gallery, d)` from [`encode_gallery`] with the same model, to encode the gallery only once
            for several query sets.
        progress: show progress bars.

    Raises:
        ValueError: for an unknown method, or a gallery that does not fit the benchmark.
    """
    check_method(method)
    if gallery_embeds is None:
        gallery_embeds = encode_gallery(model, processor, benchmark.gallery, batch_size, progress)
    if len(gallery_embeds) != len(benchmark.gallery):
        raise ValueError(f"{len(gallery_embeds)} gallery embeddings for {len(benchmark.gallery)} gallery images")
    query_embeds = encode_queries(model, processor, benchmark.queries, method, batch_size, progress)
    row_of = {image_id: row for row, image_id in enumerate(benchmark.gallery["image_id"])}
    queries = benchmark.queries
    target = torch.tensor([row_of[i] for i in queries["target_id"]])
    reference = torch.tensor([row_of[i] for i in queries["reference_id"]])
    ranks = target_ranks(query_embeds, gallery_embeds, target, reference)
    in_subset = None
    if "subset_ids" in queries.column_names:
        subsets = [torch.tensor([row_of[i] for i in ids]) for ids in queries["subset_ids"]]
        subset = pad_sequence(subsets, batch_first=True, padding_value=-1)
        in_subset = subset_ranks(query_embeds, gallery_embeds, subset, target, reference)
    return Evaluation(
        benchmark=benchmark.name,
        method=method,
        metrics=cirr_metrics(ranks, in_subset),
        counts={"queries": len(queries), "gallery": len(benchmark.gallery)},
        protocol={"ties": "gallery order", "similarity": "cosine, float32", **benchmark.protocol},
        ranks=tuple(ranks.tolist()),
        subset_ranks=() if in_subset is None else tuple(in_subset.tolist()),
    )


def encode_gallery(
    model: PVLFModel, processor: PVLFProcessor, gallery: Dataset, batch_size: int = 64, progress: bool = True
) -> Tensor:
    """Embeds the images of a gallery.

    Returns:
        float32 `(gallery, d)` on the CPU, L2-normalised, in the order of the rows.
    """

    def encode(rows: dict[str, list[Any]]) -> Tensor:
        inputs = processor.process_targets(rows["image"]).to(device_of(model))
        return model(target_pixel_values=inputs["pixel_values"]).target_embeds

    return _encode(model, gallery.select_columns("image"), encode, batch_size, "gallery", progress)


def encode_queries(
    model: PVLFModel,
    processor: PVLFProcessor,
    queries: Dataset,
    method: QueryMethod = "pvlf",
    batch_size: int = 64,
    progress: bool = True,
) -> Tensor:
    """Embeds queries by one of `QUERY_METHODS`.

    Returns:
        float32 `(queries, d)` on the CPU, L2-normalised, in the order of the rows.

    Raises:
        ValueError: for an unknown method.
    """
    check_method(method)

    def encode(rows: dict[str, list[Any]]) -> Tensor:
        if method == "pvlf":
            return model(
                **processor.process_queries(rows["reference"], rows["caption"]).to(device_of(model))
            ).query_embeds
        embeds = []
        if "image" in method:
            embeds.append(model.get_image_features(**processor(images=rows["reference"]).to(device_of(model))))
        if "text" in method:
            embeds.append(model.get_text_features(**processor(text=rows["caption"]).to(device_of(model))))
        return F.normalize(sum(e.pooler_output for e in embeds), dim=-1)

    columns = {"image": ["reference"], "text": ["caption"]}.get(method, ["reference", "caption"])
    return _encode(model, queries.select_columns(columns), encode, batch_size, "queries", progress)


def check_method(method: str) -> None:
    """Raises a `ValueError` unless the method is one of `QUERY_METHODS`."""
    if method not in QUERY_METHODS:
        raise ValueError(f"method={method!r}: choose one of {QUERY_METHODS}")


@torch.inference_mode()
def _encode(
    model: PVLFModel,
    dataset: Dataset,
    encode: Callable[[dict[str, list[Any]]], Tensor],
    batch_size: int,
    what: str,
    progress: bool,
) -> Tensor:
    state = PartialState()
    was_training = model.training
    model.eval()
    # Padded to equal shares: a sharded model needs every process in every forward.
    with state.split_between_processes(list(range(len(dataset))), apply_padding=True) as share:
        batches = dataset.select(share).iter(batch_size=batch_size)
        total = -(-len(share) // batch_size)
        bar = tqdm(batches, desc=f"encoding {what}", total=total, disable=not (progress and state.is_main_process))
        try:
            embeds = torch.cat([encode(rows).float().cpu() for rows in bar])
        except (OSError, ValueError) as error:
            raise ValueError(f"{what}: {_first_unreadable(dataset, share)}{error}") from error
        finally:
            model.train(was_training)
    if state.num_processes == 1:
        return embeds
    by_row = dict(zip(gather_object(list(share)), torch.cat(gather_object([embeds])), strict=True))
    return torch.stack([by_row[row] for row in range(len(dataset))])


def _first_unreadable(dataset: Dataset, rows: list[int]) -> str:
    """Names the first row whose picture does not decode; the error of a whole batch does not say which it is."""
    for row in rows:
        try:
            dataset[row]
        except OSError:
            return f"the picture of row {row} cannot be read, replace it or drop the row: "
    return ""


def device_of(model: torch.nn.Module) -> torch.device:
    """The device that a model's inputs belong on."""
    return next(model.parameters()).device


def write_results(file: str | Path, evaluations: Iterable[Evaluation], **facts: Any) -> None:
    """Writes evaluations and what is needed to repeat them as JSON (UTF-8).

    Args:
        file: usually `results.json`.
        evaluations: what [`evaluate`] returned.
        facts: anything else worth keeping: seeds, arguments.
    """
    results = {
        **facts,
        "evaluations": [{k: v for k, v in asdict(e).items() if not k.endswith("ranks")} for e in evaluations],
        "environment": environment(),
    }
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def environment() -> dict[str, str | None]:
    """Versions and commit that a result was measured with; commit is None where this file is not under git."""
    packages = ("pvlf-hf", "torch", "transformers", "accelerate", "datasets", "pillow")
    return {"python": platform.python_version(), **{p: version(p) for p in packages}, "commit": _commit()}


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
    "QUERY_METHODS",
    "Evaluation",
    "QueryMethod",
    "encode_gallery",
    "encode_queries",
    "environment",
    "evaluate",
    "write_results",
]
