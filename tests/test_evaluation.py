"""`evaluate` against plain loops, in one process and in two; averages, intervals and result files."""

import json
import re
from dataclasses import asdict, replace
from statistics import fmean

import datasets
import numpy as np
import pytest
import torch
from accelerate import PartialState
from error_bounds import MEAN_ERROR
from miniatures import make_all
from processes import run_in_processes
from squares import COLOURS, make_benchmark
from tiny import make_model, make_processor
from torch.nn import functional as F

import pvlf_hf
from pvlf_hf.checkpoints.model_card import render_card
from pvlf_hf.data.benchmark import CIRBenchmark
from pvlf_hf.data.protocols import PROTOCOLS, load_protocol
from pvlf_hf.embeddings.embedding_store import EmbeddingStore
from pvlf_hf.embeddings.encoding import encode_gallery
from pvlf_hf.evaluation import results
from pvlf_hf.evaluation.metrics import METRICS, BenchmarkMetrics
from pvlf_hf.evaluation.results import intervals, read_results, write_results
from pvlf_hf.evaluation.scoring import average, evaluate, score
from pvlf_hf.evaluation.significance import bootstrap_interval


@torch.no_grad()
def plain_rankings(model, processor, benchmark):
    """Yield each query's gallery ids, best first: one image, caption and query at a time, sorted in Python."""
    gallery = {
        row["image_id"]: model.get_image_features(**processor.process_targets(row["image"])).pooler_output[0]
        for row in benchmark.gallery
    }
    plain = benchmark.gallery.remove_columns("image")
    groups_of = {row["image_id"]: row.get("group_ids", [None]) for row in plain}
    for row in benchmark.queries:
        texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        references = [row["reference"], row.get("reference_2")]
        inputs = [
            processor.process_queries(image, text) for image in references if image is not None for text in texts
        ]
        query = sum(model.get_query_features(**i).pooler_output[0] for i in inputs)
        own = [name for name in gallery if row.get("group_id") in groups_of[name]]
        cosines = {name: float(F.cosine_similarity(query, gallery[name], dim=0)) for name in own}
        if benchmark.protocol.reference == "removed":
            del cosines[row["reference_id"]]
        yield sorted(cosines, key=lambda name: -cosines[name])


def plain_metrics(benchmark, rankings):
    """Compute the metrics of a benchmark by their definitions, query by query."""
    targets = list(benchmark.queries["target_id"])
    hits = {k: fmean(t in ids[:k] for t, ids in zip(targets, rankings, strict=True)) for k in (1, 5, 10, 25, 50)}
    if benchmark.protocol.metrics in PLAIN:
        return PLAIN[benchmark.protocol.metrics](benchmark.queries, rankings)
    if benchmark.protocol.metrics == "fashioniq":
        return {"recall@10": hits[10], "recall@50": hits[50], "mean": (hits[10] + hits[50]) / 2}
    if benchmark.protocol.metrics == "circo":
        metrics = {f"recall@{k}": hits[k] for k in (5, 10, 25, 50)}
        for k in (5, 10, 25, 50):
            positives = benchmark.queries["target_ids"]
            precisions = [plain_ap(ids, answers, k) for ids, answers in zip(rankings, positives, strict=True)]
            metrics[f"map@{k}"] = fmean(precisions)
            if k == 10:
                by_aspect = {}
                for value, aspects in zip(precisions, benchmark.queries["semantic_aspects"], strict=True):
                    for aspect in aspects:
                        by_aspect.setdefault(f"map@10/{aspect}", []).append(value)
                metrics |= {aspect: fmean(values) for aspect, values in by_aspect.items()}
        return metrics
    metrics = {f"recall@{k}": hits[k] for k in (1, 5, 10, 50)}
    rows = list(zip(targets, rankings, benchmark.queries["subset_ids"], strict=True))
    for k in (1, 2, 3):
        metrics[f"recall_subset@{k}"] = fmean(t in [i for i in ids if i in group][:k] for t, ids, group in rows)
    seven = fmean(metrics.values())
    return metrics | {"mean": (metrics["recall@5"] + metrics["recall_subset@1"]) / 2, "mean_of_seven": seven}


def plain_ap(ranking, positives, k):
    ranks = [rank for rank, image_id in enumerate(ranking[:k], 1) if image_id in positives]
    return sum(count / rank for count, rank in enumerate(ranks, 1)) / min(len(positives), k)


