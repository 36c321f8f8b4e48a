"""Training scripts and commands, each run in its own process on files."""

import contextlib
import io
import json
import os
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from forked import run_python
from hub_server import serving
from inverted import make_tokenizer, tiny_clip
from PIL import Image
from processes import run_in_processes
from transformers import AutoModel, AutoProcessor, CLIPModel, HfArgumentParser
from typer.testing import CliRunner

from pvlf_hf import load_triplets, write_shards
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.commands.evaluate import EvaluationArguments
from pvlf_hf.commands.train import parse_arguments
from pvlf_hf.data.protocols import DATA_SETS, PROTOCOLS
from pvlf_hf_cli import app

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "train_scripts"
sys.path.insert(0, str(SCRIPTS))

import public_weights  # noqa: E402

COMMAND = "pvlf-hf train"


def run(script, *arguments, fails=False, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    program = ["-m", "pvlf_hf_cli", "train"] if script == COMMAND else [SCRIPTS / script]
    done = run_python([*program, *arguments], env=env, cwd=ROOT, libraries=True)
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def files(blip_checkpoint, tmp_path_factory):
    """Return a folder with a tiny BLIP checkpoint, eight squares and a table of triplets."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "blip").symlink_to(blip_checkpoint)
    colours = ["red", "green", "blue", "black", "white", "yellow", "purple", "orange"]
    (folder / "photos").mkdir()
    for colour in colours:
        Image.new("RGB", (40, 32), colour).save(folder / "photos" / f"{colour}.jpg")
    rows = [f"{a}.jpg,but {b},{b}.jpg" for a in colours for b in colours if a != b]
    (folder / "triplets.csv").write_text("\n".join(["reference,caption,target", *rows]))
    return folder


def flags(files, output_dir, *more):
    return [
        f"--model={files / 'blip'}",
        f"--output_dir={output_dir}",
        f"--train_file={files / 'triplets.csv'}",
        f"--validation_file={files / 'triplets.csv'}",
        f"--image_folder={files / 'photos'}",
        "--fusion_heads=4",
        "--fusion_ffn_size=40",
        "--per_device_train_batch_size=8",
        "--max_steps=4",
        "--save_steps=2",
        *more,
    ]


@pytest.mark.slow
def test_training_on_own_files_resumes_and_reloads(files, tmp_path):
    whole = run("train_pvlf.py", *flags(files, tmp_path / "whole"))
    assert "must be trained before use" in whole
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    (evaluation,) = results["evaluations"]
    assert evaluation["counts"] == {"queries": 56, "gallery": 8}
    assert results["training"]["finetuning"] == "both" and results["environment"]["torch"]
    assert results["base_model"] is None  # the model was a folder
    model = AutoModel.from_pretrained(tmp_path / "whole")
    assert model.config.num_prompts == 25 and model.config.prompt_depth == 2  # the paper's value
    assert AutoProcessor.from_pretrained(tmp_path / "whole").image_processor.crop_size["height"] == 32

    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")  # as if killed after step 2
    run(COMMAND, *flags(files, tmp_path / "parts"))
    again = AutoModel.from_pretrained(tmp_path / "parts")
    for (name, a), (_, b) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert a.equal(b), name


@pytest.mark.slow
def test_training_on_a_stream_of_shards(files, tmp_path):
    write_shards(load_triplets(files / "triplets.csv", files / "photos"), tmp_path / "shards", rows_per_shard=20)
    given = [flag for flag in flags(files, tmp_path / "run") if not flag.startswith("--train_file")]
    run("train_pvlf.py", *given, f"--train_shards={tmp_path / 'shards'}")
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["evaluations"][0]["counts"] == {"queries": 56, "gallery": 8}


def test_flags_override_the_recipe(files, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"method": "transagg", "learning_rate": 0.002, "seed": 3, "bf16": False}))
    model_args, _, args = parse_arguments([str(recipe), f"--output_dir={tmp_path}", "--seed", "4"])
    assert (model_args.method, args.learning_rate, args.seed, args.bf16) == ("transagg", 0.002, 4, False)
    model_args.model = str(files / "blip")
    config = model_args.build()[0].config
    assert (config.num_prompts, config.prompt_depth, config.gamma) == (1, 1, 0.0)


def test_every_recipe_is_readable(tmp_path):
    recipes = sorted((SCRIPTS / "configs").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        model_args, data_args, _ = parse_arguments([str(recipe), f"--output_dir={tmp_path}"])
        assert (ROOT / model_args.model).is_dir() and data_args.dataset == "emoji-cir"


def test_accelerate_accepts_every_topology():
    from accelerate.commands.config.config_args import load_config_from_file

    topologies = {path.stem: load_config_from_file(str(path)) for path in (SCRIPTS / "accelerate").glob("*.yaml")}
    assert topologies.keys() == {"single_gpu", "multi_gpu", "multi_node", "fsdp"}
    assert str(topologies["fsdp"].distributed_type) == "DistributedType.FSDP"
    assert topologies["multi_node"].num_machines == 2


def test_wrong_data_raises_before_a_model_is_downloaded(files, tmp_path):
    for given, error in (
        ([], "pass --train_file and --image_folder, or --dataset emoji-cir"),
        (["--train_file=a.csv", "--train_shards=b"], "--train_file and --train_shards exclude each other"),
    ):
        done = CliRunner().invoke(app, ["train", "--model=you/nothing", f"--output_dir={tmp_path}", *given])
        assert done.exit_code == 1 and done.stderr.splitlines()[-1].startswith(f"error: {error}")


@pytest.mark.slow
def test_read_only_token_raises_before_the_first_step(files, tmp_path):
    with serving({"hf_reader": ("you", False)}) as hub:
        online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_reader", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        push = ["--push_to_hub", "--hub_model_id=you/mine"]
        output = run(COMMAND, *flags(files, tmp_path / "run"), *push, fails=True, **online)
    assert "\nerror: this token may not write to you/mine on the Hub: log in with one that may" in output
    assert "Traceback" not in output and not (tmp_path / "run").exists()


def print_help(script):
    """Return the exit code of a script's `--help` and what it printed."""
    sys.argv, sys.path[:0], printed = [script, "--help"], [str(SCRIPTS)], io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    return end.value.code, printed.getvalue()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_pvlf.py", "demo.py", "emoji_tables.py", "pretrain_emoji_backbone.py"])
def test_help_shows_usage(script):
    ((code, printed),) = run_in_processes(1, print_help, script)
    assert not code and "usage" in printed


@pytest.mark.parametrize("name", list(public_weights.ROWS))
def test_recipes_of_public_weights_are_commands(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    *made, evaluation = public_weights.commands(name, str(tmp_path), str(tmp_path))
    (args,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(shlex.split(evaluation)[2:])
    assert set(args.protocols) <= PROTOCOLS.keys() and args.output_dir.startswith(str(tmp_path))
    assert (args.model in (public_weights.CLIP_L, public_weights.BLIP_B)) == (not made)
    for command in made:
        program, *arguments = shlex.split(command)
        if program == "python":
            compile(arguments[1], command, "exec")
        elif arguments[0] == "train":
            model_args, _, training_args = parse_arguments(arguments[1:])
            assert model_args.method == "pvlf" and training_args.output_dir == args.model
        else:
            done = CliRunner().invoke(app, arguments)
            assert done.exit_code == 1 and "error: " in done.stderr  # the arguments are right, the file is not here


def test_rows_and_columns_of_public_weights_are_whole():
    """Every method that the package has, and every benchmark of 2026 that it loads."""
    rows = " ".join(public_weights.ROWS)
    for name in ("CompoDiff", "SEARLE-OTI", "CLIP-L, untrained", "BLIP-B, untrained", "PVLF, BLIP-B", "PVLF, CLIP-L"):
        assert name in rows
    measured = {p for column in public_weights.COLUMNS.values() for p in column.protocols}
    folders = {PROTOCOLS[protocol].folder for protocol in measured}
    assert folders == {*DATA_SETS} - {"laion-cir"}  # which is for training alone
    assert sum(name.startswith("circled-") for name in measured) == 5


def test_model_of_an_optimised_token_is_saved_by_its_command(tmp_path):
    vl_config = tiny_clip("searle_oti")[0]
    vl_config.text_config.max_position_embeddings = 77
    CLIPModel(vl_config).save_pretrained(tmp_path / "clip")
    make_tokenizer().save_pretrained(tmp_path / "clip")
    settings = {"encoder": str(tmp_path / "clip"), "method": "searle_oti", "folder": str(tmp_path / "model")}
    exec(public_weights.SAVE.format(**settings), {})
    model, processor = load_model(str(tmp_path / "model"))
    assert model.config.method == "searle_oti" and model.config.placeholder_id == processor.placeholder_id


@pytest.mark.slow
def test_hours_of_public_weights_follow_the_number_of_images():
    hours = public_weights.hours("TransAgg")
    assert hours["PinPoint"] is None and 0 < hours["CIRR"] < hours["CIRCO"] < hours["i-CIR"] < 1
    assert hours["training"] is None and public_weights.hours("PVLF, BLIP-B")["training"] > 1
    query, image = public_weights.operations("TransAgg")
    per_hour = public_weights.PEAK_FLOPS * public_weights.UTILISATION * 3600
    assert hours["CIRR"] == pytest.approx((4181 * query + 2297 * image) / per_hour)
    known = [name for name, facts in public_weights.COLUMNS.items() if None not in facts.images.values()]
    again = hours["CIRCLED"] - public_weights.CIRCLED_QUERIES * query / per_hour  # its images are in other columns
    again += 2 * 2297 * image / per_hour + public_weights.FASHION_IQ[1] * image / per_hour
    assert hours["all"] == pytest.approx(sum(hours[name] for name in known) - again)
    plain, _ = public_weights.operations("SEARLE")
    assert public_weights.operations("SEARLE-OTI")[0] > 10 * plain
    assert 1 < public_weights.operations("CompoDiff")[0] / plain < 5
    text = public_weights.rendered(["CLIP-L, sum", "SEARLE"], "data")
    assert text.count("pvlf-hf evaluate") == 2 and "'SEARLE=outputs/public/searle/evaluation/results.json'" in text
