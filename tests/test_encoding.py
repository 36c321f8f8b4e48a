"""Embeddings of queries and galleries by every method, independent of batching."""

import copy
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from datasets import Dataset, Image
from error_bounds import squares_error, unit_error
from squares import draw, make_benchmark
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from pvlf_hf.embeddings.encoding import (
    QUERY_METHODS,
    embed,
    encode_gallery,
    encode_queries,
    encode_stream,
    prefetch_map,
)

EMOJI = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"


@pytest.fixture(scope="module")
def emoji():
    """Return the trained emoji model; the rounding error of random weights is not representative."""
    return AutoModel.from_pretrained(EMOJI).eval(), AutoProcessor.from_pretrained(EMOJI)


def method_error(method):
    """Return how far apart a query's embeddings from two batches may be; the norm of "image+text" is 1 or more."""
    halves = {"composed": ["query"], "image+text": ["image", "text"]}.get(method, [method])
    return sum(squares_error()[f"{half}_embeds"] for half in halves)


@pytest.mark.parametrize("method", QUERY_METHODS)
def test_batch_size_does_not_change_embeddings(tiny_model, tiny_processor, method):
    queries = make_benchmark(several_captions=True).queries
    one, all_at_once = (
        encode_queries(tiny_model, tiny_processor, queries, method, batch_size, progress=False)
        for batch_size in (1, 64)
    )
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=method_error(method))
    assert (one.dtype, one.shape) == (torch.float32, (5, 32))
    torch.testing.assert_close(one.norm(dim=1), torch.ones(5), rtol=0, atol=unit_error(32))


def test_baselines_embed_the_image_the_text_or_their_sum(tiny_model, tiny_processor):
    queries = make_benchmark().queries
    image, text, both, pvlf = (
        encode_queries(tiny_model, tiny_processor, queries, method, progress=False)
        for method in ("image", "text", "image+text", "composed")
    )
    references = encode_gallery(
        tiny_model, tiny_processor, queries.rename_column("reference", "image"), progress=False
    )
    torch.testing.assert_close(image, references, rtol=0, atol=method_error("image"))
    with torch.no_grad():
        tokens = tiny_processor(text=list(queries["caption"]))
        expected = tiny_model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(text, F.normalize(expected, dim=-1), rtol=0, atol=method_error("text"))
    assert (image + text).norm(dim=-1).min() >= 1
    torch.testing.assert_close(both, F.normalize(image + text, dim=-1), rtol=0, atol=method_error("image+text"))
    assert not torch.allclose(pvlf, both, atol=0.01)


def test_captions_of_a_query_are_averaged(tiny_model, tiny_processor):
    queries = make_benchmark(several_captions=True).queries
    mean = encode_queries(tiny_model, tiny_processor, queries, progress=False)
    rest = queries.remove_columns("caption")
    first, last = (
        encode_queries(
            tiny_model,
            tiny_processor,
            rest.add_column("caption", [c[at] for c in queries["caption"]]),
            progress=False,
        )
        for at in (0, -1)
    )
    total = first + last
    assert total.norm(dim=-1).min() >= 1
    torch.testing.assert_close(mean, F.normalize(total, dim=-1), rtol=0, atol=2 * method_error("composed"))
    assert not torch.allclose(first[1], last[1], atol=1e-3)


def test_mixed_precision_training_does_not_change_embeddings(tiny_model, tiny_processor):
    gallery = make_benchmark().gallery
    whole = encode_gallery(tiny_model, tiny_processor, gallery, progress=False)
    try:
        prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare(tiny_model)
    finally:
        AcceleratorState._reset_state()  # the next test may use another precision
    pixels = tiny_processor.process_targets(list(gallery["image"]))["pixel_values"]
    for _ in range(2):
        assert encode_gallery(prepared, tiny_processor, gallery, progress=False).equal(whole)
        with torch.no_grad():  # training goes on as before
            assert not torch.allclose(prepared(target_pixel_values=pixels).target_embeds, whole, atol=1e-4)


