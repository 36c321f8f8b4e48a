"""The feature cache: the same training, no image encoded twice, no stale features, no lost work."""

import pickle
import resource
import threading
import time

import pytest
import torch
from accelerate import Accelerator, PartialState
from error_bounds import embeds_of, rounding, training_error
from PIL import Image as PILImage
from processes import run_in_processes
from squares import square_triplets
from tiny import make_model, make_processor
from torch.utils._pytree import tree_map
from transformers import AutoModel

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments
from pvlf_hf.digests import sequence_digest
from pvlf_hf.embeddings.fingerprints import fingerprint
from pvlf_hf.training import feature_cache
from pvlf_hf.training.feature_cache import FeatureCache, accept_cached_features, cache_features

COLOURS = ("red", "green", "blue", "black", "white", "yellow", "purple", "orange")


@pytest.fixture
def squares(tmp_path):
    """Return triplets of eight coloured squares, from each to every other."""
    return square_triplets(tmp_path, COLOURS, lambda reference, target: f"make it {target} and {reference}")


def plain_model():
    """Return a model without dropout at a mild temperature: 0.01 and dropout of 0.5 would magnify rounding errors."""
    return make_model(temperature=0.1, dropout=0.0)


@pytest.fixture
def tiny_model():
    return plain_model()


@pytest.fixture
def encoded_images(tiny_model):
    """Return the list of the image encoder's batch sizes."""
    batches = []
    tiny_model.backbone.vision_model.register_forward_hook(
        lambda module, args, kwargs, output: batches.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    return batches


def train(model, triplets, folder, finetuning, cache=None):
    args = PVLFTrainingArguments(
        str(folder / "run"),
        finetuning=finetuning,
        feature_cache=cache and str(cache),
        max_steps=4,
        per_device_train_batch_size=8,
        optim="sgd",  # Adam makes full steps along a gradient that is only rounding error
        learning_rate=1e-2,
        encoder_learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = PVLFTrainer(model, args, triplets, processing_class=make_processor())
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def cached_batch(model, squares, folder, rows, finetuning="frozen"):
    """Return the cached features of some rows, in float32."""
    model.set_finetuning(finetuning)
    known, collate = cache_features(model, make_processor(), squares, folder, progress=False)
    accept_cached_features(model)
    batch = collate([known[row] for row in rows])
    return tree_map(lambda t: t.float() if t.is_floating_point() else t, batch)


@pytest.mark.slow
@pytest.mark.parametrize("finetuning", ["frozen", "text"])
def test_cached_training_equals_uncached_within_float16(tiny_model, encoded_images, squares, tmp_path, finetuning):
    plain = train(plain_model(), squares, tmp_path, finetuning)
    cached = train(tiny_model, squares, tmp_path, finetuning, tmp_path / "cache")
    batch = cached_batch(tiny_model, squares, tmp_path / "cache", range(8), finetuning)
    error = training_error(tiny_model.train(), batch, 4, 1e-2, stored=torch.float16)["losses"]
    torch.testing.assert_close(cached, plain, rtol=0, atol=error)
    assert error < 0.01
    assert (plain[0] - plain[-1]).abs() > 0.02  # the trajectory moves by more than the tolerance
    assert encoded_images == [len(COLOURS)]  # all encoded before the first step, none afterwards


def test_model_is_pickled_after_cached_training(tiny_model, squares, tmp_path):
    train(tiny_model, squares, tmp_path, "frozen", tmp_path / "cache")
    batch = cached_batch(tiny_model, squares, tmp_path / "cache", (3, 20))
    again = pickle.loads(pickle.dumps(tiny_model))
    with torch.no_grad():
        again.aggregation.output.bias.add_(1)  # its own weights, not those of the first
        assert not torch.equal(again(**batch).query_embeds, tiny_model(**batch).query_embeds)


def test_model_embeds_as_before_when_its_bfloat16_forward_is_unwrapped(tiny_model, squares, tmp_path):
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    accept_cached_features(tiny_model)
    expected = tiny_model(target_pixel_values=image).target_embeds
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    prepared = accelerator.prepare_model(tiny_model, evaluation_mode=True)
    unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(target_pixel_values=image).target_embeds, expected)


def test_second_run_encodes_nothing(tiny_model, encoded_images, squares, tmp_path):
    train(make_model(), squares, tmp_path, "frozen", tmp_path / "cache")
    # another finetuning mode with the same image encoder
    train(tiny_model, squares, tmp_path, "text", tmp_path / "cache")
    assert encoded_images == []


def test_cached_tokens_equal_the_encoder_outputs(tiny_model, tiny_processor, squares, tmp_path):
    tiny_model.set_finetuning("frozen")
    known, collate = cache_features(tiny_model, tiny_processor, squares, tmp_path / "cache", progress=False)
    accept_cached_features(tiny_model)
    batch = collate([known[row] for row in (3, 20, 41)])
    rows = [squares[row] for row in (3, 20, 41)]
    inputs = tiny_processor(
        images=[r["reference"] for r in rows],
        text=[r["caption"] for r in rows],
        target_images=[r["target"] for r in rows],
    )
    with torch.inference_mode():
        wanted = tiny_model(**inputs, return_loss=True)
        got = tiny_model(**{k: v for k, v in batch.items() if k != "target_ids"}, return_loss=True)
    kept = cached_batch(tiny_model, squares, tmp_path / "cache", (3, 20, 41))
    with torch.no_grad():
        error = rounding(embeds_of, tiny_model, kept, stored=torch.float16)
    assert error["query_embeds"] < 0.01
    for name in ("query_embeds", "target_embeds"):
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=error[name])


