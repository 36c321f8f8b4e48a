"""Hard negatives: batches with further images, a mined pass, batches without repeated values."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from error_bounds import rounding, training_error
from processes import run_in_processes
from squares import square_triplets
from torch.utils._pytree import tree_map
from transformers import TrainerCallback

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments, load_triplets
from pvlf_hf.models.loss_pvlf import focal_info_nce
from pvlf_hf.training.batches import DistinctBatchSampler, PVLFCollator
from pvlf_hf.training.negatives import RowsWithNegatives, hard_rows, mine_negatives

COLOURS = ["red", "lime", "blue", "white", "black", "yellow"]


@pytest.fixture(scope="module")
def triplets(tmp_path_factory):
    """Return triplets of six colours; each names two negatives, the first of them its reference."""
    folder = tmp_path_factory.mktemp("colours")
    square_triplets(folder, COLOURS, lambda a, b: b)
    pairs = [(a, b) for a in COLOURS for b in COLOURS if a != b]
    rows = [
        {
            "reference": f"{a}.png",
            "caption": b,
            "target": f"{b}.png",
            "key": b,
            "negatives": [f"{a}.png", next(f"{c}.png" for c in COLOURS if c not in (a, b))],
        }
        for a, b in pairs
    ]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_triplets(folder / "t.jsonl", folder)


def trainer_of(model, processor, triplets, folder, callbacks=None, **settings):
    settings = {"per_device_train_batch_size": 6, "max_steps": 2, "finetuning": "frozen", **settings}
    args = PVLFTrainingArguments(str(folder), report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    return PVLFTrainer(model, args, triplets, processing_class=processor, callbacks=callbacks)


def test_triplets_bring_their_negatives(triplets):
    assert triplets["negative_ids"][0] == ["red.png", "blue.png"]
    rows = RowsWithNegatives(triplets, 2)
    row = rows[0]
    assert row["negative_ids"] == ["red.png", "blue.png"], "the reference first, then the one that is left"
    assert [image.getpixel((0, 0)) for image in row["negatives"]] == [(255, 0, 0), (0, 0, 255)]
    assert RowsWithNegatives(triplets, 3)[0]["negative_ids"] == ["red.png", "blue.png", "red.png"]
    assert RowsWithNegatives(triplets, 1)[0]["negative_ids"] == ["blue.png"]
    bare = triplets.remove_columns(["negatives", "negative_ids"])
    assert RowsWithNegatives(bare, 1)[0]["negative_ids"] == ["red.png"], "without a column, the reference"
    rows.mined = [[4]] * len(triplets)
    assert rows[0]["negative_ids"] == ["red.png", triplets["target_id"][4]]


@pytest.mark.parametrize("cell", ["x.png", '{"a": 1}', "[1]", '[""]'])
def test_negatives_that_are_no_list_are_refused(cell, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('reference,caption,target,negatives\na.png,red,b.png,"' + cell.replace('"', '""') + '"\n')
    with pytest.raises(ValueError, match="data row 0 .* must be a list of file names"):
        load_triplets(table, tmp_path)


@pytest.mark.parametrize("cached", [False, True])
def test_the_loss_is_that_of_all_targets_and_negatives(tiny_model, tiny_processor, triplets, tmp_path, cached):
    """A model that ignores negatives, or confuses their ids, has another loss."""
    batches = []

    class Spy(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            batches.append(kwargs)

    tiny_model.config.temperature = 0.1  # 0.01 would magnify rounding
    settings = {"hard_negatives": 2, "feature_cache": str(tmp_path / "cache") if cached else None}
    trainer = trainer_of(tiny_model, tiny_processor, triplets, tmp_path / "run", [Spy()], **settings)
    trainer.train()
    assert len(batches) == 2
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["target_ids"]) == 18
    model = trainer.model.eval()
    inputs = {name: value for name, value in batch.items() if name != "target_ids"}
    c = model.config

    def losses(model, inputs):
        """Return the loss with the targets and negatives of the batch, and that with each query's target alone."""
        output = model(**inputs, return_loss=False)
        queries, targets, settings = output.query_embeds, output.target_embeds, (c.temperature, c.alpha, c.gamma)
        assert targets.shape[0] == 18 and queries.shape[0] == 6
        loss = focal_info_nce(queries, targets, *settings, target_ids=batch["target_ids"])
        return {"loss": loss, "own": focal_info_nce(queries, targets[:6], *settings)}

    with torch.no_grad():
        loss, expected = trainer.compute_loss(model, batch), losses(model, inputs)
        error = rounding(losses, model, in_float32(inputs))["loss"]
    assert error < (expected["loss"] - expected["own"]) / 100
    assert loss == pytest.approx(expected["loss"].item(), rel=0, abs=error)