def test_undecodable_image_raises_with_its_row(tiny_model, tiny_processor, tmp_path):
    draw(0).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    files = [str(tmp_path / name) for name in ("whole.png", "whole.png", "cut.png")]
    gallery = Dataset.from_dict({"image": files}).cast_column("image", Image())
    with pytest.raises(ValueError, match="gallery: the image of row 2 cannot be read, replace it or drop the row"):
        encode_gallery(tiny_model.train(), tiny_processor, gallery, batch_size=2, progress=False)
    assert tiny_model.training  # the mode is restored after an error, too


def test_missing_model_or_unknown_method_raises(tiny_model, tiny_processor):
    with pytest.raises(
        ValueError, match=r"method='caption': choose one of \('composed', 'image', 'text', 'image\+text'\)"
    ):
        embed(tiny_model, tiny_processor, make_benchmark(), method="caption")
    with pytest.raises(ValueError, match="pass a model and its processor, or a store"):
        embed(None, None, make_benchmark())


def test_stream_skips_unusable_inputs_and_fills_its_batches(tiny_model):
    """Even samples are encoded, odd ones need no encoding, every fifth raises an error."""
    batches, failed = [], {}

    def prepare(sample):
        if sample % 5 == 0:
            raise OSError(f"sample {sample}")
        return torch.full((1, 2), float(sample)) if sample % 2 == 0 else None

    def encode(inputs):
        assert not tiny_model.training and torch.is_inference_mode_enabled()
        batches.append(inputs[:, 0].tolist())
        return inputs.half()

    tiny_model.train()
    stream = encode_stream(tiny_model, prepare, encode, range(24), 4, torch.zeros(1, 2), failed.__setitem__)
    embedded = [(samples, embeds) for samples, embeds in stream]
    assert batches == [[2, 4, 6, 8], [12, 14, 16, 18], [22]]
    assert [samples for samples, _ in embedded] == batches
    assert all(embeds.dtype == torch.float32 and embeds[:, 1].tolist() == samples for samples, embeds in embedded)
    assert [(sample, str(error)) for sample, error in failed.items()] == [(n, f"sample {n}") for n in range(0, 24, 5)]
    assert tiny_model.training


@pytest.mark.parametrize("threads", [1, 3])
def test_prefetch_map_keeps_order_and_stays_within_its_threads(threads):
    started = []

    def work(task):
        started.append(task)
        if task == 7:
            raise ValueError("task 7")
        return -task

    found = prefetch_map(work, range(10), threads)
    assert next(found) == 0
    time.sleep(0.05)  # time for threads that would run ahead
    assert len(started) == threads + 1
    assert [next(found) for _ in range(6)] == [-1, -2, -3, -4, -5, -6]
    with pytest.raises(ValueError, match="task 7"):
        next(found)


def test_several_loader_threads_give_the_same_embeddings(tiny_model, tiny_processor, monkeypatch):
    benchmark = make_benchmark(several_captions=True)
    alone = embed(tiny_model, tiny_processor, benchmark, batch_size=2, progress=False)
    monkeypatch.setattr("pvlf_hf.embeddings.encoding._threads", lambda device: 3)
    fed = embed(tiny_model, tiny_processor, benchmark, batch_size=2, progress=False)
    assert fed.queries.equal(alone.queries) and fed.gallery.equal(alone.gallery)


def test_bfloat16_embeds_nearly_the_same(emoji):
    model, processor = emoji
    benchmark = make_benchmark()
    whole = embed(model, processor, benchmark, progress=False)
    half = embed(copy.deepcopy(model).to(torch.bfloat16), processor, benchmark, progress=False)
    for a, b in zip(whole, half, strict=True):
        assert b.dtype == torch.float32 and not b.equal(a)
        assert F.cosine_similarity(a, b).min() > 0.999
