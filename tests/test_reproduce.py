"""The committed tables of the paper, the recipes of their rows, and a table reproduced on miniature data sets."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest
from error_bounds import MEAN_ERROR
from forked import Forked
from inverted import make_tokenizer, tiny_clip
from miniatures import make_all
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, CLIPModel
from typer.testing import CliRunner

SCRIPTS = Path(__file__).parents[1] / "train_scripts"
sys.path.insert(0, str(SCRIPTS))

import gpu_hours  # noqa: E402
import paper_tables  # noqa: E402
import reproduce  # noqa: E402

from pvlf_hf.commands.train import DataArguments, last_checkpoint, parse_arguments  # noqa: E402
from pvlf_hf.data.protocols import PROTOCOLS, load_protocol  # noqa: E402
from pvlf_hf.evaluation.results import read_results  # noqa: E402
from pvlf_hf.evaluation.submission import lint_submission  # noqa: E402
from pvlf_hf.training.methods import METHODS  # noqa: E402
from pvlf_hf.training.objectives import SAMPLES  # noqa: E402
from pvlf_hf_cli import app  # noqa: E402

TABLES = paper_tables.load_tables()
RECIPES = {file.stem: file for file in sorted(reproduce.RECIPES.glob("*.yaml"))}
CELLS = [
    ((number, row.name, column), figure)
    for number, table in TABLES.items()
    for row in table.rows
    for column, figure in zip(table.columns, row.paper, strict=True)
]
FIGURE = dict(CELLS)


def footnoted_cells(*but):
    notes = [(number, note) for number, table in TABLES.items() for note in table.footnotes]
    return {
        (number, row, column)
        for number, note in notes
        if "columns" in note and note["id"] not in but
        for row, column in product(note["rows"], note["columns"])
    }


# The paper.


def test_figures_are_those_of_the_paper():
    """Published figures do not change by accident."""
    figures = json.dumps([[number, row.name, row.labels, row.paper] for number, t in TABLES.items() for row in t.rows])
    assert hashlib.sha256(figures.encode()).hexdigest()[:16] == "b1a104f1c75a46f4"
    assert [len(table.rows) for table in TABLES.values()] == [14, 15, 12, 7, 4]


def test_footnotes_mark_exactly_the_figures_that_cannot_be_right():
    def off(parts, whole):
        """Return whether a mean differs from its parts by more than rounding explains."""
        decimals = 2 if any(round(p, 1) != p for p in parts) else 1
        return abs(sum(parts) / len(parts) - whole) > 10**-decimals + 1e-9

    wrong = set()
    for row, k in product((row.name for row in TABLES[1].rows), (10, 50)):
        if off(
            [FIGURE[1, row, f"{part} R@{k}"] for part in ("shirt", "dress", "toptee")],
            FIGURE[1, row, f"average R@{k}"],
        ):
            wrong.add((1, row, f"average R@{k}"))
    means = {"CIRR average": ("CIRR R@5", "CIRR Rsubset@1"), "FIQ average": ("FIQ R@10", "FIQ R@50")}
    for (number, row, column), figure in CELLS:
        if column in means and off([FIGURE[number, row, part] for part in means[column]], figure):
            wrong.add((number, row, column))
        columns = list(TABLES[number].columns)
        earlier = [c for c in columns[: columns.index(column)] if "@" in c and c.split("@")[0] == column.split("@")[0]]
        if figure is not None and any(FIGURE[number, row, c] > figure for c in earlier):
            wrong.add((number, row, column))  # recall must not decrease with k
    assert wrong == footnoted_cells("rounding") and len(wrong) == 4


def test_rows_of_one_recipe_agree_wherever_they_are_printed():
    """Compare Table 3's BLIP rows with those of Table 2, and TransAgg's with those on Laion-CIR-Template."""
    printed = {}
    for number, table in TABLES.items():
        for row in (row for row in table.rows if row.recipe):
            for source, column, figure in zip(table.columns.values(), table.columns, row.paper, strict=True):
                printed.setdefault((row.recipe, source), []).append(((number, row.name, column), figure))
    cells = [cell for its in printed.values() for cell, figure in its if figure != its[0][1]]
    assert set(cells) == {cell for cell in footnoted_cells("case", "average", "average-frozen", "average-both")}
    assert sum(len(its) > 1 for its in printed.values()) >= 25


def test_footnotes_name_rows_and_columns_of_their_table():
    for table in TABLES.values():
        for note in table.footnotes:
            assert set(note.get("rows", [])) <= {row.name for row in table.rows} and note["text"]
            assert set(note.get("columns", [])) <= set(table.columns)
    of_tables = {number: table.marks() for number, table in TABLES.items()}
    assert of_tables == {1: "[^protocol]", 2: "", 3: "", 4: "[^test-server]", 5: "[^test-server]"}
    assert TABLES[2].marks("CASE Pre-LaSCo.Ca.", "Rsubset@3") == "[^case]"
    assert [row.name for row in TABLES[3].rows if TABLES[3].marks(row.name)] == [
        row.name for row in TABLES[3].rows if row.name.endswith("TransAgg")
    ]


def test_readme_of_the_scripts_quotes_the_papers_figures():
    readme = (SCRIPTS / "README.md").read_text(encoding="utf-8")
    for method, name in (("TransAgg", "TransAgg (Laion-CIR-Combined)"), ("PVLF", "PVLF (Laion-CIR-Combined)")):
        columns = [(2, name, column) for column in ("R@1", "R@5", "R@10", "R@50", "Rsubset@1")]
        columns += [(1, name, f"average R@{k}") for k in (10, 50)]
        cells = " | ".join(f"{FIGURE[column]:.2f}" for column in columns)
        assert f"| {method} (paper, Tables 1-2) | {cells} |" in readme


# The recipes


def test_rows_are_trained_evaluated_or_quoted():
    rows = [row for table in TABLES.values() for row in table.rows]
    assert all(bool(row.recipe) + bool(row.baseline and row.model) + row.quoted == 1 for row in rows)
    assert {row.recipe for row in rows if row.recipe} == set(RECIPES) and len(RECIPES) == 24
    assert {row.name.split()[0] for row in rows if row.quoted} == {
        "Pic2Word", "PALAVRA", "SEARLE-XL-OTI", "CompoDiff", "Context-I2W", "CASE",
    }  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_have_the_settings_of_their_name_and_the_paper(name, tmp_path):
    method, backbone, finetuning, subset, *ablation = name.split("-")
    model_args, data_args, args = parse_arguments([str(RECIPES[name]), f"--output_dir={tmp_path}"])
    config = gpu_hours.model_config(model_args)
    checkpoint = {"blip": "Salesforce/blip-itm-base-coco", "clip": "openai/clip-vit-large-patch14"}[backbone]
    assert (model_args.model, args.finetuning, data_args.dataset) == (checkpoint, finetuning, f"laion-cir-{subset}")
    prompts, layers, gamma = (25, 2, 2) if method == "pvlf" else (1, 2, 0)
    for change in ablation:
        prompts, layers = (int(change[1:]), layers) if change[0] == "p" else (prompts, int(change[1:]))
    depth = layers if method == "pvlf" else 1
    assert (config.num_prompts, config.fusion_layers, config.prompt_depth, config.gamma) == (
        prompts,
        layers,
        depth,
        gamma,
    )
    assert (config.joint_width, config.temperature, config.alpha) == ({"blip": 256, "clip": 768}[backbone], 0.01, 1)
    assert (config.fusion_heads, config.fusion_ffn_size, config.dropout, config.residual) == (8, 2048, 0.5, "pre_norm")
    assert (args.learning_rate, args.encoder_learning_rate, args.min_lr_ratio) == (1e-4, 1e-6, 0.01)
    assert (args.weight_decay, args.max_grad_norm, args.decay_norms_and_biases) == (0.05, 5, True)
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.max_steps) == (64, 100, -1)
    assert (data_args.validation, args.metric_for_best_model, args.load_best_model_at_end) == (
        "cirr-val", "mean_of_seven", False,
    )  # fmt: skip


def test_every_setting_of_a_recipe_names_its_source():
    for name, file in RECIPES.items():
        settings = [line for line in file.read_text().splitlines() if not line.startswith("#")]
        assert [line for line in settings if "  # " not in line] == [f"output_dir: outputs/paper/{name}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\n\nfine_tuning: both\n", "line 3: unknown setting 'fine_tuning'; did you mean 'finetuning'"),
        ("model: a\nqqqqqqqq: 1\n", "line 2: unknown setting 'qqqqqqqq', see pvlf-hf train --help"),
        ("- model\n", "a recipe has lines of the form `name: value`"),
    ],
)
def test_unknown_settings_of_a_recipe_raise(text, message, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="mine.yaml.*") as error:
        parse_arguments([str(tmp_path / "mine.yaml")])
    assert message in str(error.value)


def test_recipes_may_hold_lists(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "evaluate_on: [cirr-val, fashioniq]\nencoder_learning_rate: 1.0e-6\nseed: null\n"
    )
    _, data_args, args = parse_arguments([str(tmp_path / "mine.yaml"), "--bf16"])
    assert (data_args.evaluate_on, args.encoder_learning_rate, args.bf16) == (["cirr-val", "fashioniq"], 1e-6, True)


# The cost


@pytest.mark.slow
def test_operations_agree_with_pencil_and_paper(tmp_path):
    model_args, *_ = parse_arguments([str(RECIPES["pvlf-blip-both-combined"]), f"--output_dir={tmp_path}"])
    config = gpu_hours.model_config(model_args).to_json_string()
    tokens, width, layers = 577, 768, 12
    a_layer = tokens * 12 * width**2 + 2 * tokens**2 * width  # four projections and 8 d^2; scores, and their sum
    image = 2 * (layers * a_layer + 576 * (3 * 16**2) * width + tokens * width * 256)
    query, target = gpu_hours.encoding_flops(config)
    assert target == image
    assert image < query < 1.1 * image
    both, frozen = (gpu_hours.training_flops(config, mode) for mode in ("both", "frozen"))
    assert 2.9 * (query + target) < both < 3 * (query + target) and frozen < 1.1 * (query + target)


@pytest.mark.parametrize("finetuning", ["both", "text"])
def test_operations_of_deep_encoders_follow_from_those_of_shallow_ones(blip_checkpoint, finetuning, tmp_path):
    arguments = [str(RECIPES["pvlf-blip-both-combined"]), f"--model={blip_checkpoint}", "--fusion_heads=4"]
    model_args, *_ = parse_arguments([*arguments, f"--output_dir={tmp_path}"])
    config = gpu_hours.model_config(model_args)
    config.vl_config.vision_config.num_hidden_layers, config.vl_config.text_config.num_hidden_layers = 4, 3
    model, query, target = gpu_hours._without_data(config.to_json_string(), [4, 3])
    model.set_finetuning(finetuning)
    with FlopCounterMode(display=False) as whole:
        (model.train()(**query).query_embeds * model(**target).target_embeds).sum().backward()
    assert gpu_hours.training_flops(config.to_json_string(), finetuning) == whole.get_total_flops()


def test_gpu_hours_are_proportional_to_samples(blip_checkpoint, tmp_path):
    def hours(name, *flags, processes=1):
        arguments = [
            str(RECIPES[name]),
            f"--model={blip_checkpoint}",
            "--fusion_heads=4",
            f"--output_dir={tmp_path}",
            *flags,
        ]
        return gpu_hours.gpu_hours(*parse_arguments(arguments), processes)

    whole = hours("pvlf-blip-both-combined")
    assert whole == pytest.approx(2 * hours("pvlf-blip-both-combined", "--num_train_epochs=50"), rel=MEAN_ERROR)
    assert whole == pytest.approx(hours("pvlf-blip-both-combined", "--max_steps=50000"), rel=MEAN_ERROR)
    shared = hours("pvlf-blip-both-combined", "--per_device_train_batch_size=16", processes=4)
    assert whole == pytest.approx(shared, rel=MEAN_ERROR)
    assert whole > hours("pvlf-blip-both-combined", "--validation=fashioniq") > 1.5 * hours("pvlf-blip-both-llm")
    with pytest.raises(ValueError, match="emoji-cir.*not known"):
        hours("pvlf-blip-both-llm", "--dataset=emoji-cir")


# The command


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_all(tmp_path_factory.mktemp("data"))


def in_small(blip):
    return [
        "--", f"--model={blip}", "--max_steps=2", "--fusion_heads=4", "--fusion_ffn_size=40",
        "--per_device_train_batch_size=4", "--dataloader_num_workers=0", "--check_counts=false",
    ]  # fmt: skip


def test_dry_run_prints_commands_and_gpu_hours(blip_checkpoint, tmp_path, capsys):
    flags = ["--table", "4", "--rows", "p=5", "p=25", "--seeds", "0", "1", "--output_dir", str(tmp_path), "--dry_run"]
    reproduce.main([*flags, *in_small(blip_checkpoint)])
    output = capsys.readouterr().out
    assert "p=5: 0 of 2 trained, 0.0 GPU hours to go" in output and "p=10" not in output
    assert output.count("train_pvlf.py") == 4 and "configs/paper/pvlf-blip-both-combined-p5.yaml --model=" in output
    assert "0.0 GPU hours of training expected" in output and "A100" in output and "30% of it used" in output
    assert not list(tmp_path.iterdir())
    reproduce.main(["--table", "1", "--rows", "Text-only", "--dry_run"])
    assert "Text-only: no training, openai/clip-vit-base-patch32 measured" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--table", "5", "--rows", "J=9", "--dry_run"],
            "Table 5 has no row 'J=9'; its rows are\n  TransAgg\n  PVLF J=1",
        ),
        (
            ["--table", "2", "--rows", "Pic2Word", "CASE Pre-LaSCo.Ca.", "--data_root", "/nowhere"],
            "submission files\n  cc3m/train.csv: the images of CC3M, column image\n  lasco/train.csv: triplets",
        ),
        (["--table", "6"], "invalid choice: 6"),
        (
            ["--table", "1"],
            "pass --data_root, a folder with\n  laion-cir/: the training triplets\n  cirr/: validation",
        ),
        (
            ["--table", "1", "--rows", "Text-only", "--data_root", "/nowhere"],
            "lacks\n  fashioniq/: the FashionIQ columns",
        ),
        (["--table", "4", "--data_root", "/nowhere"], "laion-cir/: the training triplets\n  cirr/: validation"),
    ],
)
def test_invalid_rows_and_data_roots_are_rejected(flags, message, capsys):
    with pytest.raises(SystemExit):
        reproduce.main(flags)
    error = capsys.readouterr().err
    assert message in error
    assert ("fashioniq/" in error) == (flags[1] == "1")


def test_several_processes_share_the_batch(tmp_path):
    topology, (row,) = tmp_path / "four.yaml", reproduce.chosen_rows(TABLES[5], ["PVLF J=3"])
    topology.write_text("num_processes: 4\n")
    args = SimpleNamespace(seeds=[7], data_root=None, accelerate_config=topology)
    (run,) = reproduce.runs_of(row, args, ["--bf16=false"], tmp_path)
    command = " ".join(run.command())
    assert f"-m accelerate.commands.launch --config_file {topology} {SCRIPTS / 'train_pvlf.py'}" in command
    assert command.endswith(f"--bf16=false --seed=7 --output_dir={run.folder} --per_device_train_batch_size=16")
    assert run.settings()["training"]["processes"] == 4
    with pytest.raises(ValueError, match="batch of 6 cannot be shared by 4 processes"):
        list(reproduce.runs_of(row, args, ["--per_device_train_batch_size=6"], tmp_path))


def test_tables_render_seeds_and_caveats(tmp_path):
    metrics = dict.fromkeys([f"recall@{k}" for k in (1, 5, 10, 50)], 0.5)
    for seed, recall in ((0, 0.40), (1, 0.42)):
        folder = tmp_path / "pvlf-blip-both-combined-p5" / f"seed{seed}"
        (folder / "last" / "cirr-val").mkdir(parents=True)
        (folder / "arguments.json").write_text(json.dumps({"overrides": ["--num_train_epochs=20"] * seed}))
        evaluation = {
            "benchmark": "cirr/val",
            "metrics": {**metrics, "recall@1": recall},
            "protocol": {"missing": "2 queries"},
        }
        (folder / "last" / "cirr-val" / "results.json").write_text(json.dumps({"evaluations": [evaluation]}))
    paper_tables.write_table(TABLES[4], tmp_path, [0, 1, 2])
    row, other = json.loads((tmp_path / "table4.json").read_text())["rows"][:2]
    assert row["ours"]["last"]["R@1"] == {
        "mean": pytest.approx(41, rel=MEAN_ERROR),
        "std": pytest.approx(2**0.5, rel=MEAN_ERROR),
        "seeds": 2,
    }
    assert row["difference"]["last"]["R@1"] == 1.51  # 41 - 39.49, written with two digits
    assert row["caveats"] == [
        "2 of 3 seeds so far",
        "cirr/val lacks files: 2 queries",
        "run with `--num_train_epochs=20`",
    ]
    assert other["ours"] == {} and other["paper"]["R@1"] == 39.66
    text = (tmp_path / "table4.md").read_text()
    assert "| 5 | paper (CIRR: test) | 39.49 | 72.23 | 82.06 | 95.24 |" in text
    assert "|  | ours (CIRR: val), last epoch | 41.00 ± 1.41 | 50.00 ± 0.00 |" in text
    assert "|  | difference (CIRR: val - test) | +1.51 | -22.23 |" in text
    assert "| 10 | paper (CIRR: test); ours not run yet | 39.66 |" in text
    assert "# Table 4: Prompt length p[^test-server]" in text and "- p=5: 2 of 3 seeds so far; cirr/val lacks" in text
    for number in TABLES:  # no measured figures
        paper_tables.write_table(TABLES[number], tmp_path / "none", [0])
    assert (tmp_path / "none" / "table2.md").read_text().count("quoted, not run") == 6
    assert "| 61.91[^case] |" in (tmp_path / "none" / "table2.md").read_text()


def test_published_data_sets_train_and_validate(data):
    published = DataArguments(
        dataset="laion-cir-template", data_root=str(data), validation="fashioniq", check_counts=False
    )
    triplets, validation = published.load()
    names = [f"fashioniq/val/{category}" for category in ("dress", "shirt", "toptee")]
    assert len(triplets) == 8 and list(validation) == names
    assert [b.name for b in published.final_benchmarks(validation)] == names
    elsewhere = replace(published, validation="cirr-val", evaluate_on=["cirr-val", "circo-val"])
    assert [b.name for b in elsewhere.final_benchmarks(elsewhere.load()[1])] == ["cirr/val", "circo/val"]
    for wrong, message in [
        ({"data_root": None}, "--dataset laion-cir-template needs --data_root"),
        ({"train_file": "mine.csv"}, "--dataset and --train_file exclude each other"),
        ({"validation_file": "mine.csv"}, "--validation_file excludes --dataset and --validation"),
        ({"validation": "cirr"}, "unknown protocol 'cirr'; choose from"),
        ({"check_counts": True}, "8 triplets, but the published annotations have 16000"),
    ]:
        with pytest.raises(ValueError, match=message):
            replace(published, **wrong).load()


def test_incomplete_checkpoints_are_ignored(tmp_path):
    assert last_checkpoint(tmp_path / "nowhere") is None
    for step in (8, 16, 120):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-120")
    (tmp_path / "checkpoint-120" / "trainer_state.json").unlink()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-16")


QUOTED = sorted({row.name for table in TABLES.values() for row in table.rows if row.quoted})


def test_dry_run_says_what_a_quoted_row_needs(tmp_path, capsys):
    """Check that a plan names the missing data, the protocol, and what differs from the authors' run."""
    reproduce.print_plan(TABLES[1], [row for row in TABLES[1].rows if row.quoted], [], None)  # as without --rows
    plan = capsys.readouterr().out
    assert "Pic2Word: quoted, not run; --rows Pic2Word runs it\n  lacks cc3m/train.csv: the images of CC3M" in plan
    assert "evaluated on fashioniq-and-reversed-as-written in place of fashioniq\n  trained on the images of" in plan
    assert "or: pvlf-hf convert inversion --method pic2word" in plan and "configs/methods" not in plan
    (tmp_path / "cc3m").mkdir()
    (tmp_path / "cc3m" / "train.csv").touch()
    reproduce.main(["--table", "2", "--rows", "Pic2Word", "--data_root", str(tmp_path), "--dry_run"])
    plan = capsys.readouterr().out
    assert "Pic2Word: 0 of 1 trained, GPU hours not estimated" in plan
    assert "lacks" not in plan and "fashioniq" not in plan  # Table 2 is CIRR's
    assert f"methods/pic2word.yaml --train_file={tmp_path}/cc3m/train.csv --image_folder={tmp_path}/cc3m --" in plan
    reproduce.main(["--table", "1", "--rows", "SEARLE-XL-OTI", "--dry_run"])
    assert "SEARLE-XL-OTI: no training, openai/clip-vit-large-patch14 measured" in capsys.readouterr().out


