"""The speed benchmarks run to the end; their figures need an idle machine and are not checked."""

import importlib
import json
import sys
from pathlib import Path

import pytest
from datasets import enable_progress_bars
from transformers.utils import logging

SCRIPTS = Path(__file__).parents[1] / "train_scripts"


@pytest.fixture
def benchmark(monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    verbosity = logging.get_verbosity()
    yield importlib.import_module("benchmark")
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
    enable_progress_bars()


@pytest.mark.slow
def test_server_benchmark_measures_both_servers(benchmark, monkeypatch, tmp_path, capsys):
    """Every answer is compared with the gallery's own; a wrong one raises."""
    script = importlib.import_module("benchmark_server")
    page = tmp_path / "page.md"
    page.write_text("<!-- server: written by benchmark_server.py -->\nold\n<!-- end of server -->\nwords")
    monkeypatch.setattr(sys.modules["measuring"], "DOCUMENT", page)
    arguments = ["--clients", "2", "--seconds", "0.2", "--rounds", "1", "--images", "12", "--write"]
    monkeypatch.setattr(sys, "argv", ["benchmark_server.py", *arguments, "--output_dir", str(tmp_path)])
    script.main()
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["way"], row["clients"]) for row in rows] == [("`pvlf-hf serve`", 2), ("Gradio", 2)]
    assert all(row["latencies"] and min(row["latencies"]) > 0 for row in rows)
    assert rows[0]["encoder rows"] >= len(rows[0]["latencies"]) and rows[1]["encoder rows"] == 0
    assert "| Gradio | 2 |" in page.read_text() and "old" not in page.read_text()
    assert "encoder's share" in capsys.readouterr().out


@pytest.mark.slow
def test_benchmark_script_measures_and_writes_every_part(benchmark, monkeypatch, tmp_path, capsys):
    parts = ["encoding", "query", "ranking", "search"]  # the part "startup" takes as long as all others together
    page = tmp_path / "page.md"
    page.write_text(
        "\n".join(f"# {p}\n<!-- {p}: written by benchmark.py -->\nold\n<!-- end of {p} -->\nwords" for p in parts)
    )
    arguments = ["--size", "tiny", "--rounds", "1", "--output_dir", str(tmp_path), "--write", "--only"]
    monkeypatch.setattr(sys.modules["measuring"], "DOCUMENT", page)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, *parts])
    benchmark.main()
    results = json.loads((tmp_path / "results.json").read_text())
    for part in parts:
        for table in results[part]:
            assert all(seconds > 0 for times in table["seconds"].values() for seconds in times)
            assert f"**{table['title']}**" in page.read_text()
    exact = results["search"][-1]
    assert exact["recall@10"][0] == exact["recall@10"][2] == "1.000"
    assert "old" not in page.read_text() and page.read_text().count("words") == len(parts)
    assert "## ranking" in capsys.readouterr().out


@pytest.mark.slow
def test_tables_of_scale_measure_stores(benchmark, monkeypatch, tmp_path):
    script = importlib.import_module("scale_tables")
    marks = "<!-- {0}: written by scale_tables.py -->\nold\n<!-- end of {0} -->\n"
    page = tmp_path / "page.md"
    page.write_text("".join(map(marks.format, script.RENDERED)))
    monkeypatch.setattr(script, "DOCUMENT", page)
    facts = {"processor": "one", "threads": 1, "load": 0.0, "operations a second": {}}
    monkeypatch.setattr(script, "machine", lambda size: facts)
    # In this process, which is quicker; memory is not looked at.
    monkeypatch.setattr(script, "alone", lambda function, *arguments: function(*arguments))
    pytest.importorskip("milvus_lite")
    stores = ["in memory, exact", "Milvus Lite", "shards, int8", "shards, int8+float16"]
    arguments = ["--only", "figures", "paper", "--numbers", "1000", "--write", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["scale_tables.py", *arguments, "--stores", *stores])
    script.main()
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["store"] for row in rows] == stores
    assert [row["recall@50"] for row in rows] == pytest.approx([1, 1, 0.98, 1], abs=0.02)
    memory, _, int8, _ = (row["disk"] for row in rows)
    assert 1000 * 260 < int8 < 0.5 * memory
    assert page.read_text().count("old") == 2 and "| 100,000,000 | shards, int8 |" in page.read_text()


@pytest.mark.slow
def test_store_demo_finds_what_the_exact_ranking_has(monkeypatch, tmp_path, capsys):
    """Run the demo, which raises where a result differs from the exact ranking; it must also see one that does."""
    pytest.importorskip("milvus_lite")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    script = importlib.import_module("store_demo")
    arguments = ["--images", "2000", "--searches", "5", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["store_demo.py", *arguments])
    script.main()
    printed = capsys.readouterr().out
    assert "all 15 filtered results equal the exact ranking; the store holds 2,000 images" in printed
    assert "images were removed or added meanwhile" in printed
    found = script.SearchResult(["000000003.jpg"] * 10, [0.5] * 10, [None] * 10, None, None)
    with pytest.raises(AssertionError):
        script.check(found, [("000000010.jpg", 0.5)] * 10, range(2000))
