"""Keeps the int8 encoder of a gallery in its folder, and makes it from a sample of the gallery's own images.

The encoder is in `image_encoder.int8` before the first image is embedded by it, so that whatever adds images later, or
goes on after an interruption, embeds them by the same.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from accelerate import PartialState
from torch import Tensor
from transformers.utils import logging

from ..digests import sequence_digest
from ..embeddings.int8_encoder import Int8Encoder, calibrate, int8_made_by
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor
from .gallery_files import kept_provenance
from .indexing import DecodeOptions, decode, digest_of, source_of
from .replacement import beside, place_to_build

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.get_logger(__name__)

ENCODER = "image_encoder.int8"

MOST_CALIBRATED, MOST_HELD_OUT, LEAST_IMAGES = 300, 100, 100
"""Images to calibrate on and to check with, at most, and both together, at least; 300 is NNCF's default, the others
our choice."""


class Sample(NamedTuple):
    """Rows of a gallery to calibrate on, and others to check with."""

    calibrated: list[int]
    held_out: list[int]


class ImageRows:
    """Images of a gallery, read by row.

    Args:
        sources: column `image` of undecoded images.
        ids: their names.
        options: how they are decoded.
        processor: prepares them.
    """

    def __init__(
        self, sources: "Dataset", ids: Sequence[str], options: DecodeOptions, processor: ComposedRetrievalProcessor
    ) -> None:
        self.sources, self.ids, self.options, self.processor = sources, ids, options, processor

    def prepare(self, row: int) -> Tensor:
        """Return the pixel values `(1, 3, height, width)` of an image."""
        return self._pixels(source_of(self.sources[row]["image"]))

    def sample(self) -> Sample:
        """Choose images that can be read and whose files differ, in the order of digests of their names.

        A quarter is held out, at most `MOST_HELD_OUT`.

        Raises:
            ValueError: if there are fewer than `LEAST_IMAGES`.
        """
        chosen: dict[str, int] = {}
        for row in sorted(range(len(self.ids)), key=lambda row: sequence_digest(self.ids[row])):
            try:
                source = source_of(self.sources[row]["image"])
                self._pixels(source)
            except Exception:  # of any type, as Pillow's decoders raise; indexing reports it
                continue
            chosen.setdefault(digest_of(source, self.options), row)
            if len(chosen) == MOST_CALIBRATED + MOST_HELD_OUT:
                break
        if len(chosen) < LEAST_IMAGES:
            raise ValueError(
                f"int8 is calibrated and checked on at least {LEAST_IMAGES} different images, and {len(chosen)} can "
                "be read here: use --openvino without int8, which needs none"
            )
        rows, held_out = [*chosen.values()], min(MOST_HELD_OUT, len(chosen) // 4)
        return Sample(rows[held_out:], rows[:held_out])

    def _pixels(self, source: bytes | str) -> Tensor:
        return self.processor.process_targets(decode(source, self.options))["pixel_values"]


class Int8Place(NamedTuple):
    """Folder to embed images in, the encoder to embed them by, and the provenance that they get."""

    folder: Path
    encoder: Int8Encoder
    made_by: dict[str, str]


def int8_place(
    home: Path,
    model: ComposedRetrievalModel,
    images: ImageRows,
    unquantised: dict[str, str],
    replacing: bool,
    progress: bool,
) -> Int8Place:
    """Return where and by what to embed the images of a gallery in int8; an encoder that was kept is used again.

    Args:
        home: folder of the gallery.
        model: unquantised, in float32; it stays as it is.
        images: to calibrate on, with the processor of the gallery.
        unquantised: provenance of the model, see [`images_made_by`].
        replacing: see [`place_to_build`].
        progress: show progress bars.

    Raises:
        ImportError: if OpenVINO or NNCF is not installed.
        ValueError: if the gallery holds other embeddings, its encoder is missing or another, or there are too few
            images; else as [`calibrate`].
    """
    if PartialState().num_processes > 1:
        raise ValueError("int8 is calibrated and computed in one process: start it without accelerate launch")
    kept = kept_provenance(home)
    if kept and "int8" in kept and int8_made_by(unquantised, kept["int8"]) == kept:
        return Int8Place(home, _kept_encoder(home, kept["int8"]), kept)
    found = [encoder for folder in (home, beside(home)[0]) if (encoder := _begun(folder, unquantised))]
    digest = found[0].digest if found else ""  # unlike that of any encoder
    folder = place_to_build(home, model, images.processor, int8_made_by(unquantised, digest), replacing)
    encoder = found[0] if found else None
    if encoder is None:
        encoder = calibrate(model, unquantised["fingerprint"], *images.sample(), images.prepare, progress)
        encoder.save(folder / ENCODER)
        lowest, median, share = encoder.quality
        logger.warning(
            f"calibrated int8: cosine {lowest:.4f} at the lowest and {median:.4f} in the median with unquantised "
            f"embeddings, {share:.1%} of the nearest images kept"
        )
    return Int8Place(folder, encoder, int8_made_by(unquantised, encoder.digest))


def _kept_encoder(folder: Path, digest: str) -> Int8Encoder:
    """Load the encoder that embedded the images of a folder."""
    file = folder / ENCODER
    if not file.is_file():
        raise ValueError(
            f"{folder} lacks {ENCODER}, which embedded its images in int8 and must embed those that are added: "
            "restore the file, or index into another folder"
        )
    encoder = Int8Encoder.load(file)
    if encoder.digest != digest:
        raise ValueError(f"{file} is not what embedded the images of {folder}: restore it, or index into another")
    return encoder


def _begun(folder: Path, unquantised: dict[str, str]) -> Int8Encoder | None:
    """Load the encoder of this model that an interrupted run left in a folder, None where there is none."""
    file = folder / ENCODER
    encoder = Int8Encoder.load(file) if file.is_file() else None
    return encoder if encoder and encoder.base == unquantised["fingerprint"] else None


__all__ = ["ENCODER", "ImageRows", "Int8Place", "Sample", "int8_place"]
