"""A gallery in shards: searched exactly where it lies, within a limit of memory.

A search reads the vectors of all row groups once, for any number of queries, and keeps as many of them in memory as
the limit allows, for the next search. Scores are cosines of the stored vectors (`vectors.py`): results of `float32`
shards equal those of a [`Gallery`] of the same embeddings bit for bit. Where `float16` is beside `int8`, images are
found if they are among the best `CANDIDATES` by int8, and ranked by float16.

The images are those of the parts that there were at the opening: parts added later are seen by the next opening, and
once a part is replaced or removed, reading it is refused.
"""

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import cached_property
from mmap import mmap
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image as PILImage
from torch import Tensor

from ..embeddings.combined import CombinedScores
from ..embeddings.encoding import prefetch_map
from ..embeddings.similarity import TopK, exact_unit_rows
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .filters import Filter, applied
from .gallery_files import prepared_as
from .image_search import ImageSearch
from .indexing import DecodeOptions, open_cell
from .pages import Ranked, ranking_without
from .query import Query, Weights
from .shards import Block, EmbeddingShards
from .vectors import StoredVectors, decode_vectors

CANDIDATES, LEAST_CANDIDATES = 8, 64
"""Images per result that int8 proposes to float16, and at least how many (our choice)."""

ROWS_AT_ONCE = 4096
"""Rows brought to float32 and compared at a time (our choice): 4 MiB at width 256."""

READ_AHEAD = 1
"""Row groups read while another is compared (our choice); each takes memory."""

GROUPS_AT_WORK = {"float32": 20, "float16": 20, "int8": 30}
"""Memory of a search in sizes of a row group's vectors (measured: 17 for float32, 21 to 28 for int8, 7 if float16
is beside it): three are alive, as pages, as being decoded and in use, and Arrow's allocator returns late what was
freed."""

FOUND_BEFORE = 10_000
"""Ids whose rows are remembered (our choice), for refinements of what was found."""

UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Choice(NamedTuple):
    """Images that a search may find."""

    excluded: list[int]
    """Rows that are left out."""
    passing: dict[int, Tensor] | None
    """Rows of each row group that pass the filter, bool `(rows,)`; groups without one are missing. None for all."""


