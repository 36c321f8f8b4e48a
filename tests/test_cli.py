"""`pvlf-hf`, run as a command in its own process, and in this process where models are in memory."""

import base64
import io
import json
import logging
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import huggingface_hub
import pytest
import torch
from error_bounds import squares_error
from forked import run_python
from miniatures import make_cirr
from PIL import Image
from squares import COLOURS, draw
from tiny import make_model, make_processor
from transformers import AutoModel, AutoProcessor
from typer.testing import CliRunner

from pvlf_hf import Gallery
from pvlf_hf.commands.gallery import index_dtype, open_index, open_or_embed
from pvlf_hf.search.gallery_files import TABLE
from pvlf_hf.search.shard_sets import gallery_to_shards
from pvlf_hf.search.sharded_gallery import ShardedGallery
from pvlf_hf_cli import INDEX, app

TEXT = "the same but green"
ODD = "white <script>\"&'.png"


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def process(*arguments, python=(), **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    if not python:
        return run_python(["-m", "pvlf_hf_cli", *arguments], env=env)
    command = [sys.executable, *python, "-m", "pvlf_hf_cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=240, check=False)


def error(done):
    """Return the error message of a call that failed."""
    assert done.exit_code == 1 and not done.stdout and isinstance(done.exception, SystemExit), done.output
    assert "Traceback" not in done.stderr
    *_, message = done.stderr.splitlines()
    assert message.startswith("error: ")
    return message


@pytest.fixture(scope="module")
def models(tiny_checkpoint, tmp_path_factory):
    """Return two checkpoints with different weights."""
    other = tmp_path_factory.mktemp("model")
    make_model(seed=1).save_pretrained(other)
    make_processor().save_pretrained(other)
    return [tiny_checkpoint, other]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Return a folder of nine squares, one with an odd name, a truncated image, and a file that is not an image."""
    folder = tmp_path_factory.mktemp("photos")
    for row, colour in enumerate(COLOURS):
        draw(row).save(folder / (ODD if colour == "white" else f"{colour}.png"))
    whole = io.BytesIO()
    draw(0).resize((320, 320)).save(whole, "JPEG")
    (folder / "cut.jpg").write_bytes(whole.getvalue()[:900])
    (folder / "text.jpg").write_text("no image")
    return folder


@pytest.fixture(scope="module")
def index(models, photos, tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "photos.gallery"
    done = call("index", photos, "--model", models[0], "--path", path)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == f"{path}: 9 images, 9 new, 2 skipped"
    assert [line.split(":")[0] for line in lines[1:]] == ["skipped cut.jpg", "skipped text.jpg"]
    return path


@pytest.fixture
def search(index, models):
    return lambda *arguments: call("search", index, "--model", models[0], *arguments)


@pytest.fixture(scope="module")
def gallery(index, models):
    return Gallery.load(index, AutoModel.from_pretrained(models[0]), AutoProcessor.from_pretrained(models[0]))


# ---- processes ----


@pytest.mark.slow
def test_help_does_not_import_torch():
    done = process("--help", python=("-X", "importtime"))
    assert done.returncode == 0 and not re.search(r"\b(torch|transformers|pvlf_hf)\b", done.stderr)
    lines = done.stdout.partition("Commands:\n")[2].splitlines()
    names = "index search serve demo train evaluate card doctor compare triplets report submit convert".split()
    assert [line.split()[0] for line in lines] == names and all(line.endswith(".") for line in lines)
    assert not any(line.endswith("...") for line in lines)  # cut off
    assert "pvlf-hf index photos/ --path photos.gallery\n" in done.stdout


@pytest.mark.slow
def test_index_and_search_use_a_milvus_database(photos, models, tmp_path):
    pytest.importorskip("milvus_lite")
    where = ["--model", models[0], "--milvus", tmp_path / "photos.db"]
    done = call("index", photos, "--path", tmp_path / "kept", *where)
    assert f"{tmp_path / 'kept'}: 9 images, 9 new, 2 skipped" in done.stdout, done.output
    asked = ["--image", photos / "red.png", "--text", TEXT, "--json"]
    exact = call("search", tmp_path / "kept", "--model", models[0], *asked)
    assert call("search", tmp_path / "kept", *where, *asked).stdout == exact.stdout and "red.png" in exact.stdout
    again = ["search", tmp_path / "kept", "--model", models[0], "--milvus", tmp_path / "no" / "photos.db", *asked]
    assert "there is no folder" in error(call(*again))


@pytest.mark.slow
def test_a_store_is_searched_as_others_left_it(photos, gallery, models, tmp_path, caplog, monkeypatch):
    """Searching changes no store, and `index` brings it in line."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    pytest.importorskip("milvus_lite")
    uri, asked = tmp_path / "photos.db", ["--model", models[0], "--text", TEXT, "-k", 12, "--json"]

    def found(index):
        return {one["id"] for one in json.loads(call("search", index, "--milvus", uri, *asked).stdout)["results"]}

    where = ["--model", models[0], "--milvus", uri, "--path"]
    assert call("index", photos, *where, tmp_path / "kept", "--name", "named").exit_code == 0
    message = error(call("search", tmp_path / "kept", "--milvus", uri, *asked))
    assert "has filled no store under its own name" in message and "which holds ['named']: name one" in message
    assert "which holds ['named']" in error(call("search", tmp_path / "kept", "--milvus", uri, *asked))  # still
    assert call("index", photos, *where, tmp_path / "kept").exit_code == 0
    opened = open_index(str(tmp_path / "kept"), str(models[0]), uri=str(uri))
    opened.add([photos / "red.png"], ["added"])
    opened.remove(["blue.png"])
    opened.close()
    changed = {*gallery.ids, "added"} - {"blue.png"}
    assert found(tmp_path / "kept") == changed and found("named") == {*gallery.ids}
    opened = open_index(str(tmp_path / "kept"), str(models[0]), uri=str(uri))
    opened.remove(["added"])
    assert "holds 8 images, and" not in caplog.text
    opened.close()
    assert found(tmp_path / "kept") == changed - {"added"} and "holds 8 images, and" in caplog.text
    assert call("index", photos, *where, tmp_path / "kept").exit_code == 0
    assert found(tmp_path / "kept") == {*gallery.ids}
    for wrong in ("nobody", tmp_path / "nowhere"):
        message = error(call("search", wrong, "--milvus", uri, *asked))
        assert "is neither a folder of an index nor a store's name" in message and "'named']" in message
    missing = tmp_path / "none.db"
    for index in ("named", tmp_path / "kept"):
        assert "there is no database" in error(call("search", index, "--milvus", missing, *asked))
    assert not missing.exists()


NOT_WAITED_FOR = {
    "datasets",
    "pandas",
    "pyarrow.dataset",
    "matplotlib",
    "faiss",
    "pymilvus",
    "gradio",
    "peft",
    "evaluate",
}
"""Imports of half a second each, or more, that a search does without."""


@pytest.mark.slow
def test_a_search_imports_only_what_it_needs(index, models):
    done = process("search", index, "--text", TEXT, python=("-X", "importtime"), PVLF_MODEL=str(models[0]))
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 9
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE))
    assert {"torch", "transformers", "pvlf_hf.search.gallery", "pvlf_hf.models.modeling_pvlf"} <= imported
    assert not imported & NOT_WAITED_FOR
    ours = {name.split(".")[1] for name in imported if name.startswith("pvlf_hf.")}
    assert not ours & {"training", "export", "sentence_transformer", "mteb_model"}
    assert {name for name in imported if re.match(r"pvlf_hf\.(data|evaluation)\.", name)} == {
        "pvlf_hf.data.image_files"
    }


