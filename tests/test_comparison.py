"""`compare` against plain arithmetic: means, intervals, paired tests, Holm's correction; refusals; the three forms."""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from statistics import fmean

import numpy as np
import pytest
import torch
from error_bounds import MEAN_ERROR
from miniatures import make_circo, make_cirr
from squares import make_benchmark
from typer.testing import CliRunner

from pvlf_hf.commands.compare import read_all
from pvlf_hf.data.circo import load_circo
from pvlf_hf.data.cirr import load_cirr
from pvlf_hf.evaluation.comparison import Column, Run, compare, informative_name, read_runs
from pvlf_hf.evaluation.comparison_page import render_html, render_markdown
from pvlf_hf.evaluation.metrics import METRICS
from pvlf_hf.evaluation.results import intervals, write_results
from pvlf_hf.evaluation.scoring import average, score
from pvlf_hf.evaluation.significance import holm, paired_test, seed_interval
from pvlf_hf.evaluation.submission import evaluate_submissions, write_circo_submission, write_cirr_submission
from pvlf_hf_cli import app


def measured(seed, skill=0.0, name="squares/val", size=60, **protocol):
    """Return the evaluation of random embeddings, the more like their target the greater the skill."""
    squares = make_benchmark(subsets=False, **{"reference": "kept", **protocol})
    benchmark = replace(squares, name=name, queries=squares.queries.select([row % 5 for row in range(size)]))
    generator = torch.Generator().manual_seed(seed)
    gallery, noise = torch.eye(9), torch.randn(size, 9, generator=generator)
    ids = list(benchmark.gallery["image_id"])
    targets = gallery[[ids.index(target) for target in benchmark.queries["target_id"]]]
    return score(benchmark, noise + skill * targets, gallery)


def runs_of(**evaluations):
    return [Run(name, {e.benchmark: e for e in listed}) for name, listed in evaluations.items()]


def test_cells_equal_plain_figures():
    good, poor, worse = measured(0, 3.0), measured(1, 0.5), measured(2, 0.4)
    comparison = compare(runs_of(good=[good], poor=[poor], worse=[worse]), against="poor")
    assert comparison.columns == tuple(Column("squares/val", m) for m in ("recall@1", "recall@10"))
    p_values = []
    for name, evaluation in (("good", good), ("worse", worse)):
        for column in comparison.columns:
            cell, metric = comparison.rows[name][column], column.metric
            assert cell.value == evaluation.metrics[metric] == fmean(evaluation.values(metric))
            assert (cell.low, cell.high) == intervals(evaluation)[metric]
            test = paired_test(evaluation.values(metric), poor.values(metric))
            assert (cell.p_value, cell.difference) == (
                test.p_value,
                pytest.approx(test.difference, abs=2 * MEAN_ERROR),
            )
            p_values.append(cell.p_value)
    adjusted = [cell.adjusted for name in ("good", "worse") for cell in comparison.rows[name].values()]
    assert adjusted == holm(p_values) and comparison.tests == 4
    assert comparison.rows["good"][comparison.columns[0]].differs
    assert not comparison.rows["worse"][comparison.columns[0]].differs
    assert all(cell.p_value is None for cell in comparison.rows["poor"].values())


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 x .01; 2 x .03; 1 x .04, which must not fall below .06
        ([0.5, 0.6], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([0.01, 0.01], [0.02, 0.02]),
    ],
)
def test_holm_by_hand(p_values, expected):
    assert holm(p_values) == pytest.approx(expected, rel=MEAN_ERROR)


def test_holm_equals_step_down_rejection():
    """A test is rejected at a level by Holm's procedure exactly if its adjusted p-value is at most the level."""
    generator = np.random.default_rng(0)
    for _ in range(50):
        values = generator.random(6) ** 3
        for level in (0.01, 0.05, 0.3):
            rejected = np.zeros(6, bool)
            for step, test in enumerate(values.argsort()):
                if values[test] > level / (6 - step):
                    break
                rejected[test] = True
            assert [p <= level for p in holm(values)] == rejected.tolist()
    for wrong in ([0.1, 1.2], [-0.1], []):
        with pytest.raises(ValueError, match="p_values"):
            holm(wrong)


def test_runs_of_one_name_are_seeds():
    seeds = [measured(seed, 1.0) for seed in range(3)]
    other = measured(9, 0.0)
    comparison = compare([Run("ours", {e.benchmark: e}) for e in seeds] + runs_of(other=[other]), against="other")
    column = comparison.columns[0]
    cell, values = comparison.rows["ours"][column], [e.metrics["recall@1"] for e in seeds]
    assert (cell.value, cell.runs) == (fmean(values), 3) and (cell.low, cell.high) == seed_interval(values)
    mean = np.mean([e.values("recall@1") for e in seeds], axis=0)
    assert cell.p_value == paired_test(mean, other.values("recall@1")).p_value
    assert "Rows of 3 runs: the mean, and in [ ] the 95 % interval over seeds" in render_markdown(comparison)


