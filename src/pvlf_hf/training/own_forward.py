"""Gives a model another `forward` during training, because DDP, FSDP and autocast work through a model's `forward`."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from ..models.interface_pvlf import unwrap


def replace_forward(model: nn.Module, forward: Callable[..., Any]) -> None:
    """Replace the `forward` of a model, unless it has been replaced.

    Args:
        model: the model, or one inside an adapter of PEFT; before DDP or FSDP wraps it.
        forward: function of the model and of the inputs, of a module, so that the model can be pickled.
    """
    inner: Any = unwrap(model)
    if "forward" not in vars(inner):
        inner.forward = partial(_call, forward, inner)  # a bound method could not be pickled


def _call(forward: Callable[..., Any], model: nn.Module, *args: Any, **inputs: Any) -> Any:
    if args and args[0] is model:  # Accelerate's unwrap_model binds a forward to its model once more
        args = args[1:]
    return forward(model, *args, **inputs)


__all__ = ["replace_forward"]
