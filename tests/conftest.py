"""Shared fixtures: toy models, one thread unless OMP_NUM_THREADS is set, no network, a fresh Accelerate state."""

import gc
import os
import sys
from collections import Counter

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from tiny import make_model, make_processor
from transformers import BlipForImageTextRetrieval

# On a busy machine, threads that wait for each other cost more than they gain.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_configure(config):
    config.addinivalue_line("markers", "reliability(chapter, claim, broken): a row of RELIABILITY.md (reliability.py)")
    config.addinivalue_line("markers", "slow: starts processes, a server or a browser, or takes over 3 s (CPU) alone")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Return the number of processes: one more than cores, because tests wait for programs that they start."""
    return 1 + min(os.cpu_count() or 1, 8)


def pytest_collection_modifyitems(items):
    """Order files by length, longest first, so that all processes end together.

    A slow test counts as a hundred others, a notebook as a thousand.
    """
    weight = Counter()
    for item in items:
        slow = 1000 if "notebook" in item.name else 100
        weight[item.path] += slow if item.get_closest_marker("slow") else 1
    items.sort(key=lambda item: (-weight[item.path], item.path))


@pytest.fixture
def figure(record_property):
    """Return the function that records a test's figure for its row of RELIABILITY.md."""
    return lambda text: record_property("figure", text)


@pytest.fixture(scope="module", autouse=True)
def libraries_stay():
    """Let collections leave what is there before a file's tests alone: a million objects of libraries.

    Each training collects garbage; otherwise that takes several times as long as to train a toy model.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Disable the network in the environment, which child processes inherit."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Reset Accelerate's state, which holds settings such as mixed precision for the lifetime of the process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not torch.is_autocast_enabled("cpu"), "autocast was left on for the tests that follow"


@pytest.fixture
def pillow_alone(monkeypatch):
    """Pillow as it is without the packages that add decoders to it."""
    for kind, module in (
        ("HEIF", "pillow_heif.HeifImagePlugin"),
        ("JXL", "pillow_jxl.JpegXLImagePlugin"),
        ("RAW", "rawpy"),
    ):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.delitem(Image.OPEN, kind, raising=False)


@pytest.fixture
def openvino(monkeypatch):
    """Make OpenVINO usable in a run that imitates a smaller processor; its kernels detect the real one.

    OpenVINO's copy of oneDNN crashes if ONEDNN_MAX_CPU_ISA names another processor. PyTorch's copy has read it by now.
    """
    torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)


@pytest.fixture
def tiny_model():
    """Return PVLF-Deep on a tiny BLIP, in eval mode; each test gets a new one, which it may train."""
    return make_model("blip")


@pytest.fixture
def tiny_processor():
    return make_processor()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Return the folder of `tiny_model` and `tiny_processor`, saved once a session; no test writes to it."""
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def blip_checkpoint(tmp_path_factory):
    """Return the folder of a tiny BLIP in the format of released checkpoints, saved once a session."""
    folder, model = tmp_path_factory.mktemp("blip"), make_model()
    blip = BlipForImageTextRetrieval(model.config.vl_config)
    for name in (*model.backbone.vision_modules, *model.backbone.text_modules):
        setattr(blip, name, getattr(model.backbone, name))
    blip.save_pretrained(folder)
    make_processor().tokenizer.save_pretrained(folder)
    return folder
