"""Two real processes (gloo) against one with the whole batch: same losses, gradients and weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


def run(folder, processes, *chunk_size, finetuning="both", gather="gather"):
    folder.mkdir()
    command = [sys.executable]
    if processes > 1:
        # --standalone picks a free port; `accelerate launch --cpu --num_processes 2` would silently run one process.
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [str(HERE / "train_in_processes.py"), str(folder), finetuning, gather, *chunk_size]
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = load_file(folder / "outcome.safetensors")
    assert outcome.pop("world_size") == processes
    return outcome


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run(tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize("chunk_size", [(), ("4",)], ids=["whole", "chunks"])
def test_two_processes_equal_one(alone, tmp_path, chunk_size):
    """Six rows a process, at once or in chunks of four and two (gradient caching)."""
    together = run(tmp_path / "run", 2, *chunk_size)
    torch.testing.assert_close(together.pop("loss"), alone["loss"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.pop("grad_norm"), alone["grad_norm"], rtol=1e-3, atol=1e-5)
    for name, weight in together.items():
        if name.endswith(("key.bias", "k_proj.bias")) or "qkv.bias" in name:
            continue  # a key bias has no true gradient: Adam makes full steps of its rounding noise
        torch.testing.assert_close(weight, alone[name], rtol=0, atol=3e-4, msg=name)


def test_without_gathering_there_are_fewer_negatives(alone, tmp_path):
    """The test above could not fail if gathering made no difference."""
    apart = run(tmp_path / "run", 2, gather="local")
    assert (apart["loss"][0] - alone["loss"][0]).abs() > 0.05
