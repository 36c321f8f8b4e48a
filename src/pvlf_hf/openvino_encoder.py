"""The image encoder by OpenVINO: the fastest way on CPUs, for galleries and queries alike.

    model = encode_by_openvino(AutoModel.from_pretrained("you/mine"))
    Gallery.from_folder("photos/", model, processor)

Needs `pip install "pvlf-hf[openvino]"`; what it gains stands in `train_scripts/PERFORMANCE.md`.
"""

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from .modeling_pvlf import PVLFModel


class VisionTower(nn.Module):
    """From `(batch, 3, height, width)` to what the projection is applied to, `(batch, 1 + m, width)`."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See `last_hidden_state` of Transformers' towers."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state


def encode_by_openvino(model: PVLFModel) -> PVLFModel:
    """Hands what the image encoder computes to OpenVINO, in place, and makes the rest of the model bfloat16.

    Weights are rounded to bfloat16 and stay where they are: the model is saved as before, and what it embeds goes with
    embeddings of the same model in bfloat16 by PyTorch, of which it differs by rounding.

    Args:
        model: in any precision, on the CPU; from now on for inference alone.

    Returns:
        the same model.

    Raises:
        ImportError: if OpenVINO is not installed.
        ValueError: if the model is on an accelerator. Training it later raises as well.
    """
    if model.device.type != "cpu":
        raise ValueError(f"OpenVINO encodes on the CPU, and the model is on {model.device}: leave one of the two out")
    vision_model = model.bfloat16().eval().backbone.vision_model
    request = _compile(vision_model, model.config.vl_config.vision_config.image_size)

    def forward(pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        if vision_model.training:
            raise ValueError("OpenVINO computes no gradients: load the model again to train it")
        found = request(pixel_values.float().contiguous().numpy())[0]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(found).to(model.dtype))

    vision_model.forward = forward
    return model


def _compile(vision_model: nn.Module, image_size: int) -> Any:
    """What computes the tower for any number of pictures, in bfloat16 where the processor does."""
    try:
        from openvino import Core
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    except ImportError as error:
        raise ImportError(f'{error}: OpenVINO comes with `pip install "pvlf-hf[openvino]"`') from error
    tower = VisionTower(copy.deepcopy(vision_model).float())
    with warnings.catch_warnings(action="ignore"):  # tracing touches what is deprecated, and knows less than we do
        decoder = TorchScriptPythonDecoder(tower, example_input=torch.zeros(2, 3, image_size, image_size))
    # Not openvino.convert_model, which tells Intel of its use.
    frontend = FrontEndManager().load_by_framework("pytorch")
    converted = frontend.convert(frontend.load(decoder))
    converted.reshape([-1, 3, image_size, image_size])
    hints = {"INFERENCE_PRECISION_HINT": "bf16", "PERFORMANCE_HINT": "LATENCY"}
    return Core().compile_model(converted, "CPU", hints)


__all__ = ["encode_by_openvino"]
