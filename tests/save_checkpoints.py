"""Save a tiny BLIP and a tiny CLIP checkpoint of this version, to be committed with a release:

python tests/save_checkpoints.py tests/fixtures/checkpoint-0.1.0
"""

import sys
from pathlib import Path

import torch
from tiny import VOCABULARY
from transformers import BertTokenizer, CLIPTokenizer

from pvlf_hf import PVLFConfig, PVLFImageProcessor, PVLFModel, PVLFProcessor, write_golden

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
VISION = {**SMALL, "image_size": 16, "patch_size": 8}
TEXT = {**SMALL, "vocab_size": len(VOCABULARY), "max_position_embeddings": 16}


def main():
    torch.manual_seed(0)
    blip = {
        "model_type": "blip",
        "image_text_hidden_size": 16,
        "text_config": {**TEXT, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3},
        "vision_config": VISION,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    clip = {"model_type": "clip", "projection_dim": 16, "text_config": {**TEXT, **ends}, "vision_config": VISION}
    letters = [f"{letter}{end}" for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {token: number for number, token in enumerate(["<|startoftext|>", "<|endoftext|>", *letters])}
    tokenizers = BertTokenizer(vocab=dict(VOCABULARY)), CLIPTokenizer(vocab=vocabulary, merges=[])
    images = PVLFImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    for config, tokenizer in zip((blip, clip), tokenizers, strict=True):
        folder = Path(sys.argv[1], config["model_type"])
        fusion = {"num_prompts": 2, "fusion_layers": 2, "fusion_heads": 2, "fusion_ffn_size": 16}
        model = PVLFModel(PVLFConfig(vl_config=config, **fusion))
        with torch.no_grad():  # otherwise biases are 0 and scales 1, and a loader that swaps two would not be noticed
            for weight in model.parameters():
                weight += 0.2 * torch.randn_like(weight)
        model.save_pretrained(folder)
        PVLFProcessor(images, tokenizer, max_text_length=16).save_pretrained(folder)
        for code in folder.glob("*.py"):
            code.unlink()  # a later version loads it with its own code
        write_golden(folder)


if __name__ == "__main__":
    main()