def plain_icir(queries, rankings):
    """Compute i-CIR's metrics as its scorer does: positions of positives, the trapezoidal rule, means by instance."""
    precisions = {}
    for row, ids in zip(queries, rankings, strict=True):
        positions = [n for n, i in enumerate(ids) if i in row["target_ids"]]
        area = 0.0
        for j, position in enumerate(positions):
            before = 1.0 if position == 0 else j / position
            area += (before + (j + 1) / (position + 1)) / 2 / (len(positions) + 1e-5)
        precisions.setdefault(row["group_id"], []).append(area)
    return {"macro_map": fmean(map(fmean, precisions.values())), "map": fmean(sum(precisions.values(), []))}


def plain_pinpoint(queries, rankings):
    """Compute PinPoint's metrics as its scorer does, list by list."""
    columns, groups = {}, {}
    for row, ids in zip(queries, rankings, strict=True):
        positives, negatives = row["target_ids"], row["negative_ids"]
        without = [i for i in ids if i not in negatives]
        for k in (1, 5, 10, 50):
            hits = sum(i in positives for i in ids[:k])
            marked = sum(i in negatives for i in ids[:k]) / min(len(negatives), k) if negatives else 0.0
            values = {"map": plain_ap(ids, positives, k), "precision": hits / k, "recall": hits / len(positives)}
            values |= {"negative_recall": marked, "map_without_negatives": plain_ap(without, positives, k)}
            for name, value in values.items():
                columns.setdefault(f"{name}@{k}", []).append(value)
        pair = (row["reference_id"], row["reference_2_id"])
        groups.setdefault(pair, []).append(columns["precision@10"][-1])
    several = [values for values in groups.values() if len(values) > 1]
    assert several and any(len(set(values)) > 1 for values in several)
    metrics = {name: fmean(values) for name, values in columns.items()}
    metrics["delta_map@10"] = metrics["map_without_negatives@10"] - metrics["map@10"]
    metrics["paraphrase_range"] = fmean(max(values) - min(values) for values in several)
    return metrics | {"paraphrase_std": fmean(np.std(values) for values in several)}


def plain_sessions(queries, rankings):
    sessions, turns = {}, {}
    for row, ids in zip(queries, rankings, strict=True):
        rank = min(ids.index(i) for i in row["target_ids"])
        sessions.setdefault(row["session_id"], []).append(rank)
        turns.setdefault(row["turn"], []).append(rank)
    metrics = {f"recall@10/turn {turn}": fmean(r < 10 for r in ranks) for turn, ranks in turns.items()}
    for k in (1, 5, 10, 50):
        metrics[f"recall@{k}"] = fmean(r < k for ranks in turns.values() for r in ranks)
        metrics[f"session_recall@{k}"] = fmean(any(r < k for r in ranks) for ranks in sessions.values())
        metrics[f"final_recall@{k}"] = fmean(ranks[-1] < k for ranks in sessions.values())
    return metrics


def plain_genecis(queries, rankings):
    assert {len(ids) for ids in rankings} == {4}
    targets = list(queries["target_id"])
    return {f"recall@{k}": fmean(t in ids[:k] for t, ids in zip(targets, rankings, strict=True)) for k in (1, 2, 3)}


def plain_edir(queries, rankings):
    ranks = [ids.index(t) for ids, t in zip(rankings, queries["target_id"], strict=True)]
    metrics = {f"recall@{k}": fmean(r < k for r in ranks) for k in (1, 5, 10)}
    for kind in ("color", "count"):
        own = [rank < 1 for rank, category in zip(ranks, queries["category"], strict=True) if category == kind]
        metrics[f"recall@1/{kind}"] = fmean(own)
    return metrics


def plain_graded(queries, rankings):
    metrics = {}
    for k in (5, 10, 50):
        gains, marked = [], []
        for row, ids in zip(queries, rankings, strict=True):
            grade_of = dict(zip(row["target_ids"], row["target_grades"], strict=True))
            gain = sum(grade_of.get(i, 0) / np.log2(n + 2) for n, i in enumerate(ids[:k]))
            best = sum(g / np.log2(n + 2) for n, g in enumerate(sorted(grade_of.values(), reverse=True)[:k]))
            negatives = row["negative_ids"]
            gains.append(gain / best)
            marked.append(len({*ids[:k]} & {*negatives}) / min(len(negatives), k) if negatives else 0.0)
        metrics |= {f"ndcg@{k}": fmean(gains), f"negative_recall@{k}": fmean(marked)}
    return metrics