class ShardedGallery(ImageSearch):
    """Embedded images in shards (`shards.py`), opened without copying; any number of threads may search.

    Args:
        shards: the shards.
        model: embeds queries; any model on the image encoder that made the embeddings.
        processor: the model's processor.
        memory: see [`~ShardedGallery.open`].

    Attributes:
        shards: the shards.
        memory: limit in bytes.
    """

    def __init__(
        self,
        shards: EmbeddingShards,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        memory: int | str = "1.5GB",
    ) -> None:
        self.shards, self.model, self.memory = shards, model, parse_memory(memory)
        self.processor, self.made_by = prepared_as(shards.made_by, shards.location, model, processor)
        if self.made_by != shards.made_by:
            kept, now = shards.made_by.get("dtype"), self.made_by["dtype"]
            same = f", or it is in {now} now and was in {kept}" if kept != now else ""
            raise ValueError(
                f"{shards.location} holds embeddings of another image encoder, projection or preprocessing{same}: "
                "open it with a model on the encoder that made it, or index the images again into another location"
            )
        if shards.width != model.embedding_width:
            raise ValueError(
                f"{shards.location}/{shards.parts[0].name} holds embeddings of {shards.width} numbers, and those of "
                f"the model that made them have {model.embedding_width}: index the images again into another location"
            )
        self._room = self.memory - self._needed()
        self._kept: dict[int, StoredVectors] = {}
        self._known: dict[str, int] = {}
        self._lock = Lock()

    @classmethod
    def open(
        cls,
        location: str | Path,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        memory: int | str = "1.5GB",
    ) -> "ShardedGallery":
        """Open shards to be searched.

        Args:
            location: folder or fsspec URL of shards.
            model: embeds queries; any model on the image encoder that made the embeddings.
            processor: the model's processor.
            memory: most memory that searches take beside the model and imported libraries, in bytes or as `"800MB"`;
                what the row groups at work leave of it keeps vectors, so that the next search need not read them.

        Raises:
            ValueError: if the shards do not fit together ([`EmbeddingShards`]), another model made them, or the memory
                does not suffice for the row groups at work.
        """
        return cls(EmbeddingShards(location), model, processor, memory)

    def image(self, image_id: str) -> PILImage.Image:
        """Open an image, RGB; see [`ImageSearch.image`]."""
        (row,) = self._rows_of("image", [image_id])
        path = self._names([row])[row][1]
        try:
            return open_cell({"bytes": None, "path": path}, DecodeOptions(None))
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            reason = str(error).replace(str(path), image_id)
            raise ValueError(f"the image {image_id!r} cannot be opened ({reason}): index the images again") from error

    def values_of(self, ids: Sequence[str]) -> list[dict[str, Any]] | None:
        """Return the metadata of images, None if there is no metadata."""
        if not self.shards.metadata_names:
            return None
        rows = self._rows_of("ids", ids)
        values = self._values(rows, self.shards.metadata_names)
        return [values[row] for row in rows]

    @property
    def metadata_names(self) -> list[str]:
        """Names of the columns of metadata."""
        return self.shards.metadata_names

    def known(self, ids: Sequence[str]) -> list[str]:
        """Return those of some ids that the shards have; reads the ids of row groups that may hold one."""
        found = self._find(ids)
        return [image_id for image_id in ids if image_id in found]

    def some_ids(self, number: int) -> list[str]:
        """Return the ids of random images; reads the ids of as many row groups, at most."""
        rows = random.sample(range(len(self)), min(number, len(self)))
        names = self._names(rows)
        return [names[row][0] for row in rows]

    def __len__(self) -> int:
        return len(self.shards)

    def __repr__(self) -> str:
        return f"ShardedGallery({self.shards!r}, memory={self.memory:,})"

    def _choice(self, exclude: Sequence[str], filter: Filter | None) -> Choice:
        excluded = self._rows_of("exclude", exclude)
        if len({*excluded}) == len(self):
            raise ValueError(f"exclude leaves none of the gallery's {len(self)} images; exclude fewer")
        return Choice(excluded, None if filter is None else self._passing(filter))

    def _ranking(self, query: Query, weights: Weights, choice: Choice) -> Ranked:
        left_out = self._left_out(query, choice)

        def ranked(number: int) -> tuple[Tensor, Tensor]:
            if query.is_combined(weights):
                scores, rows = self._best_combined(query, weights, number + len(left_out), choice)
            else:
                scores, rows = (
                    one[0] for one in self._best(query.embed(weights)[None], number + len(left_out), choice)
                )
            return ranking_without(scores, rows, left_out)(number)

        return ranked

    def _rankings(self, queries: Sequence[Query], weights: Weights, choice: Choice, number: int) -> list[Ranked]:
        """Return the rankings of several queries, reading the shards once."""
        if any(query.is_combined(weights) for query in queries):
            return super()._rankings(queries, weights, choice, number)
        left_out = [self._left_out(query, choice) for query in queries]
        embeds = torch.stack([query.embed(weights) for query in queries])
        best = self._best(embeds, number + max(map(len, left_out)), choice)
        return [ranking_without(*one) for one in zip(*best, left_out, strict=True)]

    def _left_out(self, query: Query, choice: Choice) -> list[int]:
        return [*choice.excluded, *self._rows_of("ids", query.ids)]

    def _best(self, queries: Tensor, k: int, choice: Choice) -> tuple[Tensor, Tensor]:
        """Return scores `(Q, k)`, -inf where there are fewer images, and rows `(Q, k)` of the best of each query."""
        k = min(k, len(self))
        if self.shards.vectors != "int8+float16":
            best = TopK(queries, k)
            for embeds, rows in self._pieces(choice):
                best.add(embeds, rows)
            return best.scores, best.positions
        proposed = TopK(queries, min(len(self), max(CANDIDATES * k, LEAST_CANDIDATES)))
        for embeds, rows in self._pieces(choice):
            proposed.add(embeds, rows)
        candidates = [
            rows[scores > -torch.inf].sort().values
            for scores, rows in zip(proposed.scores, proposed.positions, strict=True)
        ]
        ranked = [TopK(query[None], k) for query in queries]
        for embeds, rows in self._embeddings_by_block(torch.cat(candidates).unique()):
            for one, mine in zip(ranked, candidates, strict=True):
                held = mine[(mine >= rows[0]) & (mine <= rows[-1])]
                if len(held):
                    one.add(embeds[torch.searchsorted(rows, held)], held)
        return torch.cat([one.scores for one in ranked]), torch.cat([one.positions for one in ranked])

    def _best_combined(self, query: Query, weights: Weights, k: int, choice: Choice) -> tuple[Tensor, Tensor]:
        """Return the best by a composition that scores by two similarities."""
        scores, rows = torch.empty(0), torch.empty(0, dtype=torch.int64)
        for embeds, positions in self._pieces(choice, exact=True):
            scored = query.scored_by(weights, embeds, self._mean)
            assert isinstance(scored, CombinedScores)
            scores = torch.cat([scores, scored.of_images(0, torch.arange(len(embeds)))])
            best = scores.sort(descending=True, stable=True)
            scores, rows = best.values[:k], torch.cat([rows, positions])[best.indices[:k]]
        return scores, rows

    @cached_property
    def _mean(self) -> Tensor:
        """Float64 mean of the embeddings, which centres the similarities of a composition without an embedding."""
        total = torch.zeros(self.shards.width, dtype=torch.float64)
        for embeds, _ in self._pieces(Choice([], None), exact=True):
            total += exact_unit_rows(embeds).sum(dim=0)
        return total / len(self)

    def _pieces(self, choice: Choice, exact: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield embeddings float32 `(n, d)` and their rows `(n,)` of all images that may be found, in order.

        They are those that find candidates; with `exact`, those that rank.
        """
        blocks = self.shards.blocks
        numbers = range(len(blocks)) if choice.passing is None else sorted(choice.passing)
        tasks = (blocks[number] for number in numbers)
        read = self._read_exact if exact else self._read
        with closing(prefetch_map(lambda block: (block, read(block)), tasks, READ_AHEAD)) as groups:
            for number, (block, stored) in zip(numbers, groups, strict=True):
                if choice.passing is None:
                    starts = range(0, block.rows, ROWS_AT_ONCE)
                    pieces: Any = [slice(start, start + ROWS_AT_ONCE) for start in starts]
                else:
                    pieces = choice.passing[number].nonzero()[:, 0].split(ROWS_AT_ONCE)
                rows = torch.arange(block.first, block.first + block.rows)
                for piece in pieces:
                    scale = None if stored.scale is None else stored.scale[piece]
                    yield decode_vectors(StoredVectors(stored.values[piece], scale)), rows[piece]

    def _read(self, block: Block) -> StoredVectors:
        """Return the vectors of a row group that find candidates; keep them where there is room."""
        if (kept := self._kept.get(block.first)) is not None:
            return kept
        names = ["embedding", "scale"] if self.shards.element == "int8" else ["embedding"]
        stored = self.shards.stored(self.shards.read(block, names))
        size = _size(stored)
        with self._lock:  # which copies of this gallery share, as they do what is kept
            if block.first not in self._kept and size + sum(map(_size, self._kept.values())) <= self._room:
                self._kept[block.first] = _copied(stored)
        return stored

    def _read_exact(self, block: Block) -> StoredVectors:
        if self.shards.vectors != "int8+float16":
            return self._read(block)
        return self.shards.stored(self.shards.read(block, ["embedding_float16"]), "embedding_float16")

    def _embeddings_by_block(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the embeddings that rank ascending rows, and these rows, from one row group at a time."""
        for block in self.shards.blocks:
            low, high = torch.searchsorted(rows, torch.tensor([block.first, block.first + block.rows])).tolist()
            if low < high:
                held = rows[low:high]
                stored, inside = self._read_exact(block), held - block.first
                scale = None if stored.scale is None else stored.scale[inside]
                yield decode_vectors(StoredVectors(stored.values[inside], scale)), held

    def _passing(self, condition: Filter) -> dict[int, Tensor]:
        """Return the rows that pass a filter; row groups whose statistics rule them out are not read."""
        if not self.shards.metadata_names:
            raise ValueError(f"filter {condition!r:.200}: these shards have no metadata; write them with its columns")
        schema = pa.schema([self.shards.schema.field(name) for name in self.shards.metadata_names])
        passing: dict[int, Tensor] = {}
        first = 0
        with applied(condition, schema) as expression:
            for fragment, part in zip(self._fragments, self.shards.parts, strict=True):
                may_pass = [group.id for group in fragment.subset(expression, schema=schema).row_groups]
                for group in may_pass:
                    columns = {"passes": expression}
                    one = fragment.subset(row_group_ids=[group])
                    found = one.to_table(schema=schema, columns=columns, use_threads=False)["passes"].combine_chunks()
                    passes = np.array(pc.fill_null(found, False).to_numpy(zero_copy_only=False))
                    if passes.any():
                        passing[first + group] = torch.from_numpy(passes)
                if may_pass:
                    self.shards.check_unchanged(part)
                first += part.footer.num_row_groups
        return passing

    @cached_property
    def _fragments(self) -> list[Any]:
        """The parts as pyarrow filters them."""
        return self.shards.fragments()

    def _embeddings(self, rows: Tensor) -> Tensor:
        ascending, order = rows.unique(return_inverse=True)
        parts = [embeds for embeds, _ in self._embeddings_by_block(ascending)]
        return torch.cat(parts)[order] if parts else torch.empty(0, self.shards.width)

    def _embeddings_of(self, name: str, ids: Sequence[str]) -> dict[str, Tensor]:
        rows = torch.tensor(self._rows_of(name, ids), dtype=torch.int64)
        return dict(zip(ids, self._embeddings(rows), strict=True))

    def _names(self, rows: Sequence[int]) -> dict[int, tuple[str, str | None]]:
        names = {row: (one["id"], one["path"]) for row, one in self._values(rows, ["id", "path"]).items()}
        self._remember({image_id: row for row, (image_id, _) in names.items()})
        return names

    def _values(self, rows: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Return columns of some rows."""
        values: dict[int, dict[str, Any]] = {}
        for block in self.shards.blocks:
            held = [row for row in {*rows} if block.first <= row < block.first + block.rows]
            if held:
                batch = self.shards.read(block, columns)
                values |= {row: batch.slice(row - block.first, 1).to_pylist()[0] for row in held}
        return values

    def _rows_of(self, name: str, ids: Sequence[str]) -> list[int]:
        """Return the rows of ids that an argument names."""
        if isinstance(ids, str):
            raise ValueError(f"{name}={ids!r}: pass a list of ids")
        found = self._find(ids)
        if unknown := [image_id for image_id in ids if image_id not in found]:
            raise ValueError(f"{name} names {unknown[:3]}, which are not in the gallery; pass ids of its images")
        return [found[image_id] for image_id in ids]

    def _find(self, ids: Sequence[str]) -> dict[str, int]:
        """Return the rows of those ids that there are; row groups are read whose statistics do not rule them out."""
        found = {image_id: self._known[image_id] for image_id in ids if image_id in self._known}
        missing = sorted({image_id for image_id in ids if isinstance(image_id, str)} - {*found})
        wanted = pa.array(missing, pa.string())
        for block in self.shards.blocks if missing else ():
            if not block.may_hold(missing):
                continue
            column = self.shards.read(block, ["id"]).column("id")
            for offset in np.flatnonzero(pc.is_in(column, wanted).to_numpy(zero_copy_only=False)):
                found.setdefault(column[int(offset)].as_py(), block.first + int(offset))
            if len(found) == len({*ids}):
                break
        self._remember(found)
        return found

    def _remember(self, rows: dict[str, int]) -> None:
        with self._lock:
            if len(self._known) > FOUND_BEFORE:
                self._known = {}
            self._known |= rows

    def _needed(self) -> int:
        """Return the memory that the row groups at work take; raise a `ValueError` if the limit is below that."""
        width, rows = self.shards.width, max(block.rows for block in self.shards.blocks)
        element = "float16" if self.shards.vectors == "int8+float16" else self.shards.element
        size = {"float32": 4, "float16": 2, "int8": 1}[element] * rows * width
        needed = GROUPS_AT_WORK[element] * size + 6 * 4 * ROWS_AT_ONCE * width + 2**25
        if needed > self.memory:
            raise ValueError(
                f"memory={self.memory:,}: the row groups of {self.shards.location} need {needed:,} bytes at work: "
                f'pass memory="{-(-needed // 10**6)}MB" or more'
            )
        return needed


def _copied(stored: StoredVectors) -> StoredVectors:
    """Copy vectors to pages of their own: among what allocators reuse, what is kept took 1.6 times its size."""

    def copied(tensor: Tensor) -> Tensor:
        return torch.frombuffer(mmap(-1, tensor.nbytes), dtype=tensor.dtype).view(tensor.shape).copy_(tensor)

    return StoredVectors(copied(stored.values), None if stored.scale is None else copied(stored.scale))


def _size(stored: StoredVectors) -> int:
    """Return the bytes that vectors take."""
    return sum(one.nbytes for one in stored if one is not None)


def parse_memory(memory: int | str) -> int:
    """Return a limit of memory in bytes.

    Raises:
        ValueError: if it is none.
    """
    read = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(memory).lower())
    if isinstance(memory, bool) or read is None or read[2] not in UNITS:
        raise ValueError(f'memory={memory!r}: pass bytes, or a text such as "1.5GB" or "800MB"')
    return int(float(read[1]) * UNITS[read[2]])


__all__ = ["ShardedGallery", "parse_memory"]
