"""Quantises the image encoder to int8 by NNCF, calibrated on images and checked on others, for OpenVINO to compute.

Post-training quantisation after Xiao et al., SmoothQuant (ICML 2023), as NNCF does it for Transformers: weights and
inputs of matrix products become int8, by scales that are taken from the images of the calibration. So an encoder is
made for images like these, and another calibration is another encoder: it is kept in a file, and embeddings by it have
a fingerprint of their own ([`int8_made_by`]). Queries are embedded by the model as it is.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from ..atomic_files import whole
from ..digests import sequence_digest
from ..models.interface_pvlf import ComposedRetrievalModel
from .model_views import eval_view
from .openvino_encoder import (
    checked_encoder,
    compile_graph,
    convert_encoder,
    import_quietly,
    openvino_core,
    run_instead,
)
from .similarity import top_k

NEIGHBOURS = 5
"""Nearest images that the check compares (our choice)."""

LEAST_MEDIAN, LEAST_COSINE, LEAST_KEPT = 0.99, 0.9, 0.9
"""Median and lowest cosine with the unquantised embeddings, and share of the nearest images kept, below which a
calibration is refused (our choice)."""

T = TypeVar("T")


class Int8Quality(NamedTuple):
    """Measurements of a calibration, on images that it had not seen."""

    lowest: float
    """Lowest cosine of an image's embedding with the unquantised one."""
    median: float
    """Median of these cosines."""
    kept: float
    """Share of the `NEIGHBOURS` nearest images of each image, by unquantised queries, that stay among the nearest."""

    @property
    def is_enough(self) -> bool:
        """Whether it is what is tolerated, or better."""
        return self.median >= LEAST_MEDIAN and self.lowest >= LEAST_COSINE and self.kept >= LEAST_KEPT

    def check(self) -> None:
        """Raise a `ValueError` if it is below what is tolerated."""
        if self.is_enough:
            return
        raise ValueError(
            f"int8 changes the embeddings of these images too much: cosine {self.lowest:.4f} at the lowest and "
            f"{self.median:.4f} in the median with the unquantised ones, {self.kept:.1%} of the {NEIGHBOURS} nearest "
            f"images kept; at least {LEAST_COSINE}, {LEAST_MEDIAN} and {LEAST_KEPT:.0%} are needed. Use --openvino "
            "without int8, and with --dtype bfloat16 if the processor computes in it"
        )


