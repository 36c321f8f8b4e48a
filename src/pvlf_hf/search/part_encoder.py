"""Encodes parts of images into shards, by the encoder of the one-machine path; whoever decodes may be elsewhere."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch import Tensor

from ..embeddings.encoding import encode_stream, image_encoder
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .indexing import DecodeOptions, decode, digest_of, source_of
from .parts import Cell, PlannedPart, metadata_schema, read_cells
from .shards import shard_table, write_broken, write_part
from .vectors import Vectors

T = TypeVar("T")

BATCHES_AHEAD = 4
"""Batches that are handed over to be decoded at a time (our choice); as many more are decoded meanwhile."""


class Decoded(NamedTuple):
    """An image that is ready to be encoded, or the reason that it is not."""

    digest: str
    pixels: np.ndarray | None
    """float32 `(1, 3, height, width)`."""
    reason: str | None


Decoder = Callable[[list[Cell]], Callable[[], list[Decoded]]]
"""Starts to decode images, and returns a function that waits for them."""


class PartReport(NamedTuple):
    """Numbers of images of a part that were encoded, and that could not be read, and of other files by ending."""

    images: int
    broken: int
    left_out: Counter[str]


def decode_cells(
    cells: Sequence[Cell], options: DecodeOptions, processor: ComposedRetrievalProcessor
) -> list[Decoded]:
    """Read, identify and decode images; one that cannot be read does not stop the others.

    Raises:
        OSError: if a store refuses an image or does not answer, which is no fault of the image.
    """
    return [_decoded(cell, options, processor) for cell in cells]


def _decoded(cell: Cell, options: DecodeOptions, processor: ComposedRetrievalProcessor) -> Decoded:
    digest = ""
    if cell.refusal is not None:
        return Decoded(digest, None, cell.refusal)
    try:
        source = source_of({"bytes": cell.content, "path": cell.path})
        digest = digest_of(source, options)
        pixels = processor.process_targets(decode(source, options))["pixel_values"]
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        unread = not digest and not isinstance(error, FileNotFoundError | ValueError)
        if unread and "://" in (cell.path or ""):  # each kind of store raises its own
            raise OSError(
                f"{cell.path} cannot be read ({error}): check that the store answers, and the login"
            ) from error
        return Decoded(digest, None, str(error) or type(error).__name__)
    return Decoded(digest, pixels.numpy(), None)


class PartEncoder:
    """Encodes parts and writes them.

    Args:
        model: computes the embeddings.
        processor: the model's processor.
        made_by: their provenance.
        decoder: decodes images.
        location: folder or fsspec URL of the shards.
        vectors: how embeddings are stored, see `pvlf_hf.search.vectors`.
        batch_size: images encoded at once.
    """

    def __init__(
        self,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        made_by: dict[str, str],
        decoder: Decoder,
        location: str | Path,
        vectors: Vectors,
        batch_size: int,
    ) -> None:
        self.model, self.made_by, self.decoder = model, made_by, decoder
        self.location, self.vectors, self.batch_size = location, vectors, batch_size
        self.blank = processor.process_targets(PILImage.new("RGB", (8, 8)))["pixel_values"]

    def encode(self, part: PlannedPart) -> PartReport:
        """Encode a part; its file appears when all of it is encoded, after the list of what cannot be read.

        Raises:
            OSError: if it cannot be written.
            ValueError: if its source cannot be read.
        """
        kept: list[tuple[Cell, str]] = []
        broken: list[tuple[str, str | None, str]] = []
        embeds = [torch.empty(0, self.model.embedding_width)]
        left_out: Counter[str] = Counter()
        windows = _groups(read_cells(part.plan, left_out), BATCHES_AHEAD * self.batch_size)
        for cells, wait in _one_ahead((cells, self.decoder(cells)) for cells in windows):
            decoded = wait()
            reasons = {row: one.reason for row, one in enumerate(decoded) if one.reason is not None}
            for rows, encoded in self._encode(decoded, [row for row in range(len(cells)) if row not in reasons]):
                kept += [(cells[row]._replace(content=None), decoded[row].digest) for row in rows]
                embeds.append(encoded)
            broken += [(cells[row].id, cells[row].path, reason) for row, reason in reasons.items()]
        schema = metadata_schema(part.plan)
        metadata = pa.Table.from_pylist([cell.values for cell, _ in kept], schema=schema) if schema.names else None
        ids, paths = [cell.id for cell, _ in kept], [cell.path for cell, _ in kept]
        table = shard_table(ids, paths, [digest for _, digest in kept], torch.cat(embeds), self.vectors, metadata)
        if broken:
            write_broken(self.location, part.broken_name, broken)
        write_part(self.location, part.name, table, self.made_by)
        return PartReport(len(kept), len(broken), left_out)

    def _encode(self, decoded: list[Decoded], rows: list[int]) -> Iterator[tuple[list[int], Tensor]]:
        def prepare(row: int) -> Tensor:
            return torch.tensor(decoded[row].pixels)

        def on_error(row: int, error: Exception) -> None:
            raise AssertionError(f"row {row} was decoded") from error

        encode = image_encoder(self.model)
        yield from encode_stream(self.model, prepare, encode, rows, self.batch_size, self.blank, on_error)


def _groups(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while group := list(islice(items, size)):
        yield group


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield items, each after the next one has been made."""
    waiting: list[T] = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting


__all__ = ["Decoded", "PartEncoder", "PartReport", "decode_cells"]
