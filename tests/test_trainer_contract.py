"""Contract with the library's Trainer: every argument takes effect, raises at once, or is listed as without effect."""

import ast
import json
import logging
import os
import warnings
from collections import Counter
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset, DatasetDict
from error_bounds import MEAN_ERROR, roundoff
from forked import run_python
from hub_server import serving
from processes import run_in_processes
from squares import make_benchmark, square_triplets
from tiny import Rows, make_model, make_processor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import default_collate
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.utils import logging as library_logging

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments
from pvlf_hf.training.argument_contract import ARGUMENTS, TRAINER_ARGUMENTS, Status, check_arguments

TESTS = Path(__file__).parent
FIELDS = {f.name: f for f in fields(TrainingArguments)}

SHOWN = {
    "test_trainer.py::test_parameter_groups_have_learning_rates_and_decay": "learning_rate weight_decay",
    "test_determinism.py::test_full_determinism_repeats_the_run_bit_for_bit": "full_determinism",
    "test_several_processes.py::trainer_of": "fsdp fsdp_config",
    "test_several_processes.py::train_with_one_that_leaves": "ddp_timeout",
    "test_training_resumes_from_output_dir": "output_dir save_strategy save_steps save_total_limit",
    "test_batch_settings_give_the_expected_steps_and_batch_sizes": (
        "max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps "
        "dataloader_drop_last accelerator_config"
    ),
    "test_seeds_and_sampling_strategy_determine_the_order_of_rows": "seed data_seed train_sampling_strategy",
    "test_loader_arguments_reach_the_data_loader": (
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers "
        "dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order"
    ),
    "test_ignore_data_skip_resumes_at_the_first_batch": "ignore_data_skip",
    "test_schedules_equal_those_of_the_library": "lr_scheduler_type lr_scheduler_kwargs warmup_steps",
    "test_optimizer_arguments_reach_the_optimizer": "optim optim_args adam_beta1 adam_beta2 adam_epsilon",
    "test_clipping_noise_and_bf16_change_the_losses": "max_grad_norm neftune_noise_alpha bf16",
    "test_unsupported_precision_raises": "fp16 tf32 use_cpu",
    "test_activation_checkpointing_reaches_the_fusion_layers": (
        "activation_checkpointing activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs"
    ),
    "test_torch_compile_captures_the_model_and_keeps_the_losses": (
        "torch_compile torch_compile_backend torch_compile_mode"
    ),
    "test_torch_empty_cache_steps_empties_the_cache_at_its_steps": "torch_empty_cache_steps",
    "test_logging_arguments_choose_the_logged_steps": "logging_strategy logging_steps logging_first_step",
    "test_log_levels_set_the_verbosity_of_each_process": "log_level log_level_replica",
    "test_disable_tqdm_hides_progress_bars": "disable_tqdm",
    "test_integrations_receive_logs_metrics_and_settings": (
        "report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id"
    ),
    "test_memory_metrics_and_overflow_debugging_are_reported": "skip_memory_metrics debug",
    "test_evaluation_arguments_choose_the_evaluated_steps": (
        "eval_strategy eval_steps eval_delay eval_on_start per_device_eval_batch_size"
    ),
    "test_save_only_model_omits_the_optimizer_and_resumes": "save_only_model",
    "test_best_checkpoint_follows_the_metric_and_its_direction": (
        "load_best_model_at_end metric_for_best_model greater_is_better"
    ),
    "test_enable_jit_checkpoint_saves_a_complete_checkpoint_on_signal": "enable_jit_checkpoint",
    "test_callback_states_are_restored_on_request": "restore_callback_states_from_checkpoint",
    "test_log_on_each_node_is_honoured": "log_on_each_node",
    "test_ddp_arguments_reach_the_wrapped_model": (
        "ddp_backend ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph"
    ),
    "PUSH": "push_to_hub hub_model_id hub_token",
    "test_hub_arguments_choose_what_is_pushed": "hub_private_repo hub_strategy hub_revision",
    "test_hub.py::TRAIN": "hub_always_push",
}
"""Honoured arguments by the test, helper or script that shows their effect; its source names them."""

REFUSED = {
    "auto_find_batch_size": True,
    "remove_unused_columns": True,
    "label_names": ["labels"],
    "optim_target_modules": "all-linear",
    "label_smoothing_factor": 0.1,
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "include_num_input_tokens_seen": "all",
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["loss"],
    "batch_eval_metrics": True,
    "save_on_each_node": True,
    "deepspeed": {"zero_optimization": {"stage": 2}},
    "parallelism_config": SimpleNamespace(),
}


class Recorder(TrainerCallback):
    """Callback that records the Trainer's events."""

    def __init__(self):
        self.steps, self.logs, self.args, self.evaluated = [], [], None, []

    def on_step_end(self, args, state, control, **_):
        self.steps.append(state.global_step)

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs))

    def on_evaluate(self, args, state, control, **_):
        self.args = args
        self.evaluated.append(state.global_step)


