"""Batches of training triplets."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import ProcessorMixin

from ..data.checks import caption_problem
from ..data.triplets import TRIPLET_COLUMNS
from ..digests import id_number


class OneValueBatchSampler(Sampler[int]):
    """Sampler of row numbers in random order, in blocks whose rows have the same value in a column.

    Args:
        values: the column. Its values should be frequent.
        batch_size: rows per block. Rows that do not fill a block are left out, different ones in each epoch.
        seed: seeds the order, together with the epoch.

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
        """Set the epoch; the Trainer calls it, so that every epoch differs and a resumed one is the same."""
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
    """Collator that makes the model's training inputs of a list of triplets with the columns `TRIPLET_COLUMNS`.

    Args:
        processor: the [`PVLFProcessor`] of the model.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of triplets.

        Returns:
            `pixel_values`, `target_pixel_values` float `(batch, 3, height, width)`; `input_ids`, `attention_mask`
            int64 `(batch, n)`; `target_ids` int64 `(batch,)`, equal where the `target_id` strings are.

        Raises:
            ValueError: if a column is missing, or a caption is none; names the row's `target_id`.
        """
        missing = [c for c in TRIPLET_COLUMNS if c not in rows[0]]
        if missing:
            raise ValueError(f"triplets lack column(s) {missing}; they have {list(rows[0])}")
        for row in rows:
            if problem := caption_problem(row["caption"]):
                raise ValueError(f"triplet with target_id {row['target_id']!r}: caption {problem}; drop the row")
        batch = self.processor(
            images=[row["reference"] for row in rows],
            text=[row["caption"] for row in rows],
            target_images=[row["target"] for row in rows],
            return_tensors="pt",
            **getattr(self.processor, "training_settings", {}),
        )
        return {**batch, "target_ids": torch.tensor([id_number(str(row["target_id"])) for row in rows])}
