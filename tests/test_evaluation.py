"""`evaluate` against a plain loop, in one process and in two (this file is also what the two processes run)."""

import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from tiny import make_model, make_processor
from torch.nn import functional as F

import pvlf_hf
from pvlf_hf import evaluation
from pvlf_hf.data import CIRBenchmark
from pvlf_hf.evaluation import QUERY_METHODS, encode_gallery, encode_queries, evaluate, write_results
from pvlf_hf.metrics import cirr_metrics

COLOURS = ["red", "orange", "yellow", "lime", "cyan", "blue", "purple", "black", "white"]
QUERIES = [(0, "blue", 5), (5, "more red", 6), (8, "dark", 7), (2, "the same but green", 3), (7, "not dark", 8)]


def draw(row):
    """A square that differs from the others in colour, size and place."""
    picture = PILImage.new("RGB", (32, 32), COLOURS[-row - 1])
    ImageDraw.Draw(picture).rectangle((2 + row, 4, 14 + row, 8 + 2 * row), COLOURS[row])
    return picture


def make_benchmark(subsets=True):
    """Five queries and nine images: neither can be shared evenly by two processes."""
    queries = {
        "reference": [draw(reference) for reference, _, _ in QUERIES],
        "reference_id": [COLOURS[reference] for reference, _, _ in QUERIES],
        "caption": [caption for _, caption, _ in QUERIES],
        "target_id": [COLOURS[target] for _, _, target in QUERIES],
    }
    if subsets:
        pairs = [{reference, target} for reference, _, target in QUERIES]
        queries["subset_ids"] = [[COLOURS[i] for i in sorted(pair | {1, 4})] for pair in pairs]
    return CIRBenchmark(
        name="squares",
        queries=with_pictures(queries, "reference"),
        gallery=with_pictures({"image": [draw(row) for row in range(9)], "image_id": COLOURS}, "image"),
        protocol={"gallery": "nine squares"},
    )


def with_pictures(columns, pictures):
    kinds = {column: Value("string") for column in columns} | {pictures: Image()}
    if "subset_ids" in columns:
        kinds["subset_ids"] = [Value("string")]
    return Dataset.from_dict(columns, features=Features(kinds))


@torch.no_grad()
def plain_ranks(model, processor, benchmark):
    """One picture at a time, one query at a time, sorted in Python."""
    gallery = [
        (row["image_id"], model.get_image_features(**processor.process_targets(row["image"])).pooler_output[0])
        for row in benchmark.gallery
    ]
    ranks, subset_ranks = [], []
    for row in benchmark.queries:
        query = model.get_query_features(**processor.process_queries(row["reference"], row["caption"])).pooler_output
        cosines = {name: float(F.cosine_similarity(query[0], image, dim=0)) for name, image in gallery}
        ranking = sorted((n for n in cosines if n != row["reference_id"]), key=lambda n: -cosines[n])
        ranks.append(ranking.index(row["target_id"]))
        subset_ranks.append([n for n in ranking if n in row["subset_ids"]].index(row["target_id"]))
    return ranks, subset_ranks


def test_equals_a_plain_loop(tiny_model, tiny_processor):
    benchmark = make_benchmark()
    ranks, subset_ranks = plain_ranks(tiny_model, tiny_processor, benchmark)
    outcome = evaluate(tiny_model, tiny_processor, benchmark, batch_size=2, progress=False)
    assert (list(outcome.ranks), list(outcome.subset_ranks)) == (ranks, subset_ranks)
    assert len(set(ranks)) > 2  # the toy tells something
    assert outcome.metrics == cirr_metrics(torch.tensor(ranks), torch.tensor(subset_ranks))
    assert outcome.metrics["recall@5"] == sum(rank < 5 for rank in ranks) / 5
    assert (outcome.benchmark, outcome.method) == ("squares", "pvlf")
    assert outcome.counts == {"queries": 5, "gallery": 9}
    expected = {"ties": "gallery order", "similarity": "cosine, float32", "gallery": "nine squares"}
    assert outcome.protocol == expected


def test_without_subsets(tiny_model, tiny_processor):
    outcome = evaluate(tiny_model, tiny_processor, make_benchmark(subsets=False), progress=False)
    assert outcome.subset_ranks == ()
    assert list(outcome.metrics) == ["recall@1", "recall@5", "recall@10", "recall@50"]
    assert outcome.ranks == evaluate(tiny_model, tiny_processor, make_benchmark(), progress=False).ranks


@pytest.mark.parametrize("method", QUERY_METHODS)
def test_batch_size_does_not_matter(tiny_model, tiny_processor, method):
    benchmark = make_benchmark()
    one, all_at_once = (
        encode_queries(tiny_model, tiny_processor, benchmark.queries, method, batch_size, progress=False)
        for batch_size in (1, 64)
    )
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-5)
    assert (one.dtype, one.shape) == (torch.float32, (5, 32))
    torch.testing.assert_close(one.norm(dim=1), torch.ones(5))
    outcomes = [
        evaluate(tiny_model, tiny_processor, benchmark, method, batch_size, progress=False)
        for batch_size in (1, 4, 64)
    ]
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_baselines_embed_what_they_say(tiny_model, tiny_processor):
    queries = make_benchmark().queries
    image, text, both, pvlf = (
        encode_queries(tiny_model, tiny_processor, queries, method, progress=False)
        for method in ("image", "text", "image+text", "pvlf")
    )
    references = encode_gallery(
        tiny_model, tiny_processor, queries.rename_column("reference", "image"), progress=False
    )
    torch.testing.assert_close(image, references)
    with torch.no_grad():
        tokens = tiny_processor(text=list(queries["caption"]))
        expected = tiny_model.get_text_features(**tokens).pooler_output
    torch.testing.assert_close(text, F.normalize(expected, dim=-1))
    torch.testing.assert_close(both, F.normalize(image + text, dim=-1))
    assert not torch.allclose(pvlf, both, atol=0.01)


