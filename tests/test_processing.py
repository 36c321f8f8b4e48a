"""`PVLFProcessor` with tiny tokenizers made in memory."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import inverted
import pytest
import torch
from PIL import Image
from transformers import BertTokenizer, CLIPTokenizer

from pvlf_hf import CASEProcessor, CompoDiffProcessor
from pvlf_hf.models.image_processing_pvlf import PVLFImageProcessor
from pvlf_hf.models.processing_pvlf import PVLFProcessor, all_tokens

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "same", "dress", "but", "red", "with", "sleeves"]
IMAGE = Image.new("RGB", (40, 30), "navy")


def bert_tokenizer():
    return BertTokenizer(vocab={word: index for index, word in enumerate(WORDS)})


def clip_tokenizer():
    tokens = [*"abdehrsu", *(f"{c}</w>" for c in "abdehrsu"), "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[("r", "e"), ("re", "d</w>")]
    )


def make_processor(tokenizer=None, **kwargs):
    images = PVLFImageProcessor(size={"shortest_edge": 32}, crop_size=32)
    return PVLFProcessor(images, tokenizer or bert_tokenizer(), **kwargs)


def test_each_output_is_returned_only_with_its_input():
    processor = make_processor()
    everything = processor(images=[IMAGE] * 2, text=["red", "the same dress"], target_images=[IMAGE] * 2)
    assert {key: (tuple(value.shape), value.dtype) for key, value in everything.items()} == {
        "pixel_values": ((2, 3, 32, 32), torch.float32),
        "input_ids": ((2, 5), torch.int64),
        "attention_mask": ((2, 5), torch.int64),
        "target_pixel_values": ((2, 3, 32, 32), torch.float32),
    }
    assert list(everything) == processor.model_input_names
    assert list(processor(text="red")) == ["input_ids", "attention_mask"]  # without BERT's token_type_ids
    assert list(processor(images=IMAGE)) == ["pixel_values"]
    assert list(processor(target_images=IMAGE)) == ["target_pixel_values"]
    assert list(processor.process_targets([IMAGE])) == ["pixel_values"]
    assert list(processor.process_queries(IMAGE, "red")) == ["pixel_values", "input_ids", "attention_mask"]
    assert processor(images=IMAGE, text="red", return_tensors="np")["input_ids"].tolist() == [[2, 9, 3]]


def test_captions_are_padded_to_the_longest_and_truncated():
    processor = make_processor(max_text_length=5)
    out = processor(text=["red", "the same dress but red with sleeves"])
    assert out["input_ids"].tolist() == [[2, 9, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert processor(text=["red"])["input_ids"].tolist() == [[2, 9, 3]]
    fixed = make_processor(max_text_length=5, padding="max_length")
    assert fixed(text=["red"])["input_ids"].tolist() == [[2, 9, 3, 0, 0]]
    assert make_processor().max_text_length == 35


def test_captions_are_padded_on_the_right():
    tokenizer = bert_tokenizer()
    tokenizer.padding_side = "left"
    assert make_processor(tokenizer)(text=["red", "the same"])["input_ids"].tolist() == [[2, 9, 3, 0], [2, 5, 6, 3]]


def test_clip_keeps_the_end_token_when_it_truncates():
    processor = make_processor(clip_tokenizer(), max_text_length=4)
    start, end = (processor.tokenizer.convert_tokens_to_ids(f"<|{name}oftext|>") for name in ("start", "end"))
    out = processor(text=["red", "red red red red"])
    red = processor.tokenizer.convert_tokens_to_ids("red</w>")
    assert out["input_ids"].tolist() == [[start, red, end, end], [start, red, red, end]]
    assert out["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_overrides_reach_the_image_processor():
    out = make_processor()(images=IMAGE, target_images=IMAGE, size={"shortest_edge": 16}, crop_size=16)
    assert out["pixel_values"].shape == out["target_pixel_values"].shape == (1, 3, 16, 16)


@pytest.mark.parametrize("make_tokenizer", [bert_tokenizer, clip_tokenizer])
def test_round_trip_is_exact_and_calls_leave_no_trace(make_tokenizer, tmp_path):
    processor = make_processor(make_tokenizer(), max_text_length=9, padding="max_length")
    processor.save_pretrained(tmp_path / "before")
    inputs = {"images": [IMAGE] * 2, "text": ["red", "red " * 20]}
    expected = processor(**inputs)
    processor.save_pretrained(tmp_path / "after")

    loaded = PVLFProcessor.from_pretrained(tmp_path / "after")
    assert (loaded.max_text_length, loaded.padding) == (9, "max_length")
    for key, value in loaded(**inputs).items():
        assert torch.equal(value, expected[key])
    loaded.save_pretrained(tmp_path / "again")

    saved = sorted(path.name for path in (tmp_path / "before").iterdir())
    files = ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    code = "configuration image_formats image_processing interface loss pipeline processing".split()
    assert saved == [*(f"{name}_pvlf.py" for name in code), *files]  # the code is saved, too
    for name in files:
        contents = [json.loads((tmp_path / folder / name).read_text()) for folder in ("before", "after", "again")]
        if name == "tokenizer_config.json":  # the library records where a tokenizer was loaded from
            for content in contents:
                content.pop("is_local", None), content.pop("local_files_only", None)
        assert contents[0] == contents[1] == contents[2]
    config = json.loads((tmp_path / "again" / "processor_config.json").read_text())
    assert config["image_processor"]["image_processor_type"] == "PVLFImageProcessor"
    assert (
        PVLFProcessor.from_pretrained(tmp_path / "again", max_text_length=4)(text="red " * 9)["input_ids"].shape[1]
        == 4
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "nothing to process"),
        ({"images": [IMAGE] * 2, "text": ["red"] * 3}, "there are 2 images, 3 captions"),
        ({"images": [IMAGE] * 2, "target_images": [IMAGE]}, "there are 2 images, 1 target images"),
        ({"text": ["red", "  "]}, "caption 1 is empty.*get_image_features"),
        ({"text": ""}, "caption 0 is empty"),
        ({"text": ["red", None]}, "caption 1 is None, not a string"),
        ({"text": []}, "text is empty"),
        ({"images": []}, "images is empty"),
        ({"images": "nowhere.png", "text": "red"}, "cannot read image 'nowhere.png'"),
    ],
)
def test_invalid_inputs_raise(inputs, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(**inputs)


def test_incomplete_queries_and_invalid_settings_raise():
    with pytest.raises(ValueError, match="a query is an image and a caption"):
        make_processor().process_queries(IMAGE, None)
    with pytest.raises(ValueError, match="max_text_length 2 leaves no room"):
        make_processor(max_text_length=2)
    with pytest.raises(ValueError, match="padding must be"):
        make_processor(padding="shortest")
    with pytest.raises(TypeError, match="length"):
        make_processor()(text="red", length=3)
    with pytest.raises(TypeError):
        make_processor()(images=IMAGE, text="red", length=3)


def test_processor_accepts_settings_by_the_librarys_names():
    """Call the processor as the documentation of CLIP, BLIP and SigLIP does."""
    processor = make_processor()
    captions, images = ["red", "the same dress but red"], [IMAGE] * 2
    whole = processor(text=captions, images=images)
    for settings in ({"padding": True}, {"text_kwargs": {}}, {"images_kwargs": {}}, {"common_kwargs": {}}):
        given = processor(text=captions, images=images, **settings)
        assert given.keys() == whole.keys() and all(torch.equal(given[name], whole[name]) for name in whole)
    for settings in ({"max_length": 4}, {"text_kwargs": {"max_length": 4}}):
        assert processor(text=captions, images=images, **settings)["input_ids"].tolist() == [
            [2, 9, 3, 0],
            [2, 5, 6, 3],
        ]
    padded = processor(text=captions, padding="max_length", max_length=9)["input_ids"]
    assert padded.shape == (2, 9) and processor(text=captions)["input_ids"].shape == (2, 7)
    assert processor(images=IMAGE, images_kwargs={"size": {"shortest_edge": 16}, "crop_size": 16})[
        "pixel_values"
    ].shape == (1, 3, 16, 16)
    arrays = processor(text="red", common_kwargs={"return_tensors": "np"})
    assert type(arrays["input_ids"]).__name__ == "ndarray"
    bare = processor(text="red", add_special_tokens=False)["input_ids"]
    assert bare.tolist() == [[9]]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"text": "red", "size": 4}, "'size'. are settings for images, but none are given"),
        ({"images": IMAGE, "max_length": 4}, "'max_length'. are settings for captions, but none are given"),
        ({"text": "red", "text_kwargs": {"padding_side": "left"}}, "'padding_side'. are no settings for captions"),
    ],
)
def test_settings_without_their_input_raise(inputs, message):
    with pytest.raises(TypeError, match=message):
        make_processor()(**inputs)


@pytest.mark.parametrize("name", ["pic2word", "pic2word, cut", "compodiff"])
def test_threads_share_a_processor(name):
    """Truncation and padding are a state of the tokenizer: two settings in turn would mix up the threads' captions."""
    if name == "compodiff":
        plain = inverted.make_processor("pic2word")
        processor = CompoDiffProcessor(plain.image_processor, plain.tokenizer)
    else:
        processor = inverted.make_processor("pic2word", truncation="cut" in name)
    texts = [["this is a" + " photo" * number, "a photo"] for number in range(1, 90, 13)]

    def prepare(number):
        try:
            return processor.process_captions(texts[number % len(texts)])["input_ids"].tolist()
        except ValueError as error:  # where the caption is too long
            return str(error)

    expected = [prepare(number) for number in range(len(texts))]
    assert ("tokens" in expected[-1]) == ("cut" not in name) and isinstance(expected[0], list)
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(prepare, range(350)))
    finally:
        sys.setswitchinterval(switching)
    assert found == expected * 50