def test_averages_weigh_categories_the_same():
    def whole(seed, skill):
        parts = [
            measured(seed + n, skill, f"fashioniq/val/{name}", size, metrics="fashioniq")
            for n, (name, size) in enumerate({"dress": 20, "shirt": 50, "toptee": 80}.items())
        ]
        parts = [
            replace(p, per_query={**p.per_query, "rank": tuple(9 * r for r in p.per_query["rank"])}) for p in parts
        ]
        return average([replace(p, metrics=METRICS["fashioniq"].means(p.per_query)) for p in parts])

    a, b = whole(0, 0.5), whole(10, 0.0)
    comparison = compare(runs_of(a=[a], b=[b]), against="b", metrics=["recall@10"])
    cell = comparison.rows["a"][Column("fashioniq/val/average", "recall@10")]
    assert cell.difference == pytest.approx(a.metrics["recall@10"] - b.metrics["recall@10"], abs=4 * MEAN_ERROR)
    weights = np.repeat([150 / (3 * n) for n in (20, 50, 80)], (20, 50, 80))
    values = [weights * np.array(e.values("recall@10")) for e in (a, b)]
    plain = np.mean(a.values("recall@10"))
    assert values[0].mean() == pytest.approx(a.metrics["recall@10"], rel=2 * MEAN_ERROR) != pytest.approx(plain)
    unweighted = paired_test(*(e.values("recall@10") for e in (a, b))).p_value
    assert cell.p_value == paired_test(*values).p_value != unweighted


def test_two_protocols_in_a_column_are_refused():
    kept, removed = measured(0), measured(0, reference="removed")
    with pytest.raises(
        ValueError, match=r"a and b measured squares/val under two protocols.*reference 'kept' and 'rem"
    ):
        compare(runs_of(a=[kept], b=[removed]))
    other = replace(kept, counts={**kept.counts, "gallery": kept.counts["gallery"] + 3})
    with pytest.raises(
        ValueError, match=r"two protocols.*: number of gallery '\d+' and '\d+'. Evaluate both under one"
    ):
        compare(runs_of(a=[kept], b=[other]))
    fewer = replace(kept, per_query={**kept.per_query, "query_id": tuple(reversed(kept.per_query["query_id"]))})
    with pytest.raises(ValueError, match="a and b measured squares/val on different queries"):
        compare(runs_of(a=[kept], b=[fewer]))
    templates = [replace(kept, protocol={**kept.protocol, "template": text}) for text in ("a photo of *", "$ that")]
    assert len(compare(runs_of(a=[templates[0]], b=[templates[1]], c=[kept])).rows) == 3  # a part of the method


def test_missing_rows_metrics_and_runs_raise():
    for options, message in (
        ({"against": "c"}, r"no row 'c' to test against; there are \['a'\]"),
        ({"metrics": ["map@7"]}, r"no benchmark has the metrics \['map@7'\]"),
    ):
        with pytest.raises(ValueError, match=message):
            compare(runs_of(a=[measured(0)]), **options)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare([])


def test_rows_may_lack_columns():
    first, second = measured(0), measured(1, name="other/val")
    comparison = compare(runs_of(a=[first, second], b=[first]), against="b")
    assert len(comparison.rows["a"]) == 4 and len(comparison.rows["b"]) == 2 and comparison.tests == 2
    assert re.search(r"^\| b \|.* - \| - \|$", render_markdown(comparison), re.MULTILINE)


# ---- files, and what is rendered ----


@pytest.fixture
def results(tmp_path):
    """Return two results files, one with the cost of its model and a baseline."""
    files = {}
    for name, skill, cost in (("pvlf", 2.0, {"parameters": 2900000, "query_ms": 12.345}), ("transagg", 0.3, {})):
        evaluations = [measured(0, skill)] + [replace(measured(5), method="text")] * (name == "pvlf")
        files[name] = tmp_path / name / "results.json"
        facts = {"arguments": {"model": f"outputs/{name}"}, "cost": cost}
        write_results(files[name], evaluations, **facts)
    return files


def invoke(*arguments):
    done = CliRunner().invoke(app, ["compare", *map(str, arguments)])
    return done.exit_code, done.stdout, done.stderr


