"""Metrics for Hugging Face Evaluate, loaded from their folders as by a user, against `evaluation/metrics.py`."""

import doctest
from pathlib import Path

import evaluate
import pytest
import torch

import pvlf_hf
from pvlf_hf.evaluation.metrics import CIRCO_KS, METRICS, average_precision_at_k
from pvlf_hf.evaluation.metrics import map_at_k as mean_average_precision
from pvlf_hf.evaluation.ranking import positive_ranks, subset_ranks, target_ranks

FOLDER = Path(pvlf_hf.__file__).parent / "evaluate_modules"
NAMES = ("recall_at_k", "subset_recall_at_k", "map_at_k")


@pytest.fixture
def load(tmp_path):
    return lambda name: evaluate.load(str(FOLDER / name), cache_dir=str(tmp_path))


def names(index):
    return [[f"image {i}" for i in row] for row in index.tolist()]


@pytest.fixture
def problem():
    """Make embeddings and gallery positions (12, 4): target, other positive, another image, reference."""
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(12, 6, generator=generator), torch.randn(70, 6, generator=generator)
    picks = torch.stack([torch.randperm(70, generator=generator)[:4] for _ in range(12)])
    return queries, gallery, picks


def compute_in_batches(metric, arguments, **settings):
    """Compute a metric from batches of five queries."""
    for start in range(0, 12, 5):
        metric.add_batch(**{name: rows[start : start + 5] for name, rows in arguments.items()})
    return metric.compute(**settings)


def test_module_scores_equal_embedding_scores(load, problem):
    queries, gallery, picks = problem
    target, reference = picks[:, 0], picks[:, 3]
    ranked = names((queries @ torch.nn.functional.normalize(gallery).T).argsort(dim=1, descending=True))
    targets, references = ([row[column] for row in names(picks)] for column in (0, 3))

    ranks, within = (
        target_ranks(queries, gallery, target, reference),
        subset_ranks(queries, gallery, picks, target, reference),
    )
    expected = METRICS["cirr"].means({"rank": ranks, "subset_rank": within})
    recall = {"predictions": ranked, "references": targets}
    subset = recall | {"subsets": names(picks)}
    settings = {"exclude": references, "per_query": True}
    outcome = compute_in_batches(load("recall_at_k"), recall, **settings)
    assert outcome.pop("ranks") == ranks.tolist()
    among = compute_in_batches(load("subset_recall_at_k"), subset, **settings)
    assert among.pop("ranks") == within.tolist()
    assert outcome | among == {k: v for k, v in expected.items() if "mean" not in k}

    positives = positive_ranks(queries, gallery, picks[:, :2])  # no image excluded
    outcome = load("map_at_k").compute(predictions=ranked, references=names(picks[:, :2]), per_query=True)
    assert outcome == {
        **{f"map@{k}": v for k, v in mean_average_precision(positives, CIRCO_KS).items()},
        **{f"average_precision@{k}": v.tolist() for k, v in average_precision_at_k(positives, CIRCO_KS).items()},
    }


@pytest.mark.parametrize("name", NAMES)
def test_documented_examples_run(load, name):
    metric = load(name)
    assert metric.description.strip() and metric.citation.strip().startswith("@inproceedings")
    examples = [e for e in doctest.DocTestParser().get_examples(metric.inputs_description) if "load" not in e.source]
    assert examples
    for example in examples:
        assert repr(eval(example.source, {"metric": metric})) == example.want.strip()


def test_targets_beyond_the_list_are_missed_and_have_no_rank(load):
    ragged = {"predictions": [["a", "b"], ["c"]], "references": ["b", "b"]}
    outcome = load("recall_at_k").compute(**ragged, ks=[1, 50], per_query=True)
    assert outcome == {"recall@1": 0, "recall@50": 0.5, "ranks": [1, None]}
    assert load("map_at_k").compute(predictions=[["a"]], references=[["b", "a"]], ks=[2]) == {"map@2": 0.5}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({"predictions": []}, "query 1: its ranked list is empty"),
        ({"predictions": ["a", "b", "a"]}, "query 1: its ranked list repeats 'a'"),
        ({"exclude": "b"}, "query 1: its target 'b' is also its excluded image"),
        ({"exclude": 5}, "query 1: its ids are of types"),
    ],
)
def test_invalid_lists_raise_with_the_query(load, name, second, message):
    reference = ["b"] if name == "map_at_k" else "b"
    query = {"predictions": ["a", "b"], "references": reference, "exclude": "c"}
    if name == "subset_recall_at_k":
        query["subsets"] = ["a", "b"]
    rows = {key: [value, second.get(key, value)] for key, value in query.items()}
    with pytest.raises(ValueError, match=message):
        load(name).compute(**rows)


def test_queries_without_positives_and_subsets_without_target_raise(load):
    with pytest.raises(ValueError, match="query 1: its list of positives is empty"):
        load("map_at_k").compute(predictions=[["a"], ["a"]], references=[["a"], []])
    with pytest.raises(ValueError, match="query 0: its target 'a' is not in its subset"):
        load("subset_recall_at_k").compute(predictions=[["a"]], references=["a"], subsets=[["b"]])
