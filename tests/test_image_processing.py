"""`PVLFImageProcessor` against the public reference's pixels, and on every image mode that a user may have."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from reference import TOLERANCES
from safetensors.numpy import load_file

from pvlf_hf.models.image_processing_pvlf import PVLFImageProcessor

FIXTURES = Path(__file__).parent / "fixtures"
PIXELS = load_file(FIXTURES / "transforms.safetensors")
META = json.loads((FIXTURES / "transforms.json").read_text())
MEAN, STD = (np.array(META[key], dtype=np.float64)[:, None, None] for key in ("mean", "std"))
RATIOS = {"targetpad": 1.25, "squarepad": 1.0}
OPAQUE = ["tall_rgb", "wide_rgb", "square_rgb", "gray", "tiny_rgb", "ratio_1p25", "ratio_below"]


def processor(dim=32, ratio=1.25, **kwargs):
    return PVLFImageProcessor(size={"shortest_edge": dim}, crop_size=dim, target_ratio=ratio, **kwargs)


def pixels(image, dim=32, ratio=1.25, **kwargs):
    """Return 8-bit (H, W, 3) pixels after cropping and resizing, before rescaling."""
    out = processor(dim, ratio, do_rescale=False, do_normalize=False)(image, **kwargs)["pixel_values"]
    return np.moveaxis(np.asarray(out[0]), 0, -1)


def random_image(mode="RGB", size=(53, 80), seed=0):
    channels = len(Image.new(mode, (1, 1)).getbands())
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], channels), dtype=np.uint8)
    return Image.fromarray(values[..., 0] if channels == 1 else values, mode=None).convert(mode)


def fixture_image(name):
    image = Image.fromarray(PIXELS[f"{name}.pixels"])
    if name == "palette":
        image.putpalette(PIXELS["palette.palette"].tobytes())
    assert image.mode == META["images"][name]["mode"]
    return image


# ---- parity ----


@pytest.mark.parametrize("pad", RATIOS)
@pytest.mark.parametrize("name", OPAQUE)
def test_pixels_equal_the_reference(name, pad):
    image = fixture_image(name)
    for dim in META["dims"]:
        assert np.array_equal(pixels(image, dim, RATIOS[pad]), PIXELS[f"{name}.{pad}.{dim}.u8"])
    out = processor(32, RATIOS[pad])(image, return_tensors="np")["pixel_values"]
    assert out.dtype == np.float32 and out.shape == (1, 3, 32, 32)
    np.testing.assert_allclose(out[0], PIXELS[f"{name}.{pad}.32.out"], rtol=0, atol=TOLERANCES["pixels"])


def test_transparency_is_the_only_difference_for_rgba():
    # The reference drops the alpha channel at the very end; we composite on white at the very start. In the image
    # that is neither padded nor resized this is the only operation: our pixels are its colours blended with white.
    values = PIXELS["same_size_rgba.pixels"]
    colours, alpha = values[..., :3], values[..., 3:] / 255
    for pad, ratio in RATIOS.items():
        assert np.array_equal(PIXELS[f"same_size_rgba.{pad}.32.u8"], colours)
        assert np.array_equal(pixels(Image.fromarray(colours), 32, ratio), colours)
        ours = pixels(Image.fromarray(values), 32, ratio)
        assert np.abs(ours - (colours * alpha + 255 * (1 - alpha))).max() < 1


def test_geometry_of_rgba_and_palette_equals_the_reference():
    for name in ("rgba", "same_size_rgba", "palette"):
        for pad, ratio in RATIOS.items():
            for dim in META["dims"]:
                run = META["images"][name]["runs"][f"{pad}.{dim}"]
                width, height = META["images"][name]["size_wh"]
                ours = processor(dim, ratio)
                padded = ours.target_pad(np.zeros((3, height, width), np.uint8), ratio)
                assert padded.shape == (3, *reversed(run["padded_wh"]))
                resized = ours.resize(padded, ours.size, resample=ours.resample)
                assert resized.shape == (3, *reversed(run["resized_wh"]))


def test_palette_is_applied_before_padding_and_resizing():
    image = fixture_image("palette")
    for pad, ratio in RATIOS.items():
        assert np.array_equal(pixels(image, 32, ratio), pixels(image.convert("RGB"), 32, ratio))
        # The reference resizes and pads palette *indices*: colours that are not in the image turn up.
        assert not np.array_equal(pixels(image, 32, ratio), PIXELS[f"palette.{pad}.32.u8"])


def test_crop_offset_rounds_half_to_even():
    # 32 x 37: offsets 2.5 -> 2 and, at 39, 3.5 -> 4; the library's own crop would floor.
    for height, top in ((37, 2), (39, 4)):
        image = np.arange(height, dtype=np.uint8)[None, :, None].repeat(3, 0).repeat(32, 2)
        assert processor().center_crop(image, processor().crop_size)[0, 0, 0] == top


# ---- image types ----


def test_defaults_are_blip_at_384():
    out = PVLFImageProcessor()(random_image(size=(72, 72)), return_tensors="pt")["pixel_values"]
    assert out.shape == (1, 3, 384, 384) and out.dtype == torch.float32 and out.is_contiguous()
    clip = PVLFImageProcessor(size={"shortest_edge": 224}, crop_size=224)
    assert clip(random_image(), return_tensors="pt")["pixel_values"].shape == (1, 3, 224, 224)
    assert PVLFImageProcessor()(random_image(), size=224, crop_size=224)["pixel_values"][0].shape == (3, 224, 224)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_become_rgb_first(mode):
    image = random_image().convert(mode)
    assert np.array_equal(pixels(image), pixels(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "P"])
def test_transparent_pixels_become_white(mode):
    image = Image.new("RGBA", (32, 32), (200, 0, 0, 0)).convert("LA" if mode == "LA" else "RGBA")
    if mode == "P":
        image = Image.new("P", (32, 32))
        image.putpalette([200, 0, 0])
        image.info["transparency"] = 0
    elif mode == "RGBa":
        image = image.convert("RGBa")
    assert (pixels(image) == 255).all()


def test_half_transparent_pixels_are_composited():
    assert (pixels(Image.new("RGBA", (32, 32), (0, 0, 0, 128))) == 127).all()


def test_sixteen_bit_gray_is_scaled_not_clipped():
    values = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    assert np.array_equal(pixels(Image.fromarray(values))[..., 0], values >> 8)


def test_arrays_and_tensors_equal_the_pil_image():
    for mode in ("RGB", "RGBA", "L"):
        image = random_image(mode)
        expected, array = pixels(image), np.asarray(image)
        last = array if array.ndim == 3 else array[..., None]
        first = np.moveaxis(last, -1, 0)
        for same in (
            array,
            last,
            first,
            torch.tensor(first),
            torch.tensor(last),
            torch.tensor(first / 255),
            last / 255,
        ):
            assert np.array_equal(pixels(same), expected)
    bfloat16 = torch.rand(3, 40, 40).bfloat16()
    assert np.array_equal(pixels(bfloat16), pixels(bfloat16.float()))


def test_layout_of_one_row_arrays_follows_type_or_argument():
    # channels last, although its first axis could be a gray channel
    row = np.arange(96, dtype=np.uint8).reshape(1, 32, 3)
    expected = pixels(Image.fromarray(row))
    assert np.array_equal(pixels(row), expected)
    assert np.array_equal(pixels(torch.tensor(row), input_data_format="channels_last"), expected)
    square = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(
        pixels(square, input_data_format="channels_first"), pixels(Image.fromarray(np.moveaxis(square, 0, -1)))
    )


def test_batches_of_every_container_type_are_accepted():
    images = [random_image(seed=0), random_image(size=(20, 90), seed=1)]
    expected = processor()(images, return_tensors="pt")["pixel_values"]
    assert expected.shape == (2, 3, 32, 32)
    assert torch.equal(processor()(tuple(images), return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor()((p for p in images), return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor()(images[1], return_tensors="pt")["pixel_values"], expected[1:])
    batch = np.stack([np.asarray(images[0])] * 2)
    for four_d in (batch, torch.tensor(batch).permute(0, 3, 1, 2)):
        assert torch.equal(processor()(four_d, return_tensors="pt")["pixel_values"], expected[[0, 0]])
    assert len(processor()([images[0], np.asarray(images[0]), torch.zeros(1, 9, 9)])["pixel_values"]) == 3


@pytest.mark.parametrize("size", [(1, 1), (1, 2), (2, 1), (3, 500), (500, 3), (1, 5000), (5000, 1)])
def test_tiny_and_elongated_images_are_resized(size):
    assert pixels(random_image(size=size)).shape == (32, 32, 3)


def test_too_elongated_images_raise_before_allocation(monkeypatch):
    with pytest.raises(ValueError, match="so elongated that padding it .* makes 31999 x 40000 pixels.*crop it first"):
        pixels(Image.new("L", (1, 40000)))
    with pytest.raises(ValueError, match="so elongated that resizing .* makes 384 x 1920000"):
        PVLFImageProcessor(do_target_pad=False)(Image.new("L", (1, 5000)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # how Pillow's own limit is lifted
    assert pixels(Image.new("L", (1, 2000))).shape == (32, 32, 3)


# ---- files ----


def test_files_and_urls_are_read_upright(tmp_path):
    image = random_image(size=(60, 40))
    expected = pixels(image)
    image.save(tmp_path / "a.png")
    encoded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), f"data:image/png;base64,{encoded}"):
        assert np.array_equal(pixels(source), expected)

    exif = Image.Exif()
    exif[0x0112] = 6  # stored rotated
    image.rotate(90, expand=True).save(tmp_path / "b.png", exif=exif)
    assert np.array_equal(pixels(tmp_path / "b.png"), expected)
    with Image.open(tmp_path / "b.png") as opened:
        assert np.array_equal(pixels(opened), expected)


def test_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("L", (32, 32), value) for value in (10, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (pixels(tmp_path / "a.gif") == 10).all()


def test_unreadable_files_raise_with_their_path(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read image '.*missing\.png'.*No such file"):
        pixels(tmp_path / "missing.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=r"cannot read image '.*text\.png'.*cannot identify"):
        pixels([random_image(), str(tmp_path / "text.png")])
    stream = io.BytesIO()
    random_image(size=(90, 90)).save(stream, "JPEG")
    (tmp_path / "cut.jpg").write_bytes(stream.getvalue()[:2000])
    with Image.open(tmp_path / "cut.jpg") as opened:  # opened here, decoded only on use
        for image in (tmp_path / "cut.jpg", opened):
            with pytest.raises(ValueError, match=r"cannot read image '.*cut\.jpg'.*truncated"):
                pixels(image)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([], "images is empty"),
        (None, "NoneType: pass files, URLs, PIL images, arrays or tensors"),
        ([[Image.new("L", (2, 2))]], "images is nested: pass a flat batch"),
        (Image.new("RGB", (0, 4)), r"size \(0, 4\): it has no pixels"),
        (np.zeros((0, 4, 3), np.uint8), r"size \(0, 4, 3\): it has no pixels"),
        (Image.new("F", (4, 4)), "mode F has no fixed range"),
        (np.zeros((5, 5, 7), np.uint8), "with 1, 3 or 4 channels"),
        (np.zeros(5, np.uint8), "with 1, 3 or 4 channels"),
        (np.zeros((5, 5, 3), np.int64), "got int64; convert them to uint8"),
        (np.full((5, 5, 3), 255.0), r"must lie in \[0, 1\], got \[255.0, 255.0\]; divide"),
        (torch.full((3, 5, 5), torch.nan), r"must lie in \[0, 1\], got \[nan"),
    ],
)
def test_inputs_that_are_not_images_raise(image, message):
    with pytest.raises(ValueError, match=message):
        pixels(image)


def test_invalid_settings_raise():
    image = random_image()
    with pytest.raises(
        ValueError, match="crop_size 384 x 384 is larger than the resized image.*set size and crop_size"
    ):
        PVLFImageProcessor(size={"shortest_edge": 224})(image)
    with pytest.raises(ValueError, match="at least 1, got 0.8"):
        processor(ratio=0.8)(image)
    with pytest.raises(ValueError, match="crop_size needs height and width"):
        processor()(image, crop_size={"shortest_edge": 32})
    with pytest.raises(TypeError):
        processor()(image, target_ration=1.0)


def test_saving_and_loading_keeps_settings(tmp_path):
    saved = processor(48, ratio=1.0, image_mean=[0.5, 0.5, 0.5])
    saved.save_pretrained(tmp_path / "one")
    loaded = PVLFImageProcessor.from_pretrained(tmp_path / "one")
    assert loaded.to_dict() == saved.to_dict()
    image = random_image("RGBA")
    assert np.array_equal(loaded(image)["pixel_values"][0], saved(image)["pixel_values"][0])
    loaded.save_pretrained(tmp_path / "two")
    name = "preprocessor_config.json"
    assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()
