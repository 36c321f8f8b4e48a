"""Batches of training triplets."""

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from heapq import heappop, heappush
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

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


class DistinctBatchSampler(Sampler[int]):
    """Sampler of row numbers in random order, in blocks no two rows of which have the same value in a column.

    Args:
        values: the column, such as a key: rows that share it are easily right answers to each other's queries.
        batch_size: rows per block. Each epoch has as many blocks; rows that do not fit are others each time.
        seed: seeds the order, together with the epoch.

    Raises:
        ValueError: if there are fewer values than rows of a batch.
    """

    def __init__(self, values: Sequence[Hashable], batch_size: int, seed: int) -> None:
        rows_of: dict[Hashable, list[int]] = defaultdict(list)
        for row, value in enumerate(values):
            rows_of[value].append(row)
        self.groups, self.batch_size, self.seed, self.epoch = list(rows_of.values()), batch_size, seed, 0
        self.batches = len(values) // batch_size
        while self.batches and sum(min(len(group), self.batches) for group in self.groups) < self.batches * batch_size:
            self.batches -= 1
        if not self.batches:
            raise ValueError(
                f"the distinct_by column has {len(self.groups)} values, fewer than the {batch_size} rows of a batch: "
                "lower per_device_train_batch_size"
            )

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls it, so that every epoch differs and a resumed one is the same."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        random = torch.Generator().manual_seed(self.seed + self.epoch)

        def shuffled(items: Sequence[Any]) -> list[Any]:
            return [items[at] for at in torch.randperm(len(items), generator=random).tolist()]

        # Each value gives at most one row to a batch, and the values with most rows are placed first, each row in
        # the emptiest of the batches: so all are filled.
        groups = sorted((shuffled(group)[: self.batches] for group in shuffled(self.groups)), key=len, reverse=True)
        surplus = sum(map(len, groups)) - len(self)
        for at in reversed(range(len(groups))):
            cut = min(surplus, len(groups[at]))
            groups[at], surplus = groups[at][cut:], surplus - cut
        heap: list[tuple[int, int, list[int]]] = [(0, place, []) for place in range(self.batches)]
        for group in groups:
            emptiest = [heappop(heap) for _ in group]
            for row, (size, place, rows) in zip(group, emptiest, strict=True):
                heappush(heap, (size + 1, place, [*rows, row]))
        for batch in shuffled([rows for _, _, rows in heap]):
            yield from shuffled(batch)


class PVLFCollator:
    """Collator that makes the model's training inputs of a list of triplets with the columns `TRIPLET_COLUMNS`.

    Args:
        processor: the [`PVLFProcessor`] of the model.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of triplets.

        Returns:
            `pixel_values`, `target_pixel_values` float `(batch, 3, height, width)`; `input_ids`, `attention_mask`
            int64 `(batch, n)`; `target_ids` int64 `(batch,)`, equal where the `target_id` strings are. Negatives of
            the rows ([`RowsWithNegatives`]) follow the targets.

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
        if negatives := negatives_of(rows, "negatives"):
            further = self.processor.process_targets(negatives)["pixel_values"]
            batch["target_pixel_values"] = torch.cat([batch["target_pixel_values"], further])
        return {**batch, "target_ids": ids_of(rows)}


def negatives_of(rows: list[dict[str, Any]], column: str) -> list[Any]:
    """Return the negatives of all rows, or their ids; none where rows come without."""
    return [one for row in rows if "negative_ids" in row for one in row[column]]


def ids_of(rows: list[dict[str, Any]]) -> Tensor:
    """Return the numbers of the ids of targets and negatives, int64 `(targets,)`."""
    names = [row["target_id"] for row in rows] + negatives_of(rows, "negative_ids")
    return torch.tensor([id_number(str(name)) for name in names])
