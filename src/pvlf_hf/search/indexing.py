"""Incremental indexing: images are identified by digest and embedded once; unreadable ones are skipped and reported.

Each file is read once: its digest and its pixels come from the same bytes. Embeddings are saved in parts while the
others are computed, so that an interruption loses little.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import fsspec
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from ..digests import sequence_digest
from ..embeddings.embedding_store import read_rows, write_rows
from ..embeddings.encoding import encode_stream
from ..models.image_processing_pvlf import check_bytes, check_file, open_image, to_rgb
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

EMBEDDINGS, PART = "embeddings.safetensors", ".part.safetensors"

SAVE_EVERY = 1024
"""Images encoded between two writes (our choice): the most that an interruption loses."""


class DecodeOptions(NamedTuple):
    """Settings by which the images of a gallery are decoded."""

    mode: str | None
    """Pillow mode of the image column (`datasets.Image`), e.g. "RGB"; None keeps the file's own."""
    draft: int | None = None
    """Smallest side, in pixels, to decode a larger JPEG at, several times faster; None decodes in full."""


class IncrementalIndexer:
    """Embeds the images that are not embedded yet, and keeps the embeddings in parts.

    Args:
        sources: column `image` of undecoded images.
        options: how they are decoded.
        path: folder that keeps the embeddings, or None.
        made_by: provenance of the embeddings, as [`EmbeddingStore`] states it.

    Attributes:
        digests: digest of every row, after [`~IncrementalIndexer.run`].
        bad: digest of every image that cannot be read, and the reason.
    """

    def __init__(self, sources: "Dataset", options: DecodeOptions, path: Path | None, made_by: dict[str, str]) -> None:
        self.sources, self.options, self.path, self.made_by = sources, options, path, made_by
        self.digests: list[str] = []
        self.bad: dict[str, str] = {}
        files = [path / EMBEDDINGS, *sorted(path.glob(f"*{PART}"))] if path else []
        self._row_of: dict[str, int] = {}  # digest -> row of the concatenated `_embeds`
        self._embeds: list[Tensor] = []
        for file in filter(Path.exists, files):
            keys, embeds = read_rows(file)
            self._add([name for (name,) in keys], embeds)
        self._unsaved: list[str] = []
        self._saved_tensors = len(self._embeds)

    def run(
        self,
        model: ComposedRetrievalModel,
        processor: ComposedRetrievalProcessor,
        batch_size: int,
        progress: bool,
        encode: Callable[[Tensor], Tensor],
    ) -> None:
        """Read every image and encode new ones by `encode`; several processes each take a share."""
        state = PartialState()
        rows = range(state.process_index, len(self.sources), state.num_processes)
        reader = _Reader(self, processor)
        blank = processor.process_targets(PILImage.new("RGB", (8, 8)))["pixel_values"]
        show = progress and state.is_main_process
        with tqdm(total=len(rows), desc="indexing", unit="image", disable=not show) as reader.bar:
            stream = encode_stream(model, reader.prepare, encode, rows, batch_size, blank, reader.skip)
            with closing(stream) as batches:
                for batch, embeds in batches:
                    mine = ([reader.digest_at[row] for row in batch], embeds)
                    for digests, others in gather_object([mine]):
                        self._unsaved += self._add(digests, others)
                    if len(self._unsaved) >= SAVE_EVERY:
                        self._save()
        self._save()
        digest_at: dict[int, str] = {}
        for digests, bad in gather_object([(reader.digest_at, reader.bad)]):
            digest_at |= digests
            self.bad |= bad
        self.digests = [digest_at[row] for row in range(len(self.sources))]

    def take(self, digests: list[str]) -> Tensor:
        """Return the embeddings of digests: float32 `(digests, d)`."""
        return torch.cat(self._embeds)[[self._row_of[name] for name in digests]]

    def __contains__(self, digest: str) -> bool:
        return digest in self._row_of

    def _add(self, digests: list[str], embeds: Tensor) -> list[str]:
        """Add embeddings, and return the digests that are new; equal images may come from files and processes."""
        new = {name: index for index, name in reversed(list(enumerate(digests))) if name not in self._row_of}
        self._row_of |= {name: row for row, name in enumerate(new, len(self._row_of))}
        self._embeds.append(embeds[list(new.values())])
        return [*new]

    def _save(self) -> None:
        """Write the embeddings that were added since the last call as a part."""
        if self.path and self._unsaved and PartialState().is_main_process:
            keys, embeds = [(name,) for name in self._unsaved], torch.cat(self._embeds[self._saved_tensors :])
            write_rows(self.path / f"{uuid4().hex}{PART}", keys, embeds, self.made_by)
        self._unsaved, self._saved_tensors = [], len(self._embeds)


