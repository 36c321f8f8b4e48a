"""Checks of training and evaluation data before the first step, and of a batch whose loss is not finite."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from ..data.benchmark import CIRBenchmark, check_columns
from ..data.checks import check_rows
from ..data.triplets import TRIPLET_COLUMNS
from ..digests import id_number
from ..evaluation.scoring import score
from ..models.interface_pvlf import ComposedRetrievalOutput

ROWS_AT_ONCE = 10_000
"""Rows read at once when a column is checked."""


def check_train_dataset(dataset: Any, args: Any, columns: Sequence[str] = TRIPLET_COLUMNS) -> None:
    """Raise a `ValueError` if training on a dataset would fail, or ignore an argument; name the row or argument.

    Args:
        dataset: the training set. Only a `datasets` dataset can be checked; any other is accepted unchecked.
        args: [`PVLFTrainingArguments`].
        columns: columns that the training reads.
    """
    if isinstance(dataset, dict):
        raise ValueError(f"train_dataset has splits {list(dataset)}: pass one of them, such as dataset['train']")
    if getattr(dataset, "column_names", None) is not None:
        check_columns(dataset, columns, "train_dataset", streams=True)
    if isinstance(dataset, IterableDataset):
        _check_stream_arguments(args)
    elif isinstance(dataset, Dataset):
        check_batch_size(dataset, args)
        _check_rows(dataset, columns)


def check_batch_size(dataset: Any, args: Any) -> None:
    """Raise a `ValueError` if a data set has fewer rows than a batch and such batches are dropped."""
    rows = args.train_batch_size * args.world_size
    if isinstance(dataset, Dataset) and args.dataloader_drop_last and len(dataset) < rows:
        raise ValueError(
            f"train_dataset has {len(dataset)} rows, a step takes {rows} and shorter batches are dropped: lower "
            "per_device_train_batch_size"
        )


def _check_stream_arguments(args: Any) -> None:
    if args.batch_by is not None:
        raise ValueError(f"batch_by={args.batch_by!r} needs all rows at once, but train_dataset is a stream")
    ignored = {
        "train_sampling_strategy": args.train_sampling_strategy != "random",
        "data_seed": args.data_seed is not None,
        "accelerator_config.dispatch_batches": bool(args.accelerator_config.dispatch_batches),
    }
    if names := [name for name, is_set in ignored.items() if is_set]:
        raise ValueError(
            f"{' and '.join(names)}: without effect on a stream, which has an order and full batches of its own; "
            "leave it out, or shuffle the stream itself"
        )


def _check_rows(dataset: Dataset, columns: Sequence[str]) -> None:
    """Raise a `ValueError` that names the first row without a caption, an image or a target_id."""
    if dataset.format["type"] == "custom":  # a transform may make rows of other columns; the collator checks its rows
        return
    if "caption" in columns:
        check_rows(dataset, "train_dataset")
    for column in (name for name in ("reference", "target", "image") if name in columns):
        if dataset.data.column(column).null_count:  # counted in the file: rows may have been left out since
            _check_images(dataset, column)


def _check_images(dataset: Dataset, column: str) -> None:
    named = ["target_id"] if "target_id" in dataset.column_names else []
    images = dataset.select_columns([column, *named]).with_format("arrow")
    for start in range(0, len(images), ROWS_AT_ONCE):
        rows = images[start : start + ROWS_AT_ONCE]
        for offset, image in enumerate(rows[column]):
            if not image.is_valid:
                name = f", with target_id {rows['target_id'][offset].as_py()!r}" if named else ""
                raise ValueError(
                    f"row {start + offset} of train_dataset{name}: {column} is None, give it an image or drop the row"
                )


def check_eval_dataset(eval_dataset: Any, metric: str | None = None) -> None:
    """Raise a `ValueError` unless a value is a benchmark with targets, or a dictionary of them.

    Args:
        eval_dataset: the value.
        metric: a metric that the evaluation must report, such as `"eval_recall@1"`.
    """
    by_name = eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}
    for name, benchmark in by_name.items():
        where = f"eval_dataset[{name!r}]" if name else "eval_dataset"
        if not isinstance(benchmark, CIRBenchmark):
            raise ValueError(
                f"{where} must be a CIRBenchmark (or eval_dataset a dict of them), got {type(benchmark).__name__}: "
                "benchmark_from_triplets makes one of triplets"
            )
        if not benchmark.has_targets:
            raise ValueError(f"{where} has no target_id, so it cannot be scored: pass a split with targets")
    if not by_name:
        raise ValueError("eval_dataset is an empty dict: leave it out, or name a benchmark in it")
    if metric is not None:
        names = [f"eval_{name}_{m}" if name else f"eval_{m}" for name, b in by_name.items() for m in _metrics_of(b)]
        if f"eval_{metric.removeprefix('eval_')}" not in names:
            raise ValueError(f"metric_for_best_model={metric!r}: the evaluation reports {names}, choose one of them")


def _metrics_of(benchmark: CIRBenchmark) -> list[str]:
    """Return the names of a benchmark's metrics, by scoring random embeddings."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = (torch.randn(len(d), 4, generator=generator) for d in (benchmark.queries, benchmark.gallery))
    return list(score(benchmark, queries, gallery).metrics)


def describe_nonfinite_loss(
    loss: Tensor, outputs: ComposedRetrievalOutput, target_ids: Tensor | None, dataset: Any
) -> str:
    """Describe which triplets of a batch have embeddings that are not finite, and what to do."""
    embeds: list[Any] = [outputs.query_embeds, outputs.target_embeds]
    if any(rows is None for rows in embeds):
        return f"{loss.item()}: resume the last checkpoint with a lower learning rate"
    bad = ~torch.stack([rows.isfinite().all(dim=1) for rows in embeds]).all(dim=0)
    names: dict[int, str] = {}
    if isinstance(dataset, Dataset):  # a stream cannot be read a second time for its ids
        names = {id_number(str(name)): str(name) for name in dataset["target_id"][:]}
    numbers = [] if target_ids is None else target_ids[bad].tolist()
    ids = [names.get(number, number) for number in numbers]
    count = int(bad.sum())
    if count == len(bad):
        advice = "all of them, so the weights are to blame: resume the last checkpoint with a lower learning rate"
    elif count:
        advice = "check their images and captions"
    else:
        advice = "another process has such triplets and names them, or the temperature is too low"
    return (
        f"{loss.item()}: {count} of {len(bad)} triplets of the batch have embeddings that are not finite, with "
        f"target_id {ids}; {advice}"
    )


__all__ = ["check_batch_size", "check_eval_dataset", "check_train_dataset", "describe_nonfinite_loss"]
