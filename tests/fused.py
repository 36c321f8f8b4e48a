"""CASE and prompted towers by public reference implementations, as tensors: tiny checkpoints under our names.

`tests/fixtures/fusion` was computed with public code at tiny random sizes, in float32. Tolerances are those measured
there against float64. CASE has no public code: its query encoder is CoVR's, its objective the published formula.
"""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from pvlf_hf.checkpoints.convert_case import case_from_covr

FIXTURES = Path(__file__).parent / "fixtures" / "fusion"


@cache
def io_of(name):
    return load_file(FIXTURES / f"{name}_io.safetensors")


@cache
def tensors_of(name):
    return load_file(FIXTURES / f"{name}_tiny.safetensors")


def case_model(**settings):
    """Our CASE with the reference's weights, in eval mode."""
    model = case_from_covr(tensors_of("case_blip"), vision_heads=4, text_heads=4)
    vl_config = model.config.vl_config
    settings = {"first_token": "enc", "enc_token_id": 89, "reverse_token_id": 88, **settings}
    ours = type(model)(type(model.config)(vl_config=vl_config, **settings))
    ours.load_state_dict(model.state_dict())
    ours.set_finetuning("text")
    return ours.eval()


def case_inputs(targets=True):
    io = io_of("case_blip")
    inputs = {
        "pixel_values": io["reference_images"],
        "input_ids": io["input_ids_cls"],
        "attention_mask": io["attention_mask"],
    }
    return {**inputs, "target_pixel_values": io["target_images"]} if targets else inputs


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def within(ours, theirs, atol=1e-5):
    torch.testing.assert_close(ours.detach(), theirs, atol=atol, rtol=0)
