"""Level 1 of making triplets: a dual encoder mines pairs, retrieves targets of edited captions, and verifies."""

import csv
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from datasets import Image
from error_bounds import rounding, roundoff
from PIL import Image as PILImage
from typer.testing import CliRunner

import pvlf_hf_cli
from pvlf_hf import TripletMiner, benchmark_from_triplets, evaluate, load_triplets, make_triplets
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.data.emoji_cir.dataset import load_emoji_pictures
from pvlf_hf.data.making import Making, load_vocabulary
from pvlf_hf.data.making.pairs import index_captions
from pvlf_hf.search.mining import CANDIDATES, best_of_both, edited_captions
from pvlf_hf.search.vector_index import make_index

pytestmark = pytest.mark.skipif(find_spec("inflect") is None, reason="needs inflect")
BACKBONE = Path(__file__).parents[1] / "model_cards" / "blip-emoji-tiny"


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    """Return a table of 60 of Google's emoji and their folder."""
    images = load_emoji_pictures(["Goog"]).cast_column("image", Image(decode=False))
    names = images["name"][:]
    chosen = [
        at
        for at, name in enumerate(names)
        if name.split()[0] in ("woman", "man") and "running" in name or "heart" in name
    ]
    rows = [(Path(images[at]["image"]["path"]), names[at]) for at in chosen[:60]]
    table = tmp_path_factory.mktemp("emoji") / "emoji.csv"
    with table.open("w", newline="") as stream:
        csv.writer(stream).writerows([("image", "caption"), *((file.name, name) for file, name in rows)])
    return table, rows[0][0].parent


@pytest.fixture(scope="module")
def encoder():
    return load_model(str(BACKBONE))


@pytest.fixture
def miner(emoji, encoder):
    return TripletMiner(*encoder, emoji[1], progress=False)


def rows_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_miners_give_pairs_of_near_images(emoji, miner, tmp_path):
    english = load_vocabulary("en")
    index = index_captions(emoji[0], tmp_path / "work", english, progress=False)
    pairs = list(miner.pairs(index, english, seed=0))
    assert {"image", "text"} <= {pair.source for pair in pairs}
    assert pairs == list(miner.pairs(index, english, seed=0)) != list(miner.pairs(index, english, seed=1))
    images = miner.images([index[row]["image"] for row in range(len(index))])
    cosines = images @ images.T
    for pair in pairs:
        assert pair.reference != pair.target and pair.target not in pair.negatives
        if pair.source == "image":  # among the nearest 50, but not the two nearest
            row = cosines[pair.reference].clone()
            row[pair.reference] = 2
            assert 2 < row.argsort(descending=True).tolist().index(pair.target) <= 50


def test_captions_are_edited_by_another_word_of_the_class():
    english = load_vocabulary("en")
    captions = ["a red dress", "a blue dress", "two dogs", "three cats", "nothing here"]
    edited = list(edited_captions(captions, english, seed=0))
    assert [(at, text) for at, text, _, _ in edited] == [
        (0, "blue dress"),
        (1, "red dress"),
        (2, "three dogs"),
        (3, "two cats"),
    ]


def test_the_target_of_an_edited_caption_has_the_least_sum_of_ranks():
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, 16, generator=generator), dim=-1)  # noqa: E731
    sides = [draw(2 * CANDIDATES), draw(2 * CANDIDATES)]
    indexes = [(make_index("exact", side), side) for side in sides]
    for query in draw(20):
        ranks = sum((side @ query).argsort(descending=True).argsort().clamp(max=CANDIDATES) for side in sides)
        for without in range(0, 2 * CANDIDATES, 50):
            expected = min(set(range(2 * CANDIDATES)) - {without}, key=lambda row: (int(ranks[row]), row))
            assert best_of_both(indexes, query, without) == expected


def test_verification_compares_target_and_reference(emoji, miner):
    images = [row["image"] for row in csv.DictReader(emoji[0].open())]
    texts = [row["caption"] for row in csv.DictReader(emoji[0].open())]
    rows = [
        {"reference": images[a], "target": images[b], "target_caption": texts[b], "kind": kind}
        for a, b, kind in [(0, 1, "action"), (1, 0, "action"), (0, 9, "removal"), (5, 6, "action")]
    ]
    judged = list(miner.verify(rows))

    def scores(model, inputs):
        reference, target = (
            model.get_image_features(inputs[name]).pooler_output[0] for name in ("reference", "target")
        )
        text = model.get_text_features(**inputs["text"]).pooler_output[0]
        return {"text": (target - reference) @ text, "pair": target @ reference}

    for row, reason in judged:
        inputs = {"text": dict(miner.processor(text=[row["target_caption"]]))}
        for name in ("reference", "target"):
            inputs[name] = miner.processor.process_targets(PILImage.open(emoji[1] / row[name]))["pixel_values"]
        with torch.no_grad():
            expected, error = scores(miner.model, inputs), rounding(scores, miner.model, inputs, draws=4)
        for name, score in expected.items():  # written with four decimals
            assert row[f"score_{name}"] == pytest.approx(score.item(), rel=0, abs=0.5e-4 + error[name])
        if row["score_text"] <= 0 and row["kind"] != "removal":
            assert "no truer of the target" in reason


@pytest.mark.slow
def test_the_audit_equals_the_evaluation(emoji, miner, encoder, tmp_path):
    output = tmp_path / "t.jsonl"
    make_triplets(*emoji, output, Making(count=40), progress=False)
    audit = miner.modality(rows_of(output))
    benchmark = benchmark_from_triplets("t", load_triplets(output, emoji[1]))
    for arm, method in (("image", "image"), ("text", "text"), ("sum", "image+text")):
        evaluation = evaluate(*encoder, benchmark, method=method, progress=False)
        assert audit["all"][arm] == pytest.approx(evaluation.metrics["recall@10"], rel=roundoff())
    assert sum(by["rows"] for kind, by in audit.items() if kind != "all") == audit["all"]["rows"]


def test_mined_triplets_are_verified_and_reported(emoji, encoder, tmp_path):
    output, store = tmp_path / "t.jsonl", tmp_path / "embeddings"
    report = make_triplets(
        *emoji, output, miner=TripletMiner(*encoder, emoji[1], store, progress=False), progress=False
    )
    rows = rows_of(output)
    assert {"caption", "image"} <= {row["source"] for row in rows}
    assert all(row["score_text"] > 0 or row["kind"] == "removal" for row in rows)
    assert "Modality need" in str(report) and report.modality["all"]["rows"] == len(rows)
    again = TripletMiner(*encoder, emoji[1], store, progress=False)
    again.model = None  # everything is kept: nothing is encoded again
    assert again.modality(rows) == report.modality


def test_the_command_mines(emoji, tmp_path):
    output = tmp_path / "t.jsonl"
    words = [
        "triplets",
        str(emoji[0]),
        "--images",
        str(emoji[1]),
        "--output",
        str(output),
        "--model",
        str(BACKBONE),
        "--count",
        "30",
    ]
    done = CliRunner().invoke(pvlf_hf_cli.app, words)
    assert done.exit_code == 0, done.output
    assert "Modality need" in done.stdout and (tmp_path / "t.jsonl.embeddings").is_dir()
    words = ["report", str(output), "--model", str(BACKBONE)]
    done = CliRunner().invoke(pvlf_hf_cli.app, words)
    assert done.exit_code == 1 and "--images" in done.output