@pytest.mark.slow
def test_errors_print_one_sentence_and_a_traceback_on_request(tmp_path):
    message = f"error: {tmp_path} is not an index: build it with `pvlf-hf index PHOTOS --path {tmp_path}`\n"
    wrong = ["search", tmp_path, "--text", "x", "--model", "m"]
    done = process(*wrong)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    for shown in (process("--debug", *wrong), process(*wrong, PVLF_DEBUG="1")):
        assert shown.returncode == 1 and "Traceback" in shown.stderr and "ValueError" in shown.stderr


@pytest.mark.slow
def test_json_flag_prints_only_json_on_stdout(photos, models, gallery, tmp_path):
    model, path = {"PVLF_MODEL": str(models[0])}, tmp_path / "gallery"
    made = process("index", photos, "--path", path, "--json", **model)
    facts = json.loads(made.stdout)
    assert made.returncode == 0 and (facts["pictures"], facts["new"]) == (9, 9)
    assert facts["skipped"].keys() == {"cut.jpg", "text.jpg"}
    found = process("search", path, "--image", photos / "red.png", "--text", TEXT, "-k", 3, "--json", **model)
    results = json.loads(found.stdout)["results"]
    expected = gallery.search(photos / "red.png", TEXT, k=3)
    assert [its["id"] for its in results] == expected.ids
    assert [its["score"] for its in results] == pytest.approx(expected.scores, abs=squares_error()["similarity"])
    assert results[0]["path"] == str(photos / expected.ids[0])


