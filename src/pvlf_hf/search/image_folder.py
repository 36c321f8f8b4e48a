"""Finds the images of a folder, and reports files that look like images but are not indexed."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from PIL import Image as PILImage

from ..data.image_files import files_below
from ..models.image_formats_pvlf import ENDINGS, ImageFormat, recognise, refusal
from ..models.image_processing_pvlf import decodes

SYSTEM_FOLDERS = {
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "@eadir",
    "@recently-snapshot",
    "@recycle",
    "@tmp",
    "__macosx",
    "lost+found",
    "system volume information",
}
"""Folders, in lower case, in which desktops and network drives keep thumbnails and deleted files."""

NOT_IMAGES = {"BUFR", "GRIB", "HDF5", "MPEG"}
"""Formats that Pillow lists but that hold no image that it could decode."""


class FolderImages(NamedTuple):
    """Images of a folder, and other files in it that look like images."""

    files: list[Path]
    """Files that hold an image by their ending or their first bytes, sorted."""
    skipped: dict[str, str]
    """Other images, by their names in the folder, each with the reason that it is not indexed and the remedy."""
    hidden: list[str]
    """Names of images in hidden and system folders, which are left out."""


def find_images(folder: Path, allow_links: bool = False, include_hidden: bool = False) -> FolderImages:
    """List the images of a folder and its subfolders.

    Args:
        folder: the folder.
        allow_links: follow links that lead out of it.
        include_hidden: list images in hidden and system folders too.

    Raises:
        ValueError: if the folder does not exist, it holds no images, or a link leads out of it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; pass the one that holds the images")
    found = files_below(folder, allow_links)  # broken links too, which are reported
    decoded, not_decoded = image_endings()
    images: list[Path] = []
    skipped: dict[str, str] = {}
    hidden: list[str] = []
    for file in found:
        name, ending = file.relative_to(folder), file.suffix.lower()
        if not include_hidden and is_hidden(name):
            hidden += [name.as_posix()] if ending in decoded or ending in not_decoded else []
            continue
        printable = os.fsencode(name.as_posix()).decode("utf-8", "backslashreplace")
        kind = None if ending in decoded else _recognise(file) or not_decoded.get(ending)
        if kind is None and ending not in decoded:
            continue
        if kind and not decodes(kind):
            skipped[printable] = refusal(kind)
        elif printable != name.as_posix():
            skipped[printable] = "its name is not valid UTF-8: rename it"
        else:
            images.append(file)
    if not images and not skipped:
        if hidden:
            raise ValueError(
                f"{folder} holds images in hidden or system folders only, first: {hidden[:3]}: pass "
                "include_hidden=True to index them"
            )
        endings = sorted({file.suffix for file in found})[:5]
        raise ValueError(f"{folder} holds no images, its files end in {endings}: pass the folder that does")
    return FolderImages(images, skipped, hidden)


def image_endings() -> tuple[set[str], dict[str, ImageFormat]]:
    """Return the endings of images that are decoded whatever they hold, and the formats of other images by ending."""
    PILImage.init()
    pillow = {ending: kind for ending, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    decoded = {ending for ending, kind in pillow.items() if decodes(ImageFormat(kind, b"", kind))}
    others = {ending: ImageFormat(kind, b"") for ending, kind in pillow.items() if kind not in NOT_IMAGES}
    return decoded, {ending: kind for ending, kind in (others | ENDINGS).items() if ending not in decoded}


def _recognise(file: Path) -> ImageFormat | None:
    """Return the format of a file whose ending does not tell, None if it is not an image or cannot be read."""
    try:
        return recognise(file) if stat.S_ISREG(file.stat().st_mode) else None
    except OSError:
        return None


def is_hidden(name: Path) -> bool:
    """Return whether a file, named in its folder, lies in a hidden or system folder or is metadata of macOS."""
    folders = name.parts[:-1]
    return name.name.startswith("._") or any(one.startswith(".") or one.lower() in SYSTEM_FOLDERS for one in folders)


__all__ = ["FolderImages", "find_images"]
