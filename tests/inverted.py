"""Tensors of the reference implementations of textual inversion: tiny checkpoints, renamed to our parameter names.

`tests/fixtures/inversion` was computed with the methods' public code at tiny random sizes, in float32; PALAVRA's from
its formulas.
"""

from functools import cache
from math import exp
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import CLIPTokenizer

from pvlf_hf import InversionConfig, InversionModel, InversionProcessor, PVLFImageProcessor
from pvlf_hf.checkpoints.convert import clip_config
from pvlf_hf.checkpoints.inversion_weights import translate_mapping
from pvlf_hf.checkpoints.weight_names import CLIP_NAMES, translate
from pvlf_hf.models.configuration_inversion import METHODS

FIXTURES = Path(__file__).parent / "fixtures" / "inversion"

TOLERANCES = {
    "features": 1e-5,  # and words, tokens, losses
    "query": 2e-6,
    "weights": 5e-6,  # and optimised words, after some steps of Adam
    "average": 2e-6,  # of optimised words
    "gradient": 1e-4,  # relative, of the norms
    "gate": 1e-6,  # the gradient of Context-I2W's gate, small by cancellation
}
"""Those that the fixtures came with: 2 to 200 times what the reference in float32 differs from itself in float64.

The smallest wrong details, another GELU in SEARLE's mapping and another eps in CLIP, move a query by more than 2e-6.
"""

FILES = {
    "pic2word": "pic2word_img2text",
    "searle": "searle_phi",
    "lincir": "lincir_phi",
    "context_i2w": "context_i2w_img2text",
}
PLACEHOLDERS = {"pic2word": 265, "searle": 259, "searle_oti": 259, "lincir": 259, "context_i2w": 297, "palavra": 265}


@cache
def io_of(method):
    return load_file(FIXTURES / f"{method.removesuffix('_oti')}_io.safetensors")


def query_of(method):
    """Return the query embeddings of the inference template."""
    io = io_of(method)
    return io["cirr_query" if "cirr_query" in io else "query"]


def prompts_of(method):
    """Return "a photo of" with the placeholder of Pic2Word or Context-I2W before the end token."""
    ids = io_of(method)["train_prompt_ids"][0].tolist()
    return torch.tensor([[*ids[:4], PLACEHOLDERS[method], *ids[4:-1]]]).expand(4, -1)


def clip_tensors(method):
    return load_file(FIXTURES / f"{'context_i2w_' if method == 'context_i2w' else ''}clip_tiny.safetensors")


def mapping_tensors(method):
    return load_file(FIXTURES / f"{FILES[method]}.safetensors")


PALAVRA_NAMES = {
    "phi.0.": "layers.0.",
    "phi.2.": "layers.1.",
    "phi.4.": "layers.2.",
    "Gamma": "element",
    "Lambda": "mean",
    "ro.1.": "hidden.",
    "ro.4.": "output.",
}


def palavra_tensors(names, file):
    """Return the weights of a PALAVRA file in float32, under our parameter names; no such file was released."""
    tensors = load_file(FIXTURES / f"{file}.safetensors")
    return {renamed(name, names): tensor.float() for name, tensor in tensors.items()}


def renamed(name, names):
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def tiny_clip(method):
    """Return configuration and weights of the reference's CLIP, under Transformers' parameter names."""
    tensors = clip_tensors(method)
    scale = tensors.pop("logit_scale")
    weights = translate(tensors, CLIP_NAMES)
    return clip_config(weights), weights, exp(-scale.item())


def reference_model(method, **settings):
    """Return our model with the reference's weights, in eval mode; it has no dropout in train mode either."""
    vl_config, clip, temperature = tiny_clip(method)
    mapping = {}
    if method in FILES:
        heads = 2 if method == "context_i2w" else None
        sizes, mapping = translate_mapping(mapping_tensors(method), vl_config, method, heads)
        settings = {**sizes, **settings}
    if method == "palavra":
        settings = {"mapping_width": 36, **settings}
    settings = {"placeholder_id": PLACEHOLDERS[method], "temperature": temperature, "dropout": 0.0, **settings}
    model = InversionModel(InversionConfig(vl_config=vl_config, method=method, **settings))
    model.backbone.load_state_dict(clip)
    if mapping:
        model.mapping.load_state_dict(mapping)
    if method == "palavra":
        model.mapping.load_state_dict(palavra_tensors(PALAVRA_NAMES, "palavra_f_theta"))
        model.text_map.load_state_dict(palavra_tensors({"layers.0.": ""}, "palavra_text_visual_map"))
    model.set_finetuning("frozen")
    return model.eval()


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def within(ours, theirs, atol=TOLERANCES["features"]):
    torch.testing.assert_close(ours.detach(), theirs, atol=atol, rtol=0)


def make_model(method, reference=True):
    """Return the model with the reference's weights, or one of the same sizes with new weights."""
    if reference:
        return reference_model(method)
    vl_config, _, _ = tiny_clip(method)
    torch.manual_seed(0)
    return InversionModel(
        InversionConfig(vl_config=vl_config, method=method, placeholder_id=PLACEHOLDERS[method], mapping_width=256)
    ).eval()


def make_tokenizer():
    """Return a CLIP tokenizer of 300 tokens: letters, words of the templates, placeholders with the fixtures' ids."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789$*,.{}"
    merges, words = [], ("jekyll", "photo", "this", "contains", "illustration", "illustrations", "sketch", "diagram")
    for word in words:
        pairs = [(word[:end], word[end] + "</w>" * (end == len(word) - 1)) for end in range(1, len(word))]
        merges += [pair for pair in pairs if pair not in merges]
    fixed = {259: "$</w>", 265: "*</w>", 297: "jekyll</w>", 298: "<|startoftext|>", 299: "<|endoftext|>"}
    tokens = dict.fromkeys([*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges)])
    rest = iter([*(token for token in tokens if token not in fixed.values()), *map("unused{}".format, range(300))])
    return CLIPTokenizer(vocab={fixed.get(number) or next(rest): number for number in range(300)}, merges=merges)


def make_processor(method, **settings):
    """Return a processor for 32 px images and CLIP's context of 77, whatever the tiny text encoder's is."""
    images = PVLFImageProcessor(
        size={"shortest_edge": 32},
        crop_size=32,
        do_target_pad=METHODS[method].target_pad if method in METHODS else True,
    )
    return InversionProcessor(images, make_tokenizer(), **{"method": method, **settings})
