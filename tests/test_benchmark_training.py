"""The training benchmark at toy size: its alternatives compute the same step, and its report is readable."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "train_scripts"))

import benchmark_training as benchmark
import measuring
from error_bounds import MEAN_ERROR, rounding
from forked import run_python
from measuring import Products, Table, Timing, markdown, paced, peak_memory
from tiny import make_model


@pytest.fixture
def model():
    model = make_model("blip", dropout=0.0).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "is_causal"):
            module.dropout = 0.0
    return model


@pytest.mark.slow
def test_all_training_modes_take_the_same_step(model):
    torch.manual_seed(1)
    batch = benchmark.make_batch(model, 4)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = {}
    for name, way in {**benchmark.BOTH, "in chunks": benchmark.Way(chunk_size=3)}.items():
        model.load_state_dict(weights)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        first = benchmark.step(model, optimizer, batch, way)
        losses[name] = torch.stack([first, benchmark.step(model, optimizer, batch, way)])
    wanted = losses.pop(next(iter(benchmark.BOTH)))
    assert (wanted[0] - wanted[1]).abs() > 0.02  # the step has an effect
    model.load_state_dict(weights)

    def two_steps(model, batch):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return {"losses": torch.stack([benchmark.step(model, optimizer, batch) for _ in range(2)])}

    error = {dtype: rounding(two_steps, model, batch, dtype)["losses"] for dtype in (torch.float32, torch.bfloat16)}
    for name, loss in losses.items():
        atol = error[torch.bfloat16 if "bf16" in name else torch.float32]
        torch.testing.assert_close(loss, wanted, rtol=0, atol=atol, msg=f"{name}: {loss} instead of {wanted}")


@pytest.fixture
def forked_measurements(monkeypatch):
    """Measure memory in forks of a process that has imported the libraries."""

    def run(command, *, stdout, text, check):
        python, *rest = command
        assert python == sys.executable and stdout == subprocess.PIPE and text and check
        done = run_python(rest, libraries=True)
        assert done.returncode == 0, done.stderr
        return done

    monkeypatch.setattr(measuring, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))


@pytest.mark.slow
def test_cached_steps_need_fewer_operations(forked_measurements):
    # Two of the four tables of `benchmark.cache`.
    tables = [benchmark.encoded_or_cached("tiny", mode, 1, keep) for mode, keep in (("frozen", False), ("text", True))]
    titles = [table.title for table in tables]
    assert titles == ["finetuning=frozen, batch 8", "finetuning=text, batch 8, memory kept"]
    for table in tables:
        floors = dict(zip(table.timings, map(float, table.columns["floor, s"]), strict=True))
        assert floors["encoded"] > floors["cached"] > 0
        assert all(float(peak.split()[0]) > 0.1 for peak in table.columns["peak memory, GB"])


def test_batch_timings_are_divided_by_their_triplets():
    timings = {name: Timing(name, [seconds]) for name, seconds in (("small", 2.0), ("large", 4.0))}
    each = benchmark.by_the_triplet(timings, rows=[2, 8])
    text = markdown(Table("sizes", each, benchmark.memory([10**9, 3 * 10**9])))
    assert "| small | 1 | 1.00 [1.00, 1.00] | 1.00 (100%) |" in text
    assert "| large | 0.5 | 2.00 [2.00, 2.00] | 3.00 (300%) |" in text


class Clock:
    """Clock of a processor that takes twice as long in each round."""

    def __init__(self):
        self.now, self.slowness = 0.0, 1.0

    def __matmul__(self, other):
        self.now += 0.002 * self.slowness
        return self

    def work(self, seconds):
        self.now += seconds * self.slowness
        self.slowness *= 2


def test_share_of_the_matrix_rate_is_that_of_each_round(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(torch, "randn", lambda *shape, **options: clock)
    products = Products(torch.float32, "tiny")
    assert products.number in (5, 6) and products.operations == 2 * 256**3 * products.number
    work = {"encoder": 300 * 2 * 256**3, "other": 150 * 2 * 256**3}  # floors of 0.6 and 0.3 s at first
    calls = {"other": lambda: clock.work(0.5), "encoder": lambda: clock.work(0.5)}
    paces = paced(calls, dict.fromkeys(calls, torch.float32), work, "tiny", rounds=3, warmup=0)
    seconds = [pace.timing.seconds for pace in (paces["other"], paces["encoder"])]
    assert seconds == [pytest.approx([0.5, 2, 8], rel=MEAN_ERROR), pytest.approx([1, 4, 16], rel=MEAN_ERROR)]
    # Products of a round run at a quarter of the speed of its first alternative.
    assert paces["other"].share == pytest.approx(0.3 * 4 / 0.5, rel=MEAN_ERROR)
    assert paces["encoder"].share == pytest.approx(0.6 * 4 / 1, rel=MEAN_ERROR)
    assert paces["encoder"].floor.seconds == pytest.approx([2.4, 9.6, 38.4], rel=MEAN_ERROR)


@pytest.mark.slow
def test_peak_memory_excludes_the_parent_process():
    held = bytearray(300 * 2**20)  # would be inherited
    small, large = peak_memory("pass"), peak_memory("x = bytearray(100 * 2**20)")
    assert small < 50 * 2**20 < len(held)
    assert 100 * 2**20 < large < 150 * 2**20