class Collator:
    """Collator of `Rows` that records the rows of each batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, rows):
        self.batches.append([int(row["target_ids"]) * 1000 + int(row["input_ids"].sum()) for row in rows])
        return default_collate(rows)


def make_args(folder, **settings):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, **settings}
    settings = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "finetuning": "frozen", **settings}
    return PVLFTrainingArguments(str(folder), **settings)


def make_trainer(
    folder, benchmark=None, model=None, rows=None, callbacks=(), data_collator=None, given=(), **settings
):
    torch.manual_seed(0)
    return PVLFTrainer(
        model or make_model(),
        make_args(folder, **settings),
        rows or Rows(),
        benchmark,
        processing_class=make_processor(),
        data_collator=data_collator or Collator(),
        callbacks=[*callbacks],
        **dict(given),
    )


def train(folder, *args, **settings):
    trainer = make_trainer(folder, *args, **settings)
    trainer.train()
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


# ---- all fields ----


def source_of(name):
    """Return the source of a test, helper or constant: `FILE::NAME`, or a name in this file."""
    file, _, name = name.rpartition("::")
    text = (TESTS / (file or Path(__file__).name)).read_text()
    for node in ast.parse(text).body:
        names = [node.name] if hasattr(node, "name") else [t.id for t in getattr(node, "targets", [])]
        if name in names:
            return "\n".join(
                ast.get_source_segment(text, part) for part in [*getattr(node, "decorator_list", []), node]
            )
    raise AssertionError(f"there is no {name} in {file}")


@pytest.mark.parametrize("name", FIELDS)
def test_every_argument_is_honoured_or_raises(name, tmp_path):
    assert name in ARGUMENTS, f"{name} is new in this version of the library: list it in argument_contract.ARGUMENTS"
    status, reason = ARGUMENTS[name]
    assert reason
    if status is Status.REFUSED:
        with pytest.raises(ValueError, match=f"^{name}="):
            make_args(tmp_path, **{name: REFUSED[name]})
    elif status is Status.HONOURED:
        (test,) = [test for test, names in SHOWN.items() if name in names.split()]
        assert name in source_of(test), f"{test} does not show {name}"
    else:
        assert name not in REFUSED and not any(name in names.split() for names in SHOWN.values())


@pytest.mark.reliability(
    9,
    "Every argument of the installed TrainingArguments is listed as honoured (by its effect, in a test), "
    "refused, or without meaning here",
    broken=(
        "src/pvlf_hf/training/argument_contract.py",
        '    "local_rank": (MEANINGLESS, "deprecated: the launcher\'s environment sets it"),\n',
        "",
    ),
)
def test_contract_lists_only_library_arguments(figure):
    assert ARGUMENTS.keys() == FIELDS.keys()
    assert REFUSED.keys() == {name for name, (status, _) in ARGUMENTS.items() if status is Status.REFUSED}
    assert TRAINER_ARGUMENTS.keys() <= signature(Trainer.__init__).parameters.keys()
    counts = Counter(status.name.lower() for status, _ in ARGUMENTS.values())
    figure(f"{len(FIELDS)} arguments: " + ", ".join(f"{count} {status}" for status, count in counts.items()))


def test_argument_of_a_newer_library_raises(tmp_path, monkeypatch):
    monkeypatch.delitem(ARGUMENTS, "eval_delay")
    make_args(tmp_path)
    with pytest.raises(ValueError, match="eval_delay=2 is unknown to this version of pvlf_hf"):
        make_args(tmp_path, eval_delay=2)


def test_changed_arguments_are_validated_again(tmp_path):
    args = make_args(tmp_path)
    args.label_smoothing_factor = 0.2
    with pytest.raises(ValueError, match="label_smoothing_factor=0.2"):
        PVLFTrainer(make_model(), args, Rows(), processing_class=make_processor())
    check_arguments(make_args(tmp_path).set_lr_scheduler(name="linear"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optim": "galore_adamw"}, "optim='galore_adamw' groups the weights itself"),
        ({"optim": "lomo"}, "optim='lomo'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by_length'"),
        ({"batch_by": "x", "train_sampling_strategy": "sequential"}, "batch_by='x' draws batches at random"),
        ({"accelerator_config": {"split_batches": True}}, "split_batches has no effect"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no effect with finetuning='frozen'"),
        ({"debug": "tpu_metrics_debug"}, "tpu_metrics_debug"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio=2.0 must be between 0 and 1"),
        ({"metric_for_best_model": "loss"}, "metric_for_best_model='loss': evaluate"),
        ({"save_strategy": "best"}, "metric_for_best_model=None"),
    ],
)
def test_combinations_without_effect_raise(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


# ---- the run and its batches ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "sizes", "steps"),
    [
        ({"max_steps": 3}, [8, 8, 8], 3),
        ({"num_train_epochs": 1}, [8, 8, 8, 8], 4),
        ({"num_train_epochs": 1, "dataloader_drop_last": False}, [8, 8, 8, 8, 4], 5),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 18}, [18] * 4, 4),
        ({"num_train_epochs": 1, "gradient_accumulation_steps": 2}, [8, 8, 8, 8], 2),
        (
            {"num_train_epochs": 1, "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
            [8, 8, 8, 8],
            1,
        ),
    ],
)
def test_batch_settings_give_the_expected_steps_and_batch_sizes(settings, sizes, steps, tmp_path):
    collator = Collator()
    settings = {"max_steps": -1, "per_device_train_batch_size": 8, **settings}
    trainer = train(tmp_path, data_collator=collator, **settings)
    assert [len(batch) for batch in collator.batches][: len(sizes)] == sizes  # one more may have been prefetched
    assert trainer.state.global_step == steps


def order(folder, **settings):
    collator = Collator()
    train(folder, data_collator=collator, max_steps=-1, num_train_epochs=1, **settings)
    return [row for batch in collator.batches for row in batch]


@pytest.mark.slow
def test_seeds_and_sampling_strategy_determine_the_order_of_rows(tmp_path):
    first = order(tmp_path, seed=1)
    assert first == order(tmp_path, seed=1) != order(tmp_path, seed=2)
    by_data_seed = order(tmp_path, seed=1, data_seed=7)
    assert by_data_seed == order(tmp_path, seed=2, data_seed=7) != first
    rows = Collator()
    rows([Rows()[row] for row in range(36)])
    assert order(tmp_path, train_sampling_strategy="sequential") == rows.batches[0] != first


def test_loader_arguments_reach_the_data_loader(tmp_path, squares):
    settings = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    settings |= {"dataloader_multiprocessing_context": "spawn", "dataloader_in_order": False}
    for rows in (Rows(), squares.to_iterable_dataset(num_shards=2)):
        trainer = make_trainer(tmp_path, rows=rows, **settings)
        trainer.args.dataloader_pin_memory = True  # the library sets it to False on a CPU
        loader = trainer.get_train_dataloader()
        assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)
        assert loader.multiprocessing_context.get_start_method() == "spawn"
        assert loader.pin_memory and not loader.in_order


@pytest.mark.slow
def test_ignore_data_skip_resumes_at_the_first_batch(tmp_path):
    whole = Collator()
    train(tmp_path, max_steps=4, data_collator=whole, save_strategy="steps", save_steps=2)
    for ignore_data_skip, expected in ((False, whole.batches[2:4]), (True, whole.batches[:2])):
        collator = Collator()
        trainer = make_trainer(tmp_path, max_steps=4, data_collator=collator, ignore_data_skip=ignore_data_skip)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert collator.batches[:2] == expected


def test_training_resumes_from_output_dir(tmp_path):
    settings = {"output_dir": str(tmp_path / "run"), "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    folder = settings.pop("output_dir")
    with pytest.raises(ValueError, match="resume_from_checkpoint=True, but .*run holds no complete checkpoint"):
        make_trainer(folder, **settings).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match=r"nothing' holds no trainer_state.json: name a folder checkpoint-N"):
        make_trainer(folder, **settings).train(resume_from_checkpoint=str(tmp_path / "nothing"))
    train(folder, max_steps=3, **settings)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    (tmp_path / "run" / "checkpoint-9").mkdir()  # a partial checkpoint, as a kill leaves it
    recorder = Recorder()
    make_trainer(folder, max_steps=4, callbacks=[recorder], **settings).train(resume_from_checkpoint=True)
    assert recorder.steps == [4]


@pytest.mark.reliability(
    9,
    "A run that is resumed from a checkpoint without optimiser says so, and its learning rate goes on at the "
    "checkpoint's step",
    broken=(
        "src/pvlf_hf/training/trainer.py",
        "checkpoint is not None and not holds_optimizer(Path(checkpoint))",
        "False",
    ),
)
def test_save_only_model_omits_the_optimizer_and_resumes(tmp_path, caplog, figure):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    whole = train(tmp_path / "whole", **settings)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert not (checkpoint / "optimizer.pt").exists()
    resumed = make_trainer(tmp_path / "resumed", **settings)
    with caplog.at_level(logging.WARNING):
        logging.getLogger("pvlf_hf").propagate = True
        resumed.train(resume_from_checkpoint=str(checkpoint))
    assert "holds no optimiser (save_only_model)" in caplog.text
    assert logged(whole, "learning_rate") == logged(resumed, "learning_rate")
    follows = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    follows |= {"metric_for_best_model": "eval_recall@1", **settings}
    with pytest.raises(ValueError, match="one that follows a metric cannot be taken up"):
        make_trainer(tmp_path, make_benchmark(), **follows).train(resume_from_checkpoint=str(checkpoint))
    figure("4 learning rates as without the interruption; a schedule that follows a metric is refused")


def test_enable_jit_checkpoint_saves_a_complete_checkpoint_on_signal(tmp_path):
    class Signalled(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:  # SIGTERM sets it 3 s later
                (jit,) = [c for c in trainer.callback_handler.callbacks if hasattr(c, "jit_manager")]
                jit.jit_manager.is_checkpoint_requested = True

    trainer = make_trainer(tmp_path, max_steps=5, enable_jit_checkpoint=True, callbacks=[Signalled()])
    trainer.train()
    assert trainer.state.global_step < 5
    (checkpoint,) = tmp_path.iterdir()
    assert (checkpoint / "optimizer.pt").exists() and (checkpoint / "trainer_state.json").exists()
    assert not (checkpoint / "checkpoint-is-incomplete.txt").exists()


@pytest.mark.slow
def test_callback_states_are_restored_on_request(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    settings |= {"metric_for_best_model": "eval_recall@1", "load_best_model_at_end": True}
    train(tmp_path, make_benchmark(), callbacks=[EarlyStoppingCallback(early_stopping_patience=7)], **settings)
    patience = []
    for restore in (False, True):
        callback = EarlyStoppingCallback(early_stopping_patience=3)
        trainer = make_trainer(
            tmp_path,
            make_benchmark(),
            callbacks=[callback],
            restore_callback_states_from_checkpoint=restore,
            **settings,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        (early,) = [c for c in trainer.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]
        patience.append(early.early_stopping_patience)
    assert patience == [3, 7]


# ---- optimisation ----


def rates(trainer, steps=10):
    """Return the fusion's learning rate at each step, relative to its initial rate."""
    trainer.create_optimizer_and_scheduler(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        values = []
        for _ in range(steps):
            values.append(trainer.optimizer.param_groups[-1]["lr"])
            trainer.lr_scheduler.step()
    return values


@pytest.mark.parametrize(
    ("name", "kwargs", "warmup_steps"),
    [
        ("linear", None, 0),
        ("linear", None, 3),
        ("constant", None, 0),
        ("constant_with_warmup", None, 2),
        ("polynomial", {"power": 2.0}, 1),
        ("cosine_with_restarts", {"num_cycles": 3}, 0),
        ("cosine_with_min_lr", {"min_lr_rate": 0.1}, 2),
        ("warmup_stable_decay", {"num_decay_steps": 4}, 2),
    ],
)
def test_schedules_equal_those_of_the_library(name, kwargs, warmup_steps, tmp_path):
    """Compare with the library's schedules; "cosine" honours its number of cycles."""
    settings = {"lr_scheduler_type": name, "lr_scheduler_kwargs": kwargs, "warmup_steps": warmup_steps}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-4)
    theirs = get_scheduler(name, optimizer, warmup_steps, 10, kwargs)
    expected = []
    for _ in range(10):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert rates(make_trainer(tmp_path, **settings)) == expected
    cycles = make_trainer(tmp_path, lr_scheduler_kwargs={"num_cycles": 1.0})
    values = rates(cycles)
    assert values[0] == 1e-4 and values[5] == pytest.approx(1e-6, rel=100 * MEAN_ERROR) and values[9] > 0.8e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_scheduler_kwargs": {"power": 2}}, r"'cosine' takes only 'num_cycles', not \['power'\]"),
        ({"lr_scheduler_type": "linear", "min_lr_ratio": 0.1}, "min_lr_ratio=0.1 is the floor of 'cosine' alone"),
        ({"lr_scheduler_type": "linear", "lr_scheduler_kwargs": {"a": 1}}, "'linear' cannot be made with .*'a'"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "'constant' takes none"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 3}, "warmup_steps=3: 'constant' has no warm-up"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "'warmup_stable_decay' cannot be made"),
        ({"lr_scheduler_type": "greedy", "eval_strategy": "steps"}, "metric_for_best_model='loss'"),
    ],
)
def test_impossible_schedules_raise(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_args(tmp_path, **settings)


def test_schedule_that_follows_a_metric_uses_its_direction(tmp_path):
    settings = {"eval_strategy": "steps", "metric_for_best_model": "recall@1"}
    trainer = make_trainer(tmp_path, make_benchmark(), lr_scheduler_type="reduce_lr_on_plateau", **settings)
    trainer.train()
    assert isinstance(trainer.lr_scheduler, ReduceLROnPlateau) and trainer.lr_scheduler.mode == "max"


def test_optimizer_arguments_reach_the_optimizer(tmp_path):
    adam = make_trainer(tmp_path, adam_beta1=0.5, adam_beta2=0.7, adam_epsilon=1e-3).create_optimizer()
    assert (adam.defaults["betas"], adam.defaults["eps"]) == ((0.5, 0.7), 1e-3)
    rmsprop = make_trainer(tmp_path, optim="rmsprop", optim_args="momentum=0.9").create_optimizer()
    assert type(rmsprop) is torch.optim.RMSprop and rmsprop.defaults["momentum"] == 0.9
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"momentum": 0.5})}
    sgd = make_trainer(tmp_path, finetuning="both", learning_rate=0.1, given=given).create_optimizer()
    assert type(sgd) is torch.optim.SGD
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in sgd.param_groups} == {
        (0.1, 0.5, 0.05),
        (1e-6, 0.5, 0.05),
    }
    for name in ("lr", "weight_decay"):
        with pytest.raises(ValueError, match=f"optimizer_cls_and_kwargs: {name}=0.2 has no effect"):
            make_trainer(tmp_path, given={"optimizer_cls_and_kwargs": (torch.optim.SGD, {name: 0.2})})
    with pytest.raises(ValueError, match=r"is not a subclass of torch.optim.Optimizer"):
        make_trainer(tmp_path, given={"optimizer_cls_and_kwargs": (make_model, {})})


