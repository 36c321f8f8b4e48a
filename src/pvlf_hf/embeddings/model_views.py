"""Makes views of a model: copies of its modules that share its weights, so that other threads notice nothing."""

from functools import partial, update_wrapper
from types import MethodType
from typing import Any

from torch import nn

from ..models.interface_pvlf import ComposedRetrievalModel


def inference_view(model: ComposedRetrievalModel) -> ComposedRetrievalModel:
    """Return the model if it is in eval mode, else a copy of its modules in eval mode that shares all weights.

    Other threads may be using the model, one of them for training, so its mode is never changed.
    """
    return eval_view(model) if any(module.training for module in model.modules()) else model


def eval_view(model: ComposedRetrievalModel) -> ComposedRetrievalModel:
    """Return a copy of a model's modules in eval mode that shares all weights: a change of its methods stays in it."""
    return _view(model, {})


def _view(module: Any, views: dict[nn.Module, Any]) -> Any:
    if module in views:
        return views[module]
    view = views[module] = module.__class__.__new__(module.__class__)
    attributes = vars(module).copy()  # weights, buffers and hooks are shared
    attributes["training"] = False
    attributes["_modules"] = {
        name: child if child is None else _view(child, views) for name, child in module._modules.items()
    }
    for name, value in attributes.items():  # Accelerate's hooks keep the module's own methods
        if isinstance(value, MethodType) and value.__self__ is module:
            attributes[name] = MethodType(value.__func__, view)
        elif isinstance(value, partial) and any(argument is module for argument in value.args):
            arguments = [view if argument is module else argument for argument in value.args]
            attributes[name] = update_wrapper(partial(value.func, *arguments, **value.keywords), value)
    view.__dict__.update(attributes)
    return view


__all__ = ["eval_view", "inference_view"]
