"""Runs the image encoder by OpenVINO, on many CPUs the fastest way, for galleries and queries alike.

    model = encode_by_openvino(AutoModel.from_pretrained("you/mine", dtype="bfloat16"))
    Gallery.from_folder("photos/", model, processor)

Needs `pip install "pvlf-hf[openvino]"`; `train_scripts/PERFORMANCE.md` says what it gains on which processor.
"""

import copy
import warnings
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..models.interface_pvlf import ComposedRetrievalModel

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""OpenVINO's names of dtypes."""


class VisionTower(nn.Module):
    """The image encoder as OpenVINO traces it, from `(batch, 3, height, width)` to `(batch, 1 + m, width)`."""

    def __init__(self, vision_model: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return `last_hidden_state` of the encoder, which the projection is applied to."""
        return self.vision_model(pixel_values=pixel_values).last_hidden_state


def encode_by_openvino(model: ComposedRetrievalModel) -> ComposedRetrievalModel:
    """Let OpenVINO compute the image encoder of a model, in place.

    Weights stay as they are: the model is saved as before, and its embeddings may be mixed with those that the same
    model computes by PyTorch in the same precision; they differ by rounding.

    Args:
        model: on the CPU; from now on for inference only. OpenVINO computes in its dtype, or in float32 where the
            processor has no instructions for that.

    Returns:
        The same model.

    Raises:
        ImportError: if OpenVINO is not installed.
        ValueError: if the model is on an accelerator or in float64. Training it later raises as well.
    """
    if model.device.type != "cpu":
        raise ValueError(f"OpenVINO encodes on the CPU, and the model is on {model.device}: leave one of the two out")
    if model.dtype not in PRECISIONS:
        raise ValueError(f"OpenVINO encodes in float32, bfloat16 or float16, and the model is in {model.dtype}")
    if "vision_model" not in model.image_side:
        raise ValueError(f"OpenVINO encodes by dual encoders, and {type(model).__name__} has none: leave it out")
    vision_model: Any = model.eval().image_side["vision_model"]
    vars(vision_model).pop("forward", None)  # of an earlier call: tracing would record its result as a constant
    request = _compile(vision_model, model.encoder_config.vision_config.image_size, PRECISIONS[model.dtype])
    lock = Lock()

    def forward(pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        if vision_model.training and torch.is_grad_enabled():
            raise ValueError("OpenVINO computes no gradients: load the model again to train it")
        with lock:  # OpenVINO refuses a request while another is computed
            hidden = request(pixel_values.float().contiguous().numpy())[0]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden).to(model.dtype))

    vision_model.forward = forward
    return model


def _compile(vision_model: nn.Module, image_size: int | tuple[int, int], precision: str) -> Any:
    """Compile the image encoder for any batch size."""
    try:
        from openvino.frontend import FrontEndManager
        from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
    except ImportError as error:
        raise ImportError(f'{error}: OpenVINO comes with `pip install "pvlf-hf[openvino]"`') from error
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    tower = VisionTower(copy.deepcopy(vision_model).float())
    with warnings.catch_warnings(action="ignore"):  # tracing uses deprecated functions
        decoder = TorchScriptPythonDecoder(tower, example_input=torch.zeros(2, 3, height, width))
    # Not openvino.convert_model, which reports its use to Intel.
    frontend = FrontEndManager().load_by_framework("pytorch")
    converted = frontend.convert(frontend.load(decoder))
    converted.reshape([-1, 3, height, width])
    hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    return _core().compile_model(converted, "CPU", hints)


@cache
def _core() -> Any:
    """Return the one OpenVINO core of the process, which is never collected.

    A core gives the thread that compiles first a stack for signals, and frees it when it is collected. If another
    thread collected it, Ctrl-C or the end of a child process would be a segmentation fault in the first.
    """
    from openvino import Core

    return Core()


__all__ = ["encode_by_openvino"]
