"""Tables of all methods on EmojiCIR: committed numbers as rendered, rows without numbers, memory of a step."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
sys.path.insert(0, str(SCRIPTS))

import method_tables as tables  # noqa: E402

ENTRIES = json.loads((tables.CARD / "results.json").read_text())
MEMORY = json.loads((tables.CARD / "memory.json").read_text())

PAPER = {
    *("Image-only", "Text-only", "Image+Text (sum)", "Pic2Word", "SEARLE", "SEARLE-OTI", "PALAVRA", "Context-I2W"),
    *("CompoDiff", "CASE", "TransAgg", "PVLF-Shallow", "PVLF-Deep"),
}
"""Systems of Tables 1 and 2 of the paper."""


def cells_of(text):
    """Return the cells of each row of Markdown tables, by its name."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {name: cells for name, *cells in lines}


def test_the_committed_page_is_what_the_numbers_render_to():
    page = (tables.CARD / "README.md").read_text(encoding="utf-8")
    shown = page.split(tables.START)[1].split(tables.END)[0].strip()
    assert shown == tables.rendered(ENTRIES, MEMORY)


def test_the_committed_comparison_is_of_the_committed_numbers():
    rows = json.loads((tables.CARD / "comparison.json").read_text())["rows"]
    assert [row["name"] for row in rows] == [*dict.fromkeys(entry["row"] for entry in ENTRIES)]
    for row in rows:
        own = [entry for entry in ENTRIES if entry["row"] == row["name"]]
        assert row["cost"].keys() == tables.costs_of(own[0]).keys() and len(row["cells"]) == len(tables.COLUMNS)
        for shown in row["cells"]:
            values = [entry["metrics"][shown["benchmark"].rpartition("/")[2]][shown["metric"]] for entry in own]
            # Less than one query more or less in one run: both are means of the same counts, summed in other orders.
            assert abs(shown["value"] - sum(values) / len(values)) < 1 / (2 * own[0]["queries"] * len(own))


def test_every_row_is_shown_whether_it_was_measured_or_not():
    rows = cells_of(tables.rendered(ENTRIES, MEMORY))
    assert rows.keys() >= {*tables.ROWS} >= PAPER
    assert sum(map(len, tables.TABLES.values())) == len(tables.ROWS)
    without = [entry for entry in ENTRIES if entry["row"] not in ("CASE", "image (VPT)")]
    rows = cells_of(tables.rendered(without, {"CASE": 1234.4}))
    heads = rows[""]
    for name, kept in (("CASE", "1,234"), ("image (VPT)", "-")):
        assert len(rows[name]) == len(heads) and rows[name][0] == "not measured yet"
        assert {head: cell for head, cell in zip(heads[1:], rows[name][1:], strict=True) if cell != "-"} == (
            {"MB a step": kept} if kept != "-" else {}
        )
    assert all(len(cells) == len(heads) for cells in rows.values())


def test_places_in_the_image_encoder_come_with_either_gallery():
    for place in ("image (VPT)", "both, independent (IVLP)", "both, linear (MaPLe)"):
        row, too = tables.ROWS[place], tables.ROWS[f"{place}, gallery too"]
        assert too.recipe == row.recipe and too.flags == (*row.flags, "--prompt_gallery=true")
    for row in tables.ROWS.values():
        assert row.recipe is None or (SCRIPTS / "configs" / row.recipe).is_file()
    assert {name for name, row in tables.ROWS.items() if row.recipe} == MEMORY.keys()


def test_memory_of_a_step_counts_each_kept_storage_once():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU(), torch.nn.Linear(5, 2))
    inputs = torch.ones(7, 3)
    with tables.kept_for_backward(model) as kept:
        model(inputs).sum()
    # The first layer keeps its input, and its output goes on to ReLU, whose result both it and the last layer keep.
    assert sum(kept.values()) == 4 * (7 * 3 + 7 * 5)
    with tables.kept_for_backward(model.requires_grad_(False)) as kept:
        model(inputs).sum()
    assert not kept


def test_times_are_the_least_of_rounds_over_all_rows(monkeypatch):
    def entry(row, seed, query, step):
        return {"row": row, "seed": seed, "query_ms": query, "seconds_a_step": step}

    timed, queries, steps = [], iter([3.0, 8.0, 2.0, 5.0, 4.0, 7.0]), iter([0.5, 0.7, 0.6])
    monkeypatch.setattr(tables, "load_emoji_cir", lambda *_: SimpleNamespace(queries=None))
    monkeypatch.setattr(tables, "load_row", lambda name, seed, _: timed.append((name, seed)) or (None, None))
    monkeypatch.setattr(tables, "query_milliseconds", lambda *_: next(queries))
    monkeypatch.setattr(tables, "brief_training", lambda *_: SimpleNamespace(seconds_a_step=next(steps)))
    entries = [entry("CASE", 1, 9, 9), entry("CASE", 2, 9, 9), entry("Product", None, 9, None)]
    untimed = entry("Image-only", None, None, None)
    again = tables.timed_again([untimed, *entries], Path("runs"), bf16=True)
    assert timed == [("CASE", 1), ("Product", None)] * tables.TIMED_ROUNDS
    assert again == [untimed, entry("CASE", 1, 2, 0.5), entry("CASE", 2, 2, 0.5), entry("Product", None, 5, None)]


@pytest.mark.slow
def test_prompts_in_a_frozen_image_encoder_keep_its_activations():
    """Count again: places whose images come from the cache keep nothing of the encoder."""
    trainer = tables.brief_training("no prompts", 3)
    assert trainer.kept_bytes / 1e6 == pytest.approx(MEMORY["no prompts"], rel=0.05)
    assert len(trainer.starts) == 3 and trainer.seconds_a_step == trainer.starts[2] - trainer.starts[1]
    assert MEMORY["image (VPT)"] > 3 * MEMORY["no prompts"]