@pytest.mark.slow
def test_shell_completion_works(tmp_path):
    command = tmp_path / "pvlf-hf"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m pvlf_hf_cli "$@"\n')
    command.chmod(0o755)
    script = """eval "$(pvlf-hf --show-completion)"
    complete -p pvlf-hf
    COMP_WORDS=(pvlf-hf s) COMP_CWORD=1
    _pvlf_hf_completion pvlf-hf
    echo "${COMPREPLY[@]}"
    COMP_WORDS=(pvlf-hf doctor c) COMP_CWORD=2
    _pvlf_hf_completion pvlf-hf
    echo "${COMPREPLY[@]}" """
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=env, timeout=60, check=True)
    registered, *completed = done.stdout.splitlines()
    assert registered.endswith("-F _pvlf_hf_completion pvlf-hf")
    assert completed == ["search serve submit", "cirr circo circled"]


# ---- index and search ----


def test_an_index_keeps_the_dtype_that_was_measured(photos, models, tmp_path, monkeypatch):
    where = [photos, "--model", models[0], "--path", tmp_path / "index", "--dtype", "fastest", "--json"]
    monkeypatch.setattr("pvlf_hf.checkpoints.loading.fastest_dtype", lambda: "bfloat16")
    first = json.loads(call("index", *where).stdout)
    monkeypatch.setattr("pvlf_hf.checkpoints.loading.fastest_dtype", lambda: pytest.fail("measured again"))
    again = json.loads(call("index", *where).stdout)
    assert first["new"] > 0 == again["new"] and again["pictures"] == first["pictures"]
    assert index_dtype(tmp_path / "index") == "bfloat16"


@pytest.mark.slow
def test_search_uses_the_dtype_of_the_index(photos, models, tmp_path, openvino):
    path, model = tmp_path / "kept", ("--model", models[0])
    assert call("index", photos, *model, "--path", path, "--dtype", "bfloat16").exit_code == 0
    half = AutoModel.from_pretrained(models[0], dtype="bfloat16")
    expected = Gallery.load(path, half, AutoProcessor.from_pretrained(models[0])).search(photos / "red.png", TEXT, k=3)
    done = call("search", path, *model, "--image", photos / "red.png", "--text", TEXT, "-k", 3, "--json")
    assert [its["score"] for its in json.loads(done.stdout)["results"]] == expected.scores
    assert "9 images, 0 new, 2 skipped" in call("index", photos, *model, "--path", path).stdout
    assert "try --dtype bfloat16" in error(call("index", photos, *model, "--path", path, "--dtype", "float32"))
    made = call("index", photos, *model, "--path", tmp_path / "fast", "--dtype", "bfloat16", "--openvino", "--json")
    assert json.loads(made.stdout)["new"] == 9
    fast = call("search", tmp_path / "fast", *model, "--image", photos / "red.png", "--text", TEXT, "-k", 3, "--json")
    scores = [its["score"] for its in json.loads(fast.stdout)["results"]]
    assert scores == pytest.approx(expected.scores, abs=squares_error(dtype=torch.bfloat16)["similarity"])