def in_float32(batch):
    """Return a batch with its features, which the cache keeps in float16, in float32."""
    return tree_map(lambda t: t.float() if t.is_floating_point() else t, batch)


def test_kept_features_of_negatives_are_those_of_their_images(tiny_model, tiny_processor, triplets, tmp_path):
    """Batches of kept features give the embeddings of batches of images."""
    trainer = trainer_of(
        tiny_model, tiny_processor, triplets, tmp_path / "run", hard_negatives=2, feature_cache=str(tmp_path / "cache")
    )
    trainer.train()
    collate, rows = trainer.data_collator, RowsWithNegatives(trainer.train_dataset, 2)
    images = PVLFCollator(tiny_processor)([RowsWithNegatives(triplets, 2)[at] for at in (0, 7)])
    kept = collate([rows[at] for at in (0, 7)])
    assert torch.equal(images["target_ids"], kept["target_ids"])
    model = trainer.model.eval()
    with torch.no_grad():
        expected = model.get_image_features(images["target_pixel_values"]).pooler_output
        kept = {name: value for name, value in kept.items() if name != "target_ids"}

        def embeds(model, inputs):
            return {"targets": model(**inputs, return_loss=False).target_embeds}

        found = embeds(model, kept)["targets"]
        error = rounding(embeds, model, in_float32(kept), stored=torch.float16)["targets"]
    assert error < 0.01
    torch.testing.assert_close(found, expected, atol=error, rtol=0)


def test_negatives_that_are_not_trained_with_are_not_read(tiny_model, tiny_processor, triplets, tmp_path):
    bare = triplets.remove_columns(["negatives", "negative_ids"])
    rows = bare.add_column("negatives", [["nowhere.png"]] * len(bare))
    trainer_of(tiny_model, tiny_processor, rows, tmp_path, feature_cache=str(tmp_path / "cache")).train()


def test_mined_negatives_are_near_but_not_suspiciously():
    targets = torch.nn.functional.normalize(
        torch.tensor([[1.0, 0], [0.99, 0.14], [0.8, 0.6], [0, 1], [1.0, 0]]), dim=1
    )
    queries = targets.clone()
    found = hard_rows(queries, targets, ["a", "b", "c", "d", "a"], threshold=0.95)
    assert found[0] == [2, 3], "row 1 scores 0.99 of the positive, rows 0 and 4 are the same target"
    assert found[4] == found[0]
    assert hard_rows(queries, targets, ["a", "b", "c", "d", "a"], threshold=1.0)[0] == [1, 2, 3]
    assert hard_rows(queries, targets, ["a", "b", "c", "d", "a"], 0.95, pool=1)[0] == [2]


def test_a_pass_between_epochs_mines_by_the_model(tiny_model, tiny_processor, triplets, tmp_path):
    mined = []

    class Spy(TrainerCallback):
        def on_epoch_end(self, args, state, control, **kwargs):
            mined.append([list(rows) for rows in trainer.rows_with_negatives.mined])

    trainer = trainer_of(
        tiny_model, tiny_processor, triplets, tmp_path, [Spy()], hard_negatives=1, mine_every=2, max_steps=20
    )
    trainer.train()
    assert mined[0] == mined[1] == [] and len(mined[2]) == len(triplets) and mined[2] == mined[3]
    fresh = mine_negatives(trainer)
    ids = triplets["target_id"][:]
    assert all(ids[row] != ids[other] for row, others in enumerate(fresh) for other in others)
    assert any(fresh)


