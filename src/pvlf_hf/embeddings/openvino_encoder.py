"""Runs the image encoder by OpenVINO, on many CPUs the fastest way, for galleries and queries alike.

    model = encode_by_openvino(AutoModel.from_pretrained("you/mine", dtype="bfloat16"))
    Gallery.from_folder("photos/", model, processor)

Needs `pip install "pvlf-hf[openvino]"`; `train_scripts/PERFORMANCE.md` says what it gains on which processor.
"""

import copy
import sys
import warnings
from functools import cache
from importlib import import_module
from threading import Lock
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from ..models.interface_pvlf import ComposedRetrievalModel, check_adapter

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
    vision_model = checked_encoder(model)
    model.eval()
    graph = convert_encoder(vision_model, model.encoder_config.vision_config.image_size)
    run_instead(vision_model, compile_graph(graph, PRECISIONS[model.dtype]), model.dtype)
    return model


def checked_encoder(model: ComposedRetrievalModel) -> nn.Module:
    """Return the module that OpenVINO is to compute, free of what an earlier call put in its place.

    Raises:
        ValueError: as [`encode_by_openvino`].
    """
    check_adapter(model)
    if model.device.type != "cpu":
        raise ValueError(f"OpenVINO encodes on the CPU, and the model is on {model.device}: leave one of the two out")
    if model.dtype not in PRECISIONS:
        raise ValueError(f"OpenVINO encodes in float32, bfloat16 or float16, and the model is in {model.dtype}")
    if "vision_model" not in model.image_side:
        raise ValueError(f"OpenVINO encodes by dual encoders, and {type(model).__name__} has none: leave it out")
    vision_model = model.image_side["vision_model"]
    vars(vision_model).pop("forward", None)  # tracing would record its result as a constant
    return vision_model


def convert_encoder(vision_model: nn.Module, image_size: int | tuple[int, int]) -> Any:
    """Return the image encoder as a graph of OpenVINO, in float32, for any batch size.

    Raises:
        ImportError: if OpenVINO is not installed.
    """
    manager = import_quietly("openvino.frontend").FrontEndManager()
    decoder_of = import_quietly("openvino.frontend.pytorch.ts_decoder").TorchScriptPythonDecoder
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    tower = VisionTower(copy.deepcopy(vision_model).float())
    with warnings.catch_warnings(action="ignore"):  # tracing uses deprecated functions
        decoder = decoder_of(tower, example_input=torch.zeros(2, 3, height, width))
    # Not openvino.convert_model, which reports its use to Intel.
    frontend = manager.load_by_framework("pytorch")
    converted = frontend.convert(frontend.load(decoder))
    converted.reshape([-1, 3, height, width])
    return converted


def compile_graph(graph: Any, precision: str) -> Any:
    """Compile a graph; `precision` is one of the names in `PRECISIONS`."""
    return openvino_core().compile_model(
        graph, "CPU", {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    )


def run_instead(vision_model: Any, request: Any, dtype: torch.dtype) -> None:
    """Let a compiled graph compute an image encoder from now on, whose hidden states are returned in a dtype."""
    lock = Lock()

    def forward(pixel_values: Tensor, **_: Any) -> BaseModelOutput:
        if vision_model.training and torch.is_grad_enabled():
            raise ValueError("OpenVINO computes no gradients: load the model again to train it")
        with lock:  # OpenVINO refuses a request while another is computed
            hidden = request(pixel_values.float().contiguous().numpy())[0]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(hidden).to(dtype))

    vision_model.forward = forward


@cache
def openvino_core() -> Any:
    """Return the one OpenVINO core of the process, which is never collected.

    A core gives the thread that compiles first a stack for signals, and frees it when it is collected. If another
    thread collected it, Ctrl-C or the end of a child process would be a segmentation fault in the first.
    """
    return import_quietly("openvino").Core()


def import_quietly(name: str) -> Any:
    """Import a module of OpenVINO or NNCF without the telemetry that reports to Intel that it was imported and used.

    Raises:
        ImportError: if it is not installed.
    """
    telemetry, modules = "openvino_telemetry", cast("dict[str, Any]", sys.modules)
    kept = {telemetry: modules[telemetry]} if telemetry in modules else {}
    try:
        modules[telemetry] = None  # as if it were not installed, which both are prepared for
        return import_module(name)
    except ImportError as error:
        raise ImportError(f'{error}: OpenVINO and NNCF come with `pip install "pvlf-hf[openvino]"`') from error
    finally:
        del modules[telemetry]
        modules.update(kept)


__all__ = [
    "checked_encoder",
    "compile_graph",
    "convert_encoder",
    "encode_by_openvino",
    "import_quietly",
    "openvino_core",
    "run_instead",
]
