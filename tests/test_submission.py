"""Submission files against the reference, a plain sort and the metrics; the linter on broken files."""

import json
import random
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from miniatures import make_circo, make_cirr
from typer.testing import CliRunner

from pvlf_hf.data.benchmark import CIRBenchmark
from pvlf_hf.data.circo import load_circo
from pvlf_hf.data.cirr import load_cirr
from pvlf_hf.evaluation.scoring import score
from pvlf_hf.evaluation.submission import (
    circo_submission,
    cirr_submission,
    lint_submission,
    score_submission,
    write_circo_submission,
    write_cirr_submission,
)
from pvlf_hf_cli import app

FIXTURE = json.loads((Path(__file__).parent / "fixtures" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory):
    """Return miniatures with random embeddings, by benchmark name."""
    root, generator = tmp_path_factory.mktemp("data"), torch.Generator().manual_seed(0)
    make_cirr(root / "cirr"), make_circo(root / "circo")
    loaded = [load_cirr(root / "cirr", split, check_counts=False) for split in ("val", "test1")]
    loaded += [load_circo(root / "circo", split, check_counts=False) for split in ("val", "test")]
    loaded += [load_circo(root / "circo", "val", reference="removed", check_counts=False)]
    sizes = {b.protocol.name: (b, len(b.queries), len(b.gallery)) for b in loaded}
    return {
        name: (b, torch.randn(queries, 6, generator=generator), torch.randn(gallery, 6, generator=generator))
        for name, (b, queries, gallery) in sizes.items()
    }


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in FIXTURE["cirr_test_submissions"]])
def test_cirr_files_equal_the_reference(case, tmp_path):
    queries = {
        "reference": [None] * len(case["pair_ids"]),
        "reference_id": case["references"],
        "caption": ["more"] * len(case["pair_ids"]),
        "query_id": list(map(str, case["pair_ids"])),
        "subset_ids": case["members"],
    }
    gallery = {"image": [None] * len(case["index_names"]), "image_id": case["index_names"]}
    benchmark = CIRBenchmark("cirr/test1", Dataset.from_dict(queries), Dataset.from_dict(gallery))
    embeds = torch.tensor(case["predicted_features"]), torch.tensor(case["index_features"])
    expected = [case["recall_submission"], case["recall_subset_submission"]]
    files = write_cirr_submission(tmp_path / "new", benchmark, *embeds)
    assert [json.loads(file.read_text()) for file in files] == expected
    assert [file.name for file in files] == ["cirr_test1_recall.json", "cirr_test1_recall_subset.json"]
    assert [lint_submission(file, benchmark) for file in files] == [[], []]


@pytest.mark.parametrize("name", ["circo-test", "circo-val-removed"])
def test_circo_file_equals_a_plain_sort(benchmarks, tmp_path, name):
    benchmark, queries, gallery = benchmarks[name]
    answers = json.loads(write_circo_submission(tmp_path, benchmark, queries, gallery).read_text())
    assert list(answers) == [str(n) for n in range(len(queries))]
    ids = [int(i) for i in benchmark.gallery["image_id"]]
    cosines = torch.cosine_similarity(queries[:, None].double(), gallery.double(), dim=2)
    for row, (ranked, reference) in enumerate(zip(answers.values(), benchmark.queries["reference_id"], strict=True)):
        by_cosine = sorted(zip((-cosines[row]).tolist(), ids, strict=True))
        assert ranked == [i for _, i in by_cosine if name == "circo-test" or i != int(reference)]


@pytest.mark.parametrize("name", ["cirr-val", "circo-val", "circo-val-removed"])
def test_a_scored_file_has_the_metrics_of_the_ranking(benchmarks, tmp_path, name):
    benchmark, *embeds = benchmarks[name]
    if name == "cirr-val":
        files = write_cirr_submission(tmp_path, benchmark, *embeds)
    else:
        files = [write_circo_submission(tmp_path, benchmark, *embeds)]
    assert [lint_submission(file, benchmark) for file in files] == [[]] * len(files)
    scored = {k: v for file in files for k, v in score_submission(file, benchmark).items()}
    metrics = score(benchmark, *embeds).metrics
    assert scored == {k: v for k, v in metrics.items() if not k.startswith("mean") and "/" not in k}
    assert 0 < sum(scored.values()) < len(scored)