PLAIN = {
    "icir": plain_icir,
    "pinpoint": plain_pinpoint,
    "sessions": plain_sessions,
    "genecis": plain_genecis,
    "edir": plain_edir,
    "graded": plain_graded,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("data"))


LABELLED = [name for name in PROTOCOLS if "test" not in name and name != "emoji-cir"]


@pytest.mark.parametrize("name", LABELLED)
def test_every_protocol_equals_a_plain_loop(tiny_model, tiny_processor, data_root, name):
    (benchmark, *_) = load_protocol(name, data_root, check_counts=False)
    rankings = list(plain_rankings(tiny_model, tiny_processor, benchmark))
    outcome = evaluate(tiny_model, tiny_processor, benchmark, batch_size=4, progress=False)
    targets = benchmark.queries["target_id"]
    assert outcome.per_query["rank"] == tuple(ids.index(t) for ids, t in zip(rankings, targets, strict=True))
    assert outcome.metrics == pytest.approx(plain_metrics(benchmark, rankings), rel=MEAN_ERROR)
    assert len(set(outcome.per_query["rank"])) > 2  # with all hits or all misses any ranking would pass
    assert {m: fmean(outcome.values(m)) for m in outcome.metrics} == pytest.approx(outcome.metrics, rel=MEAN_ERROR)
    assert outcome.protocol == asdict(benchmark.protocol)
    assert outcome.dtype == "embeddings float32, cosines float64 rounded to float32"
    assert outcome.counts == {"queries": len(rankings), "gallery": len(benchmark.gallery)}


def test_subset_metrics_have_ranks_and_names(tiny_model, tiny_processor):
    benchmark = make_benchmark()
    rankings = list(plain_rankings(tiny_model, tiny_processor, benchmark))
    outcome = evaluate(tiny_model, tiny_processor, benchmark, batch_size=2, progress=False)
    rows = zip(benchmark.queries["target_id"], rankings, benchmark.queries["subset_ids"], strict=True)
    in_subset = [[i for i in ids if i in group].index(target) for target, ids, group in rows]
    assert outcome.per_query["subset_rank"] == tuple(in_subset)
    assert outcome.per_query["query_id"] == ("0", "1", "2", "3", "4")
    ranks = {"rank": outcome.per_query["rank"], "subset_rank": in_subset}
    assert outcome.metrics == METRICS["cirr"].means(ranks)
    assert (outcome.benchmark, outcome.method) == ("squares", "composed")
    with pytest.raises(ValueError, match="no metric 'map@5' of squares; there are"):
        outcome.values("map@5")


def test_benchmarks_without_subsets_have_no_subset_metrics(tiny_model, tiny_processor):
    outcome = evaluate(tiny_model, tiny_processor, make_benchmark(subsets=False), progress=False)
    whole = evaluate(tiny_model, tiny_processor, make_benchmark(), progress=False)
    assert list(outcome.metrics) == ["recall@1", "recall@5", "recall@10", "recall@50"]
    assert outcome.per_query == {name: whole.per_query[name] for name in ("query_id", "rank")}


def test_subsets_may_differ_in_length(tiny_model, tiny_processor):
    whole = make_benchmark()
    subsets = list(whole.queries["subset_ids"])
    ragged = [[i for i in subsets[0] if i != COLOURS[4]], *subsets[1:]]
    assert whole.queries[0]["target_id"] in ragged[0] and len({len(ids) for ids in ragged}) > 1
    queries = whole.queries.remove_columns("subset_ids").add_column("subset_ids", ragged)
    ragged_ranks, ranks = (
        evaluate(tiny_model, tiny_processor, b, progress=False).per_query["subset_rank"]
        for b in (CIRBenchmark("ragged", queries, whole.gallery), whole)
    )
    assert ragged_ranks[1:] == ranks[1:]


def test_gallery_embeddings_may_be_passed(tiny_model, tiny_processor):
    benchmark = make_benchmark()
    gallery = encode_gallery(tiny_model, tiny_processor, benchmark.gallery, batch_size=4, progress=False)
    assert (gallery.dtype, gallery.shape) == (torch.float32, (9, 32))
    given = evaluate(tiny_model, tiny_processor, benchmark, gallery_embeds=gallery, progress=False)
    assert given == evaluate(tiny_model, tiny_processor, benchmark, progress=False)
    with pytest.raises(ValueError, match="8 gallery embeddings for 9 gallery images"):
        evaluate(tiny_model, tiny_processor, benchmark, gallery_embeds=gallery[:8], progress=False)
    with pytest.raises(ValueError, match="query_embeds are 32 wide and gallery_embeds 31"):
        evaluate(tiny_model, tiny_processor, benchmark, gallery_embeds=gallery[:, :31], progress=False)


