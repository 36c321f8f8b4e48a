"""Finds the images of a folder, and reports files that look like images but are not indexed."""

import os
import stat
from pathlib import Path
from typing import NamedTuple

from PIL import Image as PILImage

from ..data.image_files import files_below

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

CAMERA_RAW = "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mrw nef nrw orf pef raf rw2 rwl sr2 srf srw x3f".split()

NOT_DECODED = {
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".hif": "HEIC",
    ".jxl": "JPEG XL",
    ".svg": "SVG",
    ".xcf": "GIMP",
    ".exr": "OpenEXR",
    **{f".{ending}": "camera raw" for ending in CAMERA_RAW},
}
"""Formats by the ending, in lower case, of images that Pillow does not open by itself."""

SIGNATURES: tuple[tuple[int, tuple[bytes, ...], str, str], ...] = (
    (0, (b"\xff\xd8\xff",), "JPEG", ".jpg"),
    (0, (b"\x89PNG\r\n\x1a\n",), "PNG", ".png"),
    (0, (b"GIF87a", b"GIF89a"), "GIF", ".gif"),
    (8, (b"WEBP",), "WebP", ".webp"),
    (4, (b"ftypavif", b"ftypavis"), "AVIF", ".avif"),
    (0, (b"II*\0", b"MM\0*"), "TIFF", ".tif"),
    (0, (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"), "JPEG 2000", ".jp2"),
    (4, (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftyphevx", b"ftypmif1", b"ftypmsf1"), "HEIC", ""),
    (0, (b"\xff\x0a", b"\0\0\0\x0cJXL "), "JPEG XL", ""),
    (0, (b"8BPS",), "Photoshop", ""),
    (0, (b"%!PS-Adobe",), "PostScript", ""),
)
"""Offset, first bytes and name of image formats, and the ending of those that are decoded."""

HEAD_BYTES = 16


class FolderImages(NamedTuple):
    """Images of a folder, and other files in it that look like images."""

    files: list[Path]
    """Files with the ending of an image, sorted."""
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
        ValueError: if there is no such folder, it holds no images, or a link leads out of it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; pass the one that holds the images")
    found = files_below(folder, allow_links)  # broken links too, which are reported
    names = {file: file.relative_to(folder) for file in found}
    hidden = {file for file in found if not include_hidden and any(map(_is_hidden, names[file].parts[:-1]))}
    PILImage.init()
    readable = {ending for ending, kind in PILImage.registered_extensions().items() if kind in PILImage.OPEN}
    images: list[Path] = []
    skipped: dict[str, str] = {}
    for file in found:
        if file in hidden:
            continue
        name = names[file].as_posix()
        printable = os.fsencode(name).decode("utf-8", "backslashreplace")
        if file.suffix.lower() not in readable:
            reason = not_indexed(file)
        else:
            reason = "its name is not valid UTF-8: rename it" if printable != name else None
            images += [] if reason else [file]
        if reason:
            skipped[printable] = reason
    left_out = [names[file].as_posix() for file in found if file in hidden and file.suffix.lower() in readable]
    if not images and not skipped:
        if left_out:
            raise ValueError(
                f"{folder} holds images in hidden or system folders only, first: {left_out[:3]}: pass "
                "include_hidden=True to index them"
            )
        endings = sorted({file.suffix for file in found})[:5]
        raise ValueError(f"{folder} holds no images, its files end in {endings}: pass the folder that does")
    return FolderImages(images, skipped, left_out)


def not_indexed(file: Path) -> str | None:
    """Return why a file without the ending of an image is not indexed, with the remedy; None if it is no image."""
    if kind := NOT_DECODED.get(file.suffix.lower()):
        return _convert(kind)
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            return None
        with file.open("rb") as opened:
            head = opened.read(HEAD_BYTES)
    except OSError:
        return None
    kind, ending = format_of(head)
    if not kind:
        return None
    return f"it is a {kind} image without the ending of one: name it {file.name}{ending}" if ending else _convert(kind)


def explain_unidentified(content: bytes) -> str | None:
    """Return the remedy for content in an image format that is not decoded; None for any other content."""
    kind, ending = format_of(content[:HEAD_BYTES])
    return _convert(kind) if kind and not ending else None


def format_of(head: bytes) -> tuple[str, str]:
    """Return name and ending of the image format of a file's first bytes; the ending is empty if not decoded."""
    for offset, beginnings, kind, ending in SIGNATURES:
        if head[offset:].startswith(beginnings):
            return kind, ending
    return "", ""


def _convert(kind: str) -> str:
    return f"it is a {kind} image, which is not decoded: convert it to JPEG or PNG"


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


__all__ = ["FolderImages", "find_images"]
