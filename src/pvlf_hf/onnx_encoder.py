"""Query and gallery embeddings from exported towers: numpy, Pillow, tokenizers and onnxruntime, no torch.

`pvlf_hf.export` puts this file beside `query.onnx` and `gallery.onnx`; it runs there by itself:

    pip install numpy pillow tokenizers onnxruntime
    python onnx_encoder.py dress.jpg "the same but sleeveless" photos/*.jpg

or from Python, with a gallery that is embedded once:

    from onnx_encoder import OnnxEncoder

    encoder = OnnxEncoder("exported/")
    gallery = encoder.embed_images(paths)  # (n, d)
    query = encoder.embed_queries(["dress.jpg"], ["the same but sleeveless"])  # (1, d)
    best = (query @ gallery.T)[0].argsort()[::-1][:10]  # embeddings are unit vectors: this is the cosine
"""

import json
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from tokenizers import Tokenizer

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "JXL", "PNG", "PPM", "RAW", "TIFF", "WEBP")
"""Formats that are decoded, those of `PVLFImageProcessor`; Pillow would run Ghostscript for EPS."""

BATCH = 32
"""Gallery images embedded at once (our choice)."""

ImageInput = str | Path | Image.Image


class OnnxEncoder:
    """The two towers of an exported PVLF model with their preprocessing.

    Args:
        folder: folder that `pvlf_hf.export` wrote.
        providers: execution providers of onnxruntime, e.g. `["CUDAExecutionProvider"]`.

    Raises:
        ValueError: if the processor prepares images in a way that this file does not implement.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        folder = Path(folder)
        self.query, self.gallery = (
            onnxruntime.InferenceSession(folder / f"{tower}.onnx", providers=list(providers))
            for tower in ("query", "gallery")
        )
        processor = json.loads((folder / "processor_config.json").read_text())
        self.images = processor["image_processor"]
        steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
        if set(self.images["size"]) != {"shortest_edge"} or not all(self.images[step] for step in steps):
            raise ValueError(
                f"{folder / 'processor_config.json'}: this file resizes by the shortest edge, crops, rescales and "
                "normalises; export with a processor that does the same"
            )
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        pad = json.loads((folder / "tokenizer_config.json").read_text())["pad_token"]
        length = processor["max_text_length"]
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(
            pad_id=self.tokenizer.token_to_id(pad),
            pad_token=pad,
            length=length if processor["padding"] == "max_length" else None,
        )

    def embed_images(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Embed gallery images: float32 `(images, d)`, unit vectors."""
        batches = (images[start : start + BATCH] for start in range(0, len(images), BATCH))
        return np.concatenate([self.gallery.run(None, {"pixel_values": self.pixel_values(b)})[0] for b in batches])

    def embed_queries(self, images: Sequence[ImageInput], captions: Sequence[str]) -> np.ndarray:
        """Embed queries, each a reference image with its caption: float32 `(queries, d)`, unit vectors."""
        if len(images) != len(captions) or not all(caption.strip() for caption in captions):
            raise ValueError(
                f"{len(images)} images and {len(captions)} captions: a query is one of each, and no caption is empty"
            )
        tokens = self.tokenizer.encode_batch(list(captions))
        if cut := [row for row, encoding in enumerate(tokens) if encoding.overflowing]:
            warnings.warn(f"captions {cut[:5]} are too long: what their ends say has no effect", stacklevel=2)
        inputs = {
            "pixel_values": self.pixel_values(images),
            "input_ids": np.array([t.ids for t in tokens], dtype=np.int64),
            "attention_mask": np.array([t.attention_mask for t in tokens], dtype=np.int64),
        }
        return self.query.run(None, inputs)[0]

    def pixel_values(self, images: Sequence[ImageInput]) -> np.ndarray:
        """Prepare images as `PVLFImageProcessor` does (pad, resize, crop, normalise): float32 `(images, 3, H, W)`."""
        pixels = np.stack([self._crop(to_rgb(image)) for image in images]).astype(np.float64)
        pixels = (pixels * self.images["rescale_factor"]).astype(np.float32)
        mean, std = (np.array(self.images[name], dtype=np.float32) for name in ("image_mean", "image_std"))
        return np.ascontiguousarray(((pixels - mean) / std).transpose(0, 3, 1, 2))

    def _crop(self, image: Image.Image) -> np.ndarray:
        """Pad, resize and crop an image: uint8 `(H, W, 3)`."""
        ratio, (long, short) = self.images["target_ratio"], (max(image.size), min(image.size))
        if self.images["do_target_pad"] and long / short >= ratio:
            left, top = (max(int((long / ratio - side) / 2), 0) for side in image.size)
            image = ImageOps.expand(image, (left, top))
        long, short = max(image.size), min(image.size)
        edge = self.images["size"]["shortest_edge"]
        size = [edge if side == short else int(edge * long / short) for side in image.size]
        image = image.resize(size, self.images["resample"])
        height, width = self.images["crop_size"]["height"], self.images["crop_size"]["width"]
        top, left = round((image.height - height) / 2), round((image.width - width) / 2)
        return np.asarray(image)[top : top + height, left : left + width]


def to_rgb(image: ImageInput) -> Image.Image:
    """Open an image upright and in RGB, transparent areas white, as `PVLFImageProcessor` does."""
    if not isinstance(image, Image.Image):
        Image.init()
        with suppress(ImportError):
            import_module("pillow_heif.HeifImagePlugin")  # HEIC, where it is installed
        image = Image.open(
            image, formats=[name for name in FORMATS if name in Image.OPEN]
        )  # AVIF is not in all, RAW in none
    if isinstance(image, TiffImageFile) and 271 in image.tag_v2 and image.tag_v2.get(254, 0) & 1:  # of a camera
        raise ValueError("it is a camera raw image, which is not decoded: convert it to JPEG or PNG")
    if image.format == "EPS" and getattr(image, "tile", None):  # opened by the caller
        raise ValueError("it is PostScript, which Pillow would hand to Ghostscript: load() it first if you trust it")
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no fixed range; convert it to 8 bit (mode L)")
    if image.mode.startswith("I;16"):  # Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def main() -> None:
    """Run the command line: a reference image, a caption, and the gallery images."""
    if len(sys.argv) < 4:
        raise SystemExit(f"usage: python {Path(__file__).name} IMAGE CAPTION GALLERY_IMAGE ...")
    image, caption, *paths = sys.argv[1:]
    encoder = OnnxEncoder(Path(__file__).parent)
    scores = (encoder.embed_queries([image], [caption]) @ encoder.embed_images(paths).T)[0]
    for index in np.argsort(-scores, kind="stable")[:10]:
        sys.stdout.write(f"{scores[index]:.4f} {paths[index]}\n")


__all__ = ["OnnxEncoder"]

if __name__ == "__main__":
    main()
