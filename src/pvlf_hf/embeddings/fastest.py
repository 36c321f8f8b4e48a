"""Chooses the fastest of several ways to one result, by measuring them once on this machine.

Which dtype and which batch are fast depends on the processor: on one with AMX bfloat16 is several times as fast as
float32, on one without instructions for it several times as slow. A measurement takes about a second; the choice is
kept in Hugging Face's cache for this processor, number of threads and version of PyTorch, and logged (level INFO).
With `PVLF_HF_MEASURE=0` in the environment nothing is measured, and the first of the ways is taken.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HOME
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from ..atomic_files import whole
from ..dtypes import is_native, processor

logger = logging.get_logger(__name__)

CHOICES = Path(HF_HOME) / "pvlf_hf" / "fastest.json"
"""File of the choices; delete it to measure again."""

SWITCH = "PVLF_HF_MEASURE"
"""Environment variable that turns measuring off if it is 0."""

SECONDS = 1.0
"""Seconds after which no further round of a measurement starts (our choice)."""

GAIN = 0.95
"""Share of the first way's time that another must stay below to be preferred to it (our choice)."""

ACTIVATIONS = 2**23
"""Activations of a part (our choice): those of 4 images in BLIP base at 384 px, of 8 in CLIP-L at 224 px."""

_CHOSEN: dict[str, str] = {}


def fastest(question: str, ways: Mapping[str, Callable[[], Any]]) -> str:
    """Return the name of the fastest of several ways; the first where nothing may be measured.

    Args:
        question: names what is chosen, and everything it depends on beside the machine.
        ways: functions by name. Each is called once before it is timed.
    """
    if len(ways) == 1 or os.environ.get(SWITCH) == "0":
        return next(iter(ways))
    key = f"{question}; {processor()}, {torch.get_num_threads()} threads, PyTorch {torch.__version__}"
    if key not in _CHOSEN:
        kept = _read()
        if kept.get(key) not in ways:
            kept = {key: _measure(ways)}
            _keep(kept)
        _CHOSEN[key] = kept[key]
        logger.info(f"{key}: {kept[key]} (of {', '.join(ways)}; {SWITCH}=0 takes {next(iter(ways))})")
    return _CHOSEN[key]


def _measure(ways: Mapping[str, Callable[[], Any]]) -> str:
    """Time the ways in turn, as often as there is time and at least once; compare the shortest time of each."""
    start = time.perf_counter()
    for call in ways.values():
        call()
    seconds = dict.fromkeys(ways, float("inf"))
    before = time.perf_counter()
    while True:
        for name, call in ways.items():
            begun = time.perf_counter()
            call()
            seconds[name] = min(seconds[name], time.perf_counter() - begun)
        now = time.perf_counter()
        if now + (now - before) > start + SECONDS:
            break
        before = now
    first, best = next(iter(ways)), min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < GAIN * seconds[first] else first


def _read() -> dict[str, str]:
    try:
        kept = json.loads(CHOICES.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning(f"{CHOICES} cannot be read ({error}): it is written anew")
        return {}
    return kept if isinstance(kept, dict) else {}


def _keep(choice: dict[str, str]) -> None:
    try:
        with whole(CHOICES) as partial:
            partial.write_text(json.dumps(_read() | choice, indent=2), encoding="utf-8")
    except OSError as error:
        logger.warning(f"{error} The next process measures again which way is fastest.")


def fastest_dtype() -> str:
    """Return the dtype, `"float32"` or `"bfloat16"`, in which a layer of a ViT is faster on the device in use."""
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtypes = [torch.float32]
    if device.type != "cpu" or is_native(torch.bfloat16):
        dtypes.append(torch.bfloat16)
    ways = {str(dtype).removeprefix("torch."): lambda dtype=dtype: _layer(dtype, device) for dtype in dtypes}
    name = "" if device.type == "cpu" else f" on {torch.cuda.get_device_name() if device.type == 'cuda' else device}"
    return fastest(f"dtype of an encoder{name}", ways)


def _layer(dtype: torch.dtype, device: torch.device) -> float:
    """Compute attention and hidden layer of ViT-B for an image of 577 tokens, and wait for the result."""
    heads = torch.ones(1, 12, 577, 64, dtype=dtype, device=device)
    attended: Tensor = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(577, 768)
    weights = torch.ones(768, 3072, dtype=dtype, device=device)
    return (F.gelu(attended @ weights) @ weights.T).sum().item()


def images_at_once(wanted: int, activations: int, dtype: torch.dtype) -> int:
    """Return how many images a CPU encodes at once: as many as wanted, or fewer if that is faster.

    Large activations leave the cache, and the C library returns their memory to the system after each layer.

    Args:
        wanted: images at once, at most.
        activations: numbers in the widest layer's output for one image.
        dtype: dtype of the encoder.
    """
    fitting = max(1, ACTIVATIONS // activations)
    if fitting >= wanted:
        return wanted
    ways = {f"{parts} parts": lambda parts=parts: _hidden_layer(dtype, parts) for parts in (1, 4)}
    question = f"{4 * ACTIVATIONS} activations in {str(dtype).removeprefix('torch.')}"
    return fitting if fastest(question, ways) == "4 parts" else wanted


def _hidden_layer(dtype: torch.dtype, parts: int) -> None:
    """Compute the hidden layer of an encoder for `4 * ACTIVATIONS` activations in so many parts."""
    tokens, weights = torch.ones(4 * ACTIVATIONS // 3072, 32, dtype=dtype), torch.ones(32, 3072, dtype=dtype)
    for part in tokens.chunk(parts):
        F.gelu(part @ weights) @ weights.T


__all__ = ["fastest", "fastest_dtype", "images_at_once"]
