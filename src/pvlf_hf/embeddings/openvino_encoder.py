"""The image encoder by OpenVINO: the fastest way on CPUs, for galleries and queries alike.

    model = encode_by_openvino(AutoModel.from_pretrained("you/mine", dtype="bfloat16"))
    Gallery.from_folder("photos/", model, processor)

Needs `pip install "pvlf-hf[openvino]"`; what it gains stands in `train_scripts/PERFORMANCE.md`.
"""

import copy
import warnings
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..models.modeling_pvlf import PVLFModel

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""OpenVINO's names of them."""


class VisionTower(nn.Module):
    """From `(batch, 3, height, width)` to what the projection is applied to, `(batch, 1 + m, width)`."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """See `last_hidden_state` of Transformers' towers."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state


def encode_by_openvino(model: PVLFModel) -> PVLFModel:
    """Hands what the image encoder computes to OpenVINO, in place.

    Weights stay as they are: the model is saved as before, and what it embeds goes with embeddings of the same model
    in the same precision by PyTorch, of which it differs by rounding.

    Args:
        model: on the CPU; from now on for inference alone. OpenVINO computes in its precision, or in float32 where the
            processor has none of that kind.

    Returns:
        the same model.

    Raises:
        ImportError: if OpenVINO is not installed.
        ValueError: if the model is on an accelerator or in float64. Training it later raises as well.
    """
    if model.device.type != "cpu":
        raise ValueError(f"OpenVINO encodes on the CPU, and the model is on {model.device}: leave one of the two out")
    if model.dtype not in PRECISIONS:
        raise ValueError(f"OpenVINO encodes in float32, bfloat16 or float16, and the model is in {model.dtype}")
    vision_model: Any = model.eval().backbone.vision_model
    vars(vision_model).pop("forward", None)  # of an earlier call: traced, its outcome would be taken for a constant
    request = _compile(vision_model, model.config.vl_config.vision_config.image_size, PRECISIONS[model.dtype])
    lock = Lock()

    def forward(pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        if vision_model.training:
            raise ValueError("OpenVINO computes no gradients: load the model again to train it")
        with lock:  # a request is refused while another is computed
            found = request(pixel_values.float().contiguous().numpy())[0]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(found).to(model.dtype))

    vision_model.forward = forward
    return model


def _compile(vision_model: nn.Module, image_size: int | tuple[int, int], precision: str) -> Any:
    """What computes the tower for any number of pictures."""
    try:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    except ImportError as error:
        raise ImportError(f'{error}: OpenVINO comes with `pip install "pvlf-hf[openvino]"`') from error
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    tower = VisionTower(copy.deepcopy(vision_model).float())
    with warnings.catch_warnings(action="ignore"):  # tracing touches what is deprecated, and knows less than we do
        decoder = TorchScriptPythonDecoder(tower, example_input=torch.zeros(2, 3, height, width))
    # Not openvino.convert_model, which tells Intel of its use.
    frontend = FrontEndManager().load_by_framework("pytorch")
    converted = frontend.convert(frontend.load(decoder))
    converted.reshape([-1, 3, height, width])
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return _core().compile_model(converted, "CPU", hints)


@cache
def _core() -> Any:
    """One for the life of the process.

    It gives the thread that compiles first a stack for signals, and frees it when it is collected. If another thread
    collected it, Ctrl-C or the end of a child process would be a segmentation fault in the first.
    """
    from openvino import Core

    return Core()


__all__ = ["encode_by_openvino"]
