"""Two and four real processes (gloo), replicated (DDP) and sharded (FSDP), against one with the complete batch."""

import copy
import math
import os
import re
import signal
import time
from functools import cache, partial

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from error_bounds import rounding, sgd, training_error
from processes import run_in_processes
from squares import make_benchmark
from tiny import Rows, make_model, make_processor
from torch.utils.data import Subset, default_collate
from transformers import TrainerCallback

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments, evaluate
from pvlf_hf.commands.arguments import leave

pytestmark = pytest.mark.slow

BATCH = 12  # batch size of all processes together


class FirstGradients(TrainerCallback):
    """Callback that stores the gradients of the first step."""

    def __init__(self):
        self.found = {}

    def on_pre_optimizer_step(self, args, state, control, model, **_):
        if not self.found:
            self.found = {name: whole(p.grad).clone().numpy() for name, p in model.named_parameters()}


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trainer_of(folder, rows, sharded=False, callbacks=(), dropout=0.0, **settings):
    settings = {"max_steps": 3, "save_strategy": "no", "use_cpu": True, **settings}
    if sharded:
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}
    args = PVLFTrainingArguments(
        str(folder),
        learning_rate=1e-3,
        encoder_learning_rate=1e-3,
        logging_steps=1,
        disable_tqdm=True,
        train_sampling_strategy="sequential",
        # Adam's first steps are signs, which differ for a gradient that is only rounding error (a key's bias)
        optim="sgd",
        **settings,
    )
    args.per_device_train_batch_size = BATCH // args.world_size
    if sharded:
        # Accelerate shards on GPUs only and silently replicates on CPUs, although its sharding code runs on CPUs, too.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    model = make_model(dropout=dropout)
    collator = default_collate
    return PVLFTrainer(
        model, args, rows, processing_class=make_processor(), data_collator=collator, callbacks=list(callbacks)
    )


def train(folder, sharded=False, settings=None):
    """Return losses, first gradients, and after three steps the weights and the results of every query."""
    gradients = FirstGradients()
    trainer = trainer_of(folder, Rows(), sharded, [gradients], **(settings or {}))
    trainer.train()
    assert trainer.is_fsdp_enabled == sharded and trainer.accelerator.num_processes == trainer.args.world_size
    model = trainer.model_wrapped if sharded else trainer.model
    kind = type(next(model.parameters())).__name__
    weights = {name: whole(p.detach()).clone().numpy() for name, p in model.named_parameters()}
    outcome = evaluate(model, trainer.processing_class, make_benchmark(), batch_size=2, progress=False)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, gradients.found, outcome.per_query, kind, weights


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    (outcome,) = run_in_processes(1, train, tmp_path_factory.mktemp("alone"))
    return outcome


def rows_error(steps, rate=1e-3, dropout=0.0):
    """Return how far apart two runs of `trainer_of` may be, by name; at temperature 0.01 losses are tens."""
    rows = Rows()
    batch = default_collate([rows[row] for row in range(BATCH)])
    return training_error(make_model(dropout=dropout).train(), batch, steps, rate)


@cache
def distances_allowed():
    """Return the allowed results of `compare`: losses, gradients (worst and mean), and weights by name."""
    rows, model = Rows(), make_model(dropout=0.0).train()
    batch = default_collate([rows[row] for row in range(BATCH)])
    first, error = sgd(copy.deepcopy(model), batch, 1, 1.0), rows_error(3)
    gradients = rounding(partial(sgd, steps=1, rate=1.0), model, batch)
    names = [name for name in gradients if name != "losses"]
    sizes = torch.cat([first[name].abs().flatten() for name in names])
    mean = sum(gradients[name] * first[name].numel() for name in names) / sizes.sum().item()
    worst = max(gradients[name] for name in names) / sizes.max().item()
    return (error.pop("losses") / first["losses"].item(), worst, mean), error


def compare(alone, together):
    """Return the distances of losses, and of gradients (worst and mean), relative to the largest and the mean one."""
    losses, gradients, per_query, _, weights = together
    expected, reference, expected_queries, _, expected_weights = alone
    loss = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    ours, theirs = (np.concatenate([g[name].ravel() for name in reference]) for g in (gradients, reference))
    distance = np.abs(ours - theirs)
    distances = loss, float(distance.max() / np.abs(theirs).max()), float(distance.mean() / np.abs(theirs).mean())
    allowed, error = distances_allowed()
    assert all(distance <= bound for distance, bound in zip(distances, allowed, strict=True)), (distances, allowed)
    assert weights.keys() == expected_weights.keys()
    for name in weights:
        assert np.abs(weights[name] - expected_weights[name]).max() <= error[name], name
    assert per_query == expected_queries  # every query once, in order, with the same rank
    return distances


def power_of_ten(distance):
    """Render the next power of ten above a distance."""
    return f"{10 ** math.ceil(math.log10(distance)):.0e}"


