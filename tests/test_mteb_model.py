"""PVLF in `mteb`: MTEB's task classes on nine squares, against this package's evaluation and manual figures.

`mteb` is imported where it is used: it takes two seconds, in each process that collects the tests.
"""

import json
from math import log2
from statistics import fmean

import pytest
from squares import make_benchmark
from tiny import make_model, make_processor

from pvlf_hf import evaluate

pytestmark = pytest.mark.slow

BENCHMARK = make_benchmark(subsets=False, reference="kept")

# A task of mteb and its query modality: images with texts, texts alone, or images alone.
TASKS = {
    "CIRRIT2IRetrieval": "composed",
    "FashionIQIT2IRetrieval": "composed",
    "EDIRIT2IRetrieval": "composed",
    "Fashion200kT2IRetrieval": "text",
    "NIGHTSI2IRetrieval": "image",
}


def miniature(name):
    """Return the task with the squares as its data, in the columns of the data set on the Hub."""
    import mteb

    class Miniature(type(mteb.get_task(name))):
        def load_data(self, **kwargs):
            names = {"reference": "image", "caption": "text"}
            queries = BENCHMARK.queries.select_columns([*names]).rename_columns(names)
            corpus = BENCHMARK.gallery.rename_columns({"image_id": "id"})
            data = {
                "queries": queries.add_column("id", [f"query {row}" for row in range(len(queries))]),
                "corpus": corpus.add_column("text", [None] * len(corpus)).add_column("modality", ["image"] * 9),
                "relevant_docs": {f"query {row}": {t: 1} for row, t in enumerate(BENCHMARK.queries["target_id"])},
                "top_ranked": None,
            }
            self.dataset, self.data_loaded = {"default": {split: data for split in self.eval_splits}}, True

    return Miniature()


@pytest.fixture(scope="module")
def checkpoints(tiny_checkpoint, tmp_path_factory):
    """Return two checkpoints of the same model name."""
    other = tmp_path_factory.mktemp("models") / tiny_checkpoint.name
    make_model(seed=1).save_pretrained(other)
    make_processor().save_pretrained(other)
    return [str(tiny_checkpoint), str(other)]


def run(folder, name, cache=None):
    import mteb

    from pvlf_hf.mteb_model import PVLFEncoder

    encoder = PVLFEncoder(folder, device="cpu")
    results = mteb.evaluate(encoder, miniature(name), encode_kwargs={"batch_size": 2}, cache=cache)
    (scores,) = results.task_results[0].scores["test"]
    return scores


@pytest.mark.parametrize("name", TASKS)
def test_mteb_scores_equal_evaluate(checkpoints, name):
    scores = run(checkpoints[0], name)
    ranks = evaluate(make_model(), make_processor(), BENCHMARK, TASKS[name], progress=False).per_query["rank"]
    assert len(set(ranks)) > 2  # neither all hits nor all misses
    expected = {f"recall_at_{k}": fmean(rank < k for rank in ranks) for k in (1, 3, 5, 10)}
    expected["ndcg_at_10"] = fmean(1 / log2(rank + 2) for rank in ranks)  # nine images: all within the first ten
    expected["mrr_at_10"] = fmean(1 / (rank + 1) for rank in ranks)
    # MTEB rounds to five digits.
    assert {metric: scores[metric] for metric in expected} == pytest.approx(expected, abs=0.500001e-5)


def test_composed_tasks_run_by_sentence_transformers_alone(checkpoints, tmp_path):
    """`mteb`'s own wrapper of a `SentenceTransformer` that was saved and loaded; it is told what the folder states."""
    import mteb
    from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    from pvlf_hf.sentence_transformer import PVLFSentenceModule

    SentenceTransformer(modules=[PVLFSentenceModule.load(checkpoints[0])]).save(str(tmp_path))
    stated = json.loads((tmp_path / "sentence_bert_config.json").read_text())["modality_config"]
    encoder = SentenceTransformerEncoderWrapper(
        SentenceTransformer(str(tmp_path), trust_remote_code=True, device="cpu")
    )
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(update={"modalities": sorted(stated)})
    assert ModelMeta._detect_modalities_from_sbert_config({"modality_config": stated}) == ["image", "text"]
    for name in ("CIRRIT2IRetrieval", "EDIRIT2IRetrieval"):
        results = mteb.evaluate(encoder, miniature(name), encode_kwargs={"batch_size": 2}, cache=None)
        (scores,) = results.task_results[0].scores["test"]
        expected = run(checkpoints[0], name)
        assert {m: scores[m] for m in ("ndcg_at_10", "recall_at_1")} == {
            m: expected[m] for m in ("ndcg_at_10", "recall_at_1")
        }


def test_cached_results_of_other_weights_are_not_used(checkpoints, tmp_path):
    import mteb

    from pvlf_hf.mteb_model import PVLFEncoder

    cache, name = mteb.ResultCache(tmp_path), "CIRRIT2IRetrieval"
    first, second, again = (run(folder, name, cache)["ndcg_at_10"] for folder in (*checkpoints, checkpoints[0]))
    assert first == again != second
    metas = [PVLFEncoder(folder, device="cpu").mteb_model_meta for folder in checkpoints]
    assert [meta.name for meta in metas] == ["local/tiny"] * 2
    assert metas[0].revision != metas[1].revision
    assert PVLFEncoder(checkpoints[0], revision="v1", device="cpu").mteb_model_meta.revision == "v1"