def test_passed_optimizers_train(tmp_path):
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    steps = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.5)
    trainer = train(tmp_path, model=model, given={"optimizers": (sgd, steps)})
    assert logged(trainer, "learning_rate") == [0.5, 0.25] and not logged(trainer, "encoder_learning_rate")
    trainer = train(tmp_path, model=model, given={"optimizers": (torch.optim.SGD(model.parameters(), lr=0.5), None)})
    assert logged(trainer, "learning_rate")[0] == 0.5
    with pytest.raises(ValueError, match="pass the optimiser that the scheduler changes"):
        make_trainer(tmp_path, model=model, given={"optimizers": (None, steps)})
    with pytest.raises(ValueError, match="the optimiser holds no weight of this model"):
        make_trainer(tmp_path, given={"optimizers": (sgd, None)})


@pytest.mark.parametrize("finetuning", ["frozen", "text"])
def test_logged_learning_rate_is_that_of_the_fusion(finetuning, tmp_path):
    trainer = train(tmp_path, finetuning=finetuning, max_steps=4, encoder_learning_rate=1e-5)
    expected = [1e-4, 8.550178566873411e-05, 5.05e-05, 1.5498214331265904e-05]
    assert logged(trainer, "learning_rate") == pytest.approx(expected, rel=MEAN_ERROR)
    encoders = logged(trainer, "encoder_learning_rate")
    assert (encoders[0], len(encoders)) == (1e-5, 4) if finetuning == "text" else encoders == []
    assert encoders == sorted(encoders, reverse=True)


