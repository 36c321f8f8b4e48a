"""The benchmark of other papers' methods at toy size: every part measures what its name says."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "train_scripts"))

import benchmark_methods as benchmark


@pytest.mark.slow
def test_every_part_is_measured(monkeypatch, tmp_path, capsys):
    """Check the rows of every table; times are compared by people, on an idle machine."""
    arguments = ["--size", "tiny", "--rounds", "1", "--output_dir", str(tmp_path)]
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