@pytest.mark.slow
def test_training_with_negatives_is_repeatable(tiny_processor, triplets, tmp_path):
    from tiny import make_model

    weights = []
    for name in "ab":
        settings = {"hard_negatives": 1, "mine_every": 1, "distinct_by": "key", "max_steps": 12}
        trainer = trainer_of(make_model("blip"), tiny_processor, triplets, tmp_path / name, **settings)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize("sizes", [[1] * 12, [3, 3, 3, 3], [7, 1, 1, 1, 1, 1], [5, 4, 2, 2, 1, 1, 1], [2, 2, 2, 9]])
def test_no_batch_holds_a_value_twice(sizes):
    values = [value for value, number in enumerate(sizes) for _ in range(number)]
    sampler = DistinctBatchSampler(values, 4, seed=0)
    epochs = []
    for epoch in range(8):
        sampler.set_epoch(epoch)
        rows = list(sampler)
        assert len(rows) == len(sampler) and len(set(rows)) == len(rows)
        for start in range(0, len(rows), 4):
            batch = [values[row] for row in rows[start : start + 4]]
            assert len(batch) == 4 and len(set(batch)) == 4
        epochs.append(rows)
    assert len(set(map(tuple, epochs))) > 1
    sampler.set_epoch(0)
    assert list(sampler) == epochs[0]
    best = max(n for n in range(len(values) // 4 + 1) if sum(min(size, n) for size in sizes) >= 4 * n)
    assert len(sampler) == 4 * best
    used = Counter(row for rows in epochs for row in rows)
    assert len(used) > len(sampler) or len(sampler) == len(values), "rows that do not fit are others each time"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"hard_negatives": -1}, "hard_negatives=-1"),
        ({"mine_every": 2}, "mine_every=2 mines hard_negatives"),
        ({"hard_negatives": 1, "mine_threshold": 2}, "mine_threshold=2"),
        ({"hard_negatives": 1, "gradient_cache_chunk_size": 2}, "gradient_cache_chunk_size"),
        ({"distinct_by": "key", "batch_by": "key"}, "distinct_by='key' draws batches"),
        ({"distinct_by": "nothing"}, "nothing"),
        ({"distinct_by": "key", "per_device_train_batch_size": 7}, "6 values, fewer than the 7 rows"),
    ],
)
def test_arguments_that_cannot_go_together(settings, message, tiny_model, tiny_processor, triplets, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model, tiny_processor, triplets, tmp_path, **settings).get_train_dataloader()


def test_models_and_data_that_take_no_negatives(tiny_model, tiny_processor, triplets, tmp_path):
    from fused import case_model

    with pytest.raises(ValueError, match="reference_id"):
        trainer_of(tiny_model, tiny_processor, triplets.remove_columns("reference_id"), tmp_path, hard_negatives=1)
    with pytest.raises(ValueError, match="CASEModel compares queries with their own targets"):
        trainer_of(case_model(), tiny_processor, triplets, tmp_path, hard_negatives=1)


def model_and_processor():
    from tiny import make_model, make_processor

    return make_model("blip", dropout=0.0, temperature=0.1), make_processor()  # 0.01 would magnify rounding


def first_loss(folder, rows_of_all):
    """Return the loss of the first step on the first twelve triplets, two negatives each."""
    triplets, (model, processor) = load_triplets(folder / "t.jsonl", folder), model_and_processor()
    settings = {"per_device_train_batch_size": rows_of_all // int(os.environ.get("WORLD_SIZE", "1")), "max_steps": 1}
    settings |= {"hard_negatives": 2, "train_sampling_strategy": "sequential", "logging_steps": 1, "use_cpu": True}
    trainer = trainer_of(model, processor, triplets, folder / "run", **settings)
    trainer.train()
    return next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)


@pytest.mark.slow
def test_two_processes_share_their_negatives(triplets):
    folder = Path(triplets.with_format("arrow")[0]["target"][0]["path"].as_py()).parent
    (alone,) = run_in_processes(1, first_loss, folder, 12)
    together = run_in_processes(2, first_loss, folder, 12)
    rows, (model, processor) = RowsWithNegatives(triplets, 2), model_and_processor()
    model.set_finetuning("frozen")
    batch = PVLFCollator(processor)([rows[row] for row in range(12)])
    error = training_error(model.train(), dict(batch), 1, 1e-4)["losses"]
    assert together[0] == pytest.approx(alone, rel=0, abs=error)