@pytest.mark.slow
def test_clipping_noise_and_bf16_change_the_losses(tmp_path):
    """Compare losses: bf16 and noise change the first one, other settings the later ones through the weights."""
    plain = logged(train(tmp_path, finetuning="text", max_steps=3, learning_rate=1e-2))
    for settings in ({"max_grad_norm": 1e-9, "optim": "sgd"}, {"neftune_noise_alpha": 50.0}, {"bf16": True}):
        changed = logged(train(tmp_path, finetuning="text", max_steps=3, learning_rate=1e-2, **settings))
        assert (changed[0] == plain[0]) == ("max_grad_norm" in settings), settings
        assert changed[1:] != plain[1:], settings
    model = make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(tmp_path, model=model, optim="sgd", weight_decay=0.0, max_grad_norm=1e-9)
    for name, parameter in model.named_parameters():
        # Two steps of at most learning rate times norm; each addition rounds a weight.
        torch.testing.assert_close(parameter, before[name], rtol=2 * roundoff(), atol=2 * 1e-4 * 1e-9)


def test_unsupported_precision_raises(tmp_path, monkeypatch):
    assert make_args(tmp_path, use_cpu=True).device.type == "cpu"
    with pytest.raises(ValueError, match="fp16 has no effect on a CPU: use bf16"):
        make_args(tmp_path, fp16=True)
    if torch.cuda.is_available():
        plain, half = (logged(train(tmp_path, use_cpu=False, fp16=fp16)) for fp16 in (False, True))
        assert plain != half == pytest.approx(plain, rel=0.05)
    else:
        with pytest.raises(ValueError, match="--tf32 requires"):
            make_args(tmp_path, tf32=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # accelerate launch --mixed_precision bf16
    assert make_args(tmp_path).settings()["bf16"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(ValueError, match="fp16 has no effect on a CPU"):
        make_args(tmp_path)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_activation_checkpointing_reaches_the_fusion_layers(tmp_path):
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        kwargs = {"use_reentrant": False, "determinism_check": "none"}
        old = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
        new = {"activation_checkpointing": True, "activation_checkpointing_kwargs": kwargs}
        trainer = train(tmp_path, **(new if name in new else old))
        layer = trainer.model.fusion.layers[0]
        assert layer.gradient_checkpointing
        assert layer._gradient_checkpointing_func.keywords["determinism_check"] == "none"


@pytest.mark.slow
def test_torch_compile_captures_the_model_and_keeps_the_losses(tmp_path):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = logged(train(tmp_path))
    assert not torch._dynamo.utils.counters["stats"]
    compiled = train(tmp_path, torch_compile=True, torch_compile_backend="eager")
    assert torch._dynamo.utils.counters["stats"]["calls_captured"] > 0
    assert logged(compiled) == plain  # this backend runs the operations eagerly
    torch._dynamo.reset()
    plugin = make_trainer(tmp_path, torch_compile_mode="max-autotune").accelerator.state.dynamo_plugin
    assert plugin.mode == "max-autotune"


def test_torch_empty_cache_steps_empties_the_cache_at_its_steps(tmp_path, monkeypatch):
    emptied = []
    monkeypatch.setattr("transformers.trainer.clear_device_cache", lambda *_, **__: emptied.append(1))
    train(tmp_path, max_steps=4, torch_empty_cache_steps=2)
    assert len(emptied) == 2


# ---- logs ----


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_strategy": "steps", "logging_steps": 2}, [2, 4]),
        ({"logging_steps": 2, "logging_first_step": True}, [1, 2, 4]),
        ({"logging_strategy": "epoch", "per_device_train_batch_size": 12}, [3, 5]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_logging_arguments_choose_the_logged_steps(settings, steps, tmp_path):
    trainer = train(tmp_path, max_steps=5, **settings)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == steps


def test_log_levels_set_the_verbosity_of_each_process(tmp_path):
    before = library_logging.get_verbosity()
    try:
        args = make_args(tmp_path, log_level="error", log_level_replica="critical")
        make_trainer(tmp_path, log_level="error")
        assert library_logging.get_verbosity() == logging.ERROR
        args.distributed_state.local_process_index = 1
        assert args.get_process_log_level() == logging.CRITICAL
    finally:
        args.distributed_state.local_process_index = 0
        library_logging.set_verbosity(before)


def test_disable_tqdm_hides_progress_bars(tmp_path, capfd):
    for disable_tqdm, kind in ((True, PrinterCallback), (False, ProgressCallback)):
        trainer = make_trainer(tmp_path, make_benchmark(), disable_tqdm=disable_tqdm)
        assert any(type(callback) is kind for callback in trainer.callback_handler.callbacks)
        capfd.readouterr()
        trainer.evaluate()
        assert ("it/s" in capfd.readouterr().err) != disable_tqdm


def test_integrations_receive_logs_metrics_and_settings(tmp_path, monkeypatch):
    """Train with an integration: it receives the run's losses, metrics and its own settings."""
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Recorder)
    own = {"run_name": "a", "project": "b", "trackio_space_id": "c", "trackio_bucket_id": "d"}
    own |= {"trackio_static_space_id": "e"}
    trainer = train(tmp_path, make_benchmark(), eval_strategy="steps", eval_steps=2, report_to="recorder", **own)
    (recorder,) = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Recorder)]
    assert any("loss" in logs for logs in recorder.logs) and any("eval_recall@1" in logs for logs in recorder.logs)
    assert {name: getattr(recorder.args, name) for name in own} == own