def test_unfit_benchmarks_and_files_raise(benchmarks, tmp_path):
    test, *embeds = benchmarks["cirr-test1"]
    file, _ = write_cirr_submission(tmp_path, test, *embeds)
    with pytest.raises(ValueError, match="cirr/test1 has no targets; upload"):
        score_submission(file, test)
    with pytest.raises(ValueError, match="cannot be scored: .*answers 0 of 6 queries"):
        score_submission(file, benchmarks["circo-val"][0])
    with pytest.raises(ValueError, match="circo/test is not a benchmark for the cirr server"):
        cirr_submission(*benchmarks["circo-test"])
    with pytest.raises(ValueError, match="7 query and 14 gallery embeddings for 8 queries"):
        cirr_submission(test, embeds[0][:7], embeds[1])
    with pytest.raises(ValueError, match="cirr/test1 is not a benchmark for the circo server"):
        circo_submission(test, *embeds)


# ---- the check ----


def edited(benchmarks, name, which, edit):
    """Edit the content of a valid file; the edit changes it or returns another."""
    submission = circo_submission if name.startswith("circo") else lambda *a: cirr_submission(*a)[which]
    answers = submission(*benchmarks[name])
    query = [key for key in answers if key.isdigit()][1]
    return edit(answers, query) or answers


CIRR, SUBSET, CIRCO = ("cirr-test1", 0), ("cirr-test1", 1), ("circo-test", 0)


@pytest.mark.parametrize(
    ("file", "edit", "problem"),
    [
        (CIRR, lambda a, q: a.pop("version") and None, "'version' is None: write \"rc2\""),
        (CIRR, lambda a, q: a.update(metric="Recall"), "'metric' is 'Recall': write \"recall\" or \"recall_subset\""),
        (CIRR, lambda a, q: a.pop(q) and None, "answers 7 of 8 queries, first missing '12067'"),
        (CIRR, lambda a, q: a.update({"x": a.pop(q)}), "1 keys are not queries, first 'x'"),
        (
            CIRR,
            lambda a, q: a.update({q: [f"{i}.png" for i in a[q]]}),
            'names have a file extension: write them without ".p',
        ),
        (CIRR, lambda a, q: a[q].append(a[q][0]), "a list repeats an id.*(1 times, first in query '12067'"),
        (CIRR, lambda a, q: a[q].pop() and None, "lists must hold 13 ids (1 times, first in query '12067': '12 ids')"),
        (CIRR, lambda a, q: a.update({q: a[q][0]}), "an answer is not a list"),
        (CIRR, lambda a, q: a.update({q: {"a": 1}}), "an answer is not a list"),
        (CIRR, lambda a, q: a[q].insert(0, 7), "ids must be names in quotation marks"),
        (CIRR, lambda a, q: a[q].insert(0, "dev-1-0-img0"), "ids are not in the gallery.*'dev-1-0-img0'"),
        (CIRR, lambda a, q: a[q].insert(0, "test1-194-0-img2"), "the reference is among the answers"),
        (SUBSET, lambda a, q: a[q].insert(0, "test1-1261-1-img1"), "ids are not in the query's subset"),
        (SUBSET, lambda a, q: a[q].pop() and None, "lists must hold 3 ids"),
        (SUBSET, lambda a, q: [a], "is .*, not an object of ranked lists"),
        (CIRCO, lambda a, q: a.update({q: list(map(str, a[q]))}), "warning: ids are strings"),
        (CIRCO, lambda a, q: a.update({q: [f"{i:012d}" for i in a[q]]}), "ids are padded with zeros"),
        (CIRCO, lambda a, q: a[q].insert(0, True), "ids must be numbers.*True"),
        (CIRCO, lambda a, q: a[q].append(a[q][0]), "a list repeats an id"),
        (CIRCO, lambda a, q: a.update({"version": "rc2"}), "1 keys are not queries, first 'version'"),
        (CIRCO, lambda a, q: a[q].insert(0, 5), "ids are not in the gallery.*'5'"),
    ],
)
def test_problems_of_a_file_are_reported(benchmarks, tmp_path, file, edit, problem):
    name, which = file
    (tmp_path / "file.json").write_text(json.dumps(edited(benchmarks, name, which, edit)))
    problems = "\n".join(lint_submission(tmp_path / "file.json", benchmarks[name][0]))
    start, _, rest = problem.partition(".*")
    assert start in problems and rest in problems.partition(start)[2], problems


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"version": "rc2", "12063": ["te', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("", "is not valid JSON"),
        ('"recall"', "is 'recall', not an object of ranked lists"),
        ('{"0": [1], "0": [2]}', "has 1 keys twice, first '0': only the last counts"),
        ('{"0": [1' + " " * 5_000_000 + "]}", "has 5,000,010 bytes, more than 5,000,000"),
        ('{"7": ["dev-244-0-img0"]}', "names are not of the test1 split"),
        ('{"7": ["test1-244-0-img0"]}', "'version' is None"),
        ('{"version": "rc2", "metric": "recall", "7": []}', "answers 1 of 4148 queries: answer each"),
        ('{"800": [2]}', "answers 0 of 800 queries, first missing '0'"),
    ],
)
def test_files_of_test_splits_are_checked_without_annotations(tmp_path, text, problem):
    (tmp_path / "file.json").write_text(text)
    assert any(problem in line for line in lint_submission(tmp_path / "file.json"))
    assert "cannot be opened" in lint_submission(tmp_path / "missing.json")[0]


