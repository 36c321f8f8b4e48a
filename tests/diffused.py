"""CompoDiff by the reference implementation, as tensors: its tiny denoiser under our names, and small models of ours.

`tests/fixtures/compodiff` was computed with the public code at tiny random sizes, in float32.
"""

import copy
from functools import cache
from pathlib import Path

import torch
from dual_encoders import FAMILIES, tokenizer_of
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPConfig

from pvlf_hf import CompoDiffConfig, CompoDiffModel, CompoDiffProcessor
from pvlf_hf.checkpoints.compodiff_weights import read_denoiser, settings_of, translate_denoiser

FIXTURES = Path(__file__).parent / "fixtures" / "compodiff"

TOLERANCES = {
    "pred": 1e-5,
    "pred_cfg": 1e-4,
    "sample": 1e-3,
    "query": 1e-5,
    "loss": 1e-5,
    "grad_rel": 1e-4,
    "schedule": 1e-5,
}
"""Those that the fixtures came with: 3 to 33 times what the reference in float32 differs from itself in float64."""


@cache
def io():
    return load_file(FIXTURES / "compodiff_io.safetensors")


@cache
def denoiser_tensors():
    return read_denoiser(FIXTURES / "compodiff_tiny.safetensors")


def reference_config():
    """A CLIP of the reference's widths without layers: the fixtures begin where the encoders end."""
    size = {"num_hidden_layers": 0, "num_attention_heads": 2, "intermediate_size": 8}
    text = {**size, "hidden_size": 1280, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**size, "hidden_size": 16, "image_size": 16, "patch_size": 8}
    return CLIPConfig(projection_dim=16, text_config={**text, "max_position_embeddings": 6}, vision_config=vision)


def reference_model():
    """Our model with the reference's denoiser, in eval mode."""
    vl_config = reference_config()
    model = CompoDiffModel(CompoDiffConfig(vl_config=vl_config, **settings_of(denoiser_tensors())))
    model.denoiser.load_state_dict(translate_denoiser(denoiser_tensors(), vl_config))
    return model.eval()


def conditions():
    """Caption tokens, those of the negative text, reference images and masks of the fixtures."""
    return io()["text_cond"], io()["negative_text_cond"], io()["image_cond"][:, 0], io()["mask"]


def make_config(family="clip", **settings):
    vl_config = AutoConfig.for_model(**{"model_type": family, **copy.deepcopy(FAMILIES[family])})
    small = {"denoiser_layers": 2, "denoiser_heads": 2, "head_width": 8, "mask_size": 4, "steps": 4}
    return CompoDiffConfig(vl_config=vl_config, **{**small, **make_processor(family).negative, **settings})


def make_model(family="clip", seed=0, **settings):
    """A seeded random model of a tiny dual encoder, in eval mode."""
    torch.manual_seed(seed)
    return CompoDiffModel(make_config(family, **settings)).eval()


def make_processor(family="clip"):
    vl_config = AutoConfig.for_model(**{"model_type": family, **copy.deepcopy(FAMILIES[family])})
    return CompoDiffProcessor.for_backbone(vl_config, tokenizer_of(family))


def within(ours, theirs, atol):
    torch.testing.assert_close(ours.detach(), theirs, atol=atol, rtol=0)


def moved(ours, theirs):
    return (ours - theirs).abs().max().item()