def test_given_gallery_embeddings(tiny_model, tiny_processor):
    benchmark = make_benchmark()
    gallery = encode_gallery(tiny_model, tiny_processor, benchmark.gallery, batch_size=4, progress=False)
    assert (gallery.dtype, gallery.shape) == (torch.float32, (9, 32))
    given = evaluate(tiny_model, tiny_processor, benchmark, gallery_embeds=gallery, progress=False)
    assert given == evaluate(tiny_model, tiny_processor, benchmark, progress=False)
    with pytest.raises(ValueError, match="8 gallery embeddings for 9 gallery images"):
        evaluate(tiny_model, tiny_processor, benchmark, gallery_embeds=gallery[:8], progress=False)
    with pytest.raises(ValueError, match="query_embeds are 32 wide and gallery_embeds 31"):
        evaluate(tiny_model, tiny_processor, benchmark, gallery_embeds=gallery[:, :31], progress=False)


def test_subsets_may_differ_in_length(tiny_model, tiny_processor):
    whole = make_benchmark()
    subsets = list(whole.queries["subset_ids"])
    ragged = [[i for i in subsets[0] if i != COLOURS[4]], *subsets[1:]]
    assert whole.queries[0]["target_id"] in ragged[0] and len({len(ids) for ids in ragged}) > 1
    queries = whole.queries.remove_columns("subset_ids").add_column("subset_ids", ragged)
    benchmark = CIRBenchmark("ragged", queries, whole.gallery)
    outcome = evaluate(tiny_model, tiny_processor, benchmark, progress=False)
    assert outcome.subset_ranks[1:] == evaluate(tiny_model, tiny_processor, whole, progress=False).subset_ranks[1:]


def test_a_picture_that_does_not_decode_is_named(tiny_model, tiny_processor, tmp_path):
    draw(0).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    files = [str(tmp_path / name) for name in ("whole.png", "whole.png", "cut.png")]
    gallery = Dataset.from_dict({"image": files}).cast_column("image", Image())
    with pytest.raises(ValueError, match="gallery: the picture of row 2 cannot be read, replace it or drop the row"):
        encode_gallery(tiny_model.train(), tiny_processor, gallery, progress=False)
    assert tiny_model.training  # given back as it came, also then


def test_unknown_method(tiny_model, tiny_processor):
    with pytest.raises(
        ValueError, match=r"method='caption': choose one of \('pvlf', 'image', 'text', 'image\+text'\)"
    ):
        evaluate(tiny_model, tiny_processor, make_benchmark(), method="caption")


@pytest.mark.parametrize("training", [True, False])
def test_model_keeps_its_mode(tiny_model, tiny_processor, training):
    in_eval = evaluate(tiny_model.eval(), tiny_processor, make_benchmark(), progress=False)
    tiny_model.train(training)
    modes = [module.training for module in tiny_model.modules()]
    assert evaluate(tiny_model, tiny_processor, make_benchmark(), progress=False) == in_eval  # no dropout
    assert [module.training for module in tiny_model.modules()] == modes


def test_results_file(tiny_model, tiny_processor, tmp_path):
    outcomes = [
        evaluate(tiny_model, tiny_processor, make_benchmark(), method, progress=False) for method in ("pvlf", "text")
    ]
    write_results(tmp_path / "new/results.json", outcomes, seed=3, note="größer")
    results = json.loads((tmp_path / "new/results.json").read_text(encoding="utf-8"))
    assert (results["seed"], results["note"]) == (3, "größer")
    assert [e["method"] for e in results["evaluations"]] == ["pvlf", "text"]
    assert results["evaluations"][0] == {
        "benchmark": "squares",
        "method": "pvlf",
        "metrics": outcomes[0].metrics,
        "counts": {"queries": 5, "gallery": 9},
        "protocol": outcomes[0].protocol,
    }
    environment = results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["pvlf-hf"] == pvlf_hf.__version__
    assert environment["commit"] is None or re.match("[0-9a-f]{40}(-dirty)?$", environment["commit"])
    assert {"python", "transformers", "accelerate", "datasets", "pillow"} < set(environment)


def test_results_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert evaluation.environment()["commit"] is None


def test_two_processes_agree_with_one(tiny_model, tiny_processor, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, str(tmp_path)], env=environment, check=True, timeout=120, capture_output=True)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    alone = evaluate(tiny_model, tiny_processor, make_benchmark(), batch_size=2, progress=False)
    assert first == second == json.loads(json.dumps(asdict(alone)))


def main(folder):
    """One of two processes: evaluates and writes what came out."""
    torch.set_num_threads(1)
    state = PartialState(cpu=True)
    assert state.num_processes == 2
    outcome = evaluate(make_model(), make_processor(), make_benchmark(), batch_size=2, progress=False)
    Path(folder, f"{state.process_index}.json").write_text(json.dumps(asdict(outcome)))
    state.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
