"""The image encoder by OpenVINO: PyTorch's embeddings, its weights, and nobody told of it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import make_inputs, make_model, make_processor
from torch.nn import functional as F
from transformers import AutoModel

from pvlf_hf import PVLFModel, encode_by_openvino
from pvlf_hf.embedding_store import made_by

EMOJI = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"


@pytest.fixture(params=["trained", "blip", "clip"])
def model(request):
    return AutoModel.from_pretrained(EMOJI) if request.param == "trained" else make_model(request.param)


@torch.inference_mode()
def test_it_embeds_as_pytorch_does(model):
    kind, pixels = model.config.vl_config.model_type, model.config.vl_config.vision_config.image_size
    fast = encode_by_openvino(copy.deepcopy(model))
    for batch in (1, 3, 5):
        inputs = make_inputs(kind, batch=batch)
        images = ("pixel_values", "target_pixel_values")
        inputs |= {name: F.interpolate(inputs[name], (pixels, pixels)) for name in images}
        wanted, found = model(**inputs), fast(**inputs)
        for name in ("query_embeds", "target_embeds"):
            assert found[name].shape == wanted[name].shape and found[name].dtype == torch.float32
            assert F.cosine_similarity(found[name], wanted[name]).min() > 0.999, name
        assert not found.target_embeds.equal(wanted.target_embeds)  # something else did compute


def test_weights_are_those_of_bfloat16(model, tmp_path):
    fast, half = encode_by_openvino(copy.deepcopy(model)), copy.deepcopy(model).to(torch.bfloat16)
    assert made_by(fast, make_processor()) == made_by(half, make_processor())
    fast.save_pretrained(tmp_path)
    again = PVLFModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), half.state_dict().values()))


def test_what_it_cannot_do_is_said(monkeypatch):
    fast = encode_by_openvino(make_model())
    with pytest.raises(ValueError, match="load the model again to train it"):
        fast.train()(**make_inputs())
    with pytest.raises(ValueError, match="the model is on meta"):
        encode_by_openvino(make_model().to("meta"))
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ImportError, match=r"pip install \"pvlf-hf\[openvino\]\""):
        encode_by_openvino(make_model())


QUIET = """
import os, sys
asked = []
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and asked.append(args))
from tiny import make_inputs, make_model
from pvlf_hf import encode_by_openvino
encode_by_openvino(make_model())(**make_inputs())
assert not asked, asked
"""


def test_nobody_is_told(tmp_path):
    """OpenVINO's own converter sends statistics, unless it runs in a CI."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PYTHONPATH": path, "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", QUIET], env=environment, check=True)