class _Reader:
    """Reader of one process's share of the images: identifies and decodes them, in several threads."""

    def __init__(self, indexer: IncrementalIndexer, processor: ComposedRetrievalProcessor) -> None:
        self.indexer, self.processor, self.bar = indexer, processor, tqdm(disable=True)
        self.digest_at: dict[int, str] = {}
        self.bad: dict[str, str] = {}
        self._claimed: set[str] = set()
        self._lock = Lock()

    def prepare(self, row: int) -> Tensor | None:
        """Return the pixel values `(1, 3, height, width)` of a row's image, None where it is embedded already."""
        with self._lock:
            self.bar.update()
        source = source_of(self.indexer.sources[row]["image"])
        digest = self.digest_at[row] = digest_of(source, self.indexer.options)
        with self._lock:
            if digest in self.indexer or digest in self._claimed:
                return None
            self._claimed.add(digest)
        return self.processor.process_targets(decode(source, self.indexer.options))["pixel_values"]

    def skip(self, row: int, error: Exception) -> None:
        """Record why the image of a row is left out; an image without a file is identified by its row."""
        digest = self.digest_at.setdefault(row, f"unreadable {row}")
        self.bad[digest] = str(error) or type(error).__name__


def as_dataset(paths: Sequence[str | None], ids: Sequence[str] | None = None) -> "Dataset":
    """Make a column of undecoded images, `image`, of files or URLs, with `image_id` beside it where given."""
    from datasets import Dataset, Image

    columns = {"image": list(paths), **({} if ids is None else {"image_id": list(ids)})}
    return Dataset.from_dict(columns).cast_column("image", Image(decode=False))


def least_side(processor: ComposedRetrievalProcessor) -> int:
    """Return the smallest side to decode a JPEG at: twice the model's input, so that resizing still averages pixels.

    The factor is our choice.
    """
    size = processor.image_processor.crop_size
    return 2 * max(size["height"], size["width"])


def open_cell(cell: dict[str, Any] | None, options: DecodeOptions) -> PILImage.Image:
    """Read and decode a cell of an image column, see [`decode`]."""
    return decode(source_of(cell), options)


def source_of(cell: dict[str, Any] | None) -> bytes | str:
    """Return the content of a cell's image file, also from an object store (`s3://`); of a web URL the URL itself.

    Raises:
        OSError: if the file does not exist, or the store refuses it.
        ValueError: if the cell is empty, or the file is too large or not a regular file.
    """
    if not cell or cell["bytes"] is cell["path"] is None:
        raise ValueError("the gallery has no file for it")
    if cell["bytes"] is not None:
        return cell["bytes"]
    if cell["path"].startswith(("http://", "https://", "data:")):
        return cell["path"]
    if "://" in cell["path"]:
        with fsspec.open(cell["path"], "rb") as opened:
            check_bytes(opened.size)
            return opened.read()
    check_file(cell["path"])
    return Path(cell["path"]).read_bytes()


def digest_of(source: bytes | str, options: DecodeOptions) -> str:
    """Return the digest of a file's content and decode options; for a URL, of its string only."""
    decoded = f"{options.mode} draft {options.draft}" if options.draft else str(options.mode)
    return sequence_digest(decoded, source)


def decode(source: bytes | str, options: DecodeOptions) -> PILImage.Image:
    """Decode the content of a file, or a URL's, to RGB; with `draft` a large JPEG at 1/2, 1/4 or 1/8 of its size.

    Raises:
        OSError: if it is not an image, or of a format that is not decoded. Pillow's decoders raise many other errors.
    """
    with open_image(source) as image:
        if options.draft and image.format in ("JPEG", "MPO"):  # of others it might be an embedded thumbnail
            image.draft(None, (options.draft, options.draft))
        return to_rgb(image.convert(options.mode) if options.mode else image)


def report(skipped: dict[str, str], number: int) -> None:
    """Warn of skipped images, given as id -> reason; raise a `ValueError` if none of the `number` is left."""
    first = [f"{image_id} ({reason})" for image_id, reason in list(skipped.items())[:3]]
    if len(skipped) == number:
        raise ValueError(f"none of the {number} images can be read, first: {first}; pass images that Pillow opens")
    if skipped and PartialState().is_main_process:
        logger.warning(
            f"skipped {len(skipped)} of {number} images, which cannot be read, first: {first}; gallery.skipped "
            "lists them all"
        )


__all__ = ["DecodeOptions", "IncrementalIndexer"]
