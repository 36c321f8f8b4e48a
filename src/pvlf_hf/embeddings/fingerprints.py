"""Fingerprints of images, processors and models, by which kept embeddings and features are found again."""

import json
from collections.abc import Iterator, Mapping, Sequence
from inspect import get_annotations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..digests import sequence_digest
from ..models.interface_pvlf import ComposedRetrievalModel, ComposedRetrievalProcessor, check_adapter

if TYPE_CHECKING:
    from datasets import Dataset

PLAIN_STATE = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Types whose `repr` is the same in every process."""


def image_digests(dataset: "Dataset", column: str) -> list[str]:
    """Return a digest of each row's undecoded image file, of a URL's string, and of the mode that it is decoded to."""
    from datasets import Image

    mode = str(getattr(dataset.features[column], "mode", None))
    known: dict[str, str] = {}  # an image occurs in several triplets

    def digest_of(cell: dict[str, Any]) -> str:
        if cell["bytes"] is not None:
            return sequence_digest(mode, cell["bytes"])
        if cell["path"] not in known:
            is_url = cell["path"].startswith(("http://", "https://", "data:"))
            known[cell["path"]] = sequence_digest(mode, cell["path"] if is_url else Path(cell["path"]).read_bytes())
        return known[cell["path"]]

    cells = dataset.select_columns(column).with_format(None).cast_column(column, Image(decode=False))
    return [digest_of(row[column]) for row in cells]


def fingerprint(modules: Sequence[nn.Module], model: ComposedRetrievalModel, preprocessing: str) -> str:
    """Return a digest of everything but the sample that tokens depend on.

    Args:
        modules: the encoder and its projection.
        model: gives the encoder's configuration, its dtype and whether autocast is on.
        preprocessing: the settings of the image processor or tokenizer, as text.

    Raises:
        ValueError: if a module's state holds an object of an unknown type, or an adapter is prompt learning.
    """
    check_adapter(model)
    parts: list[bytes | str] = [_settings_of(model.encoder_config, model), _autocast(model), preprocessing]
    for module in modules:
        for name, value in module.state_dict().items():
            parts += _state_parts(name, value)
    return sequence_digest(*parts)


def image_fingerprint(model: ComposedRetrievalModel, processor: ComposedRetrievalProcessor) -> str:
    """Return a digest of all that embeddings of images depend on beside the images, and of nothing else.

    It covers the image encoder, its projection and the prompts that gallery images pass with (configuration and
    weights), autocast and the image processor. What
    composes queries is left out, so that models of different classes on one encoder have the same.

    Raises:
        ValueError: if a module's state holds an object of an unknown type, or an adapter is prompt learning.
    """
    check_adapter(model)
    parts: list[bytes | str] = [_settings_of(model.image_config, model), _autocast(model), image_settings(processor)]
    prompts = getattr(model, "gallery_prompts", None)  # code that came with an older checkpoint knows of none
    modules = {**model.image_side, **({} if prompts is None else {"prompts": prompts})}
    for name, module in sorted(modules.items()):
        for key, value in module.state_dict().items():
            parts += _state_parts(f"{name}.{key}", value)
    return sequence_digest(*parts)


def _settings_of(config: PreTrainedConfig, model: ComposedRetrievalModel) -> str:
    """Return what a part of the model's configuration says, as JSON."""
    # Saving and loading a config drops or adds these keys; the weights carry their own dtype.
    lost = ["dtype", "transformers_version", "_name_or_path"]
    if config is model.config:  # which names the file of the model's code
        lost += ["architectures", "auto_map", "custom_pipelines"]
    settings = json.loads(config.to_json_string(use_diff=False))
    for part in (settings, *settings.values()):
        for name in lost if isinstance(part, dict) else ():
            part.pop(name, None)
    return json.dumps(settings, sort_keys=True)


def _autocast(model: ComposedRetrievalModel) -> str:
    device = model.device.type
    return str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None)


def own_settings(model: ComposedRetrievalModel) -> str:
    """Return the settings that a model has beside those of its encoders, as JSON."""
    config = model.config
    if model.encoder_config is config:
        return "[]"
    kinds = [kind for kind in reversed(type(config).__mro__) if issubclass(kind, PreTrainedConfig)]
    names = [name for kind in kinds if kind is not PreTrainedConfig for name in get_annotations(kind)]
    # Settings that came after 0.1.0 count where they are used, so that embeddings kept before stay valid.
    added = getattr(config, "added_settings", ())
    names = [name for name in names if name not in added or getattr(config, name) != getattr(type(config), name)]
    return json.dumps([value for name in names if (value := getattr(config, name)) is not model.encoder_config])


def image_settings(processor: ComposedRetrievalProcessor) -> str:
    """Return every setting of the processor that pixels depend on, as JSON."""
    settings = processor.image_processor.to_dict()
    settings.pop("auto_map", None)  # names the file of the processor's code; saving adds it
    return json.dumps(settings, sort_keys=True, default=str)


def text_settings(processor: ComposedRetrievalProcessor) -> str:
    """Return every setting of the processor that token ids depend on, as JSON."""
    # The tokenizer keeps truncation and padding of its last call.
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps([tokenizer, processor.max_text_length, processor.padding])


def _state_parts(name: str, value: Any) -> Iterator[bytes | str]:
    """Yield what identifies one entry of a `state_dict`; quantised modules keep more than tensors in it."""
    if isinstance(value, Tensor) and value.is_quantized:
        # Dequantised values alone would not tell the scale that later inputs are quantised by.
        yield f"{name} {value.dtype} {value.qscheme()} {tuple(value.shape)}"
        yield _raw_bytes(value.int_repr())
        yield _raw_bytes(value.dequantize())
    elif isinstance(value, Tensor):
        yield f"{name} {value.dtype} {tuple(value.shape)}"
        yield _raw_bytes(value)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _state_parts(f"{name}.{index}", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _state_parts(f"{name}.{key}", item)
    elif isinstance(value, PLAIN_STATE):
        yield f"{name} {value!r}"
    else:
        raise ValueError(
            f"the model's state {name!r} is a {type(value).__name__}, whose content cannot be compared: embeddings "
            "cannot be kept with this model; use the model as it was before it was quantised or wrapped"
        )


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


__all__ = ["fingerprint", "image_digests", "image_fingerprint", "image_settings", "own_settings", "text_settings"]