def test_command_prints_and_writes_all_forms(results, tmp_path):
    code, text, _ = invoke(*results.values(), "--against", "transagg", "--output-dir", tmp_path / "out")
    assert code == 0 and text.strip() == (tmp_path / "out/comparison.md").read_text().strip()
    lines = text.splitlines()
    assert lines[0] == "| method | squares/val R@1 | squares/val R@10 | parameters | query_ms |"
    rows = {line.split(" | ")[0].removeprefix("| "): line for line in lines[2:5]}
    assert list(rows) == ["pvlf", "pvlf: text", "transagg"]
    assert rows["pvlf"].endswith("| 2,900,000 | 12.3 |") and "] ↑ |" in rows["pvlf"]
    assert rows["transagg"].endswith("| - | - |")
    assert "Holm's correction for the 4 tests of this table" in text and "`squares/val`, protocol `squares`" in text
    code, text, _ = invoke(*results.values(), "--against", "transagg", "--json")
    content = json.loads(text)
    assert content == json.loads((tmp_path / "out/comparison.json").read_text())
    assert [row["name"] for row in content["rows"]] == list(rows) and content["tests"] == 4
    cell = content["rows"][0]["cells"][0]
    assert cell["metric"] == "recall@1" and 0 < cell["low"] < cell["value"] < cell["high"] <= 1


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


def test_page_is_whole_escaped_and_fetches_nothing():
    comparison = compare(runs_of(**{"<b>ours</b>": [measured(0, 3.0)], "base": [measured(1)]}), against="base")
    text = render_html(comparison)
    page = Page(text)
    assert page.open == [] and "<b>" not in text and "&lt;b&gt;ours" in text
    assert not any({"src", "href"} & attributes.keys() for _, attributes in page.tags)
    assert not any(tag in ("script", "link", "img") for tag, _ in page.tags)
    circles = [float(attributes["cx"]) for tag, attributes in page.tags if tag == "circle"]
    lines = [a for tag, a in page.tags if tag == "line" and "stroke-width" in a]
    assert len(circles) == len(lines) == 4 and sum(tag == "svg" for tag, _ in page.tags) == 2
    assert circles[0] > circles[1]  # the higher value is drawn to the right
    assert all(float(a["x1"]) <= cx <= float(a["x2"]) for a, cx in zip(lines, circles, strict=True))


def test_files_are_named_or_refused(results, tmp_path):
    (run,) = read_runs(results["transagg"], "base")
    assert run.name == "base"
    copy = tmp_path / "copy" / "results.json"
    copy.parent.mkdir()
    for file in results["transagg"].parent.iterdir():
        (copy.parent / file.name).write_bytes(file.read_bytes())
    code, _, error = invoke(results["transagg"], copy)
    assert code == 1 and "are both called 'transagg': name them, NAME=" in error
    code, text, _ = invoke(f"a={results['transagg']}", f"a={copy}")
    assert code == 0 and "Rows of 2 runs" in text
    for content, message in (("{", "cannot be read as JSON"), ('{"a": 1}', "holds no results of `pvlf-hf evaluate`")):
        copy.write_text(content)
        code, _, error = invoke(copy)
        assert code == 1 and message in error


@pytest.mark.parametrize(
    ("paths", "name"),
    [
        (["outputs/pic2word-seed0/evaluation"], "pic2word-seed0"),
        (["outputs/searle/model", "elsewhere/evaluation"], "searle"),  # the model that the file records comes first
        (["model", "runs/searle/evaluation"], "searle"),
        (["openai/clip-vit-base-patch32", "outputs/mine"], "clip-vit-base-patch32"),
        (["outputs/mine/Evaluation/results"], "mine"),
        ([".", "/evaluation"], "evaluation"),  # nothing else is known
        (["outputs/evaluation"], "evaluation"),
    ],
)
def test_rows_are_named_by_the_first_informative_folder(paths, name):
    assert informative_name(*paths) == name


def test_results_in_folders_of_one_name_are_told_apart(tmp_path):
    """Results that do not record a model, in `NAME/evaluation`, as `method_tables.py` writes them."""
    for seed, name in enumerate(("pic2word", "searle")):
        write_results(tmp_path / name / "evaluation" / "results.json", [measured(seed)])
    files = [tmp_path / name / "evaluation" / "results.json" for name in ("pic2word", "searle")]
    code, text, _ = invoke(*files)
    assert code == 0 and "| pic2word | " in text and "| searle | " in text
    write_results(tmp_path / "again" / "searle" / "evaluation" / "results.json", [measured(3)])
    code, _, error = invoke(*files, tmp_path / "again" / "searle" / "evaluation" / "results.json")
    assert code == 1 and "are both called 'searle': name them, NAME=" in error


