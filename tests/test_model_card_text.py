"""Cards state what a run recorded and nothing else, and keep what their authors wrote."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData, parse_eval_result_entries
from squares import make_benchmark
from typer.testing import CliRunner

from pvlf_hf.checkpoints.eval_results import eval_result_entries, task_id
from pvlf_hf.checkpoints.model_card import render_card, results_tables, write_card
from pvlf_hf.data.emoji_cir.captions import TIERS
from pvlf_hf.evaluation.metrics import METRICS, metrics_named
from pvlf_hf.evaluation.results import read_results, write_results
from pvlf_hf.evaluation.scoring import score
from pvlf_hf_cli import app

ROOT = Path(__file__).parents[1]
SECTIONS = ["about", "usage", "results", "protocols", "training", "citation"]
FACTS = {
    "model": {"model": "Salesforce/blip-itm-base-coco", "method": "pvlf", "num_prompts": 10, "gamma": None},
    "data": {"dataset": "laion-cir-combined", "train_file": None, "data_root": "/home/someone/photos"},
    "training": {"seed": 7, "learning_rate": 0.0002},
    "best": {"checkpoint": "checkpoint-40", "metric": "mean", "value": 0.625},
}


@pytest.fixture(scope="module")
def results_file(tmp_path_factory):
    """Return the results file of nine squares ranked by two sets of embeddings, labelled as model and baseline."""
    file = tmp_path_factory.mktemp("run") / "results.json"
    embeds = torch.randn(5 + 9, 4, generator=torch.Generator().manual_seed(0))
    measured = [score(make_benchmark(), e[:5], e[5:], m) for m, e in (("composed", embeds), ("image", embeds.flip(0)))]
    write_results(file, measured, **FACTS)
    return file


@pytest.fixture(scope="module")
def results(results_file):
    return json.loads(results_file.read_text())


def section(card, name):
    start, end = f"<!-- pvlf-hf: {name} -->", f"<!-- pvlf-hf: end of {name} -->"
    return card.split(start)[1].split(end)[0]


def by_hand(card):
    """Return the card's text without metadata and rendered sections."""
    body = card.partition("---")[2].partition("---")[2]
    return re.split(r"<!-- pvlf-hf: \w+ -->.*?<!-- pvlf-hf: end of \w+ -->", body, flags=re.DOTALL)


