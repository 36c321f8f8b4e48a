"""What a gallery is made of: picture files known by their digests, encoded once, kept in parts, damage set aside."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset, Image
from PIL import Image as PILImage
from torch import Tensor
from tqdm.auto import tqdm
from transformers import BatchFeature
from transformers.utils import logging

from ..embeddings.embedding_store import read_rows, write_rows
from ..embeddings.encoding import encode_gallery
from ..embeddings.fingerprints import digest
from ..models.image_processing_pvlf import check_file, open_picture, to_rgb
from ..models.modeling_pvlf import PVLFModel
from ..models.processing_pvlf import PVLFProcessor

logger = logging.get_logger(__name__)

EMBEDDINGS, PART = "embeddings.safetensors", ".part.safetensors"

SAVE_EVERY = 1024
"""Pictures encoded between two writes (ours): what an interruption can lose."""


class Decoding(NamedTuple):
    """How the pictures of a gallery are decoded."""

    mode: str | None
    """Of their column (`datasets.Image`)."""
    draft: int | None = None
    """The least width and height at which a larger JPEG may be decoded, several times faster than in full."""


class Encoding:
    """Embeds what is not embedded yet, and keeps it in parts, so that an interruption loses little."""

    def __init__(
        self, sources: Dataset, how: Decoding, digests: list[str], path: Path | None, made_by: dict[str, str]
    ) -> None:
        self.sources, self.how, self.digests, self.path, self.made_by = sources, how, digests, path, made_by
        files = [path / EMBEDDINGS, *sorted(path.glob(f"*{PART}"))] if path else []
        self.known: list[str] = []
        self.embeds: list[Tensor] = []
        for file in filter(Path.exists, files):
            keys, embeds = read_rows(file)
            self.known += [name for (name,) in keys]
            self.embeds.append(embeds)

    def run(
        self, model: PVLFModel, processor: PVLFProcessor, bad: dict[str, str], batch_size: int, progress: bool
    ) -> dict[str, str]:
        """Takes the digests of what cannot be read, and why; returns them with those that do not decode."""
        bad, state = dict(bad), PartialState()
        known = {*self.known, *bad}
        first_row = {name: row for row, name in reversed(list(enumerate(self.digests))) if name not in known}
        # One process says what is missing: nothing is written before all of them have read the folder.
        (missing,) = broadcast_object_list([sorted(first_row.values())])
        show = progress and state.is_main_process
        with tqdm(total=len(missing), desc="encoding gallery", unit="picture", disable=not show) as bar:
            for start in range(0, len(missing), SAVE_EVERY):
                rows = missing[start : start + SAVE_EVERY]
                reader = Reader(processor, self.how, bar)
                embeds = encode_gallery(model, reader, self.sources.select(rows), batch_size, progress=False)  # type: ignore[arg-type]
                for found in gather_object([reader.bad]):
                    bad |= found
                good = [place for place, row in enumerate(rows) if self.digests[row] not in bad]
                self._keep([self.digests[rows[place]] for place in good], embeds[good])
        return bad

    def take(self, digests: list[str]) -> Tensor:
        """float32 `(digests, d)`."""
        row_of = {name: row for row, name in enumerate(self.known)}
        return torch.cat(self.embeds)[[row_of[name] for name in digests]]

    def _keep(self, digests: list[str], embeds: Tensor) -> None:
        self.known += digests
        self.embeds.append(embeds)
        if self.path and digests and PartialState().is_main_process:
            keys = [(name,) for name in digests]
            write_rows(self.path / f"{uuid4().hex}{PART}", keys, embeds, self.made_by)


class Reader:
    """Stands for the processor in [`encode_gallery`]: a picture that cannot be read does not stop the others."""

    def __init__(self, processor: PVLFProcessor, how: Decoding, bar: tqdm) -> None:
        self.processor, self.how, self.bar = processor, how, bar
        # Stands for what cannot be read: every process of a sharded model needs every forward.
        self.black = processor.process_targets(PILImage.new("RGB", (8, 8)))["pixel_values"]
        self.bad: dict[str, str] = {}

    def process_targets(self, cells: list[dict[str, Any]]) -> BatchFeature:
        """Inputs of undecoded cells."""
        pixels = torch.cat([self._read(cell) for cell in cells])
        with self.bar.get_lock():  # several threads read
            self.bar.update(min(len(cells) * PartialState().num_processes, self.bar.total - self.bar.n))
        return BatchFeature({"pixel_values": pixels})

    def _read(self, cell: dict[str, Any]) -> Tensor:
        try:
            return self.processor.process_targets(open_cell(cell, self.how))["pixel_values"]
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            self.bad[digest_of(cell, self.how)] = str(error) or type(error).__name__
            return self.black


def as_dataset(paths: Sequence[str | None], ids: Sequence[str] | None = None) -> Dataset:
    """Files or addresses as a column of undecoded pictures, `image`, with `image_id` beside it where given."""
    columns = {"image": list(paths), **({} if ids is None else {"image_id": list(ids)})}
    return Dataset.from_dict(columns).cast_column("image", Image(decode=False))


def _is_address(path: str | None) -> bool:
    return bool(path) and str(path).startswith(("http://", "https://", "data:"))


def least_side(processor: PVLFProcessor) -> int:
    """At which a JPEG may be decoded: twice what the model sees, so that resizing still averages (ours)."""
    size = processor.image_processor.crop_size
    return 2 * max(size["height"], size["width"])


def open_cell(cell: dict[str, Any] | None, how: Decoding) -> PILImage.Image:
    """Decodes a cell, RGB; where `how` allows it a large JPEG at a half, a quarter or an eighth of its size."""
    if not cell or cell["bytes"] is cell["path"] is None:
        raise ValueError("the gallery knows no file of it")
    with open_picture(cell["path"] if cell["bytes"] is None else cell["bytes"]) as picture:
        if how.draft:
            picture.draft(None, (how.draft, how.draft))  # what is no JPEG stays as it is
        return to_rgb(picture.convert(how.mode) if how.mode else picture)


def digest_of(cell: dict[str, Any], how: Decoding) -> str:
    """Of the file and of how it is decoded; of an address itself."""
    decoded = f"{how.mode} draft {how.draft}" if how.draft else str(how.mode)
    if cell["bytes"] is not None:
        return digest(decoded, cell["bytes"])
    if _is_address(cell["path"]):
        return digest(decoded, cell["path"])
    check_file(cell["path"])
    return digest(decoded, Path(cell["path"]).read_bytes())


def digests_of(sources: Dataset, how: Decoding, progress: bool) -> tuple[list[str], dict[str, str]]:
    """Digests of all pictures, the same in every process; what has no file gets a name of its own, and why."""
    state = PartialState()
    digests: list[str] = []
    bad: dict[str, str] = {}
    mine = sources if state.is_main_process else []
    bar = tqdm(mine, desc="reading gallery", unit="picture", disable=not (progress and state.is_main_process))
    for row, source in enumerate(bar):
        try:
            digests.append(digest_of(source["image"], how))
        except (OSError, ValueError, TypeError) as error:  # TypeError: an empty cell
            digests.append(f"unreadable {row}")
            bad[digests[-1]] = str(error)
    digests, bad = broadcast_object_list([digests, bad])
    return digests, bad


def report(skipped: dict[str, str], number: int) -> None:
    """Warns of pictures that were skipped, id -> reason; a `ValueError` if that is all of them."""
    first = [f"{image_id} ({reason})" for image_id, reason in list(skipped.items())[:3]]
    if len(skipped) == number:
        raise ValueError(f"none of the {number} pictures can be read, first: {first}; pass pictures that Pillow opens")
    if skipped and PartialState().is_main_process:
        logger.warning(
            f"skipped {len(skipped)} of {number} pictures, which cannot be read, first: {first}; gallery.skipped "
            "lists them all"
        )