def test_benchmarks_without_labels_or_columns_raise(tiny_model, tiny_processor):
    whole = make_benchmark()
    unlabelled = replace(whole, queries=whole.queries.remove_columns("target_id"))
    with pytest.raises(ValueError, match=r"squares has no target_id.*pvlf_hf\.evaluation\.submission"):
        evaluate(tiny_model, tiny_processor, unlabelled)
    with pytest.raises(ValueError, match="squares: its protocol's metrics need the column target_ids"):
        score(make_benchmark(metrics="circo"), torch.eye(9)[:5], torch.eye(9))


def test_half_precision_is_recorded(tiny_model, tiny_processor):
    outcome = evaluate(tiny_model.bfloat16(), tiny_processor, make_benchmark(), progress=False)
    assert outcome.dtype.startswith("embeddings bfloat16")


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_keeps_training_mode(tiny_model, tiny_processor, training):
    in_eval = evaluate(tiny_model.eval(), tiny_processor, make_benchmark(), progress=False)
    tiny_model.train(training)
    modes = [module.training for module in tiny_model.modules()]
    assert evaluate(tiny_model, tiny_processor, make_benchmark(), progress=False) == in_eval  # no dropout
    assert [module.training for module in tiny_model.modules()] == modes


# ---- averages, intervals and files ----


def random_evaluations(sizes):
    """Yield evaluations of FashionIQ's categories with random embeddings."""
    benchmark = make_benchmark(subsets=False, metrics="fashioniq", reference="kept")
    for number, (name, size) in enumerate(sizes.items()):
        generator = torch.Generator().manual_seed(number)
        rows = [row % 5 for row in range(size)]
        part = replace(benchmark, name=f"fashioniq/val/{name}", queries=benchmark.queries.select(rows))
        evaluation = score(part, torch.randn(size, 3, generator=generator), torch.randn(9, 3, generator=generator))
        ranks = tuple(torch.randint(80, (size,), generator=generator).tolist())  # the gallery has nine
        hits = {f"recall@{k}": fmean(r < k for r in ranks) for k in (10, 50)}
        yield replace(
            evaluation,
            per_query={**evaluation.per_query, "rank": ranks},
            metrics=hits | {"mean": fmean(hits.values())},
        )


def test_an_average_is_the_unweighted_mean():
    parts = list(random_evaluations({"dress": 40, "shirt": 70, "toptee": 100}))
    whole = average(parts)
    assert whole.benchmark == "fashioniq/val/average"
    means = {name: sum(part.metrics[name] for part in parts) / 3 for name in parts[0].metrics}
    assert whole.metrics == pytest.approx(means, rel=MEAN_ERROR)
    assert whole.counts == {"queries": 210, "gallery": 27}
    assert whole.protocol == parts[0].protocol
    assert whole.values("recall@10") == [v for part in parts for v in part.values("recall@10")]
    for wrong in ([], [parts[0], replace(parts[1], method="text")]):
        with pytest.raises(ValueError, match="average"):
            average(wrong)


def test_intervals_resample_each_category():
    parts = list(random_evaluations({"dress": 40, "shirt": 70, "toptee": 100}))
    assert intervals(parts[0])["recall@10"] == bootstrap_interval(parts[0].values("recall@10"), resamples=2000)
    random, draws = np.random.default_rng(1), []  # each category is resampled separately
    for _ in range(4000):
        means = [random.choice(part.values("recall@50"), part.counts["queries"]).mean() for part in parts]
        draws.append(fmean(means))
    # Three standard errors of a normal quantile, with 2000 draws in `evaluate` and 4000 here
    error = 3 * np.std(draws) * np.sqrt(0.025 * 0.975 * (1 / 2000 + 1 / 4000)) / 0.0584
    assert intervals(average(parts))["recall@50"] == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=error)