@pytest.mark.reliability(
    9,
    "Results whose names a console or pipe cannot encode (Japanese and Cyrillic in cp1252) are all printed, "
    "with escapes",
    broken=("src/pvlf_hf_cli.py", '            stream.reconfigure(errors="backslashreplace")', "            pass"),
)
@pytest.mark.slow
def test_names_that_the_console_cannot_encode_are_escaped(models, tmp_path, figure):
    assert INDEX == TABLE  # the command line checks for the index before it imports the package
    (tmp_path / "photos").mkdir()
    for row, name in enumerate(["日本.png", "b.png", "c.png"]):
        draw(row).save(tmp_path / "photos" / name)
    environment = {"PVLF_MODEL": str(models[0]), "PYTHONIOENCODING": "cp1252"}
    (tmp_path / "photos" / "красный.jpg").write_text("no image")
    made = process("index", tmp_path / "photos", "--path", tmp_path / "kept", **environment)
    assert made.returncode == 0 and r"skipped \u043a\u0440" in made.stdout
    (tmp_path / "photos" / "b.png").unlink()
    wanted = ["search", tmp_path / "kept", "--text", TEXT, "--sheet", tmp_path / "sheet.png"]
    done = process(*wanted, **environment)
    names = [line.split()[-1] for line in done.stdout.splitlines()[:3]]
    assert done.returncode == 0 and sorted(names) == [r"\u65e5\u672c.png", "b.png", "c.png"]
    assert "a blank is shown instead: the image 'b.png' cannot be opened" in done.stderr
    assert Image.open(tmp_path / "sheet.png").height > 100
    figure("3 of 3 results, one of them gone")


