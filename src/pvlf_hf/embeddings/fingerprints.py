"""Digests of images, texts, models and processors, by which kept embeddings are found again."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image
from torch import Tensor, nn

from ..models.modeling_pvlf import PVLFModel
from ..models.processing_pvlf import PVLFProcessor


def picture_digests(dataset: Dataset, column: str) -> list[str]:
    """Digests of a column's picture files, undecoded, and of how the column decodes them."""
    mode = str(getattr(dataset.features[column], "mode", None))
    known: dict[str, str] = {}  # a picture occurs in several triplets

    def of(cell: dict[str, Any]) -> str:
        if cell["bytes"] is not None:
            return digest(mode, cell["bytes"])
        if cell["path"] not in known:
            known[cell["path"]] = digest(mode, Path(cell["path"]).read_bytes())
        return known[cell["path"]]

    return [of(cell) for cell in dataset.cast_column(column, Image(decode=False))[column]]


def fingerprint(modules: Sequence[nn.Module], model: PVLFModel, preprocessing: str) -> str:
    """Digest of everything but the sample that tokens depend on.

    Args:
        modules: the encoder and its projection.
        model: gives the encoder's configuration, its dtype and whether autocast is on.
        preprocessing: the settings of the image processor or tokenizer, as text.
    """
    device = model.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    # A config loses and gains these on the way through a file; the weights below tell their dtype themselves.
    config = json.loads(model.config.vl_config.to_json_string(use_diff=False))
    for part in (config, config["vision_config"], config["text_config"]):
        for name in ("dtype", "transformers_version", "_name_or_path"):
            part.pop(name, None)
    parts: list[bytes | str] = [json.dumps(config, sort_keys=True), str(autocast), preprocessing]
    for module in modules:
        for name, tensor in module.state_dict().items():
            parts += [f"{name} {tensor.dtype} {tuple(tensor.shape)}", _raw_bytes(tensor)]
    return digest(*parts)


def image_settings(processor: PVLFProcessor) -> str:
    """Everything of the processor that pixels depend on."""
    settings = processor.image_processor.to_dict()
    settings.pop("auto_map", None)  # where its code is found; saving adds it
    return json.dumps(settings, sort_keys=True, default=str)


def text_settings(processor: PVLFProcessor) -> str:
    """Everything of the processor that token ids depend on."""
    # The tokenizer keeps truncation and padding of its last call.
    tokenizer = json.loads(processor.tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    return json.dumps([tokenizer, processor.max_text_length, processor.padding])


def _raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*parts: bytes | str) -> str:
    """Hexadecimal digest of a sequence of parts."""
    hasher = hashlib.blake2b(digest_size=16)
    for part in parts:
        raw = part.encode() if isinstance(part, str) else part
        hasher.update(len(raw).to_bytes(8, "big") + raw)
    return hasher.hexdigest()
