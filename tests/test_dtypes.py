"""A warning is logged if a dtype is requested that the processor only emulates."""

import os
from pathlib import Path

import pytest
import torch

from pvlf_hf import PVLFTrainingArguments, dtypes
from pvlf_hf.commands.evaluate import load_model
from pvlf_hf_cli_index import Precision

CARDS = Path(__file__).parents[1] / "model_cards"
EMOJI, BLIP = str(CARDS / "pvlf-emoji-tiny"), str(CARDS / "blip-emoji-tiny")


@pytest.fixture
def warnings(monkeypatch):
    """Return the list of warnings on a machine that computes natively in float32 only."""
    warnings = []
    monkeypatch.setattr(dtypes, "is_native", lambda dtype: False)
    monkeypatch.setattr(dtypes.logger, "warning_once", warnings.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return warnings


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_emulated_precision_warns(warnings, tmp_path, dtype):
    load_model(EMOJI, dtype=dtype)
    load_model(BLIP, dtype=dtype)
    if dtype == "bfloat16":
        PVLFTrainingArguments(str(tmp_path), bf16=True)
    else:
        with pytest.raises(ValueError, match="fp16 has no effect on a CPU"):
            PVLFTrainingArguments(str(tmp_path), fp16=True)
    assert len(warnings) == {"bfloat16": 3, "float16": 2}[dtype] and all(
        f"does not compute in {dtype}" in warning for warning in warnings
    )


def test_native_dtypes_raise_no_warning(warnings, tmp_path, monkeypatch):
    load_model(EMOJI)
    dtypes.warn_if_slow(torch.float64)
    PVLFTrainingArguments(str(tmp_path))
    monkeypatch.setattr(dtypes, "is_native", lambda dtype: True)
    load_model(EMOJI, dtype="bfloat16")
    PVLFTrainingArguments(str(tmp_path), bf16=True)
    assert warnings == []


def test_native_dtypes_are_those_of_the_processor():
    """On x86 oneDNN's bfloat16 kernels need AVX-512 or AMX, which ONEDNN_MAX_CPU_ISA can disable."""
    capability = torch.backends.cpu.get_cpu_capability()
    if os.environ.get("ONEDNN_MAX_CPU_ISA") in ("SSE41", "AVX", "AVX2", "AVX2_VNNI"):
        assert not dtypes.is_native(torch.bfloat16)
    elif capability == "AVX2" and "ATEN_CPU_CAPABILITY" not in os.environ:  # a property of PyTorch's own kernels
        assert not dtypes.is_native(torch.bfloat16)
    elif capability == "AVX512":
        assert dtypes.is_native(torch.bfloat16)


def test_the_command_line_offers_the_same_dtypes():
    assert tuple(Precision) == (*dtypes.DTYPES, "int8")  # images in int8 are an index's alone