def long_processors():
    """Yield the name of each processor that cuts captions, the processor, and the tokens that it keeps."""
    images = make_processor().image_processor
    yield "pvlf on blip", make_processor(max_text_length=7), 7
    yield "pvlf on clip", make_processor(clip_tokenizer(), max_text_length=6), 6
    yield "case", CASEProcessor(images, bert_tokenizer(), max_text_length=9, train_text_length=5), 9
    yield "compodiff on blip", CompoDiffProcessor(images, bert_tokenizer(), 8, truncation=True), 8
    yield "inversion on blip", inverted.make_processor("searle", truncation=True), 77


@pytest.mark.parametrize(("name", "processor", "longest"), [*long_processors()])
def test_no_caption_is_cut_without_a_message(name, processor, longest, caplog):
    caplog.set_level("INFO", logger="pvlf_hf")
    captions, images = ["red", "the same dress but red " * 20], [IMAGE, IMAGE]
    calls = [lambda **given: processor.process_queries(images, captions, **given)]
    calls += [lambda **given: processor.process_captions(captions, **given)]
    calls += [lambda **given: processor(text=captions, **given)]
    for number, call in enumerate(calls):
        caplog.clear()
        assert call()["input_ids"].shape[1] == longest
        (record,) = caplog.records
        assert record.levelname == ("INFO" if number else "WARNING")
        template = processor.template if "inversion" in name and number < 2 else "{caption}"
        whole = processor.tokenizer(template.replace("{caption}", captions[1]), truncation=False)["input_ids"]
        assert "caption 1, 'the same dress but red the" in record.message
        assert f"has {len(whole)} tokens and is cut to {longest}: what its end says has no effect" in record.message
        caplog.clear()
        assert call(truncation=True)["input_ids"].shape[1] == longest and not caplog.records
    caplog.clear()
    processor.process_queries(IMAGE, "red")
    assert not caplog.records
    if name == "case":
        processor(text=captions, **processor.training_settings)
        assert "is cut to 5" in caplog.text


def test_all_tokens_of_a_caption_are_known_though_it_was_cut_off():
    tokenizer = inverted.make_tokenizer()
    for text in ("a photo", "a" * 5, "a b " * 60, "x " * 75, "x " * 76, "x " * 300, "<|endoftext|> x"):
        encoded = tokenizer([text, "x"], truncation=True, max_length=77, padding="longest").encodings[0]
        whole = tokenizer(text, truncation=False, padding=False)["input_ids"]
        assert all_tokens(encoded) == whole[1:-1]