def test_index_names_what_it_left_out(models, tmp_path):
    for name in ("a.png", ".git/b.png", "sub/@eaDir/c.png", "sub/@eaDir/d.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        draw(0).save(tmp_path / "photos" / name)
    indexing = ["index", tmp_path / "photos", "--model", models[0], "--path", tmp_path / "kept"]
    lines = call(*indexing).stdout.splitlines()
    assert lines[0].endswith(": 1 images, 1 new, 0 skipped")
    left_out = "left out 3 images in hidden or system folders (.git, sub/@eaDir); --include-hidden indexes them"
    assert lines[1:] == [left_out]
    assert len(json.loads(call(*indexing, "--json").stdout)["left_out"]) == 3
    assert call(*indexing, "--include-hidden").stdout.splitlines() == [
        f"{tmp_path / 'kept'}: 4 images, 0 new, 0 skipped"
    ]


def test_index_command_reports_new_and_removed_images(photos, models, tmp_path):
    for colour in ("red", "blue"):
        draw(COLOURS.index(colour)).save(tmp_path / f"{colour}.png")
    again = ["index", tmp_path, "--model", models[0], "--path", tmp_path / "kept", "--json"]
    assert json.loads(call(*again).stdout)["new"] == 2
    draw(2).save(tmp_path / "yellow.png")
    (tmp_path / "red.png").unlink()
    facts = json.loads(call(*again).stdout)
    changed = {"pictures": 2, "new": 1, "removed": 1}
    assert facts == {"path": str(tmp_path / "kept"), **changed, "skipped": {}, "left_out": []}
    (tmp_path / "yellow.png").unlink()
    (tmp_path / "blue.png").rename(tmp_path / "sky.png")  # the same image
    assert call(*again[:-1]).stdout.splitlines()[0].endswith(": 1 images, 0 new, 1 removed, 0 skipped")


def test_search_takes_several_images_and_weights(search, gallery, photos):
    references = [photos / "red.png", photos / "blue.png"]
    images = [argument for file in references for argument in ("--image", file)]
    done = search(*images, "--text", TEXT, "--weights", "1,0.5,-0.25", "-k", 4)
    expected = gallery.search(references, TEXT, k=4, weights=(1, 0.5, -0.25))
    found = zip(range(1, 5), expected.scores, expected.ids, strict=True)
    assert done.stdout.splitlines() == [f"{rank:>3}  {score:.4f}  {image_id}" for rank, score, image_id in found]


def test_search_prints_explanations(search, gallery, photos):
    wanted = ["--image", photos / "red.png", "--text", TEXT, "--explain"]
    (why,) = json.loads(search(*wanted, "--json").stdout)["why"]
    (expected,) = gallery.search(photos / "red.png", TEXT, explain=True).why
    assert list(why["weights"].values()) == pytest.approx(expected.weights, abs=squares_error()["aggregation_weights"])
    assert why["tokens"] == expected.tokens and why["attention"] == pytest.approx(
        expected.words(), abs=squares_error()["attentions"]
    )
    output = search(*wanted, "-k", 1).stdout
    assert "\nweights: image " in output and "\nattention: " in output


class Page(HTMLParser):
    """Parser that collects the text, tags and images that a browser would show."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.texts = set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.texts.append(data)


def test_search_writes_a_contact_sheet(search, gallery, photos, tmp_path):
    wanted = ["--image", photos / "red.png", "--text", 'not <script>alert("dark")</script>', "-k", 9, "--explain"]
    done = search(*wanted, "--sheet", tmp_path / "found.html")
    assert done.stdout.endswith(f"see {tmp_path / 'found.html'}\n")
    text = (tmp_path / "found.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "http" not in text
    assert 'not <script>alert("dark")</script>' in page.texts and ODD in page.texts
    result = gallery.search(photos / "red.png", 'not <script>alert("dark")</script>', k=9)
    assert [image["alt"] for image in page.images] == ["reference", *result.ids]
    kind, _, data = page.images[1]["src"].partition(",")
    shown = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/jpeg;base64" and (shown.format, shown.size) == ("JPEG", (32, 32))
    assert f"1. {result.scores[0]:.4f}" in page.texts

    search(*wanted, "--sheet", tmp_path / "found.png")
    assert Image.open(tmp_path / "found.png").size == result.sheet(k=9).size


# ---- bad input ----


def test_invalid_images_and_models_raise_with_their_name(search, index, photos, models, tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("no image")
    message = error(call("index", tmp_path, "--model", models[0], "--path", tmp_path / "i"))
    assert "holds no images, its files end in ['.txt']" in message
    message = error(call("search", index, "--model", models[1], "--text", TEXT))
    assert f"{index} holds embeddings of another model or processor" in message
    assert "cannot read image" in error(search("--image", photos / "cut.jpg"))
    assert "nothing to search by: pass an image, a text or both" in error(search())
    make_model().config.vl_config.save_pretrained(tmp_path)
    assert "has no tokenizer; save the original's" in error(call("search", index, "--model", tmp_path, "--text", TEXT))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = error(call("search", index, "--model", "you/nothing", "--text", TEXT))
    assert "no model 'you/nothing', neither a folder here nor on the Hub: We couldn't connect" in message


@pytest.mark.parametrize("text", ["小狗", "أحمر", "красный"])
def test_texts_in_an_unknown_script_raise(search, text):
    assert f"tokenizer knows no word of {text!r}" in error(search("--text", text))
    done = search("--text", f"dog {text}", "-k", 1)
    assert done.exit_code == 0 and f"does not know {text}; the search uses the rest" in done.stderr
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "x", "--weights", "1,2"], "--weights: '1,2': give three numbers"),
        (["--text", "x", "--sheet", "found.pdf"], "--sheet: found.pdf: name a file that ends in .png or .html"),
        (["--text", "x", "--weights", "1,nan,0"], "--weights: '1,nan,0': give three numbers"),
        (["--text", "x", "-k", 0], "-k"),
        (["--nothing"], "No such option: --nothing"),
    ],
)
def test_wrong_options_exit_with_usage(search, arguments, message):
    done = search(*arguments)
    assert done.exit_code == 2 and message in done.stderr and "Usage: " in done.stderr and not done.stdout


def test_bugs_keep_their_traceback(monkeypatch, tmp_path):
    for mistake in (KeyError("row"), ImportError("no such name", name="pvlf_hf.search.gallery")):

        def examine(*arguments, mistake=mistake, **options):
            raise mistake

        monkeypatch.setattr("pvlf_hf.data.doctor.examine", examine)
        assert call("doctor", "cirr", tmp_path).exception is mistake


def test_unreachable_hub_raises_with_a_hint(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub = huggingface_hub.HfApi(endpoint="http://127.0.0.1:9")  # no server listens there
    monkeypatch.setattr("pvlf_hf.data.doctor.examine", lambda *_, **__: hub.auth_check("you/mine"))
    message = error(call("doctor", "cirr", tmp_path))
    assert message.startswith("error: the Hub cannot be reached (") and "HF_HUB_OFFLINE=1" in message


# ---- the other commands ----


def test_evaluate_prints_its_results(models, tmp_path):
    make_cirr(tmp_path / "data" / "cirr")
    where = ["--data_root", tmp_path / "data", "--output-dir", tmp_path / "out", "--no_check_counts"]
    done = call("evaluate", "--model", models[0], "--protocols", "cirr-val", "cirr-test1", *where, "--json")
    results = json.loads(done.stdout)
    files = results.pop("submissions")
    assert results == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [e["benchmark"] for e in results["evaluations"]] == ["cirr/val"] and "json" not in results["arguments"]
    half = [*where[:3], tmp_path / "half", *where[4:], "--dtype", "bfloat16"]
    done = call("evaluate", "--model", models[0], "--protocols", "cirr-val", *half, "--json")
    assert "embeddings bfloat16" in done.stdout and "embeddings bfloat16" not in json.dumps(results)
    assert [Path(file).name for file in files] == ["cirr_test1_recall.json", "cirr_test1_recall_subset.json"]
    done = call("evaluate", "--model", models[0], "--protocols", "cirr-test1", *where)
    assert done.stdout == f"check, then upload:\npvlf-hf submit lint {files[0]} {files[1]}\n"


@pytest.mark.parametrize(("command", "flag"), [("train", "--finetuning"), ("evaluate", "--protocols")])
def test_forwarded_commands_print_help_and_errors(command, flag):
    done = call(command, "--help")
    assert done.exit_code == 0 and f"pvlf-hf {command} " in done.stdout and flag in done.stdout
    message = error(call(command, "--model=m", "--protocols=p", "--output_dir=o", "--modle=x"))
    assert "unknown arguments: " in message and f"--modle=x; see pvlf-hf {command} --help" in message


def test_the_demo_opens_indices_shards_and_folders(index, photos, gallery, models, tmp_path):
    gallery_to_shards(index, tmp_path / "shards")
    opened = open_or_embed(str(tmp_path / "shards"), str(models[0]))
    assert isinstance(opened, ShardedGallery) and opened.known(gallery.ids) == gallery.ids
    with pytest.raises(ValueError, match="--milvus holds several stores: name one, or the folder"):
        open_or_embed(None, str(models[0]), uri="photos.db")
    for folder in (index, photos):
        opened = open_or_embed(str(folder), str(models[0]))
        assert opened.ids == gallery.ids and opened.embeds.allclose(
            gallery.embeds, rtol=0, atol=squares_error()["target_embeds"]
        )
    assert "--host" in call("demo", "--help").stdout