@pytest.mark.slow
def test_memory_metrics_and_overflow_debugging_are_reported(tmp_path):
    trainer = train(tmp_path, make_benchmark(), skip_memory_metrics=False)
    assert "train_mem_cpu_alloc_delta" in trainer.state.log_history[-1]
    assert "eval_mem_cpu_alloc_delta" in trainer.evaluate()
    assert not any("mem_cpu" in name for name in make_trainer(tmp_path, make_benchmark()).evaluate())
    model = make_model()
    with torch.no_grad():
        model.fusion.prompts.fill_(torch.inf)
    with pytest.raises(ValueError, match="inf/nan"):
        train(tmp_path, model=model, debug="underflow_overflow")


# ---- evaluation ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "steps", "eval_steps": 2}, [2, 4, 5]),  # always at the last step
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3}, [3, 4, 5]),
        ({"eval_strategy": "epoch", "per_device_train_batch_size": 12}, [3, 5]),
        ({"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 5}, [0, 5]),
    ],
)
def test_evaluation_arguments_choose_the_evaluated_steps(settings, steps, tmp_path, monkeypatch):
    recorder, sizes = Recorder(), []
    model = make_model()
    model.backbone.vision_model.register_forward_hook(
        lambda module, _, output: None if model.training else sizes.append(len(output.last_hidden_state))
    )
    train(
        tmp_path,
        make_benchmark(),
        model=model,
        callbacks=[recorder],
        max_steps=5,
        per_device_eval_batch_size=4,
        **settings,
    )
    assert recorder.evaluated == steps
    assert max(sizes) == 4


