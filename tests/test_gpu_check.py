"""The check of a GPU runs to its end at toy size on a CPU, and reports what differs."""

import json
import sys
from pathlib import Path

import pytest
import torch
from datasets import enable_progress_bars

sys.path.insert(0, str(Path(__file__).parents[1] / "train_scripts"))

import gpu_check
import measuring
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Return the function that runs the command at toy size; it returns exit status, results and section."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- gpu: written by gpu_check.py -->\nold\n<!-- end of gpu -->\nafter")
    monkeypatch.setattr(measuring, "DOCUMENT", page)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which the command sets
    precision = torch.backends.cudnn.conv.fp32_precision

    def call(*arguments):
        words = ["--device", "cpu", "--size", "tiny", "--rounds", "1", "--write", "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["gpu_check.py", *words, *arguments])
        with pytest.raises(SystemExit) as end:
            gpu_check.main()
        return end.value.code, json.loads((tmp_path / "results.json").read_text()), page.read_text()

    yield call
    torch.backends.cudnn.conv.fp32_precision = precision
    enable_progress_bars()


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(run):
    status, results, page = run()
    outcomes = {row[0]: row[3] for row in results["rows"]}
    skipped = [name for name, outcome in outcomes.items() if outcome.startswith("skipped")]
    assert set(outcomes.values()) - {outcomes[name] for name in skipped} == {"passed"} and status == 0
    assert [name.partition(",")[0] for name in skipped] == [
        "cudnn_attention",
        "efficient_attention",
        "fusion by flash_attention_2",
        "the graph itself",
    ]
    assert results["seconds"].keys() == gpu_check.CHECKS.keys() | gpu_check.SPEEDS.keys()
    assert len(results["verdicts"]) == 4 and page.count("| operator |") == len(gpu_check.SPEEDS) == 5
    assert all(f"| {name} |" in page for name in outcomes) and "old" not in page
    assert page.startswith("before") and page.endswith("after")


def test_a_failed_check_does_not_cost_the_others(run, monkeypatch):
    def wrong(setup):
        one, other = torch.ones(4), torch.tensor([1.0, 1.0, 1.0, 1.2])
        yield from gpu_check.compared("close", {"sums": one + 1e-5}, {"sums": one}, torch.float32)
        yield from gpu_check.compared("far", {"sums": other}, {"sums": one}, torch.float32)
        yield from gpu_check.compared("rounded", {"sums": other}, {"sums": one}, torch.bfloat16)

    def broken(setup):
        raise RuntimeError("no kernel\nfor this card")

    monkeypatch.setattr(gpu_check, "CHECKS", {"wrong": wrong, "broken": broken, "right": lambda setup: iter(())})
    monkeypatch.setattr(gpu_check, "SPEEDS", {})
    status, results, page = run()
    assert status == 1 and results["seconds"].keys() == {"wrong", "broken", "right"}
    assert {row[0]: row[3] for row in results["rows"]} == {
        "close: sums": "passed",
        "far: sums": "failed",
        "rounded: sums": "passed",
        "broken": "failed: RuntimeError: no kernel",
    }
    assert "| far: sums | 0.1 | 0.00012 | failed |" in page


class HostReads(TorchDispatchMode):
    """Names the operations by which the host waits for the device or copies to it, which no CUDA graph can capture."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "_unique2", "unique_dim", "lift_fresh"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


def test_captured_step_does_not_wait_for_the_device(monkeypatch):
    # Transformers looks into the padding mask, except while a graph is captured.
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    step = gpu_check.cached_steps(gpu_check.Setup("tiny", "cpu", 1), 4, torch.bfloat16)
    step()  # makes the optimizer's states
    with HostReads() as reads:
        loss = step()
    assert not reads.found
    with HostReads() as reads:
        assert loss > 0
    assert reads.found == ["_local_scalar_dense"]


def test_no_part_starts_after_the_limit(run, monkeypatch):
    monkeypatch.setattr(gpu_check, "LIMIT", -1)
    status, results, _ = run()
    assert status == 0 and results["seconds"] == {}
    assert {row[3] for row in results["rows"]} == {"skipped: -1 s are over"}


def test_without_a_gpu_the_command_says_how_to_try_it(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main()
    assert "there is no CUDA GPU here: --device cpu --size tiny runs the same code" in capsys.readouterr().err
