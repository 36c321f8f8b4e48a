"""Recognises image formats by their first bytes, and readies the decoders that other packages bring."""

import io
import re
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

HEAD_BYTES = 64
"""Bytes of a file by which its format is recognised."""


class ImageFormat(NamedTuple):
    """A format of image files."""

    name: str
    """Name that people use."""
    head: bytes
    """Regular expression of its first bytes."""
    pillow: str = ""
    """Name of it in Pillow or in `FORMATS`, empty for a format that is never decoded."""
    needs: str = ""
    """Command that installs the decoder, where Pillow may lack it."""
    plugin: str = ""
    """Module of another package that is the decoder, or registers it with Pillow when it is imported."""


AVIF = ImageFormat("AVIF", rb".{4}ftyp(?:.{4})*?avi[fs]", "AVIF", 'pip install "pillow>=11.3"')
HEIC = ImageFormat(
    "HEIC",
    rb".{4}ftyp(?:.{4})*?(?:hei[cmsx]|hev[cmsx]|mif1|msf1)",
    "HEIF",
    'pip install "pvlf-hf[heif]"',
    "pillow_heif.HeifImagePlugin",
)
JPEG_XL = ImageFormat(
    "JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL ", "JXL", "pip install pillow-jxl-plugin", "pillow_jxl.JpegXLImagePlugin"
)
RAW = ImageFormat(
    "camera raw",
    rb"II\*\0.{4}CR|IIR[OS]|MMOR|IIU\0|II\x1a\0{3}HEAPCCDR|\0MRM|FUJIFILMCCD-RAW|FOVb|.{4}ftypcrx ",
    "RAW",
    'pip install "pvlf-hf[raw]"',
    "rawpy",
)
TIFF = ImageFormat("TIFF", rb"II[*+]\0|MM\0[*+]", "TIFF")
SVG, GIMP = ImageFormat("SVG", rb"<svg"), ImageFormat("GIMP", rb"gimp xcf")
OPEN_EXR = ImageFormat("OpenEXR", rb"v/1\x01")