def test_evaluation_reports_its_speed(tmp_path):
    metrics = make_trainer(tmp_path, make_benchmark()).evaluate()
    queries = metrics["eval_samples_per_second"] * metrics["eval_runtime"]
    rounded = 0.5e-3 * metrics["eval_runtime"] + 0.5e-4 * metrics["eval_samples_per_second"] + 1e-6
    assert queries == pytest.approx(len(make_benchmark().queries), rel=0, abs=rounded)  # to 3 and 4 decimals
    several = make_trainer(tmp_path, {"a": make_benchmark(), "b": make_benchmark()})
    assert {"eval_a_recall@1", "eval_b_recall@1", "eval_a_runtime"} <= several.evaluate().keys()
    assert "test_recall@1" in several.evaluate("b", metric_key_prefix="test")


@pytest.mark.slow
def test_best_checkpoint_follows_the_metric_and_its_direction(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best", "load_best_model_at_end": True}
    settings |= {"max_steps": 3}
    trainers = {}
    for metric, greater_is_better in (("recall@1", None), ("eval_recall@5", False)):
        best = {"metric_for_best_model": metric, "greater_is_better": greater_is_better}
        trainer = train(tmp_path / metric, make_benchmark(), **best, **settings)
        values = logged(trainer, f"eval_{metric.removeprefix('eval_')}")
        assert trainer.state.best_metric == (min if greater_is_better is False else max)(values)
        trainers[metric] = trainer
    assert not trainers["eval_recall@5"].args.greater_is_better and trainers["recall@1"].args.greater_is_better
    with pytest.raises(
        ValueError, match=r"metric_for_best_model='recall@7': the evaluation reports \['eval_recall@1'"
    ):
        make_trainer(tmp_path, make_benchmark(), metric_for_best_model="recall@7")
    with pytest.raises(ValueError, match=r"reports \['eval_a_recall@1'"):
        make_trainer(tmp_path, {"a": make_benchmark()}, metric_for_best_model="recall@1")
    with pytest.raises(ValueError, match="metric_for_best_model='loss': evaluate.. has no loss"):
        make_args(tmp_path, eval_strategy="steps", save_strategy="steps", load_best_model_at_end=True)


def test_benchmarks_of_the_wrong_type_raise(tmp_path, squares):
    benchmark = make_benchmark()
    for wrong, message in (
        (squares, "eval_dataset must be a CIRBenchmark .* got Dataset: benchmark_from_triplets makes one"),
        ([benchmark], "got list"),
        ({"a": benchmark, "b": squares}, r"eval_dataset\['b'\] must be a CIRBenchmark"),
        ({}, "an empty dict"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, wrong)
    unlabelled = type(benchmark)("test", benchmark.queries.remove_columns("target_id"), benchmark.gallery)
    with pytest.raises(ValueError, match="eval_dataset has no target_id, so it cannot be scored"):
        make_trainer(tmp_path, unlabelled)
    with pytest.raises(ValueError, match=r"eval_dataset='c' is none of this trainer's benchmarks \['a'\]"):
        make_trainer(tmp_path, {"a": benchmark}).evaluate("c")


# ---- arguments of the Trainer itself ----


@pytest.mark.reliability(
    9,
    "Functions that the library's Trainer accepts and that would have no effect (compute_loss_func, "
    "compute_metrics, preprocess_logits_for_metrics, predict, ignore_keys) are refused",
    broken=("src/pvlf_hf/training/trainer.py", "        check_trainer_arguments(kwargs)\n", ""),
)
def test_unused_functions_raise(tmp_path, figure):
    for name in ("compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"):
        with pytest.raises(ValueError, match=f"^{name} is not supported"):
            make_trainer(tmp_path, given={name: lambda *_: None})
    trainer = make_trainer(tmp_path, make_benchmark())
    with pytest.raises(NotImplementedError, match="rank a benchmark with evaluate"):
        trainer.predict(Rows())
    with pytest.raises(ValueError, match="ignore_keys"):
        trainer.evaluate(ignore_keys=["hidden_states"])
    figure("5 refused")


def test_plain_training_arguments_raise(tmp_path):
    for args in (TrainingArguments(str(tmp_path), remove_unused_columns=False), None):
        with pytest.raises(ValueError, match=f"args is {type(args).__name__}: pass PVLFTrainingArguments"):
            PVLFTrainer(make_model(), args, Rows(), processing_class=make_processor())


@pytest.mark.slow
def test_model_init_makes_the_model_from_the_seed(tmp_path):
    def model_init():
        return make_model(seed=torch.initial_seed() % 1000)  # the seed that the Trainer set

    runs = []
    for seed in (3, 3, 4):
        args = make_args(tmp_path, finetuning="text", seed=seed)
        more = {"processing_class": make_processor(), "data_collator": default_collate, "model_init": model_init}
        trainer = PVLFTrainer(None, args, Rows(), **more)
        trainer.train()
        runs.append(logged(trainer))
        trained = {name.split(".")[1] for name, p in trainer.model.named_parameters() if not p.requires_grad}
        assert any("vision" in part for part in trained) and not any("text" in part for part in trained)
    assert runs[0] == runs[1] != runs[2]


def make_searcher(folder, metric="eval_recall@1", **settings):
    args = make_args(folder, metric_for_best_model=metric, **settings)
    given = {"processing_class": make_processor(), "data_collator": default_collate}
    return PVLFTrainer(None, args, Rows(), make_benchmark(), model_init=lambda trial: make_model(), **given)


def test_hyperparameter_search_needs_objective_and_direction(tmp_path):
    with pytest.raises(ValueError, match="hyperparameter_search has no objective: name a metric"):
        make_searcher(tmp_path, metric=None).hyperparameter_search()
    with pytest.raises(ValueError, match="direction is missing"):
        make_searcher(tmp_path).hyperparameter_search(compute_objective=lambda metrics: 1.0)


@pytest.mark.slow
def test_hyperparameter_search_trains_each_trial_from_its_own_start(tmp_path):
    """Search hyperparameters: every trial has its own model, arguments, weights and folder; recall is maximised."""
    optuna = pytest.importorskip("optuna")
    seen, recalls = [], []

    class Trains(TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **_):
            trains = {name.split("_")[0] for name, p in model.backbone.named_parameters() if p.requires_grad}
            seen.append((args.finetuning, "text" in trains, args.learning_rate, optimizer.param_groups[-1]["lr"]))

        def on_evaluate(self, args, state, control, metrics, **_):
            recalls.append(metrics["eval_recall@1"])

    def search(space, settings, **given):
        trainer = make_searcher(tmp_path, **settings)
        trainer.add_callback(Trains)
        choices = {name: list(values) for name, values in space.items()}
        given = {"sampler": optuna.samplers.GridSampler(choices, seed=0), "n_trials": 2, **given}

        def hp_space(trial):
            return {name: trial.suggest_categorical(name, values) for name, values in choices.items()}

        return trainer.hyperparameter_search(hp_space, **given)

    kept = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    best = search({"learning_rate": [0.1], "finetuning": ["text", "frozen"]}, kept)  # two steps, each evaluated
    assert sorted(seen) == [("frozen", False, 0.1, 0.1), ("text", True, 0.1, 0.1)]
    assert best.objective == max(recalls[1::2]) and best.hyperparameters["finetuning"] in ("text", "frozen")
    assert all((tmp_path / f"run-{n}" / "checkpoint-2" / "trainer_state.json").exists() for n in (0, 1))
    rates = {"learning_rate": [0.1, 0.2]}
    for direction, expected in (("minimize", 0.1), ("maximize", 0.2)):
        once = {"max_steps": 1}
        found = search(rates, once, compute_objective=lambda metrics: seen[-1][2], direction=direction)
        assert found.objective == expected
    with pytest.raises(ValueError, match="learning_rate=-1.0"):
        search({"learning_rate": [-1.0]}, {}, n_trials=1)


# ---- training data ----


@pytest.fixture
def squares(tmp_path):
    (tmp_path / "squares").mkdir()
    return square_triplets(tmp_path / "squares", ["red", "green", "blue", "white"], lambda _, b: f"make it {b}")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        (
            "caption",
            None,
            "train_dataset: 1 rows cannot be used, first: row 5 .counted from 0., target_id 'white': caption is None",
        ),
        ("caption", "  ", "first: row 5 .counted from 0., target_id 'white': caption is empty"),
        ("target_id", None, "first: row 5 .counted from 0., target_id is None, but it must be text or a number"),
        ("target", None, "row 5 of train_dataset, with target_id 'white': target is None, give it an image"),
        ("reference", None, "row 5 of train_dataset, with target_id 'white': reference is None"),
    ],
)
def test_invalid_row_raises_before_the_first_step(column, value, message, squares, tmp_path):
    table = squares.to_dict()
    table[column][5] = value
    bad = Dataset.from_dict(table, features=squares.features)

    def make(rows):
        return PVLFTrainer(make_model(), make_args(tmp_path), rows, processing_class=make_processor())

    with pytest.raises(ValueError, match=message):
        make(bad)
    make(bad.select([row for row in range(12) if row != 5]))
    shifted = bad.select([*range(3), *range(4, 12)])
    with pytest.raises(ValueError, match=message.replace("row 5", "row 4")):
        make(shifted)
    if column == "caption":  # a stream is checked row by row
        with pytest.raises(ValueError, match="row 5 of the stream in pass 0: target_id 'white': caption is"):
            make(bad.to_iterable_dataset()).train()


