"""Batches of training triplets."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import ProcessorMixin

from ..data.triplets import TRIPLET_COLUMNS
from ..digests import id_number


class OneValueBatchSampler(Sampler[int]):
    """Row numbers in random order, in blocks that agree in a column; give it a column whose values are frequent.

    Args:
        values: the column.
        batch_size: rows of a block. Rows that do not fill one are left out of the epoch, others in each.
        seed: of the order, together with the epoch.

    Raises:
        ValueError: if no value has enough rows for a batch.
    """

    def __init__(self, values: Sequence[Hashable], batch_size: int, seed: int) -> None:
        self.rows_of: dict[Hashable, list[int]] = defaultdict(list)
        for row, value in enumerate(values):
            self.rows_of[value].append(row)
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0
        if not len(self):
            most = max(map(len, self.rows_of.values()), default=0)
            raise ValueError(
                f"no value of the batch_by column has the {batch_size} rows of a batch, but {most} at most"
            )

    def __len__(self) -> int:
        return sum(len(rows) // self.batch_size * self.batch_size for rows in self.rows_of.values())

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer, so that every epoch differs and a resumed one is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)
        batches = []
        for rows in self.rows_of.values():
            order = torch.tensor(rows)[torch.randperm(len(rows), generator=random)]
            batches += [batch for batch in order.split(self.batch_size) if len(batch) == self.batch_size]
        for number in torch.randperm(len(batches), generator=random).tolist():
            yield from batches[number].tolist()


class PVLFCollator:
    """Makes a training batch of triplets: what [`PVLFModel.forward`] takes.

    Args:
        processor: the [`PVLFProcessor`] of the model.

    Returns (when called with a list of rows with `TRIPLET_COLUMNS`):
        `pixel_values`, `target_pixel_values` `(batch, 3, height, width)`; `input_ids`, `attention_mask`
        `(batch, n)`; `target_ids` int64 `(batch,)`, equal where the `target_id` strings are.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """See the class."""
        missing = [c for c in TRIPLET_COLUMNS if c not in rows[0]]
        if missing:
            raise ValueError(f"triplets lack column(s) {missing}; they have {list(rows[0])}")
        batch = self.processor(
            images=[row["reference"] for row in rows],
            text=[row["caption"] for row in rows],
            target_images=[row["target"] for row in rows],
            return_tensors="pt",
        )
        return {**batch, "target_ids": torch.tensor([id_number(str(row["target_id"])) for row in rows])}