def test_reloaded_model_keeps_its_fingerprint(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    assert fingerprint([again.backbone], again, "x") == fingerprint([tiny_model.backbone], tiny_model, "x")
    again.bfloat16()
    assert fingerprint([again.backbone], again, "x") != fingerprint([tiny_model.backbone], tiny_model, "x")


@pytest.mark.parametrize("change", ["weights", "preprocessing", "image", "nothing"])
def test_any_change_encodes_again(tiny_model, encoded_images, squares, tmp_path, change):
    tiny_model.set_finetuning("frozen")
    processor = make_processor()
    cache_features(tiny_model, processor, squares, tmp_path / "cache", progress=False)
    encoded_images.clear()
    encoded_texts = []
    tiny_model.backbone.text_encoder.register_forward_hook(lambda *_: encoded_texts.append(1))
    if change == "weights":
        with torch.no_grad():
            tiny_model.backbone.vision_proj.bias[0] += 1e-3
    elif change == "preprocessing":
        processor.image_processor.target_ratio = 2.0
    elif change == "image":
        PILImage.new("RGB", (32, 32), "pink").save(tmp_path / "red.png")
    cache_features(tiny_model, processor, squares, tmp_path / "cache", progress=False)
    assert sum(encoded_images) == {"weights": 8, "preprocessing": 8, "image": 1, "nothing": 0}[change]
    assert not encoded_texts  # the text side has not changed


def numbered(positions):
    """Return sequences of one to three tokens filled with the sample's number, in position of an encoder."""
    return [torch.full((1 + position % 3, 4), float(position)) for position in positions], [
        position % 2 for position in positions
    ]


@pytest.mark.parametrize(("limit", "value"), [("SHARD_BYTES", 40), ("SHARD_SECONDS", 0)])
def test_interrupted_builds_resume(tmp_path, monkeypatch, limit, value):
    monkeypatch.setattr(feature_cache, limit, value)
    digests = [sequence_digest(str(n)) for n in range(30)]
    encoded = []

    def encode(positions, broken=True):
        if broken and len(encoded) == 12:
            raise KeyboardInterrupt
        encoded.extend(positions)
        return numbered(positions)

    with pytest.raises(KeyboardInterrupt):
        FeatureCache(tmp_path, "model").fill(digests, encode, 4, "samples", progress=False)
    cache = FeatureCache(tmp_path, "model")
    assert sum(d in cache for d in digests) == 12
    cache.fill([*digests, *digests], lambda positions: encode(positions, broken=False), 4, "samples", progress=False)
    assert sorted(encoded) == list(range(30))  # each once
    for number, name in enumerate(digests):
        (wanted,), (position,) = numbered([number])
        assert torch.equal(cache[name], wanted.half()) and cache.position(name) == position


def test_full_disk_keeps_finished_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 40)
    digests = [sequence_digest(str(n)) for n in range(8)]
    cache = FeatureCache(tmp_path, "model")
    cache.fill(digests[:4], numbered, 4, "samples", progress=False)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))  # no file may grow beyond 100 bytes
    try:
        with pytest.raises(OSError, match=r"cannot write \w+\.safetensors in .*/model .*free disk space"):
            cache.fill(digests, numbered, 4, "samples", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(file.suffix for file in (tmp_path / "model").iterdir()) == ["", ".safetensors"]  # and the lock
    again = FeatureCache(tmp_path, "model")
    assert [d in again for d in digests] == [True] * 4 + [False] * 4


def test_damaged_files_raise_with_their_path(tmp_path):
    FeatureCache(tmp_path, "model").fill([sequence_digest("a")], numbered, 1, "samples", progress=False)
    (file,) = (tmp_path / "model").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match=f"{file.name} is damaged .*delete it"):
        FeatureCache(tmp_path, "model")