def complete_files():
    """Yield files that the servers accept."""
    names = [f"test1-{n}-0-img0" for n in range(50)]
    yield {"version": "rc2", "metric": "recall", **{str(12063 + 2 * n): names for n in range(4148)}}
    yield {"version": "rc2", "metric": "recall_subset", **{str(12063 + 2 * n): names[:3] for n in range(4148)}}
    yield {str(n): list(range(50)) for n in range(800)}


def test_the_command_fails_on_errors_only(tmp_path):
    def lint(*arguments):
        done = CliRunner().invoke(app, ["submit", "lint", *map(str, arguments)])
        return done.exit_code, done.stdout

    files = [tmp_path / f"{number}.json" for number in range(3)]
    for file, content in zip(files, complete_files(), strict=True):
        file.write_text(json.dumps(content))
    assert lint(*files) == (0, "".join(f"{file}: fine\n" for file in files))
    strings = tmp_path / "strings.json"
    strings.write_text(json.dumps({key: list(map(str, ids)) for key, ids in json.loads(files[2].read_text()).items()}))
    assert lint(strings)[0] == 0  # only a warning
    files[0].write_text(files[0].read_text()[:-100])
    code, text = lint(files[1], files[0])
    assert code == 1 and "1.json: fine" in text and "0.json: is not valid JSON" in text
    code, text = lint("--json", strings, files[0])
    problems = json.loads(text)["files"]
    assert code == 1 and list(problems) == [str(strings), str(files[0])]
    assert problems[str(strings)][0].startswith("warning: ids are strings")


ODDITIES = [None, True, -1, 1e999, 10**30, "", "\ud800", "²", "test1-0-0-img0", [], [[]], {}, {"a": [1]}, "x" * 999]


@pytest.mark.parametrize("file", [CIRR, SUBSET, CIRCO], ids=["recall", "recall_subset", "circo"])
def test_any_json_is_checked_without_a_crash(benchmarks, tmp_path, file):
    """Edit structure and bytes at random; the result is always a list of problems."""
    chance, (name, which), target = random.Random(0), file, tmp_path / "file.json"
    clean, valid = 0, edited(benchmarks, name, which, lambda answers, query: None)
    for _ in range(100):
        content = deepcopy(valid)
        for _ in range(chance.randint(1, 3)):
            key, oddity = chance.choice(list(content)), chance.choice(ODDITIES)
            part = chance.choice(["value", "key", "inside", "all"])
            if part == "all" and chance.random() < 0.1:
                content = {"0": oddity}
            elif part == "inside" and isinstance(content[key], list) and content[key]:
                content[key][chance.randrange(len(content[key]))] = oddity
            elif part == "key":
                content[str(oddity)] = content[key]
            else:
                content[key] = oddity
        raw = json.dumps(content).encode()
        if chance.random() < 0.3:
            cut = chance.randrange(len(raw))
            raw = raw[:cut] + bytes([chance.randrange(256)]) + raw[cut + 1 :]
        target.write_bytes(raw)
        for benchmark in (benchmarks[name][0], None):
            problems = lint_submission(target, benchmark)
            assert all(isinstance(p, str) and p.encode() for p in problems)
            clean += not problems
    assert clean < 10
