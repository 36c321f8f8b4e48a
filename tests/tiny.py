"""Models and processors of toy size, made in memory: random weights, 16 patches, a vocabulary of 60 words."""

import string

import torch
from reference import CONFIGS
from transformers import BertTokenizer

from pvlf_hf import PVLFConfig, PVLFImageProcessor, PVLFModel, PVLFProcessor

BACKBONES = ("blip", "clip")

# 60 words: ids fit the smaller of the two tiny vocabularies, and 2 and 3 are BLIP's [CLS] and [SEP].
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = """a the same but with without is not of in on and more less one two color colour red blue green dark bright
face smiling crying hat glasses dog cat""".split()
VOCABULARY = {word: number for number, word in enumerate([*SPECIAL, *string.ascii_lowercase[1:], *WORDS])}


def tiny_config(backbone="blip", **settings):
    """Return a configuration of two fusion layers of width 32 on a tiny BLIP or CLIP with 32 x 32 px images."""
    settings = {"num_prompts": 3, "fusion_heads": 4, "fusion_ffn_size": 40, **settings}
    return PVLFConfig(vl_config=CONFIGS[backbone], **settings)


def make_model(backbone="blip", seed=0, **settings):
    """Return a seeded random PVLF in eval mode."""
    torch.manual_seed(seed)
    return PVLFModel(tiny_config(backbone, **settings)).eval()


def make_processor():
    """Return a processor for 32 px images with a BERT tokenizer of 60 words (BLIP)."""
    images = PVLFImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return PVLFProcessor(images, BertTokenizer(vocab=dict(VOCABULARY)))


def make_inputs(backbone="blip", batch=3, seed=1):
    """Return queries with captions of different lengths, each with its end token last, and their targets."""
    text = CONFIGS[backbone]["text_config"]
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.zeros(batch, 8, dtype=torch.long)
    attention_mask = torch.zeros(batch, 8, dtype=torch.long)
    for row in range(batch):
        length = 8 - 2 * (row % 3)
        input_ids[row, :length] = torch.randint(5, 60, (length,), generator=generator)
        input_ids[row, 0], input_ids[row, length - 1] = text["bos_token_id"], text["eos_token_id"]
        attention_mask[row, :length] = 1
    return {
        "pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "target_pixel_values": torch.randn(batch, 3, 32, 32, generator=generator),
    }


class Rows(torch.utils.data.Dataset):
    """Data set of 36 queries; every third shares the target of the row before, also across processes."""

    def __init__(self):
        self.inputs = make_inputs("blip", batch=36)
        self.target_ids = torch.arange(36) - (torch.arange(36) % 3 == 2).long()
        repeated = torch.where(self.target_ids != torch.arange(36))[0]
        self.inputs["target_pixel_values"][repeated] = self.inputs["target_pixel_values"][repeated - 1]

    def __len__(self):
        return 36

    def __getitem__(self, row):
        return {**{k: v[row] for k, v in self.inputs.items()}, "target_ids": self.target_ids[row]}
