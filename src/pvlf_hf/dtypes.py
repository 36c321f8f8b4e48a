"""Dtypes that a model computes in, and a warning where the processor only emulates one."""

import platform
import re
from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16", "fastest")
"""Dtypes to load a model in; `auto` is the checkpoint's, `fastest` is float32 or bfloat16, as measured once."""

KERNELS = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
"""Functions of `torch.ops.mkldnn` that tell whether oneDNN, which multiplies matrices on the CPU, has native kernels
of a dtype for this processor."""

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16")
"""Instruction sets, by Linux's names, that decide which dtype is fast."""


def warn_if_slow(dtype: torch.dtype) -> None:
    """Warn once if PyTorch emulates a dtype's matrix products on the CPU.

    Measured: 6 times slower than float32 on an AMD EPYC without AVX-512.
    """
    if dtype not in KERNELS or is_native(dtype):
        return
    name = str(dtype).removeprefix("torch.")
    logger.warning_once(
        f"this processor does not compute in {name}, PyTorch emulates it, several times slower than float32: load the "
        "model, or make the index, in float32 (--dtype float32), and train without --bf16 and --fp16"
    )


def is_native(dtype: torch.dtype) -> bool:
    """Return whether the processor computes in bfloat16 or float16."""
    return torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, KERNELS[dtype])()


def processor() -> str:
    """Return the processor's name and instruction sets: what a measurement of speed holds for."""
    facts = Path("/proc/cpuinfo")
    text = facts.read_text() if facts.exists() else ""  # Linux only
    name, flags = (re.search(rf"^{key}\s*: (.*)", text, re.MULTILINE) for key in ("model name", "flags"))
    known = set(flags[1].split()) if flags else set()
    sets = [one for one in INSTRUCTIONS if one in known] or [torch.backends.cpu.get_cpu_capability()]
    return f"{name[1] if name else platform.processor() or platform.machine()} ({', '.join(sets)})"