@pytest.mark.parametrize("name", QUOTED)
def test_quoted_rows_have_recipe_data_and_protocols(name, tmp_path):
    """Check that every recipe of a quoted row trains what the row is about, with a source for every line."""
    row = next(row for table in TABLES.values() for row in table.rows if row.name == name)
    published = row.published
    assert set(map(row.protocol, ("cirr-val", "fashioniq"))) <= set(PROTOCOLS) and published.differs
    if published.weights:
        done = CliRunner().invoke(app, shlex.split(published.weights)[1:])
        assert done.output.startswith("error: FILE: no such file"), done.output  # all but the file is right
    if row.recipe_file is None:
        assert published.model == "openai/clip-vit-large-patch14" and published.data is None
        return
    flags = [str(row.recipe_file), *published.data_flags(tmp_path), f"--output_dir={tmp_path}"]
    model_args, data_args, _ = parse_arguments(flags)
    assert model_args.method == published.recipe.partition("-")[0] and published.needs
    assert {"CLIP-B/32": "openai/clip-vit-base-patch32", "BLIP": "Salesforce/blip-itm-base-coco"}.get(
        row.labels[1], "openai/clip-vit-large-patch14"
    ) == model_args.model
    assert data_args.train_file or data_args.train_shards
    assert model_args.given().keys() <= {*METHODS[model_args.method].settings}
    if model_args.method in SAMPLES:
        assert all(column in published.needs for column in SAMPLES[model_args.method].columns)
    settings = [line for line in row.recipe_file.read_text().splitlines() if not line.startswith("#")]
    unsourced = {line.partition(":")[0] for line in settings if "  # " not in line}
    assert unsourced <= {
        "method",
        "settings",
        "output_dir",
        "save_steps",
        "save_total_limit",
        "decay_norms_and_biases",
    }


