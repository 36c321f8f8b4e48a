"""Training in one process: trained weights, learning rates, resuming, checkpoint selection, errors."""

import json
import math
from collections import Counter

import pytest
import torch
from datasets import Dataset, Image
from error_bounds import MEAN_ERROR, assert_within, exact_loss, training_error
from squares import square_triplets
from tiny import make_model
from transformers.models.blip.modeling_blip import BlipMLP
from transformers.models.blip.modeling_blip_text import BlipTextIntermediate

from pvlf_hf import CIRBenchmark, PVLFModel, PVLFTrainer, PVLFTrainingArguments
from pvlf_hf.models.modeling_pvlf import PVLFFusionLayer

# Colours, and the tokens of the tiny tokenizer that name them.
TOKENS = {"red": "red", "green": "green", "blue": "blue", "black": "dark", "white": "bright"}
TOKENS |= {"yellow": "hat", "purple": "dog", "orange": "cat"}
COLOURS = list(TOKENS)


@pytest.fixture
def squares(tmp_path):
    """Return triplets of coloured squares: "make it c" from any colour has square c as its target."""
    return square_triplets(tmp_path, COLOURS, lambda _, target: f"make it {TOKENS[target]}")


@pytest.fixture
def benchmark(squares, tmp_path):
    references = [a for a in COLOURS for b in COLOURS if a != b]
    files = [str(tmp_path / f"{colour}.png") for colour in COLOURS]
    gallery = Dataset.from_dict({"image": files, "image_id": COLOURS}).cast_column("image", Image())
    queries = squares.add_column("reference_id", references).remove_columns("target")
    return CIRBenchmark("squares", queries.select(range(0, len(queries), 5)), gallery)


def arguments(folder, **kwargs):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        **kwargs,
    }
    return PVLFTrainingArguments(output_dir=str(folder), use_cpu=True, disable_tqdm=True, report_to="none", **settings)


def clone(model):
    again = PVLFModel(model.config)
    again.load_state_dict(model.state_dict())
    return again