def test_card_figures_equal_the_results_file(results):
    card = render_card(results, "you/mine")
    rows = [line.strip("| ").split(" | ") for line in section(card, "results").splitlines() if "squares" in line]
    assert [row[2] for row in rows] == ["composed", "image"]
    for row, evaluation in zip(rows, results["evaluations"], strict=True):
        for cell, (metric, value) in zip(row[3:], evaluation["metrics"].items(), strict=True):
            low, high = evaluation["intervals"][metric]
            assert cell == f"{100 * value:.2f} ({100 * low:.1f} to {100 * high:.1f})"
    # metrics of the model, without the baseline
    (entry,) = ModelCard(card).data.to_dict()["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in entry["metrics"]} == results["evaluations"][0]["metrics"]
    assert entry["dataset"]["args"] == results["evaluations"][0]["protocol"]


def test_protocol_training_and_environment_come_from_the_file(results):
    card = render_card(results, "you/mine")
    protocols, training = section(card, "protocols"), section(card, "training")
    assert protocols.count("| squares | |") == 1  # one card for all methods
    assert "| gallery | nine squares (9 images) |" in protocols and "| queries | 5 |" in protocols
    for setting in ("num_prompts | 10", "seed | 7", "learning_rate | 0.0002", "data_root | photos"):
        assert f"| {setting} |" in training
    assert "gamma" not in training and "checkpoint-40`: 0.625" in training
    assert f"torch {results['environment']['torch']}" in training and "/home" not in card


@pytest.mark.parametrize("absent", ["evaluations", "environment", "training", "all"])
def test_missing_facts_are_stated_as_not_recorded(results, absent):
    known = {} if absent == "all" else {name: its for name, its in results.items() if name != absent}
    card = render_card(known, "you/mine")
    if absent in ("evaluations", "all"):
        assert section(card, "results").strip() == "Not measured." and "model-index" not in card
        assert section(card, "protocols").strip() == "Nothing was measured."
    if absent in ("environment", "all"):
        assert "Versions were not recorded." in section(card, "training")
        assert not re.search(r"python \d|commit [0-9a-f]", card)
    if absent == "all":
        assert "Settings were not recorded." in section(card, "training")
        assert not any(re.search(r"\d", section(card, name)) for name in SECTIONS[:1] + SECTIONS[2:5])


def test_card_metadata_names_model_task_and_results(results, tmp_path):
    data = ModelCard(render_card(results, "you/mine", license="bsd-3-clause", tags="fashion")).data
    assert (data.library_name, data.pipeline_tag, data.license) == (
        "transformers",
        "image-feature-extraction",
        "bsd-3-clause",
    )
    assert data.tags == ["composed-image-retrieval", "pvlf", "fashion"]
    assert (data.base_model, data.datasets) == ("Salesforce/blip-itm-base-coco", ["laion-cir-combined"])
    for folder in (str(tmp_path), str(ROOT / "src")):  # a folder's name is no repository of the Hub
        card = render_card({**results, "model": {"model": folder}}, "you/mine")
        assert ModelCard(card).data.base_model is None and Path(folder).name in section(card, "about")
    relative = {"model": {"model": "outputs/base"}, "base_model": None}  # as the run knew, in whose folder it was one
    assert ModelCard(render_card({**results, **relative}, "you/mine")).data.base_model is None


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_text_of_the_author_is_kept(results, line_end):
    card = render_card({}, "you/mine", language="en").replace("\n", line_end)
    author = "Ours – ünïcode,  two spaces  " + line_end
    card = card.replace("# mine", author + "# mine").replace("## Citation", author * 2 + "## Citing") + author
    card = card.replace("tags:", "# my comment\ntags:".replace("\n", line_end)).replace("\n- pvlf", "\n- my-tag")
    again = render_card(results, "you/mine", card)
    assert by_hand(again) == by_hand(card)
    assert section(again, "results") != section(card, "results")
    assert (line_end == "\n") == ("\r" not in again) and again.count("\n") == again.count(line_end)
    data = ModelCard(again).data
    assert data.tags == ["composed-image-retrieval", "my-tag"] and data.language == "en" and data.eval_results
    assert "# my comment" in again and list(ModelCard(again).data.to_dict())[-1] == "model-index"
    assert render_card(results, "you/mine", again) == again
    withdrawn = render_card({}, "you/mine", again)  # the base model stays, old figures do not
    assert ModelCard(withdrawn).data.eval_results is None and "Not measured." in section(withdrawn, "results")
    assert ModelCard(withdrawn).data.base_model == "Salesforce/blip-itm-base-coco"


def test_cards_survive_rewriting_by_the_library(results):
    card = render_card(results, "you/mine", license="mit")
    rewritten = str(ModelCard(card))  # as model.push_to_hub and processor.push_to_hub do
    assert ModelCard(rewritten).text == ModelCard(card).text
    assert ModelCard(rewritten).data.to_dict() == ModelCard(card).data.to_dict()
    assert render_card(results, "you/mine", rewritten, license="mit") == rewritten


def test_removed_sections_stay_removed_and_foreign_cards_get_all(results):
    card = render_card(results, "you/mine")
    without = card.replace(f"<!-- pvlf-hf: usage -->{section(card, 'usage')}<!-- pvlf-hf: end of usage -->", "See us.")
    assert render_card(results, "you/mine", without) == without
    foreign = str(ModelCard.from_template(ModelCardData(license="mit"), model_description="A model."))
    ours = render_card(results, "you/mine", foreign)
    assert ModelCard(ours).text.startswith(ModelCard(foreign).text) and ModelCard(ours).data.license == "mit"
    assert [name for name in SECTIONS if section(ours, name)] == SECTIONS


@pytest.mark.parametrize(
    "damage",
    [
        lambda card: card.replace("<!-- pvlf-hf: end of results -->", ""),
        lambda card: card.replace("<!-- pvlf-hf: results -->", ""),
        lambda card: card + "<!-- pvlf-hf: results --><!-- pvlf-hf: end of results -->",
    ],
)
def test_damaged_markers_raise(results, damage):
    with pytest.raises(ValueError, match="one <!-- pvlf-hf: results --> and after it one"):
        render_card(results, "you/mine", damage(render_card(results, "you/mine")))


def test_cards_list_other_metrics_and_aspects():
    circo = {"benchmark": "circo/val", "method": "pvlf", "protocol": {"name": "circo"}}
    aspects = {"map@5": 0.1, "map@10/colour": 0.25}
    fashion = {**circo, "benchmark": "a|b", "metrics": {"recall@10": 0.5, "mean": 0.5}}
    tables = results_tables([{**circo, "metrics": aspects}, fashion]).split("\n\n")
    assert tables[0] == "Percent."  # these have no intervals
    assert [table.splitlines()[0].split(" | ")[3:] for table in tables[1:]] == [
        ["mAP@5 |"],
        ["mAP@10/colour |"],
        ["R@10", "mean |"],
    ]
    assert [table.splitlines()[2] for table in tables[1:]] == [
        "| circo/val | circo | pvlf | 10.00 |",
        "| circo/val | circo | pvlf | 25.00 |",
        "| a/b | circo | pvlf | 50.00 | 50.00 |",
    ]


def test_checkpoint_folder_gets_a_card(results, results_file, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    assert "Not measured." in write_card(folder).read_text(encoding="utf-8")
    (folder / "results.json").write_text(results_file.read_text())
    (folder / "retrievals.png").touch()
    done = CliRunner().invoke(app, ["card", str(folder), "--name", "you/mine", "--license", "mit"])
    assert done.stdout == f"{folder / 'README.md'}\n"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert card == render_card(results, "you/mine", picture="retrievals.png", license="mit")
    assert "![Queries with what was retrieved](retrievals.png)" in card
    assert write_card(folder, "you/mine", results_file).read_text(encoding="utf-8") == card


def test_citation_equals_the_readme():
    assert section(render_card({}, "x"), "citation").strip() in (ROOT / "README.md").read_text(encoding="utf-8")


# ---- results that the Hub reads ----


def measured(benchmark, metrics, method="composed", name="emoji-cir"):
    protocol = {"name": name, "reference": "removed", "metrics": "cirr", "revision": "v1"}
    counts = {"queries": 1500, "gallery": 3633}
    return {"benchmark": benchmark, "method": method, "metrics": metrics, "counts": counts, "protocol": protocol}


EMOJI = [
    measured("emoji-cir/test/plain", {"recall@1": 0.096, "recall@5": 0.2, "recall@10": 0.34666}),
    measured("emoji-cir/test/brief", {"recall@1": 0.1, "recall@10": 0.3}),
    measured("emoji-cir/test/plain", {"recall@1": 0.9, "recall@10": 0.9}, "text"),
    measured("cirr/val", {"recall@1": 0.3}),
]
IDS = {"emoji-cir": "you/emoji-cir"}


def test_eval_results_state_the_headline_of_each_benchmark(tmp_path):
    """Read back by the library's own parser: percent, of the model and not of its baselines."""
    results = {"evaluations": EMOJI}
    write_card(tmp_path, "you/mine", results, hub_ids=IDS)
    assert (
        "huggingface.co" not in (tmp_path / ".eval_results/emoji-cir.yaml").read_text()
    )  # no such file would be there
    (tmp_path / "results.json").write_text(json.dumps(results))
    write_card(tmp_path, "you/mine", hub_ids=IDS)
    (file,) = (tmp_path / ".eval_results").iterdir()
    entries = parse_eval_result_entries(yaml.safe_load(file.read_text()))
    assert file.name == "emoji-cir.yaml" and {entry.dataset_id for entry in entries} == {"you/emoji-cir"}
    assert {entry.task_id: entry.value for entry in entries} == {
        "test-plain-recall_at_1": 9.6,
        "test-plain-recall_at_10": 34.67,
        "test-brief-recall_at_1": 10.0,
        "test-brief-recall_at_10": 30.0,
    }
    assert entries[0].notes == "percent; protocol emoji-cir, reference removed, data v1"
    assert entries[0].source_url == "https://huggingface.co/you/mine/blob/main/results.json"
    assert ModelCard.load(tmp_path / "README.md").data.eval_results  # beside the legacy model-index
    assert eval_result_entries(results) == {}  # without an id on the Hub there is nowhere to state them
    local = eval_result_entries(results, "mine", IDS)["emoji-cir"]
    assert local[0].source_url is None and local[0].value == 9.6


def test_eval_results_of_data_sets_on_the_hub_need_no_id():
    e = measured("icir/test", {"macro_map": 0.2835, "map": 0.3}, name="icir")
    (entry,) = eval_result_entries({"evaluations": [{**e, "protocol": {**e["protocol"], "metrics": "icir"}}]})["icir"]
    assert (entry.dataset_id, entry.task_id, entry.value) == ("billpsomas/icir", "test-macro_map", 28.35)


def test_tasks_of_emoji_cir_are_those_that_are_measured():
    listed = yaml.safe_load((ROOT / "model_cards" / "emoji-cir" / "eval.yaml").read_text())
    assert {"name", "description", "evaluation_framework", "tasks"} == listed.keys()
    tasks = [task_id(f"emoji-cir/test/{tier}", metric) for tier in TIERS for metric in METRICS["cirr"].headline]
    assert [task["id"] for task in listed["tasks"]] == tasks


def test_new_cards_lead_with_what_the_hub_indexes(results):
    card = render_card(results, "you/mine", license="mit")
    assert list(yaml.safe_load(card.split("---")[1]))[:3] == ["library_name", "pipeline_tag", "base_model"]


def test_shipped_cards_lead_with_what_the_hub_indexes():
    cards = {
        name: ModelCard.load(ROOT / "model_cards" / name / "README.md")
        for name in ("pvlf-emoji-tiny", "blip-emoji-tiny")
    }
    for card in cards.values():
        assert list(yaml.safe_load(card.content.split("---")[1]))[:2] == ["library_name", "pipeline_tag"]
    # the name of blip-emoji-tiny on the Hub, which pvlf-emoji-tiny is built on, is known when it is pushed
    assert cards["pvlf-emoji-tiny"].data.base_model is None
    assert cards["blip-emoji-tiny"].data.base_model == "sentence-transformers/paraphrase-MiniLM-L3-v2"


@pytest.mark.parametrize("name", ["pvlf-emoji-tiny", "blip-emoji-tiny"])
def test_figures_of_shipped_cards_equal_the_results_file(name):
    facts = json.loads((ROOT / "model_cards" / name / "results.json").read_text())
    listed = ModelCard.load(ROOT / "model_cards" / name / "README.md").data.to_dict()["model-index"][0]["results"]
    stated = {r["dataset"]["name"]: {m["type"]: m["value"] for m in r["metrics"]} for r in listed}
    if name == "pvlf-emoji-tiny":
        assert stated == {f"emoji-cir/test/{tier}": metrics for tier, metrics in facts["metrics"].items()}
        assert stated == {e["benchmark"]: e["metrics"] for e in facts["evaluations"]}
        read = read_results(ROOT / "model_cards" / name / "results.json")  # with the values of every query
        assert [metrics_named("cirr").means(e.per_query) for e in read] == [e.metrics for e in read]
    else:
        assert [*stated.values()] == [facts["metrics"]]


def test_shipped_cards_are_those_that_the_code_writes():
    sys.path.insert(0, str(ROOT / "train_scripts"))
    from shipped_cards import shipped_cards

    for file, text in shipped_cards().items():
        assert file.read_text(encoding="utf-8") == text, "run `python train_scripts/shipped_cards.py`"


def test_shipped_card_is_completed_by_a_push():
    """With what is known then: the names on the Hub and the commit."""
    folder = ROOT / "model_cards" / "pvlf-emoji-tiny"
    card, facts = (folder / "README.md").read_text(), json.loads((folder / "results.json").read_text())
    pushed = render_card(facts, "you/tiny", card, revision="0123abc", base_model="you/blip-emoji-tiny")
    front = yaml.safe_load(pushed.split("---")[1])
    assert [*front][:3] == ["library_name", "pipeline_tag", "base_model"]
    assert front["base_model"] == "you/blip-emoji-tiny" and front["model-index"][0]["results"]
    assert section(pushed, "usage").count('"you/tiny", revision="0123abc"') == 2
    assert by_hand(pushed) == by_hand(card)
    entries = eval_result_entries(facts, "you/tiny", {"emoji-cir": "you/emoji-cir"})["emoji-cir"]
    assert {e.task_id: e.value for e in entries}["test-plain-recall_at_10"] == 82.8


def test_usage_is_pinned_to_a_known_revision(results):
    usage = section(render_card(results, "you/mine", revision="0123abc"), "usage")
    assert usage.count('from_pretrained("you/mine", revision="0123abc", trust_remote_code=True)') == 2
    assert "<commit>" not in usage
    unpinned = section(render_card(results, "you/mine"), "usage")
    assert 'Pass revision="<commit>"' in unpinned and 'from_pretrained("you/mine", trust_remote_code=True)' in unpinned


def test_card_command_pins_and_names_benchmarks(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"evaluations": EMOJI}))
    options = ["--name", "you/mine", "--revision", "0123abc", "--benchmark", "emoji-cir=you/emoji-cir"]
    done = CliRunner().invoke(app, ["card", str(tmp_path), *options])
    assert done.exit_code == 0 and (tmp_path / ".eval_results/emoji-cir.yaml").exists()
    assert 'revision="0123abc"' in (tmp_path / "README.md").read_text()
    for given in (
        [],
        ["--name", "you/mine", "--revision", "0123abc"],
        ["--name", "mine"],
    ):  # a push needs a name alone
        done = CliRunner().invoke(app, ["card", str(tmp_path), "--push", *given])
        assert done.exit_code == (1 if given == ["--name", "mine"] else 2), done.stderr
        assert ("has no owner" if done.exit_code == 1 else "needs --name, and takes no --revision") in done.stderr
    done = CliRunner().invoke(app, ["card", str(tmp_path), "--push", "--name", "you/mine"])
    assert done.exit_code == 1 and "holds no checkpoint (no config.json)" in done.stderr
    done = CliRunner().invoke(app, ["card", str(tmp_path), "--private"])
    assert done.exit_code == 2 and "add --push" in done.stderr
    done = CliRunner().invoke(app, ["card", str(tmp_path), "--benchmark", "emoji-cir"])
    assert done.exit_code == 2 and "NAME=OWNER/DATASET" in done.stderr
