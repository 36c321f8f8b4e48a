"""Recipes of the methods: what the Trainer makes of them equals the optimisation of the reference implementations."""

from math import cos, pi
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from inverted import TOLERANCES, io_of, make_processor, prompts_of, reference_model, within
from PIL import Image

from pvlf_hf import PVLFTrainer
from pvlf_hf.commands.train import parse_arguments
from pvlf_hf.training.objectives import SAMPLES, SampleCollator

RECIPES = Path(__file__).parents[1] / "train_scripts" / "configs" / "methods"

TRACE = ("--learning_rate=1e-3", "--lr_scheduler_type=constant", "--warmup_steps=0", "--min_lr_ratio=0.01")
"""Flags of the fixtures' steps, which were taken at a constant and higher rate than the recipes' own."""


class FixtureCollator(SampleCollator):
    """Collator that gives the fixture's batch of each step, whatever the rows."""

    def __init__(self, method, batches):
        super().__init__(make_processor(method))
        self.batches = iter(batches)

    def __call__(self, rows):
        assert len(rows) == 4
        return next(self.batches)


class RecordingTrainer(PVLFTrainer):
    """Trainer that keeps its losses as they are."""

    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.losses = [*getattr(self, "losses", ()), loss.detach().clone()]
        return loss


def trainer_of(method, folder, *flags, batches=()):
    """Return a trainer of the reference's model by the method's recipe, with flags after it."""
    given = [f"--output_dir={folder}", "--use_cpu=true", "--save_strategy=no", "--disable_tqdm=true", *flags]
    given += ["--per_device_train_batch_size=4", "--dataloader_num_workers=0", "--report_to=none"]
    _, _, args = parse_arguments([str(RECIPES / f"{method}.yaml"), *given])
    row = {"image": Image.new("RGB", (32, 32)), "caption": "a red dog", "concept": "dog"}
    rows = Dataset.from_dict({name: [row[name]] * 20 for name in SAMPLES[method].columns})
    collator = FixtureCollator(method, batches)
    return RecordingTrainer(
        reference_model(method), args, rows, processing_class=collator.processor, data_collator=collator
    )


def batches_of(method):
    io = io_of(method)
    if method == "pic2word":
        return [{"pixel_values": io["pixel_values"], "input_ids": prompts_of(method)}] * 3
    noises = io["train.noise_uniform"][..., None] * io["train.noise_normal"]
    ids = {"input_ids": io["train.replaced_ids"], "caption_ids": io["train.original_ids"]}
    return [{**ids, "noise": noise} for noise in noises]


TRACES = {
    "pic2word": {"trace.fc_out.weight": "output.weight", "trace.layers.0.0.bias": "layers.0.bias"},
    "lincir": {"train.after_3_steps.layers.6.weight": "output.weight"},
}


def trained(method, folder, *flags):
    """Train three steps on the fixture's batches; return the trainer."""
    trainer = trainer_of(method, folder, "--max_steps=3", *TRACE, *flags, batches=batches_of(method))
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", TRACES)
def test_three_steps_by_the_recipe_equal_the_reference(method, tmp_path):
    """Train by weight decay, its groups, betas, epsilon and clipping of the recipe."""
    trainer, io = trained(method, tmp_path), io_of(method)
    within(torch.stack(trainer.losses), io["trace.loss" if method == "pic2word" else "train.losses"])
    for theirs, ours in TRACES[method].items():
        within(trainer.model.mapping.get_parameter(ours), io[theirs], atol=TOLERANCES["weights"])


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        ("pic2word", "--weight_decay=0.01"),
        ("pic2word", "--decay_norms_and_biases=true"),
        ("pic2word", "--adam_beta2=0.999"),
        ("pic2word", "--max_grad_norm=0.1"),
        ("lincir", "--weight_decay=0"),
        ("lincir", "--adam_beta1=0.8"),
    ],
)
def test_a_wrong_line_of_a_recipe_moves_the_weights(method, wrong, tmp_path):
    model, io = trained(method, tmp_path, wrong).model, io_of(method)
    off = [(model.mapping.get_parameter(ours) - io[theirs]).abs().max() for theirs, ours in TRACES[method].items()]
    assert max(off) > 1e-5


def cosine_after_warmup(step, total, warmup=10_000):
    """Return the rate of Pic2Word's code at a step, as a share."""
    if step < warmup:
        return (step + 1) / warmup
    return (1 + cos(pi * (step - warmup) / (total - warmup))) / 2


ADAM = {"betas": (0.9, 0.999), "eps": 1e-8}
PIC2WORD = {"betas": (0.9, 0.98), "eps": 1e-6, "decay": 0.1, "decay of biases": 0.0}
ON_EVERYTHING = {**ADAM, "decay": 0.01, "decay of biases": 0.01}
FACTS = {
    "pic2word": (PIC2WORD, cosine_after_warmup),
    "context_i2w": (PIC2WORD, cosine_after_warmup),
    "searle": (ON_EVERYTHING, None),
    "lincir": (ON_EVERYTHING, None),
    "palavra": ({**ADAM, "decay": 0.0, "decay of biases": 0.0}, None),
}
"""Optimiser and schedule of each method's code; None for a constant rate. All start from 1e-4 and clip nothing."""


@pytest.mark.parametrize("method", FACTS)
def test_optimizers_of_the_recipes_are_those_of_the_methods(method, tmp_path):
    expected, schedule = FACTS[method]
    trainer, total = trainer_of(method, tmp_path), 50_000
    trainer.create_optimizer_and_scheduler(total)
    optimizer, names = trainer.optimizer, {p: name for name, p in trainer.model.named_parameters()}
    assert isinstance(optimizer, torch.optim.AdamW) and not trainer.args.max_grad_norm
    found = {}
    for group in optimizer.param_groups:
        assert (group["initial_lr"], group["betas"], group["eps"]) == (1e-4, expected["betas"], expected["eps"])
        found |= {names[p]: group["weight_decay"] for p in group["params"]}
    assert found.keys() == {n for n, _ in trainer.model.named_parameters() if not n.startswith("backbone.")}
    for name, decay in found.items():
        assert decay == expected["decay of biases" if name.endswith("bias") or "norm" in name else "decay"], name
    for factor in trainer.lr_scheduler.lr_lambdas:
        for step in (0, 1, 9_999, 10_000, 10_001, 30_000, total - 1):
            exact = 1 if schedule is None else schedule(step, total)
            assert factor(step) == pytest.approx(exact, abs=1e-12), step


def test_the_first_step_of_a_warm_up_trains(tmp_path):
    """Train by the recipe's warm-up of 10,000 steps: Pic2Word's code counts its steps from 1."""
    trainer = trainer_of("pic2word", tmp_path, "--max_steps=3", "--logging_steps=1", batches=batches_of("pic2word"))
    trainer.train()
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged == pytest.approx([1e-8, 2e-8, 3e-8])
