"""Protocols by name, and the cards that state how figures were measured."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import datasets
import pytest
import torch
from forked import run_python
from inverted import make_model as make_inversion
from inverted import make_processor as make_inversion_processor
from miniatures import make_all
from tiny import make_model
from transformers import AutoModel, AutoProcessor

from pvlf_hf.checkpoints.model_card import protocol_card, protocol_cards, render_card
from pvlf_hf.commands.evaluate import main
from pvlf_hf.data.fashioniq import compose_captions
from pvlf_hf.data.protocols import PROTOCOLS, describe_protocols, load_protocol
from pvlf_hf.evaluation.results import read_results
from pvlf_hf.evaluation.scoring import average, evaluate, score
from pvlf_hf.evaluation.submission import lint_submission

SCRIPT = Path(__file__).parents[1] / "train_scripts" / "evaluate_pvlf.py"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "emoji-cir"])
def test_protocol_keeps_the_name_it_is_loaded_by(data_root, name):
    benchmarks = load_protocol(name, data_root, check_counts=False)
    assert {b.protocol.name for b in benchmarks} == {name}
    assert len(benchmarks) == (4 if name == "genecis" else 3 if name.removeprefix("refined-")[:4] == "fash" else 1)
    assert all(b.has_targets != ("test" in name) for b in benchmarks)


def test_other_counts_than_published_raise(data_root):
    with pytest.raises(ValueError, match="10 queries, but the published annotations have 4181"):
        load_protocol("cirr-val", data_root)


def test_unknown_protocols_and_folders_raise(tmp_path):
    with pytest.raises(ValueError, match="(?s)unknown protocol 'cirr'; choose from.*cirr-val .*circo-test "):
        load_protocol("cirr")
    with pytest.raises(ValueError, match="circo is not a folder; protocol circo-val looks for its data there"):
        load_protocol("circo-val", tmp_path)
    assert [line.split()[0] for line in describe_protocols().splitlines()] == list(PROTOCOLS)


def test_protocol_card_states_how_results_were_measured(data_root):
    (benchmark, *_) = load_protocol("fashioniq-removed", data_root, check_counts=False)
    evaluation = score(benchmark, torch.eye(12)[:6], torch.eye(12), dtype="exact")
    facts = {"python": "3.11", "torch": "2.13", "commit": None}
    assert (
        protocol_card(evaluation, facts)
        == f"""\
| fashioniq/val/dress | |
| --- | --- |
| protocol | fashioniq-removed |
| gallery | {benchmark.protocol.gallery} (12 images) |
| queries | 6 |
| reference image | removed |
| captions | {benchmark.protocol.captions} |
| metrics | fashioniq |
| order of equal scores | gallery order |
| left out | none |
| precision | exact |
| data revision | {benchmark.protocol.revision} |
| code | commit unknown |
| versions | python 3.11, torch 2.13 |"""
    )
    assert "| code | commit " in protocol_card(evaluation)


@pytest.mark.parametrize(
    ("method", "protocol", "template", "caption"),
    [
        ("pic2word", "fashioniq-and-reversed-as-written", "a photo of * , {caption}", "Has a HAT, and is red."),
        (
            "searle",
            "fashioniq-both-mean",
            "a photo of $ that {caption}",
            ["Is red and Has a HAT", "Has a hat and is red"],
        ),
    ],
)
def test_protocol_card_states_template_and_join_of_a_method(method, protocol, template, caption, data_root):
    """Compare with the protocols of the specification: Pic2Word strips nothing, SEARLE averages both orders."""
    model, processor = make_inversion(method), make_inversion_processor(method)
    (benchmark, *_) = load_protocol(protocol, data_root, check_counts=False)
    joined = compose_captions(["is red.", "Has a HAT,"], benchmark.protocol.captions.partition(":")[0])
    assert joined == caption
    short = [["red"] * len(joined) if isinstance(joined, list) else "red"] * len(benchmark.queries)
    queries = benchmark.queries.remove_columns("caption").add_column("caption", short)  # 20 tokens at most
    benchmark = replace(benchmark, queries=queries)
    composed, text = (evaluate(model, processor, benchmark, name, progress=False) for name in ("composed", "text"))
    card = protocol_cards([composed, text])
    assert card == protocol_cards([text, composed]) == protocol_card(composed)
    assert f"| captions | {benchmark.protocol.captions} |\n| template | {template} |" in card
    assert "template" not in text.protocol  # a baseline reads the caption alone
    results = {"evaluations": [json.loads(json.dumps(asdict(e))) for e in (composed, text)]}
    assert f"| template | {template} |" in render_card(results, "you/mine")


# ---- train_scripts/evaluate_pvlf.py ----


def flags(model, data_root, output_dir, *protocols):
    rest = ["--output_dir", output_dir, "--data_root", data_root, "--no_check_counts", "--batch_size", 4]
    return list(map(str, ["--model", model, "--protocols", *protocols, *rest]))


@pytest.mark.slow
def test_evaluation_script_runs_in_two_processes_and_rescores(tiny_checkpoint, data_root, tmp_path):
    protocols = ["cirr-val", "fashioniq", "circo-test"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT)]
    command = [
        *launch,
        *flags(tiny_checkpoint, data_root, tmp_path / "two", *protocols),
        "--methods",
        "composed",
        "text",
    ]
    done = run_python(command, env=env)
    assert done.returncode == 0, done.stderr[-3000:]

    model, processor = AutoModel.from_pretrained(tiny_checkpoint), AutoProcessor.from_pretrained(tiny_checkpoint)
    cirr, *fashion = (b for name in protocols[:2] for b in load_protocol(name, data_root, check_counts=False))
    expected = []
    for method in ("composed", "text"):
        measured = [evaluate(model, processor, b, method, progress=False) for b in (cirr, *fashion)]
        expected += [*measured, average(measured[1:])]
    assert read_results(tmp_path / "two" / "results.json") == expected
    table = (tmp_path / "two" / "results.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith("| fashioniq/val/average | fashioniq | text |"))
    assert f"{100 * expected[-1].metrics['recall@10']:.2f} (" in row
    assert table.count("| order of equal scores |") == 5  # cards: one for each benchmark and the average
    (circo,) = load_protocol("circo-test", data_root, check_counts=False)
    for method in ("composed", "text"):
        assert lint_submission(tmp_path / f"two/submissions/{method}/circo-test/circo_test.json", circo) == []

    rescored = flags(tiny_checkpoint, data_root, tmp_path / "new", "fashioniq-removed", "cirr-val")
    rescored += ["--embeddings", str(tmp_path / "two" / "embeddings"), "--submissions"]
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "two" / "embeddings").iterdir()}
    main(rescored)
    assert before == {file: file.stat().st_mtime_ns for file in before}  # nothing was encoded
    again = read_results(tmp_path / "new" / "results.json")
    assert again[-1] == expected[0] and again[3].benchmark == "fashioniq/val/average"
    recall = json.loads((tmp_path / "new/submissions/composed/cirr-val/cirr_val_recall.json").read_text())
    assert recall["metric"] == "recall" and len(recall) == 12


def test_help_lists_protocols_and_the_launch_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    output = capsys.readouterr().out
    assert describe_protocols() in output and "torchrun --nproc_per_node 4" in output


def test_dual_encoder_without_tokenizer_raises(data_root, tmp_path, tiny_checkpoint):
    make_model().config.vl_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer; save the original's tokenizer there"):
        main(flags(tmp_path, data_root, tmp_path / "out", "cirr-val"))
