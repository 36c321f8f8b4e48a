"""Choices between ways to one result: the fastest is taken, kept for the next process, and changes no result."""

import json
import logging

import pytest
import torch
from accelerate import PartialState
from error_bounds import squares_error
from squares import make_benchmark
from tiny import make_model

from pvlf_hf import PVLFConfig, PVLFModel
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.embeddings import encoding, fastest


class Ways(dict):
    """Ways that take so many seconds of a clock; the first call of each takes ten times as long."""

    def __init__(self, clock, **seconds):
        self.calls = []
        super().__init__({name: lambda name=name: self.call(clock, name, seconds[name]) for name in seconds})

    def call(self, clock, name, seconds):
        clock[0] += seconds * (1 if name in self.calls else 10)
        self.calls.append(name)


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Return a clock that only calls move, with an empty folder for choices."""
    clock = [0.0]
    monkeypatch.setattr(fastest.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(fastest, "CHOICES", tmp_path / "pvlf_hf" / "fastest.json")
    monkeypatch.setattr(fastest, "_CHOSEN", {})
    monkeypatch.delenv(fastest.SWITCH, raising=False)
    return clock


@pytest.fixture
def log(caplog):
    """Record messages of level INFO."""
    fastest.logger.addHandler(caplog.handler)
    level = fastest.logger.level
    fastest.logger.setLevel(logging.INFO)
    yield caplog
    fastest.logger.setLevel(level)
    fastest.logger.removeHandler(caplog.handler)


def test_fastest_way_is_measured_once_and_kept(clock, monkeypatch, log):
    ways = Ways(clock, default=0.02, slow=0.03, quick=0.01)
    assert fastest.fastest("copy", ways) == "quick"
    assert 0.9 < clock[0] < 1.0 and len(ways.calls) == 3 * 7  # warm-up 0.6 s, six rounds of 0.06
    assert fastest.fastest("copy", ways) == "quick" and len(ways.calls) == 21
    assert len({*log.messages}) == 1 and "copy; " in log.messages[0] and "PVLF_HF_MEASURE=0 takes default" in log.text
    monkeypatch.setattr(fastest, "_CHOSEN", {})  # as in another process
    assert fastest.fastest("copy", ways) == "quick" and len(ways.calls) == 21
    assert fastest.fastest("batch", Ways(clock, default=1.0, other=3.0)) == "default"
    assert sorted(json.loads(fastest.CHOICES.read_text()).values()) == ["default", "quick"]


def test_choice_belongs_to_the_machine(clock, monkeypatch):
    ways = Ways(clock, default=0.02, quick=0.01)
    for change in (
        lambda: None,
        lambda: monkeypatch.setattr(fastest, "processor", lambda: "another"),
        lambda: monkeypatch.setattr(torch, "get_num_threads", lambda: 77),
        lambda: monkeypatch.setattr(torch, "__version__", "1.0"),
    ):
        change()
        before = len(ways.calls)
        assert fastest.fastest("copy", ways) == "quick" and len(ways.calls) > before


def test_a_gain_of_less_than_a_twentieth_changes_nothing(clock):
    assert fastest.fastest("a", Ways(clock, default=0.100, other=0.096)) == "default"
    assert fastest.fastest("b", Ways(clock, default=0.100, other=0.094)) == "other"


def test_long_ways_are_measured_in_one_round(clock):
    ways = Ways(clock, default=4.0, other=2.0)
    assert fastest.fastest("a", ways) == "other" and ways.calls == ["default", "other"] * 2


def test_nothing_is_measured_where_it_is_switched_off(clock, monkeypatch):
    monkeypatch.setenv(fastest.SWITCH, "0")
    ways = Ways(clock, default=0.2, other=0.1)
    assert fastest.fastest("a", ways) == "default" and not ways.calls and not fastest.CHOICES.exists()


@pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
def test_an_unusable_file_is_written_anew(clock, content, log):
    fastest.CHOICES.parent.mkdir()
    fastest.CHOICES.write_text(content)
    assert fastest.fastest("a", Ways(clock, default=0.2, other=0.1)) == "other"
    assert "other" in json.loads(fastest.CHOICES.read_text()).values()
    assert ("cannot be read" in log.text) == (content == "{")


def test_a_choice_that_cannot_be_kept_is_made_all_the_same(clock, log):
    fastest.CHOICES.parent.write_text("a file where the folder would be")
    assert fastest.fastest("a", Ways(clock, default=0.2, other=0.1)) == "other"
    assert "cannot write fastest.json" in log.text and "The next process measures again" in log.text


def test_images_at_once_fit_the_parts(clock, monkeypatch):
    """Choose 4 images of BLIP base at 384 px where parts are faster; fewer images than that need no choice."""
    asked = []
    monkeypatch.setattr(fastest, "fastest", lambda question, ways: asked.append(question) or "4 parts")
    activations = 24**2 * 3072
    assert fastest.images_at_once(64, activations, torch.float32) == 4
    assert fastest.images_at_once(3, activations, torch.float32) == 3
    assert fastest.images_at_once(64, 10 * fastest.ACTIVATIONS, torch.bfloat16) == 1
    assert asked == ["33554432 activations in float32", "33554432 activations in bfloat16"]
    monkeypatch.setattr(fastest, "fastest", lambda question, ways: "1 parts")
    assert fastest.images_at_once(64, activations, torch.float32) == 64


def test_smaller_batches_give_the_same_embeddings(tiny_model, tiny_processor, monkeypatch):
    gallery, sizes = make_benchmark().gallery, []
    whole = encoding.encode_gallery(tiny_model, tiny_processor, gallery, progress=False)
    tiny_model.register_forward_pre_hook(
        lambda _, args, inputs: sizes.append(len(inputs["target_pixel_values"])), with_kwargs=True
    )
    vision = tiny_model.config.vl_config.vision_config
    each = (vision.image_size // vision.patch_size) ** 2 * vision.intermediate_size
    monkeypatch.setattr(fastest, "ACTIVATIONS", 2 * each)
    monkeypatch.setattr(fastest, "fastest", lambda question, ways: "4 parts")
    split = encoding.encode_gallery(tiny_model, tiny_processor, gallery, progress=False)
    assert max(sizes) == 2 and sum(sizes) == len(gallery)
    torch.testing.assert_close(split, whole, rtol=0, atol=squares_error()["target_embeds"])


def test_batches_stay_as_they_are_where_processes_must_agree(tiny_model, monkeypatch):
    monkeypatch.setattr(encoding, "images_at_once", lambda *_: 1)
    assert encoding.fastest_batch(tiny_model, 64) == 1
    assert encoding.fastest_batch(make_model("clip").to("meta"), 64) == 64  # an accelerator
    monkeypatch.setitem(PartialState()._shared_state, "num_processes", 2)
    assert encoding.fastest_batch(tiny_model, 64) == 64


def test_measured_layers_compute_what_they_name(clock):
    with torch.device("meta"):
        model = PVLFModel(PVLFConfig())
    vision = model.config.vl_config.vision_config
    assert 4 * (vision.image_size // vision.patch_size) ** 2 * vision.intermediate_size <= fastest.ACTIVATIONS
    fastest._hidden_layer(torch.bfloat16, 4)
    assert fastest._layer(torch.float32, torch.device("cpu")) > 0


def test_fastest_dtype_is_that_of_the_loaded_model(monkeypatch, clock):
    from test_dtypes import EMOJI

    for dtype in ("float32", "bfloat16"):
        monkeypatch.setattr(fastest, "fastest", lambda question, ways, dtype=dtype: dtype)
        assert load_model(EMOJI, dtype="fastest")[0].dtype == getattr(torch, dtype)
    monkeypatch.setattr(fastest, "fastest", lambda question, ways: [*ways])
    monkeypatch.setattr(fastest, "is_native", lambda dtype: False)
    assert fastest.fastest_dtype() == ["float32"]