@dataclass
class Int8Encoder:
    """Image encoder in int8, as OpenVINO's two files: its graph in XML and its weights.

    Attributes:
        graph, weights: content of the files.
        base: fingerprint of the unquantised image side and preprocessing ([`images_made_by`]).
        quality: what the check measured.
    """

    graph: bytes
    weights: bytes
    base: str
    quality: Int8Quality

    @property
    def digest(self) -> str:
        """Digest of graph and weights."""
        return sequence_digest(self.graph, self.weights)

    def save(self, file: Path) -> None:
        """Write the encoder to one file."""
        tensors = {name: _as_tensor(content) for name, content in (("graph", self.graph), ("weights", self.weights))}
        facts = {"base": self.base} | {name: repr(value) for name, value in self.quality._asdict().items()}
        with whole(file) as partial:
            save_file(tensors, partial, facts)

    @classmethod
    def load(cls, file: Path) -> "Int8Encoder":
        """Read what [`~Int8Encoder.save`] wrote.

        Raises:
            ValueError: if the file is damaged.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                facts = opened.metadata()
                graph, weights = (opened.get_tensor(name).numpy().tobytes() for name in ("graph", "weights"))
                quality = Int8Quality(*(float(facts[name]) for name in Int8Quality._fields))
                return cls(graph, weights, facts["base"], quality)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{file} is damaged ({error}): restore it, or index into another folder") from error

    def encoder_of(self, model: ComposedRetrievalModel) -> Callable[[Tensor], Tensor]:
        """Return a function from pixel values `(batch, 3, height, width)` to L2-normalised float32 `(batch, d)`.

        Args:
            model: the model that was quantised, in float32; its projection is applied. It stays as it is.
        """
        view = eval_view(model)
        graph = openvino_core().read_model(self.graph, self.weights)
        run_instead(checked_encoder(view), compile_graph(graph, "bf16"), view.dtype)
        return lambda pixel_values: view(target_pixel_values=pixel_values).target_embeds


def int8_made_by(unquantised: dict[str, str], digest: str) -> dict[str, str]:
    """Return the provenance of embeddings by an encoder in int8, from that of the unquantised model and its digest."""
    fingerprint = sequence_digest(unquantised["fingerprint"], "int8", digest)
    return {**unquantised, "fingerprint": fingerprint, "dtype": "int8", "int8": digest}


@torch.inference_mode()
def calibrate(
    model: ComposedRetrievalModel,
    base: str,
    images: Sequence[T],
    held_out: Sequence[T],
    prepare: Callable[[T], Tensor],
    progress: bool = True,
) -> Int8Encoder:
    """Quantise a model's image encoder, and check it.

    Args:
        model: on the CPU, in float32; it stays as it is.
        base: fingerprint of its image side and preprocessing.
        images: what to calibrate on, each prepared twice, and twice again if the first result is not good enough.
        held_out: other images, for the check; more than `NEIGHBOURS`.
        prepare: returns the pixel values `(1, 3, height, width)` of an image.
        progress: show a progress bar.

    Raises:
        ImportError: if OpenVINO or NNCF is not installed.
        ValueError: if the model is on an accelerator, not in float32, or no dual encoder; its gallery images pass the
            encoder with prompts; or the check refuses what was made.
    """
    view = eval_view(model)
    vision_model = checked_encoder(view)
    if view.dtype != torch.float32:
        raise ValueError(f"int8 is made from float32 weights, and the model is in {view.dtype}: load it in float32")
    if getattr(view, "gallery_prompts", None) is not None:
        raise ValueError("gallery images pass this model's encoder with prompts, which int8 leaves out: leave it out")
    graph = convert_encoder(vision_model, view.encoder_config.vision_config.image_size)
    with tqdm(
        total=2 * (len(images) + len(held_out)), desc="calibrating int8", unit="image", disable=not progress
    ) as bar:

        def show(image: T) -> Tensor:
            bar.update()
            return prepare(image)

        exact = torch.cat([view(target_pixel_values=show(image)).target_embeds for image in held_out]).float()
        # Sums of int8 products overflow on processors without VNNI, unless weights have half the range.
        for half_range in (False, True):
            made = Int8Encoder(*_quantise(graph, images, show, half_range), base, Int8Quality(0, 0, 0))
            encode = made.encoder_of(model)
            made.quality = int8_quality(exact, torch.cat([encode(show(image)) for image in held_out]).float())
            if made.quality.is_enough:
                break
            bar.total += len(images) + len(held_out)
        bar.update(bar.total - bar.n)  # NNCF may take an image more or less often
    made.quality.check()
    return made


def int8_quality(exact: Tensor, quantised: Tensor) -> Int8Quality:
    """Compare embeddings of the same images, float32 `(images, d)` each: exact ones are the queries."""
    cosines, rows = F.cosine_similarity(exact, quantised), torch.arange(len(exact))
    (_, before), (_, after) = (top_k(exact, gallery, NEIGHBOURS, rows) for gallery in (exact, quantised))
    kept = (before[:, :, None] == after[:, None, :]).any(dim=2).float().mean()
    return Int8Quality(cosines.min().item(), cosines.median().item(), kept.item())


def _quantise(
    graph: Any, images: Sequence[T], prepare: Callable[[T], Tensor], half_range: bool
) -> tuple[bytes, bytes]:
    """Quantise a graph, weights to eight bits or to seven, and return the two files of the result."""
    nncf = import_quietly("nncf")
    data, kind = nncf.Dataset(images, lambda image: prepare(image).numpy()), nncf.ModelType.TRANSFORMER
    with _silent(logging.getLogger("nncf")), TemporaryDirectory() as folder:
        fix = nncf.OverflowFix.ENABLE if half_range else None
        options = nncf.AdvancedQuantizationParameters(overflow_fix=fix)
        made = nncf.quantize(graph, data, model_type=kind, subset_size=len(images), advanced_parameters=options)
        files = Path(folder, "encoder.xml"), Path(folder, "encoder.bin")
        import_quietly("openvino").serialize(made, *files)
        return files[0].read_bytes(), files[1].read_bytes()


@contextmanager
def _silent(logger: logging.Logger) -> Iterator[None]:
    """Keep NNCF's log and progress bars from stdout within the block."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


__all__ = ["Int8Encoder", "Int8Quality", "calibrate", "int8_made_by", "int8_quality"]
