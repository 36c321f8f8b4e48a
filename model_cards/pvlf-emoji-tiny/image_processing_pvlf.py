"""Image processor of PVLF: target pad, resize, centre crop, CLIP normalisation.

The steps and their order are TransAgg's ("Zero-shot Composed Text-Image Retrieval", BMVC 2023), which PVLF aligns its
preprocessing with; pixels equal its output exactly. What differs is how an image becomes RGB: TransAgg drops the
alpha channel, so that transparent areas turn up black or in hidden colours; here they turn up white, and palettes and
the EXIF orientation are applied before any other step.

Files and URLs may be hostile: what is opened is limited by `FORMATS`, `MAX_BYTES`, `MAX_SECONDS` and Pillow's own
`PIL.Image.MAX_IMAGE_PIXELS`. These limits are settings of the machine, which no checkpoint can change. The caller
decides which URLs may be fetched: a service must not pass on URLs from its users, which may point into its network.
"""

import io
import os
import stat
import urllib.request
from collections.abc import Callable, Iterable
from functools import partial
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs

from .image_formats_pvlf import JPEG_XL, RAW, ImageFormat, beginning, damage, jxl_size, make_ready, recognise, refusal

ImageInput = str | Path | Image.Image | np.ndarray | torch.Tensor
"""A file, an `http(s):` or `data:` URL, a PIL image, a (H, W[, C]) array or a (C, H, W) tensor."""

FORMATS: tuple[str, ...] | None = tuple("AVIF BMP GIF HEIF JPEG JPEG2000 JXL PNG PPM RAW TIFF WEBP".split())
"""Formats that are decoded where Pillow or a package beside it can (our choice); None allows all of Pillow's, EPS
included, which runs Ghostscript."""

MAX_BYTES: int = 2**28
"""Largest file or download in bytes (our choice): the size of `PIL.Image.MAX_IMAGE_PIXELS` pixels, uncompressed."""

MAX_SECONDS: float = 60
"""Longest download in seconds (our choice)."""


class PVLFImageProcessorKwargs(ImagesKwargs, total=False):
    """The library's arguments and `do_target_pad` (bool), `target_ratio` (float), see `PVLFImageProcessor`."""

    do_target_pad: bool | None
    target_ratio: float | None


