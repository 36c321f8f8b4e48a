"""Toy checkpoints of every dual-encoder family, in the Hub's file layout: random weights and a tokenizer."""

import copy
import json
import string
from pathlib import Path

import torch
import transformers
from reference import CONFIGS
from tiny import VOCABULARY, WORDS
from transformers import AutoConfig, BertTokenizer, CLIPTokenizer, GemmaTokenizer, XLMRobertaTokenizer

from pvlf_hf.models.configuration_pvlf import BACKBONES

_TOWER = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_IMAGE = {"image_size": 32, "patch_size": 8}

FAMILIES = {
    "blip": CONFIGS["blip"],
    "clip": {
        "projection_dim": 32,
        "text_config": {**_TOWER, "hidden_size": 40, "vocab_size": 160, "bos_token_id": 0, "eos_token_id": 1},
        "vision_config": {**_TOWER, **_IMAGE, "hidden_size": 24},
    },
    "metaclip_2": {
        "projection_dim": 32,
        "text_config": {**_TOWER, "hidden_size": 40, "vocab_size": 160, "bos_token_id": 0, "eos_token_id": 2},
        "vision_config": {**_TOWER, **_IMAGE, "hidden_size": 24},
    },
    "altclip": {
        "projection_dim": 32,
        "text_config": {
            **_TOWER,
            "hidden_size": 40,
            "project_dim": 28,
            "vocab_size": 160,
            "max_position_embeddings": 90,
            "initializer_range": 0.1,
            "initializer_factor": 1.0,
        },
        "vision_config": {**_TOWER, **_IMAGE, "hidden_size": 24},
    },
    "siglip": {
        "text_config": {
            **_TOWER,
            "hidden_size": 40,
            "vocab_size": 160,
            "projection_size": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 1,
        },
        "vision_config": {**_TOWER, **_IMAGE, "hidden_size": 32},
    },
}


VARIANTS = {
    # As TinyCLIP: a narrow text encoder, a wide joint space, the end token's id as before Transformers 4.31.
    "tinyclip": (
        "clip",
        {
            "projection_dim": 48,
            "text_config": {**FAMILIES["clip"]["text_config"], "hidden_size": 16, "eos_token_id": 2},
        },
    ),
    # As BLIP-large: a deeper and wider image encoder, of which the text encoder's idle cross-attention knows.
    "blip-large": (
        "blip",
        {
            "text_config": {**FAMILIES["blip"]["text_config"], "encoder_hidden_size": 48},
            "vision_config": {
                **FAMILIES["blip"]["vision_config"],
                "hidden_size": 48,
                "num_hidden_layers": 4,
                "num_attention_heads": 8,
            },
        },
    ),
    # SigLIP 1, whose tokenizer is of another class than SigLIP 2's.
    "siglip-1": ("siglip", {}),
}
"""Published models of a family that differ from its entry in `FAMILIES`: the family, and their settings."""

IMAGE_PROCESSORS = {"blip": "BlipImageProcessor", "siglip": "SiglipImageProcessor"}
"""Classes of the image processors that checkpoints name; those of the others name CLIP's."""


def tokenizer_of(family):
    """Return a tokenizer of the class that the family's checkpoints name."""
    if family == "blip-large":
        return tokenizer_of("blip")
    if family == "tinyclip":  # the end token has the highest id, as in CLIP's own
        tokens = sorted(tokenizer_of("clip").get_vocab(), key=lambda token: token == "<|endoftext|>")
        return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[])
    if family == "blip":
        return BertTokenizer(vocab=dict(VOCABULARY))
    if family == "clip":
        letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
        special = ["<|startoftext|>", "<|endoftext|>"]
        vocab = {token: i for i, token in enumerate([*special, *letters])}
        return CLIPTokenizer(vocab=vocab, merges=[])
    words = [f"▁{word}" for word in WORDS]
    if family in ("metaclip_2", "altclip"):
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = [*special, *words, "▁", *string.ascii_lowercase, "<mask>"]
        return XLMRobertaTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {piece: i for i, piece in enumerate([*special, "▁", *string.ascii_letters])}
    return GemmaTokenizer(vocab=vocab, merges=[], padding_side="right")


def config_of(name):
    """Return the configuration of a family, or of a variant of it."""
    family, settings = VARIANTS.get(name, (name, {}))
    return AutoConfig.for_model(**copy.deepcopy({"model_type": family, **FAMILIES[family], **settings}))


def save_dual_encoder(name, folder, seed=3):
    """Save a dual encoder and its tokenizer as a pretrained checkpoint; return the library's model in eval mode."""
    torch.manual_seed(seed)
    config = config_of(name)
    family = config.model_type
    original = getattr(transformers, BACKBONES[family].loader)(config)
    original.save_pretrained(folder)
    tokenizer_of(name).save_pretrained(folder)
    if name == "siglip-1":
        file = Path(folder) / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "SiglipTokenizer"}))
    kind = getattr(transformers, IMAGE_PROCESSORS.get(family, "CLIPImageProcessor"))
    kind(size={"height": 32, "width": 32}).save_pretrained(folder)
    return original.eval()
