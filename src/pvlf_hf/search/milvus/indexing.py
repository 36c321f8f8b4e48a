"""Embeds the images that a Milvus store does not have, a block at a time, and writes them to it."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm

from ...embeddings.encoding import MOST_THREADS, encode_stream, image_encoder
from ...models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from ..indexing import SAVE_EVERY, DecodeOptions, decode, digest_of, least_side, source_of
from ..metadata import EXIF, carry_over, read_exif
from ..query import check_positive
from .filling import differing, remove_all_but
from .schema import embedding_column
from .store import MilvusStore

if TYPE_CHECKING:
    from datasets import Dataset


class Source(NamedTuple):
    """Image that can be read."""

    row: int
    digest: str
    cell: dict[str, Any]
    """As `datasets` keeps an undecoded image."""

    @property
    def path(self) -> str | None:
        """File or URL of the image, None where the data set holds it itself."""
        return self.cell["path"] if self.cell["bytes"] is None else None


class StoreIndexer:
    """Brings a store in line with a data set.

    Args:
        store: to write to.
        model: embeds the images.
        processor: of the model.
        dataset: column `image`.
        ids: of its images.
        metadata: a row an image, with the columns of the store but those of EXIF; None keeps what the store has.
        batch_size: images encoded at once.
        progress: show a progress bar.
        draft: decode large JPEGs at reduced size.

    Attributes:
        skipped: id of every image that cannot be read, and the reason.
        encoded: number of images that were encoded.
    """

    def __init__(
        self,
        store: MilvusStore,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        dataset: "Dataset",
        ids: Sequence[str],
        metadata: pa.Table | None,
        batch_size: int = 64,
        progress: bool = True,
        draft: bool = False,
    ) -> None:
        from datasets import Image

        mode = getattr(dataset.features["image"], "mode", None)
        self.store, self.model, self.processor, self.ids = store, model, processor, ids
        self.cells = dataset.select_columns("image").cast_column("image", Image(mode=mode, decode=False))
        self.options = DecodeOptions(mode, least_side(processor) if draft else None)
        self.metadata, self.batch_size, self.progress = metadata, check_positive("batch_size", batch_size), progress
        self.skipped: dict[str, str] = {}
        self.encoded = 0

    def run(self, remove_others: bool) -> None:
        """Index the images, and remove others, or those that cannot be read any more, if that is wanted."""
        with tqdm(total=len(self.ids), desc="indexing", unit="image", disable=not self.progress) as bar:
            for start in range(0, len(self.ids), SAVE_EVERY):
                rows = range(start, min(start + SAVE_EVERY, len(self.ids)))
                self._index(rows)
                bar.update(len(rows))
        if remove_others and len(self.skipped) < len(self.ids):  # the caller raises where none can be read
            remove_all_but(self.store, [[image_id for image_id in self.ids if image_id not in self.skipped]])
        self.store.flush()

    def _index(self, rows: range) -> None:
        images = self._read(rows)
        known = self.store.look_up([self.ids[row] for row in rows])
        wanted = self._described(images, known)
        changed = np.flatnonzero(differing(wanted, known)).tolist()
        embeds = self._embeddings([images[place] for place in changed])
        there = [place for place in changed if images[place].digest in embeds]
        if there:
            column = embedding_column(np.stack([embeds[images[place].digest] for place in there]))
            self.store.write(wanted.take(pa.array(there)).append_column("embedding", column))

    def _read(self, rows: range) -> list[Source]:
        """Return the images that can be read."""

        def read(row: int) -> Source | None:
            cell = self.cells[row]["image"]
            try:
                return Source(row, digest_of(source_of(cell), self.options), cell)
            except (OSError, ValueError) as error:
                self._skip(row, error)
                return None

        with ThreadPoolExecutor(MOST_THREADS) as pool:
            return [image for image in pool.map(read, rows) if image is not None]

    def _described(self, images: list[Source], known: pa.Table) -> pa.Table:
        """Return a row an image, without embeddings; metadata is what was given, else what the store has."""
        ids, digests = [self.ids[image.row] for image in images], [image.digest for image in images]
        columns: dict[str, Any] = {
            "id": pa.array(ids, pa.string()),
            "path": pa.array([image.path for image in images], pa.string()),
            "digest": pa.array(digests, pa.string()),
        }
        given, exif = self.metadata, {*EXIF.names} <= {*known.column_names}
        parts = [
            carry_over(known, ids) if given is None else given.take(pa.array([image.row for image in images])),
            read_exif([image.cell for image in images], digests, known) if exif else None,
        ]
        columns |= {name: part[name] for part in parts if part is not None for name in part.column_names}
        return pa.table(columns).select(known.column_names)

    def _embeddings(self, images: list[Source]) -> dict[str, np.ndarray]:
        """Return embeddings by digest: those that the store has under any id, and new ones."""
        found = self.store.embeddings_by_digest(image.digest for image in images)
        missing = {image.digest: image for image in reversed(images) if image.digest not in found}
        found |= self._encode({image.row: image.digest for image in reversed(missing.values())})
        for image in images:
            if image.digest not in found:
                self.skipped[self.ids[image.row]] = self.skipped[self.ids[missing[image.digest].row]]
        return found

    def _encode(self, digests: dict[int, str]) -> dict[str, np.ndarray]:
        """Embed the images of rows, whose digests are known, and return the embeddings by digest."""

        def prepare(row: int) -> Tensor:
            source = source_of(self.cells[row]["image"])
            if digest_of(source, self.options) != digests[row]:
                raise ValueError("it was changed while it was read: index again")
            return self.processor.process_targets(decode(source, self.options))["pixel_values"]

        if not digests:
            return {}
        found: dict[str, np.ndarray] = {}
        blank = self.processor.process_targets(PILImage.new("RGB", (8, 8)))["pixel_values"]
        encode = image_encoder(self.model)
        stream = encode_stream(self.model, prepare, encode, [*digests], self.batch_size, blank, self._skip)
        with torch.inference_mode(), closing(stream) as batches:
            for batch, embeds in batches:
                found |= {digests[row]: embed for row, embed in zip(batch, embeds.numpy(), strict=True)}
        self.encoded += len(found)
        return found

    def _skip(self, row: int, error: Exception) -> None:
        self.skipped[self.ids[row]] = str(error) or type(error).__name__


__all__ = ["StoreIndexer"]