IMAGE_FORMATS = (
    ImageFormat("JPEG", rb"\xff\xd8\xff", "JPEG"),
    ImageFormat("PNG", rb"\x89PNG\r\n\x1a\n", "PNG"),
    ImageFormat("GIF", rb"GIF8[79]a", "GIF"),
    ImageFormat("WebP", rb"RIFF.{4}WEBP", "WEBP"),
    ImageFormat("BMP", rb"BM.{4}\0{4}", "BMP"),
    ImageFormat("JPEG 2000", rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", "JPEG2000"),
    AVIF,  # before HEIC, with which it shares a container
    HEIC,
    JPEG_XL,
    RAW,  # before TIFF, which most of it is built on
    TIFF,
    ImageFormat("Photoshop", rb"8BPS"),
    ImageFormat("PostScript", rb"%!PS-Adobe"),
    SVG,
    GIMP,
    OPEN_EXR,
)
"""Formats that are recognised, in the order in which they are tried."""

_RAW_ENDINGS = (
    "3fr arw cr2 cr3 crw dcr dng erf iiq kdc mef mrw nef nrw orf pef raf raw rw2 rwl sr2 srf srw x3f".split()
)

ENDINGS = {
    ".avif": AVIF,
    **dict.fromkeys((".heic", ".heics", ".heif", ".heifs", ".hif"), HEIC),
    ".jxl": JPEG_XL,
    ".svg": SVG,
    ".xcf": GIMP,
    ".exr": OPEN_EXR,
    **{f".{ending}": RAW for ending in _RAW_ENDINGS},
}
"""Formats, by the ending in lower case, that Pillow alone may not open."""


def format_of(head: bytes) -> ImageFormat | None:
    """Return the format of a file's first bytes, None if they are of no known one."""
    return next((kind for kind in IMAGE_FORMATS if re.match(kind.head, head, re.DOTALL)), None)


def recognise(source: str | Path | io.BytesIO) -> ImageFormat | None:
    """Return the format of an image by its content, None if it is of no known one.

    Most camera raw is built on TIFF, of which Pillow would open the thumbnail; some of it is known by its ending only.
    """
    kind = format_of(beginning(source))
    by_ending = None if isinstance(source, io.BytesIO) else ENDINGS.get(Path(source).suffix.lower())
    if kind in (None, TIFF) and by_ending is RAW:
        return RAW
    return RAW if kind is TIFF and _is_of_a_camera(source) else kind


def _is_of_a_camera(tiff: str | Path | io.BytesIO) -> bool:
    """Return whether a TIFF is a DNG, or a camera's whose first image is raw or the small version of another."""
    with suppress(Exception), _stream(tiff) as file:
        tags = ImageFileDirectory_v2(file.read(8))
        file.seek(tags.next)
        tags.load(file)
        dng_version, make, subfile_type, photometric = 50706, 271, 254, 262
        other = tags.get(subfile_type, 0) & 1 or tags.get(photometric) == 32803  # CFA
        return dng_version in tags or (make in tags and bool(other))
    return False  # damaged, which Pillow reports


def _stream(source: str | Path | io.BytesIO) -> BinaryIO:
    """Open a file, or what is in memory, which stays as it is."""
    return io.BytesIO(source.getbuffer()) if isinstance(source, io.BytesIO) else Path(source).open("rb")


def beginning(source: str | Path | io.BytesIO, size: int = HEAD_BYTES) -> bytes:
    """Return the first bytes of a file or of what is in memory."""
    with _stream(source) as file:
        return file.read(size)


def make_ready(kind: ImageFormat | None) -> bool:
    """Import the decoder of a format, if another package brings it; return whether there is one."""
    Image.init()
    if kind is None or kind.pillow in Image.OPEN or not kind.plugin:
        return kind is not None and kind.pillow in Image.OPEN
    with suppress(ImportError):
        import_module(kind.plugin)
        return kind is RAW or kind.pillow in Image.OPEN
    return False


def refusal(kind: ImageFormat) -> str:
    """Return that a format is not decoded, and the remedy."""
    remedy = f", or {kind.needs}" if kind.needs else ""
    return f"it is {_with_article(kind.name)} image, which is not decoded: convert it to JPEG or PNG{remedy}"


def damage(kind: ImageFormat) -> str:
    """Return that an image of a format is damaged, and the remedy."""
    return f"it is {_with_article(kind.name)} image that is damaged or incomplete: copy or export it again"


def _with_article(name: str) -> str:
    return f"an {name}" if name[0] in "AEIO" else f"a {name}"


def jxl_size(content: bytes) -> tuple[int, int]:
    """Read width and height from the header of a JPEG XL: its decoder in Pillow decodes before it tells them.

    Raises:
        ValueError: if the file is too damaged to tell.
    """
    stream = content if content.startswith(b"\xff\x0a") else _codestream(content)
    if len(stream) < 12:
        raise ValueError(f"cannot identify image file: {damage(JPEG_XL)}")
    bits = int.from_bytes(stream[2:12], "little")

    def take(number: int) -> int:
        nonlocal bits
        value, bits = bits & (1 << number) - 1, bits >> number
        return value

    in_eights = take(1)

    def side() -> int:
        return 8 * (take(5) + 1) if in_eights else take((9, 13, 18, 30)[take(2)]) + 1

    height, ratio = side(), take(3)
    if not ratio:
        return side(), height
    over, under = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return height * over // under, height


def _codestream(content: bytes) -> bytes:
    """Return the beginning of the image data in a container of boxes, empty if there is none."""
    start = 0
    while start + 8 <= len(content):
        length, kind = int.from_bytes(content[start : start + 4], "big"), content[start + 4 : start + 8]
        head = 8
        if length == 1:  # a long box
            length, head = int.from_bytes(content[start + 8 : start + 16], "big"), 16
        if kind in (b"jxlc", b"jxlp"):
            begin = start + head + (4 if kind == b"jxlp" else 0)  # a part begins with its number
            return content[begin : begin + HEAD_BYTES]
        if length < head:  # 0 means up to the end
            break
        start += length
    return b""
