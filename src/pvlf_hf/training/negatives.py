"""Hard negatives: images that a triplet names, its reference, and targets that the model ranks too high.

Each row of a batch brings the same number of further images, which every query of the batch is compared with, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import logging

from ..data.checks import check_columns
from ..data.triplets import TRIPLET_COLUMNS
from ..models.image_processing_pvlf import decode_cell, opened
from ..models.interface_pvlf import unwrap
from ..models.modeling_inversion import InversionModel
from ..models.modeling_pvlf import PVLFModel
from ..models.modeling_training_free import TrainingFreeModel

logger = logging.get_logger(__name__)

MODELS = (PVLFModel, TrainingFreeModel, InversionModel)
"""Classes of models whose loss takes more targets than queries."""

POOL = 16
"""Mined negatives of a query that are kept, of which each batch takes some (our choice)."""

QUERIES_AT_ONCE = 1024
"""Queries ranked at once (our choice)."""


class RowsWithNegatives(torch.utils.data.Dataset):
    """Rows of triplets, each with `negatives`, so many images, and `negative_ids`.

    The reference is always among them where there is more than one, because a model that ignores the caption finds it
    first. The others are drawn anew each time, from the mined ones, or else those of the column `negatives`. A row
    with fewer repeats them.

    Args:
        rows: with `pvlf_hf.data.triplets.TRIPLET_COLUMNS` and `reference_id`; images, or digests of kept features.
        count: negatives of a row.

    Attributes:
        mined: by row, the rows whose targets are its negatives; empty before the first mined pass.
    """

    def __init__(self, rows: Dataset, count: int) -> None:
        self.rows, self.count = opened(rows), count
        self.mined: list[list[int]] = []
        texts = rows.with_format(None)
        self.target_ids = list(map(str, texts["target_id"][:]))
        images = texts["target_image_id"][:] if "target_image_id" in rows.column_names else self.target_ids
        self.id_of = dict(zip(map(str, images), self.target_ids, strict=True))
        self.mode = getattr(rows.features["target"], "mode", None)
        self.keeps_features = not hasattr(rows.features["target"], "decode")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Return a row with its negatives."""
        cells = self.rows[row]
        reference = (cells["reference"], self.id_of.get(str(cells["reference_id"]), str(cells["reference_id"])))
        others = [("row", other) for other in self.mined[row]] if self.mined else []
        others = others or self._listed(cells)
        order = [others[at] for at in torch.randperm(len(others)).tolist()]
        chosen: list[tuple[Any, str]] = [reference] if self.count > 1 or not order else []
        chosen += [self._open(*one) for one in order[: self.count - len(chosen)]]
        chosen = [chosen[at % len(chosen)] for at in range(self.count)]
        images, ids = zip(*chosen, strict=True)
        return {**cells, "negatives": list(images), "negative_ids": list(ids)}

    def _listed(self, cells: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the negatives of the columns `negatives` and `negative_ids`, without the reference."""
        files = cells.get("negatives") or []
        names = list(map(str, cells.get("negative_ids") or files))
        return [("file", one) for one in zip(files, names, strict=True) if one[1] != str(cells["reference_id"])]

    def _open(self, kind: str, negative: Any) -> tuple[Any, str]:
        """Return image (or digest) and id of a negative: the target of a row, or a file with its name."""
        if kind == "row":
            return self.rows[negative]["target"], self.target_ids[negative]
        file, name = negative
        image = file if self.keeps_features else decode_cell({"path": file, "bytes": None}, self.mode)
        return image, self.id_of.get(name, name)


def used_negatives(model: Any, dataset: Any, args: Any) -> Any:
    """Return a data set without negatives that are not trained with, so that no one reads them.

    Raises:
        ValueError: if hard negatives cannot go with the model or the data set.
    """
    if not args.hard_negatives:
        columns = {"negatives", "negative_ids"} & {*(getattr(dataset, "column_names", None) or ())}
        return dataset.remove_columns(sorted(columns)) if columns and isinstance(dataset, Dataset) else dataset
    if model is not None and not isinstance(unwrap(model), MODELS):
        raise ValueError(
            f"hard_negatives={args.hard_negatives}: the loss of {type(unwrap(model)).__name__} compares queries with "
            "their own targets alone: leave it at 0"
        )
    if not isinstance(dataset, Dataset) or dataset.format["type"] == "custom":
        raise ValueError("hard_negatives needs all rows at once, untransformed: pass a datasets.Dataset, no stream")
    check_columns(dataset, ("reference_id",), "train_dataset (hard_negatives)")
    return dataset


def negative_columns(dataset: Dataset) -> list[str]:
    """Return the columns of a data set that hard negatives read."""
    names = ("reference_id", "target_image_id", "negatives", "negative_ids")
    return [name for name in names if name in dataset.column_names]


class MineNegatives(TrainerCallback):
    """Callback that mines negatives between epochs.

    Args:
        trainer: the [`PVLFTrainer`].
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer, self.resumes = trainer, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note whether the run resumes, behind passes whose results were not kept."""
        self.resumes = round(state.epoch or 0) >= args.mine_every

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mine at every `args.mine_every`-th epoch but the first, and where a run resumes."""
        epoch = round(state.epoch or 0)
        rows = self.trainer.rows_with_negatives
        if rows is not None and epoch and (epoch % args.mine_every == 0 or self.resumes):
            self.resumes = False
            rows.mined = mine_negatives(self.trainer)
            logger.warning(f"epoch {epoch}: mined {sum(map(len, rows.mined)) / len(rows):.1f} negatives a triplet")


@torch.no_grad()
def mine_negatives(trainer: Any) -> list[list[int]]:
    """Rank the training targets for every training query; return the rows of each one's hard negatives."""
    args, dataset, model = trainer.args, trainer.train_dataset, trainer.model_wrapped
    rows: Any = opened(dataset.select_columns(list(TRIPLET_COLUMNS)))
    was_training = model.training
    model.eval()
    found = []
    try:
        with trainer.compute_loss_context_manager():
            for batch in DataLoader(rows, args.per_device_eval_batch_size, collate_fn=trainer.data_collator):
                inputs = {name: _to(value, args.device) for name, value in batch.items() if name != "target_ids"}
                output = model(**inputs, return_loss=False)
                found.append((output.query_embeds.float().cpu(), output.target_embeds.float().cpu()))
    finally:
        model.train(was_training)
    queries, targets = map(torch.cat, zip(*found, strict=True))
    return hard_rows(queries, targets, list(map(str, dataset["target_id"][:])), args.mine_threshold)


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {name: _to(one, device) for name, one in value.items()}
    return value.to(device)


def hard_rows(
    queries: Tensor, targets: Tensor, target_ids: Sequence[str], threshold: float, pool: int = POOL
) -> list[list[int]]:
    """Return the rows whose targets each query ranks highest, but not suspiciously high: positive-aware mining.

    A target that scores more than `threshold` of what the query's own does may well be right, too (NV-Retriever's
    TopK-PercPos, arXiv 2407.15831).

    Args:
        queries: float32 `(rows, d)`, L2-normalised.
        targets: float32 `(rows, d)`, L2-normalised.
        target_ids: of the rows; a row's own id is never among its negatives, and no other twice.
        threshold: share of the positive's score that a negative may have.
        pool: rows returned for a query, at most.
    """
    first_row: dict[str, int] = {}
    for row, name in enumerate(target_ids):
        first_row.setdefault(name, row)
    numbers = {name: number for number, name in enumerate(first_row)}
    ids = torch.tensor([numbers[name] for name in target_ids])
    first = torch.tensor(list(first_row.values()))  # one row of each target
    found = []
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        block = queries[start : start + QUERIES_AT_ONCE]
        own = (block * targets[start : start + len(block)]).sum(dim=1, keepdim=True)
        bound = own - (1 - threshold) * own.abs()
        scores = block @ targets[first].T
        scores[(scores > bound) | (ids[start : start + len(block), None] == ids[first][None])] = -torch.inf
        best = scores.topk(min(pool, len(first)), dim=1)
        for values, rows in zip(best.values, first[best.indices], strict=True):
            found.append(rows[values > -torch.inf].tolist())
    return found


__all__ = [
    "MineNegatives",
    "RowsWithNegatives",
    "hard_rows",
    "mine_negatives",
    "negative_columns",
    "used_negatives",
]
