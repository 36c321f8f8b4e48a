"""The benchmark of other papers' methods at toy size: every part measures what its name says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train_scripts"))

import benchmark_methods as benchmark
import measuring


@pytest.mark.slow
def test_every_part_is_measured(monkeypatch, tmp_path, capsys):
    """Check the rows of every table, and their place on the page; times are compared by people, on an idle machine."""
    page = tmp_path / "PERFORMANCE.md"
    page.write_text(measuring.DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(measuring, "DOCUMENT", page)
    arguments = ["--size", "tiny", "--rounds", "1", "--output_dir", str(tmp_path), "--write"]
    monkeypatch.setattr(sys, "argv", ["benchmark_methods.py", *arguments])
    benchmark.main()
    results = json.loads((tmp_path / "results.json").read_text())
    text = ["CLIP in Transformers", "pic2word", "searle", "lincir", "context_i2w"]
    assert [list(table["seconds"]) for table in results["text"]] == [text, text]
    (tokens,) = results["tokens"]
    assert list(tokens["seconds"]) == ["one by one", "32 together"]
    (samples,) = results["samples"]
    assert list(samples["seconds"]) == ["4 times 1 sample", "4 samples"]
    assert "**SEARLE-OTI, 32 images, 5 steps, tiny**" in capsys.readouterr().out
    written = page.read_text(encoding="utf-8").split("## Methods of other papers")[1].split("\n## ")[0]
    assert "Not measured yet" not in written
    for title in ("Text pass of 1 query", "Text pass of 16 queries", "SEARLE-OTI, 32 images", "CompoDiff, a query"):
        assert written.count(title) == 1
    assert written.count("| more time |") == 2
    for table in results["text"]:
        (first,), *others = table["seconds"].values()
        assert table["more time"] == ["+0.0 %", *(f"{100 * other / first - 100:+.1f} %" for (other,) in others)]