def test_broken_images_raise_with_their_row(tiny_model, tiny_processor, squares, tmp_path):
    tiny_model.set_finetuning("text")
    (tmp_path / "blue.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match="reference image of row 14 cannot be read"):  # two colours come before it
        cache_features(tiny_model, tiny_processor, squares, tmp_path / "cache", progress=False)


def test_infinite_features_raise(tmp_path):
    def encode(positions):
        return [torch.full((1, 4), 1e6) for _ in positions], [0 for _ in positions]

    with pytest.raises(ValueError, match="not finite in float16"):
        FeatureCache(tmp_path, "model").fill([sequence_digest("a")], encode, 1, "samples", progress=False)


def test_uncacheable_inputs_raise(tiny_model, tiny_processor, squares, tmp_path):
    with pytest.raises(ValueError, match="finetuning='both' trains them"):
        PVLFTrainingArguments(str(tmp_path), finetuning="both", feature_cache=str(tmp_path))
    with pytest.raises(ValueError, match="image encoder trains"):
        cache_features(tiny_model, tiny_processor, squares, tmp_path)
    tiny_model.set_finetuning("text")
    with pytest.raises(ValueError, match="with_transform"):
        cache_features(tiny_model, tiny_processor, squares.with_transform(dict), tmp_path)
    args = PVLFTrainingArguments(
        str(tmp_path), finetuning="text", feature_cache=str(tmp_path), per_device_train_batch_size=8, report_to="none"
    )
    trainer = PVLFTrainer(tiny_model, args, squares, processing_class=tiny_processor, data_collator=list)
    with pytest.raises(ValueError, match="pass no data_collator"):
        trainer.train()


def test_second_run_waits_for_the_first(tmp_path):
    """Run two independent processes at once: together they encode each sample once."""
    digests, encoded = [sequence_digest(str(n)) for n in range(12)], []

    def fill():
        def encode(positions):
            encoded.extend(positions)
            time.sleep(0.02)
            return numbered(positions)

        FeatureCache(tmp_path, "model").fill(digests, encode, 2, "samples", progress=False)

    runs = [threading.Thread(target=fill) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert sorted(encoded) == list(range(12))


def fill_a_share(folder):
    """Fill one cache together with the other process; return what this one encoded."""
    PartialState(cpu=True)
    encoded = []

    def encode(positions):
        encoded.extend(positions)
        return numbered(positions)

    cache = FeatureCache(folder, "model")
    digests = [sequence_digest(str(n)) for n in range(21)]
    cache.fill(digests, encode, 4, "samples", progress=False)
    assert all(name in cache for name in digests)  # every process sees what the other wrote
    return encoded


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    shares = [set(share) for share in run_in_processes(2, fill_a_share, tmp_path)]
    assert shares[0] | shares[1] == set(range(21)) and not shares[0] & shares[1]
    cache = FeatureCache(tmp_path, "model")
    assert all(torch.equal(cache[sequence_digest(str(n))], numbered([n])[0][0].half()) for n in range(21))
