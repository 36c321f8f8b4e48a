"""Camera raw comes in by the same door and limits as JPEG does, and is never mistaken for its thumbnail."""

import io
import struct

import numpy as np
import pytest
from datasets import Dataset, Features
from datasets import Image as DatasetImage
from PIL import Image
from test_image_formats import DOORS, difference, encoded, quarters

from pvlf_hf import onnx_encoder
from pvlf_hf.models import image_formats_pvlf as formats
from pvlf_hf.models import image_processing_pvlf as door
from pvlf_hf.search.image_folder import find_images
from pvlf_hf.search.metadata import exif_of

XYZ_TO_SRGB = (3.2404542, -1.5371385, -0.4985314, -0.9692660, 1.8760108, 0.0415560, 0.0556434, -0.2040259, 1.0572252)
SIZES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "I", 10: "i"}


@pytest.fixture
def libraw():
    return pytest.importorskip("rawpy")


def dng(image=None, **tags):
    """Return a DNG of a sensor with 2 x 2 filters (red, green, green, blue): uncompressed, 16 bit.

    `tags` replaces values by the names in TIFF and DNG, as a type and a list.
    """
    pixels = np.asarray((image or quarters()).convert("RGB")) / 255
    height, width, _ = pixels.shape
    sensor = np.empty((height, width), "<u2")
    for row, column, colour in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 2)):
        sensor[row::2, column::2] = pixels[row::2, column::2, colour] ** 2.2 * 65535
    matrix = [number for value in XYZ_TO_SRGB for number in (round(value * 10_000), 10_000)]
    values = {
        "subfile": (254, 4, [0]),
        "width": (256, 4, [width]),
        "height": (257, 4, [height]),
        "bits": (258, 3, [16]),
        "compression": (259, 3, [1]),
        "photometric": (262, 3, [32803]),
        "make": (271, 2, b"Maker\0"),
        "model": (272, 2, b"Model\0"),
        "strips": (273, 4, [0]),
        "orientation": (274, 3, [1]),
        "samples": (277, 3, [1]),
        "rows": (278, 4, [height]),
        "bytes": (279, 4, [sensor.nbytes]),
        "date": (306, 2, b"2024:05:06 07:08:09\0"),
        "filters": (33421, 3, [2, 2]),
        "pattern": (33422, 1, [0, 1, 1, 2]),
        "dng": (50706, 1, [1, 4, 0, 0]),
        "camera": (50708, 2, b"Maker Model\0"),
        "black": (50714, 4, [0]),
        "white": (50717, 4, [65535]),
        "scale": (50718, 5, [1, 1, 1, 1]),
        "matrix": (50721, 10, matrix),
        "neutral": (50728, 5, [1] * 6),
        "light": (50778, 3, [21]),
    }
    values |= {name: (values[name][0], *value) for name, value in tags.items()}
    rows = sorted(value for value in values.values() if value[2])
    packed = [bytes(v) if kind in (1, 2) else struct.pack(f"<{len(v)}{SIZES[kind]}", *v) for _, kind, v in rows]
    after = 8 + 2 + 12 * len(rows) + 4
    start = after + sum(len(value) for value in packed if len(value) > 4)
    directory, behind = b"", b""
    for (tag, kind, value), content in zip(rows, packed, strict=True):
        content = struct.pack("<I", start) if tag == 273 else content
        count = len(value) // (2 if kind in (5, 10) else 1)
        directory += struct.pack("<HHI", tag, kind, count)
        directory += content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", after + len(behind))
        behind += content if len(content) > 4 else b""
    head = b"II*\0" + struct.pack("<IH", 8, len(rows))
    return head + directory + bytes(4) + behind + sensor.tobytes()


def nef():
    """Return what begins as Nikon's files do: a TIFF whose first image is the thumbnail."""
    stream = io.BytesIO()
    tags = {254: 1, 271: "NIKON CORPORATION"}
    quarters().save(stream, "TIFF", tiffinfo=tags)
    return stream.getvalue()


@pytest.mark.parametrize("name", [name for name in DOORS if name != "without the package"])
def test_camera_raw_comes_in_by_every_door(name, libraw, tmp_path, tiny_model, tiny_processor):
    (tmp_path / "a.dng").write_bytes(dng())
    found = DOORS[name](tmp_path / "a.dng", tiny_model, tiny_processor)
    assert (
        difference(door.open_rgb(found) if isinstance(found, (str, type(tmp_path))) else found, quarters()) < 0.04
    )  # edges are blended


@pytest.mark.parametrize("name", DOORS)
def test_camera_raw_is_refused_with_a_remedy_rather_than_read_as_its_thumbnail(
    name, pillow_alone, tmp_path, tiny_model, tiny_processor
):
    remedy = "" if name == "without the package" else r'.*pip install "pvlf-hf\[raw\]"'
    for file, content in (("a.dng", dng()), ("b.nef", nef()), ("c.tif", nef()), ("d.pef", dng(dng=(1, [])))):
        if name == "without the package" and file in ("a.dng", "d.pef"):
            continue  # Pillow alone identifies neither
        folder = tmp_path / file[0]
        folder.mkdir()
        (folder / file).write_bytes(content)
        with pytest.raises((ValueError, OSError), match=f"camera raw image, .*convert it to JPEG or PNG{remedy}"):
            DOORS[name](folder / file, tiny_model, tiny_processor)


