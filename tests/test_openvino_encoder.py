"""The image encoder by OpenVINO: PyTorch's embeddings, unchanged weights, and no telemetry."""

import copy
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from error_bounds import embedding_error, rounding
from forked import run_python
from tiny import make_inputs, make_model, make_processor
from torch.nn import functional as F
from transformers import AutoModel

from pvlf_hf import PVLFModel, encode_by_openvino
from pvlf_hf.embeddings.embedding_store import made_by

pytestmark = pytest.mark.usefixtures("openvino")
EMOJI = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"


@pytest.fixture(params=[pytest.param("trained", marks=pytest.mark.slow), "blip", "clip"])
def model(request):
    return AutoModel.from_pretrained(EMOJI) if request.param == "trained" else make_model(request.param)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_openvino_embeddings_equal_those_of_pytorch(model, dtype):
    kind, pixels = model.config.vl_config.model_type, model.config.vl_config.vision_config.image_size
    fast = encode_by_openvino(copy.deepcopy(model).to(dtype))
    names, error = ("query_embeds", "target_embeds"), None

    def compared(model, inputs):
        output = model(**inputs)
        return {name: output[name] for name in names}

    for batch in (3, 2, 1):
        inputs = make_inputs(kind, batch=batch)
        images = ("pixel_values", "target_pixel_values")
        inputs |= {name: F.interpolate(inputs[name], (pixels, pixels)) for name in images}
        wanted, found = model(**inputs), fast(**inputs)
        error = error or rounding(compared, model, inputs, dtype)  # bound of the largest batch
        for name in names:
            assert found[name].shape == wanted[name].shape and found[name].dtype == torch.float32
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=error[name], msg=name)
        assert not found.target_embeds.equal(wanted.target_embeds)  # OpenVINO did the computation


def test_openvino_leaves_weights_unchanged(model, tmp_path):
    fast = encode_by_openvino(copy.deepcopy(model))
    assert made_by(fast, make_processor()) == made_by(model, make_processor())
    fast.save_pretrained(tmp_path)
    again = PVLFModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.state_dict().values(), model.state_dict().values()))


@torch.no_grad()
def test_encode_by_openvino_is_idempotent():
    model, inputs = make_model(), make_inputs()
    wanted, error = model(**inputs).query_embeds, embedding_error(model, inputs)["query_embeds"]
    fast = encode_by_openvino(encode_by_openvino(model))
    torch.testing.assert_close(fast(**inputs).query_embeds, wanted, rtol=0, atol=error)


@pytest.mark.slow
def test_threads_share_an_encoder():
    fast, inputs = encode_by_openvino(make_model()), [make_inputs(batch=1 + row % 3) for row in range(32)]
    embed = torch.inference_mode()(lambda row: fast(**inputs[row]).query_embeds)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(embed, range(32)))
    error = embedding_error(make_model(), inputs[2])["query_embeds"]
    for row in range(32):
        torch.testing.assert_close(found[row], embed(row), rtol=0, atol=error)


def test_unsupported_models_raise_a_message(monkeypatch):
    fast = encode_by_openvino(make_model())
    with pytest.raises(ValueError, match="load the model again to train it"):
        fast.train()(**make_inputs())
    with pytest.raises(ValueError, match="the model is in torch.float64"):
        encode_by_openvino(make_model().double())
    with pytest.raises(ValueError, match="the model is on meta"):
        encode_by_openvino(make_model().to("meta"))
    monkeypatch.setitem(sys.modules, "openvino.frontend", None)
    with pytest.raises(ImportError, match=r"pip install \"pvlf-hf\[openvino\]\""):
        encode_by_openvino(make_model())


QUIET = """
import os, sys
calls = []
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and calls.append(args))
from tiny import make_inputs, make_model
from pvlf_hf import encode_by_openvino
encode_by_openvino(make_model())(**make_inputs())
assert not calls, calls
assert "openvino_telemetry" not in sys.modules
"""


@pytest.mark.slow
def test_openvino_sends_no_telemetry(tmp_path):
    """OpenVINO sends statistics when it is imported and when it converts, by another process, unless it is in a CI."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment |= {"PYTHONPATH": path, "HOME": str(tmp_path)}
    done = run_python(["-c", QUIET], env=environment)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "intel").exists()  # where the telemetry keeps the user's number


SIGNALLED = """
import gc, signal, threading
from tiny import make_inputs, make_model
from pvlf_hf import encode_by_openvino

class Made: pass
made = Made()
made.model = encode_by_openvino(make_model())
made.model(**make_inputs())

def forget():
    del made.model
    gc.collect()

thread = threading.Thread(target=forget)
thread.start()
thread.join()
seen = []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
signal.raise_signal(signal.SIGINT)
assert seen
"""


@pytest.mark.slow
@pytest.mark.reliability(
    1,
    "Ctrl-C after another thread has collected a model encoded by OpenVINO causes no segmentation fault",
    broken=("src/pvlf_hf/embeddings/openvino_encoder.py", "@cache\n", ""),
)
def test_a_model_collected_by_another_thread_leaves_signals_alone(figure):
    """Collect a model in another thread: OpenVINO then frees the signal stack of the thread that created it."""
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = run_python(["-c", SIGNALLED], env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, "killed by SIGSEGV" if done.returncode == -11 else done.returncode
    figure("SIGINT reaches its handler")
