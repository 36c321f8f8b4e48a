"""Exports query and gallery tower as `torch.export` programs and as ONNX, checked against their model.

    python -m pvlf_hf.export --model you/mine --output_dir exported/

The folder then needs neither torch nor this package: `onnx_encoder.py` in it runs with onnxruntime.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import AutoModel, AutoProcessor

from . import onnx_encoder
from .models.configuration_pvlf import BACKBONES
from .models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor, check_adapter
from .onnx_encoder import OnnxEncoder

TOLERANCE = 1e-5
"""Largest difference of an embedding's entries from the model's (our choice). The same float32 operations in another
order differ by 4e-7 on the tests' models and 3e-7 at the size of BLIP base; attending to padding, by 0.2."""

AXES: dict[str, dict[str, dict[int, str]]] = {
    "query": {
        "pixel_values": {0: "batch"},
        "input_ids": {0: "batch", 1: "length"},
        "attention_mask": {0: "batch", 1: "length"},
    },
    "gallery": {"pixel_values": {0: "batch"}},
}
"""Inputs of each tower, with their axes of variable length."""

OUTPUT = {"query": "query_embeds", "gallery": "image_embeds"}

CAPTIONS = ("red", "the same but with longer sleeves and in a darker colour", "more of them")


class QueryTower(nn.Module):
    """Query tower: `(batch, 3, H, W)` and twice int64 `(batch, length)` to float32 `(batch, d)`."""

    def __init__(self, model: ComposedRetrievalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embed queries."""
        query: Any = self.model.get_query_features(pixel_values, input_ids, attention_mask)
        return query.pooler_output


class GalleryTower(nn.Module):
    """Gallery tower: `(batch, 3, H, W)` to float32 `(batch, d)`."""

    def __init__(self, model: ComposedRetrievalModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embed gallery images."""
        images: Any = self.model.get_image_features(pixel_values)
        return images.pooler_output


def export_program(model: ComposedRetrievalModel, tower: str) -> ExportedProgram:
    """Export one tower for any number of inputs and any length of captions.

    Args:
        model: in eval mode.
        tower: `"query"` or `"gallery"`; its program takes by name what `AXES` lists, as the processor returns it.

    Returns:
        the program, which `torch.export.save(program, "query.pt2")` keeps.

    Raises:
        ValueError: for another tower, a model in train mode, or an adapter that is prompt learning.
    """
    if tower not in AXES:
        raise ValueError(f"tower={tower!r}: choose one of {sorted(AXES)}")
    check_adapter(model)
    if model.training:
        raise ValueError("the model is in train mode, where dropout is on: call model.eval() first")
    if tower == "query" and model.combine is not None:
        raise ValueError(
            "the query tower gives embeddings that are compared by cosine, and this model's composition scores by two "
            "similarities: export it with composition='slerp' or 'sum'"
        )
    config = model.encoder_config
    if config.model_type not in BACKBONES:
        raise ValueError(f"{type(model).__name__} is not exported: only models on one of {[*BACKBONES]} are")
    size = config.vision_config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    spec = BACKBONES[config.model_type]
    longest = getattr(model.config, "text_positions", config.text_config.max_position_embeddings)
    fixed = min(spec.text_length, longest) if spec.padding == "max_length" else None  # the only length it takes
    tokens = torch.ones(2, fixed or 8, dtype=torch.int64, device=model.device)
    example = {
        "pixel_values": torch.zeros(2, 3, height, width, device=model.device),
        "input_ids": tokens,
        "attention_mask": tokens.clone(),
    }
    # A caption has a word between its two special tokens: what inserts tokens behind the first relies on that.
    dims = {"batch": Dim("batch"), "length": fixed or Dim("length", min=3, max=longest)}
    shapes = {name: {axis: dims[dim] for axis, dim in axes.items()} for name, axes in AXES[tower].items()}
    module = (QueryTower if tower == "query" else GalleryTower)(model).eval()
    return torch.export.export(module, (), {name: example[name] for name in shapes}, dynamic_shapes=shapes)


def export_onnx(
    model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor, folder: str | Path
) -> dict[str, float]:
    """Write `query.onnx`, `gallery.onnx`, the processor and `onnx_encoder.py`, and check their embeddings.

    The check embeds images and captions with [`OnnxEncoder`], preprocessing included, and with the model.

    Args:
        model: in float32 and eval mode.
        processor: its processor.
        folder: made where it does not exist.

    Returns:
        for each tower the largest difference of its embeddings' entries from the model's.

    Raises:
        ValueError: for a model in another precision or train mode, and as [`check_parity`].
    """
    if model.dtype != torch.float32:
        raise ValueError(
            f"the model is in {model.dtype}, for which ONNX Runtime lacks operations: export model.float(), or load "
            "it with dtype=torch.float32"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for tower, axes in AXES.items():
        program, file = export_program(model, tower), folder / f"{tower}.onnx"
        names: dict[str, Any] = {"output_names": [OUTPUT[tower]], "dynamic_shapes": axes}
        torch.onnx.export(program, (), file, dynamo=True, verbose=False, **names)
    processor.save_pretrained(folder)
    shutil.copy(onnx_encoder.__file__, folder)
    return check_parity(model, processor, folder)


@torch.no_grad()
def check_parity(
    model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor, folder: str | Path
) -> dict[str, float]:
    """Compare embeddings of an exported folder with the model's: three images of noise, captions of three lengths.

    Args:
        model: in eval mode.
        processor: its processor.
        folder: of [`export_onnx`].

    Returns:
        for each tower the largest difference of its embeddings' entries from the model's.

    Raises:
        ValueError: if one exceeds `TOLERANCE`.
    """
    encoder, generator = OnnxEncoder(folder), np.random.default_rng(0)
    sizes = ((300, 200), (240, 240), (200, 500))  # upright, square and wide
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    targets = processor.process_targets(images).to(model.device)
    queries = processor.process_queries(images, CAPTIONS).to(model.device)
    pairs: dict[str, Any] = {
        "query": (encoder.embed_queries(images, CAPTIONS), model.get_query_features(**queries).pooler_output),
        "gallery": (encoder.embed_images(images), model.get_image_features(**targets).pooler_output),
    }
    differences = {
        tower: float(np.abs(exported - expected.cpu().numpy()).max()) for tower, (exported, expected) in pairs.items()
    }
    for tower, difference in differences.items():
        if not difference <= TOLERANCE:
            raise ValueError(
                f"{Path(folder) / tower}.onnx differs from the model by {difference:.1e}, more than {TOLERANCE:.0e}: "
                "export it again from this model, or do not use it"
            )
    return differences


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m pvlf_hf.export", description=str(__doc__).split("\n\n")[0])
    parser.add_argument("--model", required=True, help="folder or Hub name of the model")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(arguments)
    model = AutoModel.from_pretrained(args.model, dtype=torch.float32)
    differences = export_onnx(model, AutoProcessor.from_pretrained(args.model), args.output_dir)
    for tower, difference in differences.items():
        sys.stdout.write(f"{args.output_dir / tower}.onnx: differs from the model by {difference:.1e}\n")


__all__ = ["TOLERANCE", "GalleryTower", "QueryTower", "check_parity", "export_onnx", "export_program"]

if __name__ == "__main__":
    main()