def test_results_file_records_the_run(tiny_model, tiny_processor, tmp_path):
    outcomes = [
        evaluate(tiny_model, tiny_processor, make_benchmark(), method, progress=False)
        for method in ("composed", "text")
    ]
    write_results(tmp_path / "new/results.json", outcomes, seed=3, note="größer")
    results = json.loads((tmp_path / "new/results.json").read_text(encoding="utf-8"))
    assert (results["seed"], results["note"]) == (3, "größer")
    assert [e["method"] for e in results["evaluations"]] == ["composed", "text"]
    assert results["evaluations"][0] == {
        "benchmark": "squares",
        "method": "composed",
        "metrics": outcomes[0].metrics,
        "intervals": {metric: list(ends) for metric, ends in intervals(outcomes[0]).items()},
        "counts": {"queries": 5, "gallery": 9},
        "protocol": outcomes[0].protocol,
        "dtype": outcomes[0].dtype,
    }
    environment = results["environment"]
    assert environment["torch"] == torch.__version__
    assert environment["pvlf-hf"] == pvlf_hf.__version__
    assert environment["commit"] is None or re.match("[0-9a-f]{40}(-dirty)?$", environment["commit"])
    assert {"python", "transformers", "tokenizers", "accelerate", "datasets", "pillow", "device"} < set(environment)


def test_results_round_trip(tmp_path):
    parts = list(random_evaluations({"dress": 4, "shirt": 7}))
    write_results(tmp_path / "results.json", [*parts, average(parts)])
    assert read_results(tmp_path / "results.json") == [*parts, average(parts)]
    write_results(tmp_path / "other.json", parts)
    (tmp_path / "other_per_query.json").replace(tmp_path / "results_per_query.json")
    with pytest.raises(ValueError, match="results_per_query.json does not belong to .*results.json"):
        read_results(tmp_path / "results.json")
    with pytest.raises(ValueError, match="other_per_query.json is missing; evaluate again"):
        read_results(tmp_path / "other.json")


OLD_RESULTS = {
    "evaluations": [
        {
            "benchmark": "circo/val",
            "method": "pvlf",
            "metrics": {
                **{"map@5": 0.375, "map@10": 0.375, "map@25": 0.375, "map@50": 0.375},
                **{"recall@5": 0.5, "recall@10": 0.5, "recall@25": 0.5, "recall@50": 1.0},
                **{"map@10/cardinality": 0.25, "map@10/negation": 0.375},
            },
            "counts": {"queries": 2, "gallery": 123403},
            "protocol": {
                "name": "circo-val",
                "gallery": "COCO unlabeled2017",
                "reference": "kept",
                "captions": "as annotated",
                "metrics": "circo",
                "missing": "none",
                "revision": "sha256 0a",
                "ties": "gallery order",
            },
            "precision": "embeddings float32, cosines float64 rounded to float32",
        },
        {
            "benchmark": "cirr/val",
            "method": "text",
            "metrics": {
                **{"recall@1": 0.25, "recall@5": 0.75, "recall@10": 1.0, "recall@50": 1.0},
                **{"recall_subset@1": 0.5, "recall_subset@2": 0.75, "recall_subset@3": 1.0},
                **{"mean": 0.625, "mean_of_seven": 0.75},
            },
            "counts": {"queries": 4, "gallery": 2297},
            "protocol": {"name": "cirr-val", "gallery": "split.rc2.val.json", "metrics": "cirr"},
            "precision": "embeddings bfloat16, cosines float64 rounded to float32",
        },
    ],
    "environment": {"python": "3.11.9", "commit": None},
}
for summary in OLD_RESULTS["evaluations"]:
    summary["intervals"] = dict.fromkeys(summary["metrics"], [0.0, 1.0])
OLD_PER_QUERY = [
    {
        "query_id": ["0", "1"],
        "rank": [0, 30],
        **{f"average_precision@{k}": [0.25, 0.5] for k in (5, 10, 25, 50)},
        "semantic_aspects": [["negation", "cardinality"], ["negation"]],
    },
    {"query_id": ["a", "b", "c", "d"], "rank": [0, 1, 4, 5], "subset_rank": [0, 0, 1, 2]},
]