def test_a_plain_tiff_is_no_camera_raw(tmp_path):
    for tags in ({}, {254: 1}, {271: "NIKON CORPORATION"}, {254: 2, 271: "scanner"}):
        quarters().save(tmp_path / "a.tif", tiffinfo=tags)
        assert formats.recognise(tmp_path / "a.tif").name == "TIFF"
        assert difference(door.open_rgb(tmp_path / "a.tif"), quarters()) == 0
    assert formats.recognise(io.BytesIO(b"II*\0" + b"\xff" * 60)).name == "TIFF"  # damaged, as Pillow will say
    (tmp_path / "a.nef").write_bytes(encoded("TIFF"))
    assert formats.recognise(tmp_path / "a.nef") is formats.RAW
    (tmp_path / "a.nef").write_bytes(encoded("JPEG"))
    assert formats.recognise(tmp_path / "a.nef").name == "JPEG"
    (tmp_path / "a.raw").write_bytes(b"of no known beginning")
    assert formats.recognise(tmp_path / "a.raw") is formats.RAW


def test_camera_raw_is_upright_and_dated(libraw):
    for orientation in (1, 3, 6, 8):
        image = Image.open(io.BytesIO(encoded("PNG")))
        ways = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
        expected = image.transpose(ways[orientation]) if orientation in ways else image
        content = dng(orientation=(3, [orientation]))
        assert difference(door.open_rgb(content), expected) < 0.04
        assert difference(door.decode_cell({"bytes": content, "path": None}, None), expected) < 0.04
        row = exif_of({"bytes": content, "path": None})
        assert (row["exif_width"], row["exif_height"]) == expected.size
        assert str(row["exif_date"]) == "2024-05-06 07:08:09" and row["exif_latitude"] is None
    undated = dng(date=(2, b""))
    assert exif_of({"bytes": undated, "path": None})["exif_date"] is None


def test_the_policy_of_formats_covers_camera_raw(libraw, monkeypatch, tmp_path):
    assert "RAW" in door.FORMATS and onnx_encoder.FORMATS == door.FORMATS
    (tmp_path / "a.dng").write_bytes(dng())
    assert find_images(tmp_path).files == [tmp_path / "a.dng"]
    monkeypatch.setattr(door, "FORMATS", ("JPEG", "TIFF"))
    monkeypatch.setattr(libraw, "imread", lambda stream: pytest.fail("LibRaw was reached"))
    assert not find_images(tmp_path).files
    with pytest.raises(OSError, match="camera raw image, which is not decoded"):
        door.open_rgb(tmp_path / "a.dng")


@pytest.mark.reliability(
    4,
    "Camera raw keeps the limits: what states too many pixels, or a shape that would be stretched to them, is refused "
    "before it is decoded, and truncated files are; LibRaw sees the content alone, no path",
    broken=(
        "src/pvlf_hf/models/image_processing_pvlf.py",
        "            check_pixels(raw.sizes.raw_width, round(raw.sizes.raw_height * stretch))\n",
        "",
    ),
)
def test_camera_raw_keeps_the_limits(libraw, monkeypatch, tmp_path, figure):
    opened, read = [], libraw.imread
    monkeypatch.setattr(libraw, "imread", lambda stream: opened.append(stream) or read(stream))
    wide = {"width": (4, [60_000]), "height": (4, [60_000])}
    with pytest.raises(ValueError, match="60000 x 60000 pixels, more than PIL.Image.MAX_IMAGE_PIXELS"):
        door.open_rgb(dng(**wide))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
        for stretched in (dng(scale=(5, [9, 1, 1, 1])), dng(scale=(5, [1, 1, 9, 1]))):
            with pytest.raises(ValueError, match="80 x 432 pixels, more than"):
                door.open_rgb(stretched)
    content = dng()
    ends = (30, 200, 400, len(content) // 2, len(content) - 20)
    for end in ends:
        with pytest.raises(OSError, match="cannot identify image file"):
            door.open_rgb(content[:end])
    (tmp_path / "a.dng").write_bytes(content)
    door.open_rgb(tmp_path / "a.dng")
    assert opened and all(isinstance(stream, io.BytesIO) for stream in opened)
    column = Dataset.from_dict({"image": [{"bytes": dng(**wide), "path": None}]}, Features({"image": DatasetImage()}))
    with pytest.raises(ValueError, match="cannot read .*60000 x 60000 pixels"):
        door.opened(column)[0]
    monkeypatch.setattr(door, "MAX_BYTES", 100)
    with pytest.raises(ValueError, match="more bytes than .*MAX_BYTES"):
        door.open_rgb(tmp_path / "a.dng")
    figure(f"3 that state too much, {len(ends)} truncated")