def test_untrainable_data_raises(squares, tmp_path):
    with pytest.raises(ValueError, match=r"train_dataset has splits \['train'\]: pass one of them"):
        make_trainer(tmp_path, rows=DatasetDict(train=squares))
    stream = squares.to_iterable_dataset()
    for settings, name in (
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy"),
        ({"data_seed": 3}, "data_seed"),
        ({"accelerator_config": {"dispatch_batches": True}}, "accelerator_config.dispatch_batches"),
    ):
        with pytest.raises(ValueError, match=f"{name}: without effect on a stream"):
            make_trainer(tmp_path, rows=stream, **settings)


# ---- several processes and the Hub ----


def nodes(folder):
    """Return whether each of two processes logs, as the only one of its node."""
    os.environ["LOCAL_RANK"] = "0"
    return [make_args(folder, log_on_each_node=each).should_log for each in (False, True)]


@pytest.mark.slow
def test_log_on_each_node_is_honoured(tmp_path):
    """Run with `log_on_each_node`: the second node's process logs, too."""
    assert run_in_processes(2, nodes, tmp_path) == [[True, True], [False, True]]


def wrapped(folder, settings):
    trainer = make_trainer(folder, **settings)
    trainer.train()
    model = trainer.model_wrapped
    names = ("find_unused_parameters", "broadcast_buffers", "bucket_bytes_cap", "static_graph")
    assert trainer.accelerator.distributed_type == DistributedType.MULTI_CPU
    return torch.distributed.get_backend(), *(getattr(model, name) for name in names)