def check(alone, number, sharded, folder, **settings):
    """Compare every process's outcome with that of one process; return the distances as text."""
    outcomes = run_in_processes(number, train, folder, sharded, settings)
    assert all(isinstance(outcome, tuple) for outcome in outcomes), outcomes
    assert {outcome[3] for outcome in outcomes} == {"DTensor" if sharded else "Parameter"}
    loss, worst, mean = (max(distances) for distances in zip(*(compare(alone, its) for its in outcomes), strict=True))
    loss, worst, mean = map(power_of_ten, (loss, worst, mean))
    kind = "FSDP" if sharded else "DDP"
    return f"{number} {kind}: losses within {loss}, gradients within {worst} at worst, {mean} in the mean"


@pytest.mark.reliability(
    3,
    "2 and 4 processes (DDP) and 2 (FSDP 2) have, over three steps, the losses and gradients of one process "
    "with the complete batch; the evaluation afterwards covers each of 5 queries and 9 images once, with equal"
    " ranks",
    broken=(
        "src/pvlf_hf/training/gather.py",
        "return gradient.chunk(dist.get_world_size())[dist.get_rank()]",
        "return gradient.chunk(dist.get_world_size())[0]",
    ),
)
@pytest.mark.parametrize(("number", "sharded"), [(2, False), (4, False), (2, True)])
def test_several_processes_equal_one(alone, tmp_path, number, sharded, figure):
    figure(check(alone, number, sharded, tmp_path))


def test_gradient_caching_in_two_processes_equals_one(alone, tmp_path):
    """Train on six rows in each process, in chunks of four and two."""
    check(alone, 2, False, tmp_path, gradient_cache_chunk_size=4, loss_chunk_size=4)


def test_without_gathering_there_are_fewer_negatives(alone, tmp_path):
    """Show that gathering makes a difference, without which the tests above could not fail."""
    for losses, *_ in run_in_processes(2, train, tmp_path, False, {"gather_negatives": False}):
        assert abs(losses[0] - alone[0][0]) > 0.05


def leave_late(folder):
    """Return whether everything was written and the connections were closed when this process could exit."""
    state = PartialState(cpu=True)
    if state.process_index == 1:
        time.sleep(2)
        (folder / "written").touch()
    leave()
    return (folder / "written").exists() and not torch.distributed.is_initialized()


@pytest.mark.reliability(
    3,
    "A finished process waits for the others, so that no launcher kills one during a write",
    broken=("src/pvlf_hf/commands/arguments.py", "        state.wait_for_everyone()\n", ""),
)
def test_processes_wait_for_the_slowest(tmp_path, figure):
    assert run_in_processes(2, leave_late, tmp_path) == [True, True]
    figure("2 processes, one 2 s behind")


def losses_of(folder, rows, **settings):
    """Return the losses of one epoch in row order."""
    trainer = trainer_of(folder, Subset(Rows(), rows), dataloader_drop_last=False, **settings)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.reliability(
    3,
    "A last batch too short to be shared, if kept (`dataloader_drop_last=False`), is filled with the first "
    "rows of the epoch, as the losses show, and no process waits forever",
    broken=(
        "src/pvlf_hf/training/training_args.py",
        "        super().__post_init__(*args, **kwargs)\n",
        "        self.accelerator_config = {'even_batches': False}\n        super().__post_init__(*args, **kwargs)\n",
    ),
)
def test_uneven_last_batch_equals_one_process(tmp_path, figure):
    together = run_in_processes(2, losses_of, tmp_path, [*range(28)])
    (expected,) = run_in_processes(1, losses_of, tmp_path, [*range(28), *range(8)])
    assert len(expected) == 3
    for losses in together:
        assert losses == pytest.approx(expected, abs=rows_error(3)["losses"])
    distance = max(abs(a - b) / b for losses in together for a, b in zip(losses, expected, strict=True))
    figure(f"28 rows, 12 a step, 2 processes: 3 steps, losses within {power_of_ten(distance)}")


class Leaves(TrainerCallback):
    """Callback that sends the second process a signal after two steps."""

    def __init__(self, signal_number):
        self.signal = signal_number

    def on_step_end(self, args, state, control, **_):
        if args.process_index == 1 and state.global_step == 2:
            os.kill(os.getpid(), self.signal)


def train_with_one_that_leaves(folder, signal_number):
    trainer_of(folder, Rows(), callbacks=[Leaves(signal_number)], ddp_timeout=5).train()


@pytest.mark.reliability(
    3,
    "If a process dies (SIGKILL) or hangs (SIGSTOP), the others end with an error, immediately or after `ddp_timeout`",
    broken=("src/pvlf_hf/training/training_args.py", "_set_pg_timeout(timedelta(seconds=self.ddp_timeout))", "pass"),
)
@pytest.mark.parametrize(
    ("signal_number", "message"),
    [(signal.SIGKILL, "Connection (reset|closed) by peer"), (signal.SIGSTOP, "Timed out waiting 5000ms")],
    ids=["dies", "hangs"],
)
def test_lost_process_ends_training_with_an_error(tmp_path, figure, signal_number, message):
    other, its = run_in_processes(2, train_with_one_that_leaves, tmp_path, signal_number, timeout=60, grace=2)
    assert isinstance(other, str) and re.search(message, other), other
    assert its == ("killed by SIGKILL" if signal_number == signal.SIGKILL else "not ended in time")
    figure(f"{signal_number.name}: {re.search(message, other)[0]}")