def test_read_results_accepts_the_precision_key(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps(OLD_RESULTS))
    (tmp_path / "results_per_query.json").write_text(json.dumps(OLD_PER_QUERY))
    circo, cirr = read_results(tmp_path / "results.json")
    assert circo.dtype == "embeddings float32, cosines float64 rounded to float32"
    assert cirr.dtype == "embeddings bfloat16, cosines float64 rounded to float32"
    assert circo.values("map@10/negation") == [0.25, 0.5] and circo.values("map@10/cardinality") == [0.25]
    assert circo.values("recall@50") == [1, 1] and circo.values("recall@25") == [1, 0]
    assert cirr.values("mean") == [1, 1, 0.5, 0]
    assert cirr.values("mean_of_seven") == pytest.approx([1, 6 / 7, 5 / 7, 3 / 7], rel=MEAN_ERROR)
    assert (circo.method, cirr.method) == ("composed", "text"), "the first was called pvlf"
    for evaluation in (circo, cirr):
        means = {metric: fmean(evaluation.values(metric)) for metric in evaluation.metrics}
        assert means == pytest.approx(evaluation.metrics, rel=MEAN_ERROR)
    assert "| precision | embeddings bfloat16, cosines float64" in render_card(OLD_RESULTS, "you/mine")
    write_results(tmp_path / "new.json", [circo, cirr])
    assert read_results(tmp_path / "new.json") == [circo, cirr]
    written = json.loads((tmp_path / "new.json").read_text())["evaluations"]
    for new, old in zip(written, OLD_RESULTS["evaluations"], strict=True):
        renamed = {"dtype" if key == "precision" else key: value for key, value in old.items()}
        renamed["method"] = {"pvlf": "composed"}.get(old["method"], old["method"])
        assert new == {**renamed, "intervals": new["intervals"]} and new["intervals"].keys() == old["intervals"].keys()


def test_values_missing_from_results_raise():
    (evaluation,) = random_evaluations({"dress": 4})
    with pytest.raises(ValueError, match=r"the values of every query for 'recall@7' of fashioniq/val/dress were not"):
        replace(evaluation, metrics={"recall@7": 0.5}).values("recall@7")


class MacroRecall(BenchmarkMetrics):
    """Recall@1 of every query, and its mean over reference images."""

    def measure(self, query_embeds, gallery_embeds, benchmark):
        columns = super().measure(query_embeds, gallery_embeds, benchmark)
        return {**columns, "reference_id": tuple(benchmark.queries["reference_id"])}

    def _values(self, per_query):
        hits = [float(rank < 1) for rank in per_query["rank"]]
        groups = {}
        for reference, hit in zip(per_query["reference_id"], hits, strict=True):
            groups.setdefault(reference, []).append(hit)
        return {"recall@1": hits, "macro_recall@1": [fmean(group) for group in groups.values()]}


def test_new_metric_needs_one_entry(monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "macro", MacroRecall())
    squares = make_benchmark(metrics="macro", reference="kept")
    benchmark = replace(squares, queries=squares.queries.select([0, 0, 0, 1]))
    queries, gallery = torch.eye(9)[[5, 5, 0, 6]], torch.eye(9)  # the targets are 5, 5, 5, 6
    outcome = score(benchmark, queries, gallery)
    assert outcome.metrics == {"recall@1": 0.75, "macro_recall@1": pytest.approx((2 / 3 + 1) / 2, rel=MEAN_ERROR)}
    assert outcome.values("macro_recall@1") == pytest.approx([2 / 3, 1], rel=MEAN_ERROR)
    write_results(tmp_path / "results.json", [outcome])
    assert read_results(tmp_path / "results.json") == [outcome]
    with pytest.raises(ValueError, match=r"unknown metrics 'micro'; .*'graded', 'macro'\]"):
        score(replace(benchmark, protocol=replace(benchmark.protocol, metrics="micro")), queries, gallery)


def test_results_are_written_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert results.environment()["commit"] is None


# ---- two processes ----


def outcomes(folder):
    """Yield the evaluation without a store, while one is filled, and from it."""
    model, processor, benchmark = make_model(), make_processor(), make_benchmark(several_captions=True)
    for store in (None, EmbeddingStore(folder), EmbeddingStore(folder)):
        yield asdict(evaluate(model, processor, benchmark, batch_size=2, progress=False, store=store))


@pytest.mark.slow
def outcomes_of_two(folder):
    """Return the outcomes in each of two processes."""
    assert PartialState(cpu=True).num_processes == 2
    return list(outcomes(folder))


@pytest.mark.slow
def test_two_processes_agree_with_one(tmp_path):
    first, second = run_in_processes(2, outcomes_of_two, tmp_path / "together")
    alone = list(outcomes(tmp_path / "alone"))
    assert first == second == alone and alone[0] == alone[1] == alone[2]