@pytest.mark.slow
def test_ddp_arguments_reach_the_wrapped_model(tmp_path):
    settings = {"ddp_backend": "gloo", "ddp_find_unused_parameters": True, "ddp_bucket_cap_mb": 3}
    settings |= {"ddp_broadcast_buffers": False, "ddp_static_graph": True}
    for outcome in run_in_processes(2, wrapped, tmp_path, settings):
        assert outcome == ("gloo", True, False, 3 * 2**20, True), outcome


PUSH = """
import json
import sys

sys.path.insert(0, sys.argv[1])
from huggingface_hub import create_branch, create_repo
from test_trainer_contract import make_trainer

for name, settings in json.loads(sys.argv[2]).items():
    settings |= {"hub_model_id": f"you/{name}", "hub_token": "hf_owner", "save_strategy": "steps", "save_steps": 1}
    if "hub_revision" in settings:
        create_repo(f"you/{name}", token="hf_owner")
        create_branch(f"you/{name}", branch=settings["hub_revision"], token="hf_owner")
    trainer = make_trainer(name, push_to_hub=True, **settings)
    trainer.train()
    trainer.push_to_hub("Done")
"""


@pytest.mark.slow
def test_hub_arguments_choose_what_is_pushed(tmp_path):
    kinds = {
        "end": {"hub_strategy": "end", "hub_private_repo": True},
        "each": {"hub_strategy": "every_save", "hub_revision": "next"},
        "last": {"hub_strategy": "checkpoint"},
    }
    kinds = {name: {"hub_always_push": True, **settings} for name, settings in kinds.items()}
    with serving({"hf_owner": ("you", True)}) as hub:
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        env = {**known, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        done = run_python(["-c", PUSH, TESTS, json.dumps(kinds)], env=env, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        end, each, last = (hub.repositories[f"you/{name}"] for name in kinds)
    assert (end.private, each.private) == (True, False)
    steps = ["Training in progress, step 1", "Training in progress, step 2"]
    assert end.history() == ["initial commit", "Done"]
    assert each.history("next") == ["initial commit", *steps, "Done"] and each.history() == ["initial commit"]
    files = [its.commits[its.branches[branch]].files for its, branch in ((each, "next"), (last, "main"))]
    assert [any(name.startswith("last-checkpoint/") for name in its) for its in files] == [False, True]