@pytest.fixture
def forked_trainings(monkeypatch):
    """Run the programs that `reproduce.py` starts in forks of a process that has imported their libraries."""

    def run(command, *, stdout, stderr, check):
        python, *rest = command
        assert python == sys.executable and stderr == subprocess.STDOUT and not check
        return SimpleNamespace(returncode=Forked(rest, [stdout.name] * 2, libraries=True).wait())

    monkeypatch.setattr(reproduce, "subprocess", SimpleNamespace(run=run, STDOUT=subprocess.STDOUT))


@pytest.mark.slow
def test_quoted_rows_run_on_data_of_their_own(blip_checkpoint, data, tmp_path, forked_trainings):
    """Check that a mapping network, an optimised token and CASE run to a table, each under its authors' protocol."""
    clip = tmp_path / "clip"
    vl_config = tiny_clip("pic2word")[0]
    vl_config.text_config.max_position_embeddings = 77
    CLIPModel(vl_config).save_pretrained(clip)
    make_tokenizer().save_pretrained(clip)
    root = tmp_path / "data"
    root.mkdir()
    for name in ("cirr", "fashioniq"):
        (root / name).symlink_to(data / name)
    files = sorted((data / "laion-cir").glob("*.png"))[:8]
    for name, rows in (
        ("cc3m", ["image", *(file.name for file in files)]),
        ("lasco", ["reference,caption,target", *(f"{a.name},red,{b.name}" for a, b in pairwise(files))]),
    ):
        (root / name).mkdir()
        (root / name / "train.csv").write_text("\n".join(rows))
        for file in files:
            (root / name / file.name).symlink_to(file)

    def run(table, name, model, *settings):
        small = ["--max_steps=2", "--per_device_train_batch_size=4", "--dataloader_num_workers=0", "--use_cpu=true"]
        where = ["--data_root", str(root), "--output_dir", str(tmp_path / "out")]
        small += ["--allow_links=true", "--check_counts=false", f"--feature_cache={tmp_path / 'features'}"]
        kept = small if name.startswith("CASE") else small[:-1]
        reproduce.main(["--table", table, "--rows", name, *where, "--", f"--model={model}", *kept, *settings])
        return next(row for row in table_of(tmp_path / "out", int(table)) if row["name"] == name)

    mapped = run("1", "Pic2Word", clip)
    found = tmp_path / "out" / "methods" / "pic2word" / "seed0" / "last" / "fashioniq-and-reversed-as-written"
    assert "| template | a photo of * , {caption} |" in (found / "results.md").read_text()
    assert mapped["ours"]["last"].keys() == TABLES[1].columns.keys() and mapped["paper"]["shirt R@10"] == 26.2
    assert "fashioniq-and-reversed-as-written in place of fashioniq" in mapped["caveats"]
    assert AutoConfig.from_pretrained(found.parents[1]).method == "pic2word"
    text = (tmp_path / "out" / "table1.md").read_text()
    assert "| Pic2Word | CLIP-L/14 |  | paper | 26.20 |" in text and text.count("quoted, not run") == 4

    optimised = run("1", "SEARLE-XL-OTI", clip, "--settings", "inversion_steps=2")
    assert optimised["ours"].keys() == {"untrained"} and "without the phrases" in " ".join(optimised["caveats"])
    home = tmp_path / "out" / "methods" / "searle-xl-oti"
    assert AutoConfig.from_pretrained(home / "model").inversion_steps == 2
    assert (home / "untrained" / "fashioniq-both-mean" / "results.json").exists()

    tokens = ["--settings", "first_token=cls", "reverse_token_id=4"]
    case = run("2", "CASE Pre-LaSCo.Ca.", blip_checkpoint, *tokens)
    assert case["difference"]["last"]["R@1"] == round(case["ours"]["last"]["R@1"]["mean"] - 35.4, 2)
    assert list((tmp_path / "out" / "methods" / "case-lasco").rglob("cirr_test1_recall.json"))


