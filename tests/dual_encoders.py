"""Toy checkpoints of every dual-encoder family, in the Hub's file layout: random weights and a tokenizer."""

import string

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


def tokenizer_of(family):
    """Return a tokenizer of the class that the family's checkpoints name."""
    if family == "blip":
        return BertTokenizer(vocab=dict(VOCABULARY))
    if family == "clip":
        letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase)]
        vocab = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
        return CLIPTokenizer(vocab=vocab, merges=[])
    words = [f"▁{word}" for word in WORDS]
    if family == "metaclip_2":
        special = ["<s>", "<pad>", "</s>", "<unk>"]
        pieces = [*special, *words, "▁", *string.ascii_lowercase, "<mask>"]
        return XLMRobertaTokenizer(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    vocab = {piece: i for i, piece in enumerate([*special, "▁", *string.ascii_letters])}
    return GemmaTokenizer(vocab=vocab, merges=[], padding_side="right")


def save_dual_encoder(family, folder, seed=3):
    """Save a dual encoder and its tokenizer as a pretrained checkpoint; return the library's model in eval mode."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**{"model_type": family, **FAMILIES[family]})
    original = getattr(transformers, BACKBONES[family].loader)(config)
    original.save_pretrained(folder)
    tokenizer_of(family).save_pretrained(folder)
    return original.eval()
