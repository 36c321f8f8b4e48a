"""The same seed gives the same run, and `results.json` records everything that repeats it."""

import json
import os
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_in_processes
from test_several_processes import power_of_ten, rows_error, trainer_of
from test_train_scripts import files, flags
from tiny import Rows

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "train_pvlf.py"

__all__ = ["files"]


def weights_of(folder, seed, **settings):
    """Return all weights after three steps with dropout as one vector, and PyTorch's deterministic settings."""
    trainer = trainer_of(folder, Rows(), dropout=0.5, seed=seed, use_cpu=not torch.cuda.is_available(), **settings)
    trainer.train()
    weights = np.concatenate([p.detach().cpu().numpy().ravel() for p in trainer.model.parameters()])
    return weights, torch.are_deterministic_algorithms_enabled(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")


@pytest.mark.slow
@pytest.mark.reliability(
    2,
    "The same seed gives the same run, in one process and in two; another seed gives another run",
    broken=(
        "src/pvlf_hf/training/trainer.py",
        "        return super().train(checkpoint, *args, **kwargs)\n",
        "        torch.seed()\n        return super().train(checkpoint, *args, **kwargs)\n",
    ),
)
@pytest.mark.parametrize("processes", [1, 2])
def test_same_seed_repeats_the_run(tmp_path, figure, processes):
    one, again, other = (run_in_processes(processes, weights_of, tmp_path, seed)[0][0] for seed in (0, 0, 1))
    worst = float(np.abs(one - again).max())
    # Two processes may sum their gradients in either order.
    allowed = 0 if processes == 1 else max(rows_error(3, dropout=0.5).values())
    assert worst <= allowed
    assert np.abs(one - other).max() > 1e-4
    figure(f"{processes}: {len(one)} weights, {'the same bits' if worst == 0 else f'within {power_of_ten(worst)}'}")


def weights_twice(folder):
    return weights_of(folder, 0, full_determinism=True)


@pytest.mark.slow
@pytest.mark.reliability(
    2,
    "`full_determinism` is passed to PyTorch, every operation of a training step has a deterministic "
    "implementation, and two runs are bit-equal",
    broken=(
        "src/pvlf_hf/training/training_args.py",
        "        super().__post_init__(*args, **kwargs)\n",
        "        super().__post_init__(*args, **kwargs)\n        self.full_determinism = False\n",
    ),
)
def test_full_determinism_repeats_the_run_bit_for_bit(tmp_path, figure):
    (one,), (again,) = (run_in_processes(1, weights_twice, tmp_path) for _ in range(2))
    assert one[1:] == again[1:] == (True, ":16:8")
    assert np.array_equal(one[0], again[0])
    figure(f"on {torch.cuda.get_device_name() if torch.cuda.is_available() else 'a CPU; no GPU here'}")


@pytest.mark.slow
@pytest.mark.reliability(
    2,
    "`results.json` alone suffices to repeat a run with non-default settings: the same weights and metrics",
    broken=("src/pvlf_hf/training/training_args.py", "adam_beta1 adam_beta2", "adam_beta2"),
)
def test_results_file_suffices_to_repeat_the_run(files, tmp_path, figure):
    unusual = "--seed=3 --data_seed=5 --gamma=1 --adam_beta1=0.5 --decay_norms_and_biases=False --learning_rate=0.002"
    train(flags(files, tmp_path / "first", *unusual.split()))
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    assert results["triplets"]["rows"] == 56 and len(results["triplets"]["digest"]) == 32
    assert results["environment"]["torch"] == torch.__version__ and results["environment"]["device"]
    settings = results["model"] | results["data"] | results["training"]
    assert settings.pop("processes") == 1
    train(
        [f"--{name}={value}" for name, value in settings.items() if value is not None]
        + [f"--output_dir={tmp_path / 'again'}"]
    )
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    assert again == results
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again"))
    assert first == second
    figure(f"{len(settings)} settings, {len(again['evaluations'][0]['metrics'])} metrics, weights bit-equal")


def train(arguments):
    (error,) = run_in_processes(1, run_script, arguments)
    assert error is None, error


def run_script(arguments):
    sys.argv = [str(SCRIPT), *arguments]
    runpy.run_path(str(SCRIPT), run_name="__main__")