@pytest.mark.slow
def test_interrupted_table_resumes(blip_checkpoint, data, tmp_path, tmp_path_factory, forked_trainings):
    def flags(table, *rows, steps=8):
        where = ["--data_root", str(data), "--output_dir", str(tmp_path)]
        return ["--table", table, "--rows", *rows, *where, *in_small(blip_checkpoint), f"--max_steps={steps}"]

    run, name = tmp_path / "transagg-blip-text-llm" / "seed0", "TransAgg (Laion-CIR-LLM)"
    errors = tmp_path_factory.mktemp("killed") / "stderr"
    killed = kill_when(flags("2", "Image-only", name), lambda: last_checkpoint(run), errors)
    assert killed and not (run / "results.json").exists(), errors.read_text()[-3000:]
    first = {file: file.stat().st_mtime_ns for file in (tmp_path / "baselines").rglob("*results*.json")}
    assert first and [row["name"] for row in table_of(tmp_path, 2) if row["ours"]] == ["Image-only"]
    leave_trace(Path(last_checkpoint(run), "trainer_state.json"))

    reproduce.main(flags("2", "Image-only", name))
    reproduce.main(flags("1", name))  # trained already
    assert {file: file.stat().st_mtime_ns for file in first} == first
    assert "trace" in (run / "checkpoint-8" / "trainer_state.json").read_text()  # training resumed from the checkpoint
    config = AutoConfig.from_pretrained(run)
    assert (config.num_prompts, config.prompt_depth, config.gamma) == (1, 1, 0)

    (trained,), (again,) = (read_results(f / "results.json") for f in (run, run / "last" / "cirr-val"))
    assert trained.per_query == again.per_query
    baseline, ours = (row for row in table_of(tmp_path, 2) if row["ours"])
    assert baseline["ours"].keys() == {"untrained"} and ours["ours"].keys() == {"last", "best"}
    recall = 100 * trained.metrics["recall@1"]
    assert ours["ours"]["last"]["R@1"]["mean"] == recall
    assert ours["difference"]["last"]["R@1"] == round(recall - FIGURE[2, name, "R@1"], 2)
    (fashion,) = (row["ours"]["best"] for row in table_of(tmp_path, 1) if row["ours"])
    categories = [fashion[f"{category} R@10"]["mean"] for category in ("dress", "shirt", "toptee")]
    assert fashion["average R@10"]["mean"] == pytest.approx(sum(categories) / 3, rel=MEAN_ERROR)

    (test1,) = load_protocol("cirr-test1", data, check_counts=False)
    files = sorted(run.glob("*/cirr-test1/submissions/**/*.json"))
    assert len(files) == 4 and not any(lint_submission(file, test1) for file in files)
    with pytest.raises(ValueError, match="holds a run with max_steps=8, not 9: delete it"):
        reproduce.main(flags("1", name, steps=9))


def kill_when(flags, happened, errors):
    """Start the command, kill its process group once `happened()` returns a true value, and return that value."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = Forked([SCRIPTS / "reproduce.py", *flags], [os.devnull, errors], env=env, libraries=True)
    deadline = time.monotonic() + 240
    while not (found := happened()) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    return found


def leave_trace(state_file):
    """Mark the log of a checkpoint; a training that resumes from it keeps the mark."""
    state = json.loads(state_file.read_text())
    state["log_history"].append({"trace": 1.0, "step": 0})
    state_file.write_text(json.dumps(state))


def table_of(folder, number):
    return json.loads((folder / f"table{number}.json").read_text())["rows"]