@pytest.mark.parametrize("finetuning", ["frozen", "text", "both"])
def test_training_moves_only_the_chosen_weights(tiny_model, tiny_processor, squares, tmp_path, finetuning):
    model = clone(tiny_model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = arguments(tmp_path, finetuning=finetuning, encoder_learning_rate=1e-3)
    PVLFTrainer(model, args, squares, processing_class=tiny_processor).train()
    for name, parameter in model.named_parameters():
        trains = (
            not name.startswith("backbone.")
            or finetuning == "both"
            or (finetuning == "text" and name.startswith("backbone.text_"))
        )
        # Embeddings of unused tokens only decay while others move: compare complete tensors.
        assert torch.equal(before[name], parameter) != trains, name


def test_parameter_groups_have_learning_rates_and_decay(tiny_model, tiny_processor, squares, tmp_path):
    args = arguments(tmp_path, learning_rate=1e-4, finetuning="both", decay_norms_and_biases=False)
    trainer = PVLFTrainer(clone(tiny_model), args, squares, processing_class=tiny_processor)
    trainer.create_optimizer_and_scheduler(100)
    rates = {(group["initial_lr"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert rates == {(1e-4, 0.05), (1e-4, 0.0), (1e-6, 0.05), (1e-6, 0.0)}
    undecayed = {id(p) for g in trainer.optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    names = {name for name, p in trainer.model.named_parameters() if id(p) in undecayed}
    assert "fusion.prompts" in names and "fusion.layers.0.norm1.weight" in names
    assert not any(name.endswith("linear1.weight") for name in names)
    for step in (0, 25, 50, 100):
        # TransAgg: CosineAnnealing with eta_min = 1 % of the fusion rate, which is the encoders' rate
        expected = 1e-6 + (1e-4 - 1e-6) * (1 + math.cos(math.pi * step / 100)) / 2
        factors = [f(step) for f in trainer.lr_scheduler.lr_lambdas]
        for factor, group in zip(factors, trainer.optimizer.param_groups, strict=True):
            wanted = expected if group["initial_lr"] == 1e-4 else 1e-6
            assert factor * group["initial_lr"] == pytest.approx(wanted, rel=MEAN_ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("batch_by", [None, "half"])
def test_resumed_run_equals_the_uninterrupted_run(tiny_model, tiny_processor, squares, tmp_path, batch_by):
    squares = squares.add_column("half", ["first"] * 28 + ["second"] * 28)
    settings = {"batch_by": batch_by, "max_steps": 10, "save_strategy": "steps", "save_steps": 4, "finetuning": "both"}
    whole = PVLFTrainer(
        clone(tiny_model), arguments(tmp_path / "a", **settings), squares, processing_class=tiny_processor
    )
    whole.train()
    again = PVLFTrainer(
        clone(tiny_model), arguments(tmp_path / "b", **settings), squares, processing_class=tiny_processor
    )
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))  # in the middle of the first epoch
    for (name, a), (_, b) in zip(whole.model.named_parameters(), again.model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (whole, again)]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_evaluation_selects_the_best_checkpoint(tiny_processor, squares, benchmark, tmp_path):
    args = arguments(
        tmp_path,
        max_steps=120,
        finetuning="both",
        learning_rate=1e-3,
        encoder_learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=40,
        save_strategy="steps",
        save_steps=40,
        load_best_model_at_end=True,
        metric_for_best_model="eval_recall@1",
        greater_is_better=True,
    )
    trainer = PVLFTrainer(
        make_model(dropout=0.0, temperature=0.1), args, squares, benchmark, processing_class=tiny_processor
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    logged = [entry["eval_recall@1"] for entry in trainer.state.log_history if "eval_recall@1" in entry]
    assert trainer.state.best_metric == max(logged[1:-1])
    assert after["eval_recall@1"] == trainer.state.best_metric
    assert after["eval_recall@1"] > before["eval_recall@1"] + 0.3, (before, after)  # the model learns the colours
    saved = json.loads((tmp_path / "checkpoint-40" / "processor_config.json").read_text())
    assert saved["processor_class"] == "PVLFProcessor"


def test_several_benchmarks_are_reported_by_name(tiny_model, tiny_processor, squares, benchmark, tmp_path):
    trainer = PVLFTrainer(
        clone(tiny_model), arguments(tmp_path), squares, {"x": benchmark}, processing_class=tiny_processor
    )
    assert "eval_x_recall@1" in trainer.evaluate()


def test_equal_targets_of_a_batch_are_no_negatives(tiny_model, tiny_processor, squares, tmp_path):
    model = tiny_model
    trainer = PVLFTrainer(model, arguments(tmp_path, finetuning="frozen"), squares, processing_class=tiny_processor)
    rows = [squares[0], squares[8]]  # "make it green" from red, "make it blue" from green
    twice = [*rows, {**rows[0], "reference": squares[20]["reference"]}]  # a second query for green
    model.eval()
    with torch.no_grad():
        outputs = model(**trainer.data_collator(twice), return_loss=False)
        loss = trainer.compute_loss(model, trainer.data_collator(twice))
    logits = outputs.query_embeds @ outputs.target_embeds.T / model.config.temperature
    per_row = []
    for row, others in ((0, [0, 1]), (1, [0, 1, 2]), (2, [1, 2])):
        p = torch.softmax(logits[row, others], 0)[others.index(row)]
        per_row.append(-((1 - p) ** 2) * p.log())
    ids = torch.tensor([0, 1, 0])
    _, error = exact_loss(outputs.query_embeds, outputs.target_embeds, model.config.temperature, target_ids=ids)
    torch.testing.assert_close(loss, torch.stack(per_row).mean(), atol=2 * error.value.item(), rtol=0)


def test_batch_by_fills_batches_with_one_value_of_a_column(tiny_model, tiny_processor, squares, tmp_path):
    halves = squares.add_column("half", ["first"] * 20 + ["second"] * 36)
    args = arguments(tmp_path, batch_by="half")
    trainer = PVLFTrainer(tiny_model, args, halves, processing_class=tiny_processor, data_collator=lambda rows: rows)
    loader = trainer.get_train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.set_epoch(epoch)
        batches = [[(row["caption"], row["target_id"], row["half"]) for row in batch] for batch in loader]
        assert [len(batch) for batch in batches] == [8] * 6  # 2 of 20 rows, 4 of 36
        assert all(len({half for *_, half in batch}) == 1 for batch in batches)
        epochs.append(batches)
    assert epochs[0] == epochs[2] != epochs[1]
    with pytest.raises(ValueError, match=r"batch_by.*missing column\(s\) \['third'\]"):
        PVLFTrainer(tiny_model, arguments(tmp_path, batch_by="third"), halves, processing_class=tiny_processor).train()
    with pytest.raises(ValueError, match="has the 8 rows of a batch, but 7 at most"):
        args = arguments(tmp_path, batch_by="target_id")
        PVLFTrainer(tiny_model, args, halves, processing_class=tiny_processor).train()


def trained(settings, squares, tiny_processor, folder, dropout):
    """Return losses and weights after two steps."""
    model = make_model(dropout=dropout, temperature=1.0)
    if dropout == 0:
        for module in model.modules():  # BERT has its own dropout, which chunks draw in another order
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
    # SGD, because Adam makes full steps along a gradient that is only rounding noise.
    args = arguments(folder, max_steps=2, optim="sgd", encoder_learning_rate=1e-3, **settings)
    trainer = PVLFTrainer(model, args, squares, processing_class=tiny_processor)
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    return {"losses": losses, **{name: p.detach() for name, p in model.named_parameters()}}


TRAINED_ERRORS = {}
"""Bounds that were computed already, by the last arguments of `trained_error`."""


def trained_error(squares, processor, dropout, dtype=torch.float32, stored=None):
    """Return how far apart two runs of `trained` may be, by name; `squares` and `processor` are always the same."""
    if known := TRAINED_ERRORS.get((dropout, dtype, stored)):
        return known
    rows = squares.select(range(8))
    inputs = processor(images=rows["reference"], text=rows["caption"], target_images=rows["target"])
    inputs["target_ids"] = torch.tensor([COLOURS.index(target) for target in rows["target_id"]])
    model = make_model(dropout=dropout, temperature=1.0).train()
    error = TRAINED_ERRORS[dropout, dtype, stored] = training_error(model, dict(inputs), 2, 1e-3, dtype, stored)
    return error


@pytest.mark.slow
@pytest.mark.parametrize("with_it", ["nothing else", "accumulation", "feature_cache", "bf16"])
def test_chunks_do_not_change_training(tiny_processor, squares, tmp_path, with_it):
    settings = {
        "nothing else": {"finetuning": "both"},
        "accumulation": {"gradient_accumulation_steps": 2},
        "feature_cache": {"feature_cache": str(tmp_path / "cache")},
        "bf16": {"bf16": True},
    }[with_it]
    whole = trained({"finetuning": "text", **settings}, squares, tiny_processor, tmp_path, dropout=0.0)
    chunks = {"gradient_cache_chunk_size": 3, "loss_chunk_size": 5}
    chunked = trained({"finetuning": "text", **settings, **chunks}, squares, tiny_processor, tmp_path, dropout=0.0)
    assert (whole["losses"][0] - whole["losses"][1]).abs() > 1e-3
    error = trained_error(squares, tiny_processor, 0.0, torch.bfloat16 if with_it == "bf16" else torch.float32)
    for name, wanted in whole.items():
        torch.testing.assert_close(chunked[name], wanted, atol=error[name], rtol=0, msg=name)


@pytest.mark.slow
def test_activation_checkpointing_does_not_change_training(tiny_processor, squares, tmp_path, monkeypatch):
    """Count layer calls: the argument reaches encoders and fusion; a recomputed layer draws the same dropout."""
    inside = {BlipMLP: "forward", BlipTextIntermediate: "forward", PVLFFusionLayer: "feed_forward"}  # once a layer
    calls = Counter()

    def counting(kind, plain):
        def counted(self, *args):
            calls[kind] += 1
            return plain(self, *args)

        return counted

    for kind, name in inside.items():
        monkeypatch.setattr(kind, name, counting(kind, getattr(kind, name)))
    runs = []
    for checkpointing in (False, True):
        calls.clear()
        settings = {"finetuning": "both", "activation_checkpointing": checkpointing}
        runs.append(trained(settings, squares, tiny_processor, tmp_path, dropout=0.5))
        # two steps of two layers; the ViT encodes references and targets
        expected = {BlipMLP: 8, BlipTextIntermediate: 4, PVLFFusionLayer: 4}
        assert calls == {kind: number * (1 + checkpointing) for kind, number in expected.items()}
    assert_within(runs[1], runs[0], lambda: trained_error(squares, tiny_processor, 0.5))


def test_invalid_arguments_raise(tiny_model, tiny_processor, squares, tmp_path):
    with pytest.raises(ValueError, match="processing_class"):
        PVLFTrainer(tiny_model, arguments(tmp_path), squares)
    with pytest.raises(ValueError, match=r"missing column\(s\) \['caption'\]"):
        PVLFTrainer(
            tiny_model, arguments(tmp_path), squares.remove_columns("caption"), processing_class=tiny_processor
        )
    with pytest.raises(ValueError, match="choose 'frozen', 'text' or 'both'"):
        arguments(tmp_path, finetuning="image")
    with pytest.raises(ValueError, match="remove_unused_columns"):
        arguments(tmp_path, remove_unused_columns=True)
    with pytest.raises(ValueError, match="'linear' cannot be made with lr_scheduler_kwargs=.*'steepness'"):
        arguments(tmp_path, lr_scheduler_type="linear", lr_scheduler_kwargs={"steepness": 2})
    for name in ("gradient_cache_chunk_size", "loss_chunk_size"):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            arguments(tmp_path, **{name: 0})
    with pytest.raises(ValueError, match="must be positive; to leave encoders as they are"):
        arguments(tmp_path, encoder_learning_rate=0.0)
    with pytest.raises(ValueError, match="has 5 rows, a step takes 8.*lower per_device_train_batch_size"):
        PVLFTrainer(tiny_model, arguments(tmp_path), squares.select(range(5)), processing_class=tiny_processor)
    trainer = PVLFTrainer(clone(tiny_model), arguments(tmp_path), squares, processing_class=tiny_processor)
    with pytest.raises(ValueError, match="CIRBenchmark"):
        trainer.evaluate(squares)
