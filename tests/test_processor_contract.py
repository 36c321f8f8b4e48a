"""Requirements of Transformers' test suite (ProcessorTesterMixin, which is not shipped), checked on our processors."""

import inspect
import json
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from diffused import make_processor as make_compodiff_processor
from dual_encoders import FAMILIES, tokenizer_of
from inverted import make_processor as make_inversion_processor
from test_backbones import random_images
from transformers import AutoConfig, AutoImageProcessor, AutoProcessor, AutoTokenizer

from pvlf_hf import CASEProcessor, PVLFProcessor

TEXTS = ["is red", "a face with a hat"]
INVERSIONS = ("pic2word", "searle_oti")


def make_processor(kind):
    if kind in INVERSIONS:
        return make_inversion_processor(kind)
    if kind == "compodiff":
        return make_compodiff_processor()
    family = "blip" if kind == "case" else kind
    config = AutoConfig.for_model(**{"model_type": family, **FAMILIES[family]})
    return (CASEProcessor if kind == "case" else PVLFProcessor).for_backbone(config, tokenizer_of(family))


@pytest.fixture(params=[*FAMILIES, "case", "compodiff", *INVERSIONS])
def kind(request):
    return request.param


@pytest.fixture
def processor(kind):
    return make_processor(kind)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_saved_and_loaded_gives_the_same(processor, tmp_path):
    expected = processor(images=random_images(2), text=TEXTS, target_images=random_images(2, 1))
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again) is type(processor)
    assert again.to_dict() | {"auto_map": ANY} == processor.to_dict() | {"auto_map": ANY}  # saving adds it
    assert same(again(images=random_images(2), text=TEXTS, target_images=random_images(2, 1)), expected)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    assert settings["processor_class"] == type(processor).__name__ and "auto_map" in settings
    again.save_pretrained(tmp_path / "twice")
    twice = AutoProcessor.from_pretrained(tmp_path / "twice")
    assert twice.to_dict() | {"auto_map": ANY} == again.to_dict() | {"auto_map": ANY}


def test_parts_load_alone_and_overrides_reach_them(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    images, tokenizer = AutoImageProcessor.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert images.to_dict() == processor.image_processor.to_dict()
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    names = set(inspect.signature(type(processor).__init__).parameters) - {"self"}
    assert {"image_processor", "tokenizer"} <= names
    own = type(processor)(
        images, tokenizer, **{n: getattr(processor, n) for n in names - {"image_processor", "tokenizer"}}
    )
    assert same(own(images=random_images(2), text=TEXTS), processor(images=random_images(2), text=TEXTS))
    longer = AutoProcessor.from_pretrained(tmp_path, max_text_length=11)
    assert longer.max_text_length == 11


def test_outputs_are_named_by_model_input_names(processor):
    whole = processor(images=random_images(2), text=TEXTS, target_images=random_images(2, 1))
    assert {*whole} <= {*processor.model_input_names}
    assert {*processor(images=random_images(2))} == {"pixel_values"}
    assert {"input_ids", "attention_mask"} <= {*processor(text=TEXTS)} <= {*whole} - {"pixel_values"}
    assert {*processor.process_queries(random_images(2), TEXTS)} <= {*processor.model_input_names}
    with pytest.raises(ValueError, match="nothing to process|pass images"):
        processor()
    assert all(tensor.shape[0] == 2 for name, tensor in whole.items() if name != "prompt_ids")


def test_parts_process_as_the_whole(processor):
    whole = processor(images=random_images(2), text=TEXTS)
    assert torch.equal(
        whole["pixel_values"], processor.image_processor(random_images(2), return_tensors="pt")["pixel_values"]
    )
    decoded = processor.tokenizer.batch_decode(whole["input_ids"], skip_special_tokens=True)
    assert decoded == processor.batch_decode(whole["input_ids"], skip_special_tokens=True) and len(decoded) == 2
    assert processor.decode(whole["input_ids"][0], skip_special_tokens=True) == decoded[0]


@pytest.mark.parametrize("style", ["flat", "grouped", "common"])
def test_settings_of_a_call_do_not_persist(processor, style):
    """Pass settings by the library's names, flat or grouped; the next call uses the processor's own again."""
    before = processor(images=random_images(2), text=TEXTS)
    settings = {
        "flat": {"padding": "max_length", "max_length": 40, "do_normalize": False, "return_tensors": "np"},
        "grouped": {
            "text_kwargs": {"padding": "max_length", "max_length": 40},
            "images_kwargs": {"do_normalize": False},
            "return_tensors": "np",
        },
        "common": {
            "common_kwargs": {"return_tensors": "np"},
            "text_kwargs": {"padding": "max_length", "max_length": 40},
            "images_kwargs": {"do_normalize": False},
        },
    }[style]
    changed = processor(images=random_images(2), text=TEXTS, **settings)
    assert {type(tensor) for tensor in changed.values()} == {np.ndarray}
    assert changed["input_ids"].shape == changed["attention_mask"].shape == (2, 40)
    assert 0 <= changed["pixel_values"].min() and changed["pixel_values"].max() <= 1
    assert same(processor(images=random_images(2), text=TEXTS), before)


def test_settings_of_a_call_win_over_those_of_the_tokenizer(kind):
    processor = make_processor(kind)
    processor.tokenizer.padding_side, processor.tokenizer.model_max_length = "left", 5
    # the processor's setting, not the tokenizer's
    assert same(processor(text=TEXTS), make_processor(kind)(text=TEXTS))
    assert processor(text=TEXTS, padding="max_length", max_length=40)["input_ids"].shape == (2, 40)


def test_duplicate_and_unknown_settings_raise(processor):
    for name, group in (("padding", "text_kwargs"), ("do_normalize", "images_kwargs")):
        value = "longest" if name == "padding" else True
        with pytest.raises((ValueError, TypeError), match=f"{name}.*twice"):
            processor(images=random_images(2), text=TEXTS, **{name: value, group: {name: value}})
    for unknown in (
        {"sise": 3},
        {"text_kwargs": {"sise": 3}},
        {"images_kwargs": {"sise": 3}},
        {"common_kwargs": {"sise": 3}},
    ):
        with pytest.raises((ValueError, TypeError), match="sise"):
            processor(images=random_images(2), text=TEXTS, **unknown)
    with pytest.raises((ValueError, TypeError), match="videos_kwargs"):
        processor(images=random_images(2), text=TEXTS, videos_kwargs={})


def test_images_are_the_first_positional_argument(processor):
    """Pass images first, as in the library, or both by name."""
    assert [*inspect.signature(type(processor).__call__).parameters][1:3] == ["images", "text"]
    assert same(processor(random_images(2), TEXTS), processor(text=TEXTS, images=random_images(2)))
