"""Finds near-duplicates among images, and images of a benchmark's gallery, by small signatures of their content.

A signature is the image at 16 x 16 pixels in colour: re-encoded and resized copies differ little from each other, and
edits, even of a colour alone, in at least one cell.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from ...models.image_processing_pvlf import open_rgb
from ..image_files import escapes_folder, files_below, find_files

SIDE, NEAR = 16, 10
"""Side of a signature, and the largest difference of a cell between near-duplicates, of 255 (our choice)."""

BANDS, BITS = 4, 16
"""Parts of a difference hash; copies agree in at least one of them where at most three of its 64 bits differ."""


class Signature(NamedTuple):
    """Signature of an image: `cells` uint8 `(16, 16, 3)`, and `bands`, the parts of its difference hash."""

    cells: np.ndarray
    bands: tuple[int, ...]

    def is_near(self, other: "Signature") -> bool:
        """Return whether both images look the same."""
        return int(np.abs(self.cells.astype(np.int16) - other.cells).max()) <= NEAR


def signature(image: Image.Image) -> Signature:
    """Return the signature of an RGB image."""
    cells = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX))
    grey = np.asarray(image.convert("L").resize((9, 8), Image.Resampling.BOX)).astype(np.int16)
    bits = (grey[:, 1:] > grey[:, :-1] + 3).reshape(BANDS, BITS)  # 3: a flat area has no noise
    return Signature(cells, tuple(int(value) for value in bits @ (1 << np.arange(BITS))))


class ImageChecks:
    """Checks of the two images of a triplet.

    Args:
        folder: folder of the images.
        held_out: folders of benchmark images, copies of which must not be trained on.
        progress: show a progress bar while these are read.

    Attributes:
        held_out_images: number of benchmark images that were read.

    Raises:
        ValueError: if a folder does not exist, or holds no image.
    """

    def __init__(self, folder: Path, held_out: Iterable[Path] = (), progress: bool = True) -> None:
        self.folder = folder
        find_files(folder, ())  # the folder exists
        self.held_out_images = 0
        self._held_out: dict[tuple[int, int], list[Signature]] = defaultdict(list)
        for one in held_out:
            self._read_benchmark(one, progress)
        self._facts = lru_cache(100_000)(self._read)

    def _read_benchmark(self, folder: Path, progress: bool) -> None:
        find_files(folder, ())
        before = self.held_out_images
        for file in tqdm(files_below(folder, allow_links=True), f"reading {folder.name}", disable=not progress):
            try:
                found = signature(open_rgb(file))
            except Exception:  # no image, or one that no reader of the benchmark could read either
                continue
            self.held_out_images += 1
            for band in enumerate(found.bands):
                self._held_out[band].append(found)
        if self.held_out_images == before:
            raise ValueError(f"{folder} holds no image: pass the folder of a benchmark's gallery")

    def _read(self, name: str) -> tuple[Signature | None, str | None]:
        """Return signature and problem of an image."""
        if escapes_folder(self.folder, name) or not (self.folder / name).is_file():
            return None, "image not in the folder"
        try:
            found = signature(open_rgb(self.folder / name))
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            return None, f"image cannot be read ({type(error).__name__})"
        copies = (one for band in enumerate(found.bands) for one in self._held_out.get(band, ()))
        return found, "copy of a benchmark's image" if any(map(found.is_near, copies)) else None

    def problem(self, reference: str, target: str) -> str | None:
        """Return why two images, by file name, cannot make a triplet, or None."""
        (a, problem_a), (b, problem_b) = self._facts(reference), self._facts(target)
        if a is None or b is None or problem_a or problem_b:
            return problem_a or problem_b
        return "reference and target look the same" if a.is_near(b) else None

    def problem_of(self, name: str) -> str | None:
        """Return why an image, by file name, cannot be used, or None."""
        return self._facts(name)[1]


__all__ = ["ImageChecks", "Signature", "signature"]
