"""Scripts about triplets made of captions: the recipe "your catalogue" and the measurements."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from statistics import mean

import pytest
from error_bounds import MEAN_ERROR
from PIL import Image

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
sys.path.insert(0, str(SCRIPTS))

import triplet_tables  # noqa: E402
import your_catalogue  # noqa: E402

from pvlf_hf import Gallery, load_emoji_pictures, load_model  # noqa: E402
from pvlf_hf.data.emoji_cir.dataset import emoji_pairs  # noqa: E402

pytestmark = [
    pytest.mark.skipif(find_spec("inflect") is None, reason="needs inflect"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.slow
def test_a_captioned_folder_becomes_a_gallery(blip_checkpoint, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    lines = ["image,caption"]
    for c, colour in enumerate(("red", "green", "blue", "white", "black")):
        for t, thing in enumerate(("hat", "dog", "cat", "face", "glasses", "car", "house")):
            image = Image.new("RGB", (32, 32), colour)
            image.paste((40 * c, 30 * t, 99), (2 * t, 4, 4 + 4 * t, 20))
            image.save(tmp_path / "photos" / f"{colour}-{thing}.png")
            lines.append(f"{colour}-{thing}.png,a {colour} {thing}")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    words = [str(tmp_path / "captions.csv"), str(tmp_path / "photos"), "--model", str(blip_checkpoint)]
    words += ["--output_dir", str(tmp_path / "out"), "--tat_steps", "2", "--steps", "2", "--batch_size", "4"]
    your_catalogue.main(words)
    out = tmp_path / "out"
    table = (out / "results.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]] == ["as it is", "tuned", "PVLF"]
    train, held_out = (
        {
            row[side]
            for row in map(json.loads, (out / f"{name}.triplets.jsonl").read_text().splitlines())
            for side in ("reference", "target")
        }
        for name in ("train", "held_out")
    )
    assert train and held_out and train.isdisjoint(held_out)
    assert len(Gallery.load(out / "gallery", *load_model(str(out / "pvlf")))) == 35
    written = (out / "pvlf" / "model.safetensors").stat().st_mtime_ns
    your_catalogue.main(words)  # nothing is trained again
    assert (out / "pvlf" / "model.safetensors").stat().st_mtime_ns == written
    assert "triplets for training" not in capsys.readouterr().out


def test_pairs_are_scored_by_the_true_ones():
    def pairs(*names):
        return {frozenset(name.split("-")): kind for name, kind in names}

    found = pairs(("a-b", "attribute"), ("c-d", "attribute"), ("e-f", "action"))
    true = pairs(("a-b", "skin"), ("e-f", "hair"), ("g-h", "skin"))
    scored = triplet_tables.score_pairs(found, true, pairs(("a-b", "skin"), ("g-h", "skin")))
    assert scored["precision"] == pytest.approx(2 / 3, rel=MEAN_ERROR) and scored["recall"] == 0.5
    assert scored["precision_by_kind"] == {"attribute": [1, 2], "action": [1, 1]}
    assert scored["recall_by_attribute"] == {"skin": [1, 2]}


def test_results_are_kept_and_rendered(tmp_path, monkeypatch):
    monkeypatch.setattr(triplet_tables, "CARD", tmp_path)
    monkeypatch.setattr(triplet_tables, "RESULTS", tmp_path / "results.json")
    (tmp_path / "README.md").write_text(f"before\n{triplet_tables.START}\nold\n{triplet_tables.END}\nafter\n")
    for seed, recall in ((0, 0.2), (1, 0.3)):
        one = {"rows": 1000, "seconds": 60.0, "steps": 500}
        one |= {tier: {"recall@1": 0.1, "recall@10": recall} for tier in triplet_tables.TIERS}
        triplet_tables.keep(train={f"level 0/1000/{seed}": one})
    tiers = {tier: {"recall@1": 0.1, "recall@10": 0.25} for tier in triplet_tables.TIERS}
    triplet_tables.keep(tat={"0": {"seconds": 9.0, "slerp, before": tiers, "slerp, after": tiers}})
    card = (tmp_path / "README.md").read_text()
    assert "| slerp, after | 25.0 | 25.0 | 25.0 |" in card
    assert card.startswith("before\n") and card.endswith("after\n") and "old" not in card
    assert "| level 0 | 1,000 | 25.0 [" in card


def test_speed_is_measured_on_made_up_captions():
    found = triplet_tables.measure_speed(1000)
    assert found["captions"] == 1000 and found["captions_a_second"] > 0 and found["triplets"] > 50


@pytest.mark.slow
def test_triplets_for_training_hold_no_pair_of_the_test(tmp_path, monkeypatch):
    emoji = load_emoji_pictures(["Twtr"])
    people = [row for row, name in enumerate(emoji["name"]) if name.startswith(("man ", "woman "))][:300]
    monkeypatch.setattr(triplet_tables, "load_emoji_pictures", lambda vendors: emoji.select(people))
    rows = triplet_tables.triplets_of("level 0", 400, tmp_path)
    assert len(rows) == 400
    held_out = {frozenset((p.first, p.second)) for split in ("validation", "test") for p in emoji_pairs()[split]}
    assert not {frozenset(pair) for pair in zip(rows["reference_id"], rows["target_id"], strict=True)} & held_out
    smaller = triplet_tables.triplets_of("level 0", 100, tmp_path)
    assert smaller["caption"][:] == rows["caption"][:100]


def test_the_card_says_what_its_results_say(tmp_path, monkeypatch):
    card = (triplet_tables.CARD / "README.md").read_text()
    results = triplet_tables.read_results()
    monkeypatch.setattr(triplet_tables, "CARD", tmp_path)
    (tmp_path / "README.md").write_text(card)
    triplet_tables.render(results)
    assert (tmp_path / "README.md").read_text() == card, "run triplet_tables.py train --render_only"

    def recall(arm, number):
        return mean(100 * results["train"][f"{arm}/{number}/{seed}"]["plain"]["recall@10"] for seed in range(3))

    words = " ".join(card.split())
    assert f"16,000 triplets of level 0 reach {recall('level 0', 16000):.1f}, 1,000 of EmojiCIR's" in words
    assert f"own {recall('hand-written', 1000):.1f}." in words
    for arm, start in (("level 0 and 1", "change R@10 by"), ("level 0, hard negatives", "**Hard negatives help**:")):
        gains = [f"{recall(arm, n) - recall('level 0', n):+.1f}" for n in triplet_tables.NUMBERS]
        assert "{} {}, {} and {}".format(start, *gains) in words
    tuned = results["tat"]["0"]
    gains = {
        name: 100 * (tuned[f"{name}, after"]["plain"]["recall@10"] - tuned[f"{name}, before"]["plain"]["recall@10"])
        for name in ("slerp", "sum")
    }
    assert f"adds {gains['slerp']:.1f} points to Slerp and {gains['sum']:.1f} to the sum" in words
