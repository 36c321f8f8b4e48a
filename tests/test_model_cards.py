"""The folder `model_cards`: checkpoints load offline as from the Hub, and cards state measured figures."""

import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from error_bounds import squares_error
from PIL import Image
from transformers import AutoModel, AutoProcessor

import pvlf_hf
from pvlf_hf import Evaluation, write_results
from pvlf_hf.data.benchmark import Protocol
from pvlf_hf.embeddings.encoding import embed
from pvlf_hf.evaluation.metrics import METRICS
from pvlf_hf.evaluation.scoring import score

ROOT = Path(__file__).parents[1]
CARDS = ROOT / "model_cards"
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "train_scripts"))


@pytest.mark.parametrize("name", ["pvlf-emoji-tiny", "blip-emoji-tiny"])
def test_checkpoints_are_small_and_complete(name):
    files = {path.name for path in (CARDS / name).iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json", "results.json"} <= files
    assert (CARDS / name / "model.safetensors").stat().st_size < 25e6
    assert sum(path.stat().st_size for path in (CARDS / name).iterdir()) < 26.2e6


def test_code_in_the_checkpoint_is_current():
    sources = {path.name: path.read_text() for path in (ROOT / "src" / "pvlf_hf" / "models").glob("*_pvlf.py")}
    copies = {path.name: path.read_text() for path in (CARDS / "pvlf-emoji-tiny").glob("*.py")}
    assert copies == sources, "run `python train_scripts/emoji_tables.py --render_only`"


def test_recipe_cards_render_the_recipe_without_figures():
    from recipe_cards import RECIPES, recipe_card

    assert {path.stem for path in (CARDS / "recipes").iterdir()} == {*RECIPES}
    for recipe in RECIPES:
        card = (CARDS / "recipes" / f"{recipe}.md").read_text()
        assert card == recipe_card(recipe), "run `python train_scripts/recipe_cards.py`"
        assert "Not measured." in card


@torch.no_grad()
def test_emoji_checkpoint_embeds_queries_and_images():
    model = AutoModel.from_pretrained(CARDS / "pvlf-emoji-tiny")
    assert isinstance(model, pvlf_hf.PVLFModel) and model.dtype == torch.float32
    processor = AutoProcessor.from_pretrained(CARDS / "pvlf-emoji-tiny")
    image = Image.new("RGBA", (72, 72), (255, 200, 0, 128))
    query = model.get_query_features(**processor.process_queries(image, "make the skin dark")).pooler_output
    gallery = model.get_image_features(**processor.process_targets([image])).pooler_output
    assert query.shape == gallery.shape == (1, 128)


def test_tables_equal_results():
    from emoji_tables import END, START, renderings

    for file, wanted in renderings(json.loads((CARDS / "emoji-cir" / "results.json").read_text())).items():
        rendered = file.read_text(encoding="utf-8").split(START)[1].split(END)[0]
        assert rendered.strip() == wanted.strip(), f"{file}: run emoji_tables.py --render_only"


def test_every_measured_configuration_has_five_seeds():
    from emoji_tables import CONFIGURATIONS, TABLES

    runs = json.loads((CARDS / "emoji-cir" / "results.json").read_text())["runs"]
    seeds = {
        r["configuration"]: {other["seed"] for other in runs if other["configuration"] == r["configuration"]}
        for r in runs
    }
    assert {*TABLES["methods"][1].values()} <= seeds.keys() <= CONFIGURATIONS.keys()
    assert all(len(s) == 5 for s in seeds.values()), seeds


def test_tables_measure_only_what_their_results_lack(tmp_path, monkeypatch):
    import emoji_tables

    results = json.loads((CARDS / "emoji-cir" / "results.json").read_text())
    monkeypatch.setattr(emoji_tables, "RESULTS", tmp_path / "results.json")

    def measure(flags, **changed):
        emoji_tables.RESULTS.write_text(json.dumps(results | changed))
        emoji_tables.measure(["methods"], [0, 1, 2], tmp_path / "runs", 1, flags)

    measure([])
    assert not (tmp_path / "runs").exists() and json.loads(emoji_tables.RESULTS.read_text()) == results
    with pytest.raises(ValueError, match="another recipe"):
        measure(["--max_steps=1"])
    with pytest.raises(ValueError, match="another backbone"):
        measure([], backbone="other")
    place = next(i for i, run in enumerate(results["runs"]) if run["seed"] == 0)
    lacking = results["runs"][place]
    others = results["runs"][:place] + results["runs"][place + 1 :]
    folder = tmp_path / "runs" / f"{lacking['configuration']}-seed0"
    evaluations = [finished_evaluation(lacking, tier) for tier in lacking["metrics"]]
    write_results(folder / "results.json", evaluations, **{part: lacking[part] for part in ("model", "training")})
    measure([], runs=others)
    *same, found = json.loads(emoji_tables.RESULTS.read_text())["runs"]
    assert same == others and found == lacking | {"environment": found["environment"]}
    write_results(folder / "results.json", evaluations, model=lacking["model"], training={})
    with pytest.raises(ValueError, match=f"{folder.name} holds a run of another recipe"):
        measure([], runs=others)


def finished_evaluation(run, tier):
    """Return the evaluation that a run in results.json was collected from, with ranks of 0 and 10 for its hits."""
    ranks = tuple(0 if digit == "1" else 10 for digit in run["hits"][tier])
    columns = {"rank": ranks, "subset_rank": ranks}
    facts = "composed", run["metrics"][tier], run["counts"], asdict(Protocol("emoji-cir", "", "")), "float32"
    return Evaluation(f"emoji-cir/test/{tier}", *facts, columns)


def test_backbone_card_states_its_results():
    metrics = json.loads((CARDS / "blip-emoji-tiny" / "results.json").read_text())["metrics"]
    card = (CARDS / "blip-emoji-tiny" / "README.md").read_text(encoding="utf-8")
    for k in (1, 5, 10):
        assert f"R@{k} {100 * metrics[f'recall@{k}']:.1f} %" in card.replace("\n", " ")


def test_readme_states_the_scores_of_the_checkpoints():
    (pvlf,) = (line for line in README.splitlines() if line.startswith("| [pvlf-emoji-tiny]"))
    (blip,) = (line for line in README.splitlines() if line.startswith("| [blip-emoji-tiny]"))
    plain = json.loads((CARDS / "pvlf-emoji-tiny" / "results.json").read_text())["metrics"]["plain"]
    names = json.loads((CARDS / "blip-emoji-tiny" / "results.json").read_text())["metrics"]
    for line, metrics in ((pvlf, plain), (blip, names)):
        assert ", ".join(f"R@{k} {100 * metrics[f'recall@{k}']:.1f}" for k in (1, 10)) in line


@pytest.mark.slow
@torch.no_grad()
def test_shipped_model_reaches_its_scores():
    """Evaluate the plain tier again: the committed weights are those that were measured."""
    measured = json.loads((CARDS / "pvlf-emoji-tiny" / "results.json").read_text())["metrics"]["plain"]
    benchmark = pvlf_hf.load_emoji_cir("test", "plain")
    model = AutoModel.from_pretrained(CARDS / "pvlf-emoji-tiny")
    processor = AutoProcessor.from_pretrained(CARDS / "pvlf-emoji-tiny")
    queries, gallery = embed(model, processor, benchmark, batch_size=128, progress=False)
    outcome = score(benchmark, queries, gallery)
    again, ranks = outcome.metrics, torch.tensor(outcome.per_query["rank"])
    # An image whose score equals the target's within rounding error may be ranked before or after it.
    cosines = queries @ gallery.T
    row_of = {image_id: row for row, image_id in enumerate(benchmark.gallery["image_id"])}
    own = cosines[range(len(queries)), [row_of[target] for target in benchmark.queries["target_id"]]]
    error = squares_error(checkpoint=CARDS / "pvlf-emoji-tiny")["similarity"]
    near = ((cosines - own[:, None]).abs() <= 2 * error).sum(dim=1) - 1
    assert near.float().mean() < 0.1
    among = torch.tensor(outcome.per_query["subset_rank"])
    worst, best = (
        METRICS["cirr"].means({"rank": (ranks + m).clamp(min=0), "subset_rank": (among + m).clamp(min=0)})
        for m in (near, -near)
    )
    for name, value in measured.items():
        assert worst[name] <= value <= best[name], name
    baselines = json.loads((CARDS / "emoji-cir" / "results.json").read_text())["baselines"]
    (image_only,) = (b["metrics"]["plain"] for b in baselines if b["method"] == "Image-only")
    for k in (1, 5, 10):
        assert again[f"recall@{k}"] > 2 * image_only[f"recall@{k}"]


METHOD_PAGES = sorted(page for page in (CARDS / "methods").glob("*.md") if page.stem not in ("README", "comparison"))


@pytest.mark.parametrize("page", METHOD_PAGES, ids=lambda page: page.stem)
def test_page_of_a_method_has_each_part(page):
    text = page.read_text(encoding="utf-8")
    figure = re.search(r"```mermaid\nflowchart LR\n(.*?)```", text, re.DOTALL)
    assert figure and ":::frozen" in figure[1] and 'cosine(("cosine"))' in figure[1]
    for part in ("How it differs: ", "When to prefer it: ", "Numbers: ", "Cite: ", "| query |"):
        assert part in text, part
    assert "icence" in text or "MIT" in text or "Apache" in text or "CC BY" in text