class PVLFImageProcessor(PilBackend):
    """Turns images into `pixel_values`, float32 (batch, 3, crop height, crop width).

    Every argument can be set here or in a call. For CLIP backbones pass `size={"shortest_edge": 224}, crop_size=224`.

    Args:
        do_target_pad (`bool`, defaults to True): pad elongated images with black before resizing.
        target_ratio (`float`, defaults to 1.25): an image at least this elongated (longer side / shorter side) is
            padded on both sides of its shorter side until it has about this ratio; 1 pads every image to a square.
            Source: TransAgg's "targetpad", after CLIP4Cir.
        size (`dict`, defaults to `{"shortest_edge": 384}`): the shorter side after resizing, BLIP's 384 px.
        crop_size (`dict`, defaults to 384 x 384): the centre crop; not larger than the resized image.
        resample (defaults to PIL's bicubic), do_resize, do_center_crop, do_rescale, do_normalize, image_mean,
            image_std (default to CLIP's): as in the library's image processors.

    Images may be files, URLs, PIL images of any 8-bit or 16-bit gray mode (of several frames the current one, the
    first after opening), arrays and tensors: uint8, or float in [0, 1], which is rounded to 8 bit (so do not pass
    `do_rescale=False` for it).

    Raises:
        ValueError: in a call, if an image cannot be read (naming the file), is empty, has a dtype, shape or mode of
            no known range, is beyond the limits of this module, or would be padded or resized to more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels.

    Example:
        >>> processor = PVLFImageProcessor(size={"shortest_edge": 32}, crop_size=32)
        >>> processor(Image.new("RGB", (100, 40)), return_tensors="pt").pixel_values.shape
        torch.Size([1, 3, 32, 32])
    """

    valid_kwargs = PVLFImageProcessorKwargs
    model_input_names = ["pixel_values"]

    do_target_pad = True
    target_ratio = 1.25
    do_resize = True
    size = {"shortest_edge": 384}
    default_to_square = False
    resample = PILImageResampling.BICUBIC
    do_center_crop = True
    crop_size = {"height": 384, "width": 384}
    do_rescale = True
    do_normalize = True
    image_mean = OPENAI_CLIP_MEAN
    image_std = OPENAI_CLIP_STD

    def _prepare_images_structure(
        self, images: ImageInput | Iterable[ImageInput], expected_ndims: int = 3
    ) -> list[Any]:
        # Own version: the library's takes no gray (H, W) array, no `Path` and no `datasets` column.
        images = opened(images)
        if isinstance(images, np.ndarray | torch.Tensor) and images.ndim == expected_ndims + 1:
            return list(images)
        if isinstance(images, ImageInput) or not isinstance(images, Iterable):
            return [images]
        if not (images := list(images)):
            raise ValueError("images is empty: pass at least one image")
        if any(isinstance(image, list | tuple) for image in images):
            raise ValueError("images is nested: pass a flat batch of images")
        return images

    def process_image(  # type: ignore[override]  # takes files too, and every image becomes RGB
        self, image: ImageInput, input_data_format: str | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Read one image into an RGB array.

        Args:
            image: the image.
            input_data_format: "channels_first" or "channels_last", of an array or tensor; by default the usual layout
                of its type where the shape allows it, else the other.
            **kwargs: the library's other arguments, not used here.

        Returns:
            uint8 (3, H, W).

        Raises:
            ValueError: naming the image and what is wrong with it.
        """
        try:
            if isinstance(image, str | Path):
                image = open_rgb(image)
            elif isinstance(image, np.ndarray | torch.Tensor):
                image = to_rgb(array_to_image(image, input_data_format))
            elif isinstance(image, Image.Image):
                image = to_rgb(image)
            else:
                raise ValueError("pass files, URLs, PIL images, arrays or tensors")
        except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
            raise ValueError(f"cannot read {describe(image)}: {error}") from error
        return np.moveaxis(np.asarray(image), -1, 0)

    def target_pad(self, image: np.ndarray, ratio: float) -> np.ndarray:
        """Pad a (3, H, W) image with black to about the aspect ratio, if it is at least as elongated."""
        if ratio < 1:
            raise ValueError(f"target_ratio is longer / shorter side, so at least 1, got {ratio}")
        height, width = image.shape[1:]
        if max(height, width) / min(height, width) < ratio:
            return image
        shorter = max(height, width) / ratio
        # Truncated like the reference, so that the padded side may be up to two pixels short of the ratio.
        top, left = (max(int((shorter - side) / 2), 0) for side in (height, width))
        check_area(height + 2 * top, width + 2 * left, "padding it to target_ratio (do_target_pad=False avoids that)")
        return np.pad(image, ((0, 0), (top, top), (left, left)))

    def resize(self, image: np.ndarray, size: SizeDict, *args: Any, **kwargs: Any) -> np.ndarray:
        """Resize a (3, H, W) uint8 image as the library does, unless the result would not fit in memory."""
        if size.shortest_edge:
            height, width = image.shape[1:]
            scale = size.shortest_edge / min(height, width)
            check_area(round(height * scale), round(width * scale), "resizing its shorter side")
        return super().resize(image, size, *args, **kwargs)

    def center_crop(  # type: ignore[override]  # as the library's PilBackend does
        self, image: np.ndarray, size: SizeDict, **kwargs: Any
    ) -> np.ndarray:
        """Crop the centre of a (3, H, W) image; an odd margin is halved to even, as torchvision does."""
        height, width = image.shape[1:]
        if not (size.height and size.width):
            raise ValueError(f"crop_size needs height and width, got {dict(size)}")
        if size.height > height or size.width > width:
            raise ValueError(
                f"crop_size {size.height} x {size.width} is larger than the resized image, {height} x {width}; "
                "set size and crop_size together, e.g. size={'shortest_edge': 224}, crop_size=224"
            )
        top, left = round((height - size.height) / 2), round((width - size.width) / 2)
        return image[:, top : top + size.height, left : left + size.width]

    def _preprocess(  # type: ignore[override]  # names what this class adds and passes the rest on
        self, images: list[np.ndarray], do_target_pad: bool, target_ratio: float, **kwargs: Any
    ) -> BatchFeature:
        if do_target_pad:
            images = [self.target_pad(image, target_ratio) for image in images]
        return super()._preprocess(images, **kwargs)


def open_rgb(source: str | Path | bytes) -> Image.Image:
    """Open a file, a URL or the content of a file as an RGB image; of several frames the first."""
    with open_image(source) as image:
        return to_rgb(image)


def open_image(source: str | Path | bytes) -> Image.Image:
    """Open an image within the limits of this module, without decoding it (except camera raw, which is decoded).

    Args:
        source: a file, an `http(s):` or `data:` URL, or the content of a file.

    Raises:
        OSError: if the file does not exist, or it is in none of `FORMATS`; says what decodes it, if anything does.
        ValueError: if it is no regular file or too large. Pillow's decoders raise many other kinds.
    """
    stream: Any = source
    if isinstance(source, bytes):
        stream = io.BytesIO(source)
    elif str(source).startswith(("http://", "https://", "data:")):
        stream = io.BytesIO(download(str(source)))
    else:
        check_file(source)
    kind = recognise(stream)
    if kind is RAW:
        return open_raw(beginning(stream, MAX_BYTES))
    make_ready(kind)
    if kind is JPEG_XL:
        check_pixels(*jxl_size(beginning(stream, MAX_BYTES)))
    formats = None if FORMATS is None else [name for name in FORMATS if name in Image.OPEN]  # AVIF is not in all
    try:
        image = Image.open(stream, formats=formats)
    except (UnidentifiedImageError, RuntimeError) as error:  # the latter of JPEG XL, which is decoded on opening
        known = kind and (damage(kind) if decodes(kind) else refusal(kind))
        why = known or "it is not an image, or it is damaged"
        raise UnidentifiedImageError(f"cannot identify image file: {why}") from error
    check_pixels(*image.size)
    if image.format == "JXL" and not getattr(image, "jpeg", False):
        image.getexif().pop(ExifTags.Base.Orientation, None)  # it was applied, except to what had been a JPEG
    return image


def open_raw(content: bytes) -> Image.Image:
    """Decode a camera raw file by LibRaw: upright, with the camera's white balance and the date of EXIF.

    LibRaw gets the content, not the path: it would read files beside it too. Colours between the sensor's pixels are
    interpolated linearly (our choice): the slower ways differ in details that no model of 224 to 384 px sees.

    Raises:
        OSError: if `FORMATS` or the installed packages do not allow it, or LibRaw cannot.
        ValueError: if it has too many pixels.
    """
    if not decodes(RAW):
        raise UnidentifiedImageError(f"cannot identify image file: {refusal(RAW)}")
    rawpy = import_module("rawpy")
    try:
        with rawpy.imread(io.BytesIO(content)) as raw:
            stretch = max(raw.sizes.pixel_aspect, 1 / raw.sizes.pixel_aspect)
            check_pixels(raw.sizes.raw_width, round(raw.sizes.raw_height * stretch))
            linear = rawpy.DemosaicAlgorithm.LINEAR
            image = Image.fromarray(raw.postprocess(demosaic_algorithm=linear, use_camera_wb=True))
            taken = raw.other.timestamp
    except rawpy.LibRawError as error:
        why = f"LibRaw does not decode it ({os.fsdecode(error.args[0])}): convert it to JPEG or PNG"
        raise UnidentifiedImageError(f"cannot identify image file: {why}") from error
    if taken.timestamp() > 0:  # 0 where the file does not say
        image.getexif()[ExifTags.Base.DateTime] = taken.strftime("%Y:%m:%d %H:%M:%S")
    return image


def decodes(kind: ImageFormat) -> bool:
    """Return whether images of a format are decoded here: `FORMATS` allows it, and the decoder is installed."""
    return make_ready(kind) and (FORMATS is None or kind.pillow in FORMATS)


def opened(data: Any) -> Any:
    """Let [`decode_cell`] open the images of a data set, a stream or a column, instead of `datasets`.

    `datasets` decodes image columns with every format that Pillow knows. The rows returned here are the same as its
    own, also for a transform of the data set. Columns that are not decoded, and anything but a data set, are returned
    unchanged.

    Raises:
        ValueError: if a column holds images inside lists or structures.
    """
    # Recognised by attributes: files that are saved with checkpoints do not import `datasets`.
    if hasattr(data, "column_name") and hasattr(data, "source"):  # a Column
        return opened(data.source)[data.column_name]
    if not hasattr(data, "cast_column") or not getattr(data, "features", None):
        return data
    columns = {name: feature for name, feature in data.features.items() if _decodes(feature)}
    if not columns:
        return data
    if nested := [name for name, feature in columns.items() if type(feature).__name__ != "Image"]:
        raise ValueError(f"columns {nested} hold images inside lists: leave them out with dataset.remove_columns")
    modes = {name: feature.mode for name, feature in columns.items()}
    for name, feature in columns.items():
        data = data.cast_column(name, type(feature)(mode=feature.mode, decode=False))
    if not hasattr(data, "with_transform"):  # a stream
        return data.map(partial(_open_row, modes=modes))
    own = data.format["format_kwargs"].get("transform")
    transform = partial(_open_batch, modes=modes, then=own)
    return data.with_transform(transform, data.format["columns"], data.format["output_all_columns"])


def _decodes(feature: Any) -> bool:
    """Return whether `datasets` would decode an image of a column, or of lists and structures in it."""
    if isinstance(feature, dict):
        return any(map(_decodes, feature.values()))
    if type(feature).__name__ == "Image":
        return feature.decode
    return _decodes(feature.feature) if hasattr(feature, "feature") else False


def _open_row(row: dict[str, Any], modes: dict[str, str | None]) -> dict[str, Any]:
    return {**row, **{name: decode_cell(row[name], mode) for name, mode in modes.items() if name in row}}


def _open_batch(
    batch: dict[str, list[Any]], modes: dict[str, str | None], then: Callable[[dict[str, list[Any]]], Any] | None
) -> Any:
    columns = {name: [decode_cell(cell, modes[name]) for cell in batch[name]] for name in modes if name in batch}
    return (then or dict)({**batch, **columns})


def decode_cell(cell: dict[str, Any] | None, mode: str | None) -> Image.Image | None:
    """Open an undecoded cell of an image column as `datasets` decodes it: upright by EXIF, in the column's mode.

    Args:
        cell: `bytes`, the content of a file, or else its `path`, which may be a URL of any kind that `fsspec` knows.
        mode: Pillow mode of the column; None keeps that of each image.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    if cell is None:
        return None
    content, path = cell["bytes"], cell["path"]
    try:
        if content is None and "://" in path and not path.startswith(("http://", "https://")):
            with fsspec.open(path, "rb") as stream:
                content = stream.read(MAX_BYTES + 1)
            check_bytes(len(content))
        image = open_image(path if content is None else content)
        image.load()  # closes the file: a batch would hold too many open
        ImageOps.exif_transpose(image, in_place=True)  # a copy would lose the file name
        return image.convert(mode) if mode and mode != image.mode else image
    except Exception as error:  # Pillow's decoders raise anything from OSError to struct.error on damaged files
        raise ValueError(f"cannot read {describe(path or '')}: {error}") from error


def check_file(file: str | Path) -> None:
    """Raise a `ValueError` for a file that is too large or not a regular one: reading a pipe may never end."""
    status = Path(file).stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("it is not a regular file, but a folder, a pipe or a device")
    check_bytes(status.st_size)


def check_bytes(size: int) -> None:
    """Raise a `ValueError` for more than `MAX_BYTES`."""
    if size > MAX_BYTES:
        raise ValueError(f"it has more bytes than {__name__}.MAX_BYTES = {MAX_BYTES}: make it smaller, or raise that")


def check_pixels(width: int, height: int) -> None:
    """Raise a `ValueError` for more pixels than Pillow's limit; Pillow itself only warns, up to its double."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and width * height > limit:
        raise ValueError(
            f"it has {width} x {height} pixels, more than PIL.Image.MAX_IMAGE_PIXELS = {limit}: make "
            "it smaller, or raise that"
        )


def download(url: str) -> bytes:
    """Fetch a URL, at most `MAX_BYTES` in at most about `MAX_SECONDS`."""
    request = urllib.request.Request(url, headers={"User-Agent": "pvlf-hf"})
    content, end = bytearray(), monotonic() + MAX_SECONDS
    with urllib.request.urlopen(request, timeout=MAX_SECONDS) as response:
        while part := response.read1(2**16):
            content += part
            check_bytes(len(content))
            if monotonic() > end:
                raise ValueError(f"the download did not finish within {__name__}.MAX_SECONDS = {MAX_SECONDS}")
    return bytes(content)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image, turn it upright by EXIF, composite transparent areas on white and convert it to RGB."""
    if FORMATS is not None and image.format == "EPS" and getattr(image, "tile", None):  # opened by the caller
        raise ValueError("it is PostScript, which Pillow would hand to Ghostscript: load() it first if you trust it")
    if 0 in image.size:
        raise ValueError("it has no pixels")
    check_pixels(*image.size)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; convert it to 8 bit (mode L)")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def array_to_image(array: np.ndarray | torch.Tensor, input_data_format: str | None) -> Image.Image:
    """Make a PIL image of a gray, RGB or RGBA array: uint8, or float in [0, 1]."""
    if input_data_format is not None:
        channel_axes: tuple[int, ...] = (0,) if input_data_format == "channels_first" else (-1,)
    else:
        channel_axes = (0, -1) if isinstance(array, torch.Tensor) else (-1, 0)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # numpy knows no bfloat16
    if array.ndim != 2:
        axis = next((axis for axis in channel_axes if array.ndim == 3 and array.shape[axis] in (1, 3, 4)), None)
        if axis is None:
            raise ValueError("arrays must be (H, W), (H, W, C) or (C, H, W) with 1, 3 or 4 channels")
        array = np.moveaxis(array, axis, -1)
        array = array[..., 0] if array.shape[-1] == 1 else array
    if np.issubdtype(array.dtype, np.floating) and array.size:
        if not (array.min() >= 0 and array.max() <= 1):
            raise ValueError(
                f"float values must lie in [0, 1], got [{array.min()}, {array.max()}]; divide them by 255"
            )
        array = np.rint(array * 255).astype(np.uint8)
    if array.dtype != np.uint8:
        raise ValueError(f"values must be uint8, or float in [0, 1], got {array.dtype}; convert them to uint8")
    return Image.fromarray(np.ascontiguousarray(array))


def describe(image: Any) -> str:
    """Describe an image for an error message: its file or URL where known, else its type and size."""
    if source := str(image if isinstance(image, str | Path) else getattr(image, "filename", "")):
        return f"image {source[:200]!r}"
    size = getattr(image, "shape", getattr(image, "size", None))
    return f"image of type {type(image).__name__}" + (f" and size {tuple(size)}" if size is not None else "")


def check_area(height: int, width: int, step: str) -> None:
    """Raise a `ValueError` if a step would enlarge a very elongated image beyond Pillow's own limit."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit and height * width > limit:
        raise ValueError(
            f"an image is so elongated that {step} makes {width} x {height} pixels, more than "
            f"PIL.Image.MAX_IMAGE_PIXELS = {limit}; crop it first"
        )


PVLFImageProcessor.register_for_auto_class("AutoImageProcessor")

__all__ = ["PVLFImageProcessor", "PVLFImageProcessorKwargs"]