def test_results_of_two_protocols_in_one_file_are_refused(tmp_path):
    write_results(tmp_path / "results.json", [measured(0), measured(0, reference="removed")])
    with pytest.raises(ValueError, match="measures squares/val under two protocols"):
        read_runs(tmp_path / "results.json")


def embeddings(benchmark, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(rows), 8, generator=generator) for rows in (benchmark.queries, benchmark.gallery)]


def test_submission_files_of_this_package_are_called_by_model_and_method(tmp_path):
    make_cirr(tmp_path / "cirr")
    cirr = load_cirr(tmp_path / "cirr", check_counts=False)
    files = []
    for seed, method in enumerate(("composed", "text")):
        folder = tmp_path / "mine/evaluation/submissions" / method / "cirr-val"
        files += write_cirr_submission(folder, cirr, *embeddings(cirr, seed))
    runs = read_all(list(map(str, files)), tmp_path)
    assert [run.name for run in runs] == ["mine", "mine: text"]
    assert all("recall_subset@1" in run.evaluations["cirr/val"].metrics for run in runs)


def test_submission_files_are_scored_without_images(tmp_path):
    """The annotations alone score as they do beside the images, in one column with a model's own results."""
    make_cirr(tmp_path / "cirr"), make_circo(tmp_path / "circo")
    cirr, circo = (load(tmp_path / n, check_counts=False) for load, n in ((load_cirr, "cirr"), (load_circo, "circo")))
    files = [write_cirr_submission(tmp_path / "peer", cirr, *embeddings(cirr, 0))[0]]
    files.append(write_circo_submission(tmp_path / "peer", circo, *embeddings(circo, 1)))
    with_images = read_all(list(map(str, files)), tmp_path)
    own = [Run("own", {b.name: score(b, *embeddings(b, 5))}) for b in (cirr, circo)]
    shutil.rmtree(tmp_path / "cirr/dev"), shutil.rmtree(tmp_path / "circo/COCO2017_unlabeled/unlabeled2017")
    with pytest.raises(ValueError, match="no row has its images"):
        load_cirr(tmp_path / "cirr", check_counts=False)
    alone = read_all(list(map(str, files)), tmp_path)
    assert alone == with_images and compare([*alone, *own], against="own").tests == 4
    queries = load_cirr(tmp_path / "cirr", check_counts=False, with_images=False).queries
    assert queries["reference"][:] == [None] * len(queries)
    next(tmp_path.glob("circo/**/image_info_unlabeled2017.json")).unlink()
    code, _, error = invoke(files[1], "--data-root", tmp_path)
    assert code == 1 and "image_info_unlabeled2017.json is not under" in error


def test_submission_files_of_peers_are_rows(tmp_path):
    """A submission scores as the evaluation of the embeddings that it was written from."""
    make_cirr(tmp_path / "cirr"), make_circo(tmp_path / "circo")
    cirr = load_cirr(tmp_path / "cirr", check_counts=False)
    circo = load_circo(tmp_path / "circo", check_counts=False)
    recall, subset = write_cirr_submission(tmp_path / "peer", cirr, *embeddings(cirr, 0))
    circo_file = write_circo_submission(tmp_path / "peer", circo, *embeddings(circo, 1))
    runs = read_all([f"peer={file}" for file in (recall, subset, circo_file)], tmp_path)
    assert {run.name for run in runs} == {"peer"}
    scored = {b: e for run in runs for b, e in run.evaluations.items()}
    for benchmark, seed in ((cirr, 0), (circo, 1)):
        own, found = score(benchmark, *embeddings(benchmark, seed)), scored[benchmark.name]
        assert found.metrics == {name: own.metrics[name] for name in found.metrics} and len(found.metrics) >= 8
        comparison = compare(runs_of(peer=[found], ours=[own]), against="ours")
        assert all(cell.p_value == 1 for cell in comparison.rows["peer"].values())
    code, text, _ = invoke(f"peer={recall}", "--data-root", tmp_path)
    assert code == 0 and "| peer | " in text and "cirr/val R@1" in text
    # called by their folder; those of another folder of that name are not taken for the same method's
    code, text, _ = invoke(recall, subset, circo_file, "--data-root", tmp_path)
    assert code == 0 and text.count("| peer | ") == 1
    other, _ = write_cirr_submission(tmp_path / "other" / "peer", cirr, *embeddings(cirr, 2))
    code, _, error = invoke(other, subset, "--data-root", tmp_path)
    assert code == 1 and "are both called 'peer': name them, NAME=" in error
    code, _, error = invoke(f"peer={recall}")
    assert code == 1 and "is a submission file: pass --data-root, whose cirr/ has the labels" in error
    with pytest.raises(ValueError, match="holds what another file of this method does"):
        evaluate_submissions([recall, recall], cirr)
