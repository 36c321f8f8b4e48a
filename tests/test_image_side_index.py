"""An index depends on the image side only: any query composition can search it; another image encoder replaces it."""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from dual_encoders import FAMILIES, save_dual_encoder
from error_bounds import images_error
from forked import Forked, run_python
from safetensors.torch import load_file, save_file
from squares import COLOURS, draw, save_squares, square_triplets
from test_gallery import counting
from typer.testing import CliRunner

from pvlf_hf import (
    Gallery,
    InversionModel,
    InversionProcessor,
    PVLFModel,
    PVLFProcessor,
    PVLFTrainer,
    PVLFTrainingArguments,
)
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.embeddings.embedding_store import images_made_by, made_by, read_provenance
from pvlf_hf.models.configuration_inversion import METHODS
from pvlf_hf.search import gallery_files, replacement
from pvlf_hf.search.indexing import EMBEDDINGS
from pvlf_hf_cli import app

TEXT = "the same but red"
KILLS = int(os.environ.get("PVLF_KILLS", "1"))
"""Kills at random moments in the suite; those of the reliability run are `PVLF_KILLS=30 pytest ...`."""


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return save_squares(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    save_dual_encoder("clip", folder)
    return folder


@pytest.fixture
def index(photos, clip, tmp_path):
    """Return an index built by a training-free model."""
    Gallery.from_folder(photos, *load_model(str(clip)), path=tmp_path / "index", progress=False)
    return tmp_path / "index"


def train(checkpoint, folder, finetuning):
    """Return PVLF after three steps on a pretrained encoder, and its processor, both reloaded."""
    (folder / "squares").mkdir(parents=True)
    triplets = square_triplets(folder / "squares", COLOURS[:4], lambda _, target: f"but {target}")
    args = PVLFTrainingArguments(
        str(folder / "run"),
        finetuning=finetuning,
        learning_rate=0.01,
        encoder_learning_rate=0.01,
        max_steps=3,
        save_steps=3,
        per_device_train_batch_size=6,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    model = PVLFModel.from_vl_pretrained(checkpoint, fusion_heads=4, fusion_ffn_size=40, num_prompts=2)
    processor = PVLFProcessor.from_vl_pretrained(checkpoint)
    PVLFTrainer(model, args, triplets, processing_class=processor).train()
    return load_model(str(folder / "run" / "checkpoint-3"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_pvlf_trained_in_mode_text_searches_the_old_index(family, photos, tmp_path):
    save_dual_encoder(family, tmp_path / "pretrained")
    plain = load_model(str(tmp_path / "pretrained"))
    old = Gallery.from_folder(photos, *plain, path=tmp_path / "index", progress=False)
    trained, processor = train(tmp_path / "pretrained", tmp_path, "text")
    moved = {
        name.split(".")[1]
        for name, weights in plain[0].named_parameters()
        if not torch.equal(weights, trained.state_dict()[name])
    }
    assert moved and moved <= {*trained.text_side} and made_by(*plain) != made_by(trained, processor)
    opened = Gallery.load(tmp_path / "index", trained, processor)
    rebuilt = Gallery.from_folder(photos, trained, processor, progress=False)
    assert opened.embeds.equal(rebuilt.embeds) and opened.embeds.equal(old.embeds) and opened.ids == rebuilt.ids
    query = opened.query(draw(0), TEXT)
    # queries of either gallery serve the other
    assert rebuilt.search(query=query).scores == opened.search(draw(0), TEXT).scores
    assert not torch.equal(query.fused, old.query(draw(0), TEXT).fused)
    with counting(trained) as counts:
        Gallery.from_folder(photos, trained, processor, path=tmp_path / "index", progress=False)
    assert counts == [0]


def test_other_compositions_towers_and_inversions_search_the_same_index(index, clip, photos, tmp_path):
    expected = read_provenance(index)[index / EMBEDDINGS]
    sums = load_model(str(clip), "sum")
    other_text, processor = load_model(str(clip))
    for module in other_text.text_side.values():
        for weights in module.parameters():
            weights.data.mul_(2)
    other_text.config.vl_config.text_config.hidden_act = "gelu"
    processor.max_text_length = 9
    inversion = InversionModel.from_vl_pretrained(clip, "searle", placeholder_id=3, mapping_width=8).eval()
    inverting = InversionProcessor.from_vl_pretrained(clip, "searle", placeholder="b", template="a b {caption}")
    inversion.config.placeholder_id = inverting.placeholder_id
    inversion.save_pretrained(tmp_path / "inversion")
    inverting.save_pretrained(tmp_path / "inversion")
    frozen = train(clip, tmp_path, "frozen")
    error = images_error(*sums, [draw(row) for row in range(9)])
    models = [sums, (other_text, processor), (inversion, inverting), load_model(str(tmp_path / "inversion")), frozen]
    for model in models:
        assert images_made_by(*model) == expected
        gallery = Gallery.load(index, *model)
        assert len(gallery.search(draw(0), TEXT).ids) == 9
        rebuilt = Gallery.from_folder(photos, *model, progress=False)
        torch.testing.assert_close(gallery.embeds, rebuilt.embeds, rtol=0, atol=error)
    for change in (
        lambda model, _: next(model.image_side["visual_projection"].parameters()).data.add_(1e-3),
        lambda _, processor: setattr(processor.image_processor, "image_mean", [0.4, 0.4, 0.4]),
        lambda model, _: setattr(model.config.vl_config.vision_config, "hidden_act", "gelu"),
    ):
        changed = load_model(str(clip))
        change(*changed)
        with pytest.raises(ValueError, match="index holds embeddings of another model or processor, which must not"):
            Gallery.load(index, *changed)


@pytest.fixture(scope="module")
def even_clip(tmp_path_factory):
    """Return a CLIP whose joint space is as wide as its text encoder, which Context-I2W needs."""
    folder = tmp_path_factory.mktemp("even")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES["clip"], "projection_dim", FAMILIES["clip"]["text_config"]["hidden_size"])
        save_dual_encoder("clip", folder)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_inversion_searches_the_index_of_its_plain_clip(
    method, even_clip, photos, tmp_path, caplog, monkeypatch
):
    clip, index = even_clip, tmp_path / "index"
    Gallery.from_folder(photos, *load_model(str(clip)), path=index, progress=False)
    torch.manual_seed(0)
    model = InversionModel.from_vl_pretrained(
        clip, method, placeholder_id=3, mapping_width=8, extractor_heads=2
    ).eval()
    processor = InversionProcessor.from_vl_pretrained(clip, method, placeholder="b", template="a b {caption}")
    model.config.placeholder_id, model.config.inversion_steps = (
        processor.placeholder_id,
        2 * bool(METHODS[method].steps),
    )
    monkeypatch.setattr(gallery_files.logger, "propagate", True)
    own = processor.image_processor.do_target_pad
    with counting(model) as counts:
        built = Gallery.from_folder(photos, model, processor, path=index, progress=False, replace=True)
    opened = Gallery.load(index, model, processor)
    assert counts == [0] and opened.embeds.equal(built.embeds) and own == METHODS[method].target_pad
    assert ("does not pad them: its queries are prepared as the images of the index" in caplog.text) != own
    wide = draw(0).resize((90, 30))
    padded = PVLFProcessor.from_vl_pretrained(clip).process_targets(wide)["pixel_values"]
    for gallery in (built, opened):
        assert gallery.processor.process_targets(wide)["pixel_values"].equal(padded)
        assert len(gallery.search(wide, "c").ids) == 9
    unpadded = processor.process_targets(wide)["pixel_values"]
    assert unpadded.equal(padded) == own and processor.image_processor.do_target_pad == own  # the caller's own stays
    processor.image_processor.do_target_pad = False  # with another difference beside it, the index stays shut
    processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    with pytest.raises(ValueError, match="holds embeddings of another model or processor"):
        Gallery.load(index, model, processor)


def test_model_trained_in_mode_both_is_refused_with_a_remedy(index, clip, tmp_path):
    both = train(clip, tmp_path, "both")
    with pytest.raises(ValueError, match=f"its image encoder.*`pvlf-hf index PHOTOS --model NEW --path {index}`"):
        Gallery.load(index, *both)
    refused = ["search", index, "--model", tmp_path / "run" / "checkpoint-3", "--text", "red"]
    refused = CliRunner().invoke(app, list(map(str, refused)))
    assert refused.exit_code == 1 and f"`pvlf-hf index PHOTOS --model NEW --path {index}`" in refused.stderr


def as_version_01(index, model, processor):
    """Write the provenance that version 0.1 wrote: the fingerprint of the whole model."""
    file = index / EMBEDDINGS
    keys = json.dumps([(digest,) for digest in Gallery.load(index, model, processor).digests])
    save_file(load_file(file), file, {**made_by(model, processor), "keys": keys})


def test_an_index_of_version_01_is_read_and_brought_up_to_date(index, clip, photos):
    plain, other = load_model(str(clip)), load_model(str(clip), "sum")
    as_version_01(index, *plain)
    opened = Gallery.load(index, *plain)
    assert opened.made_by == images_made_by(*plain) and opened.search(text="red").ids
    with pytest.raises(ValueError, match="an index of version 0.1 is opened to all models .* by `pvlf-hf index` with"):
        Gallery.load(index, *other)
    with counting(plain[0]) as counts:
        Gallery.from_folder(photos, *plain, path=index, progress=False)
    assert counts == [0] and Gallery.load(index, *other).embeds.equal(opened.embeds)


# ---- another image encoder ----


@pytest.fixture(scope="module")
def other_clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("other")
    save_dual_encoder("clip", folder, seed=4)
    return folder


def call(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def names_beside(index):
    return sorted(path.name for path in index.parent.iterdir())


def test_another_encoder_replaces_an_index(index, clip, other_clip, photos, monkeypatch):
    serving = Gallery.load(index, *load_model(str(clip)))
    for copy in ("index.old", "index.new"):
        shutil.copytree(index, index.parent / copy)  # a user's own folder
    before, ids = serving.search(text="red"), []

    def while_building(folder):
        ids.append(Gallery.load(index, *load_model(str(clip))).search(text="red").ids)
        assert (index.parent / "index.being-built" / EMBEDDINGS).exists()
        return put_in_place(folder)

    put_in_place = replacement.put_in_place
    monkeypatch.setattr("pvlf_hf.search.building.put_in_place", while_building)
    assert call("index", photos, "--model", other_clip, "--path", index)["new"] == 9
    assert ids == [before.ids] and names_beside(index) == ["index", "index.new", "index.old"]
    assert serving.search(text="red").ids == before.ids  # a gallery opened before still works
    now = call("search", index, "--model", other_clip, "--text", "red")["results"]
    rebuilt = Gallery.from_folder(photos, *load_model(str(other_clip)), progress=False).search(text="red")
    assert [(one["id"], one["score"]) for one in now] == list(zip(rebuilt.ids, rebuilt.scores, strict=True))
    with pytest.raises(ValueError, match="holds embeddings of another model"):
        Gallery.load(index, *load_model(str(clip)))
    assert call("index", photos, "--model", other_clip, "--path", index)["new"] == 0


def test_unfinished_index_of_a_third_encoder_is_dropped(index, clip, other_clip, photos, caplog):
    third = load_model(str(clip))
    third[0].image_side["visual_projection"].weight.data.add_(1)
    Gallery.from_folder(photos, *third, path=index.parent / "index.being-built", progress=False)
    replacement.logger.propagate = True
    made = Gallery.from_folder(photos, *load_model(str(other_clip)), path=index, replace=True, progress=False)
    assert "was begun with a third image encoder" in caplog.text
    assert Gallery.load(index, *load_model(str(other_clip))).embeds.equal(made.embeds)


@pytest.mark.parametrize("renames", [0, 1])
def test_kill_during_the_replacement_leaves_a_complete_index(index, clip, other_clip, photos, renames, monkeypatch):
    """Kill at the first or the second rename; the index is complete when it is opened next."""
    rename, done = Path.rename, []

    def killed(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        Gallery.from_folder(photos, *load_model(str(other_clip)), path=index, replace=True, progress=False)
    monkeypatch.undo()
    if renames == 0:
        assert len(Gallery.load(index, *load_model(str(clip))).search(text="red").ids) == 9
    else:
        assert names_beside(index) == ["index.being-built", "index.being-replaced"]
        assert len(call("search", index, "--model", other_clip, "--text", "red")["results"]) == 9
    assert call("index", photos, "--model", other_clip, "--path", index)["new"] == (9 if renames == 0 else 0)
    assert names_beside(index) == ["index"]


BUILD = """
import sys, time
from pathlib import Path

from pvlf_hf.search import indexing
from pvlf_hf_cli import main

indexing.SAVE_EVERY = 2
save = indexing.IncrementalIndexer._save

def slow_save(indexer):
    save(indexer)
    time.sleep(float(sys.argv[1]))

indexing.IncrementalIndexer._save = slow_save
main(["index", *sys.argv[2:], "--batch-size", "1", "--json"])
"""


@pytest.mark.slow
def test_a_killed_replacement_leaves_the_old_index_and_is_resumed(index, clip, other_clip, photos, tmp_path):
    def command(pause):
        return ["-c", BUILD, str(pause), str(photos), "--model", str(other_clip), "--path", str(index)]

    new, before = tmp_path / "index.being-built", Gallery.load(index, *load_model(str(clip))).search(text="red")
    process = Forked(command(60), [os.devnull, os.devnull])
    end = time.monotonic() + 120
    while not [*new.glob("*.part.safetensors")] and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert len([*new.glob("*.part.safetensors")]) == 1 and not (new / "gallery.parquet").exists()
    after = Gallery.load(index, *load_model(str(clip))).search(text="red")
    assert (after.ids, after.scores) == (before.ids, before.scores)
    shutil.copytree(new, tmp_path / "copy")
    done = run_python(command(0))
    assert json.loads(done.stdout)["pictures"] == 9, done.stderr
    model, processor = load_model(str(other_clip))
    # resumed in this process: images that the killed one had encoded are not encoded again
    with counting(model) as counts:
        Gallery.from_folder(photos, model, processor, path=tmp_path / "copy", progress=False)
    assert counts == [7]
    resumed = Gallery.load(index, model, processor)
    rebuilt = Gallery.from_folder(photos, model, processor, progress=False, batch_size=1)
    assert resumed.embeds.equal(rebuilt.embeds) and "index.being-built" not in names_beside(index)
    with pytest.raises(ValueError, match="holds embeddings of another model"):
        Gallery.load(index, *load_model(str(clip)))


@pytest.mark.slow
@pytest.mark.reliability(
    1,
    "An index that is replaced by one of another image encoder, in a process killed (SIGKILL) at random moments, is "
    "complete after every kill: the old one or the new one, with its results",
    broken=("src/pvlf_hf/search/replacement.py", "folder.resolve().rename(old)", "shutil.rmtree(folder)"),
)
def test_replacements_killed_at_random_moments_leave_a_complete_index(
    index, clip, other_clip, photos, tmp_path, figure
):
    """Kill processes that replace the index, by turns with either encoder."""
    models = [load_model(str(clip)), load_model(str(other_clip))]
    expected = [Gallery.from_folder(photos, *model, progress=False).search(text="red") for model in models]
    dice, held, killed, longest = random.Random(0), 0, 0, 240.0
    while killed < KILLS:
        wanted = 1 - held
        (tmp_path / "begun").unlink(missing_ok=True)
        model = ["--model", str((clip, other_clip)[wanted])]
        command = ["-c", REPLACE, str(tmp_path / "begun"), str(photos), *model, "--path", str(index)]
        process = Forked(command, [os.devnull, tmp_path / "errors"])
        while not (tmp_path / "begun").exists():
            assert process.poll() is None
            time.sleep(0.01)
        begun = time.monotonic()
        ended = process.wait(dice.uniform(0, longest) if longest < 240 else longest)  # the first is timed
        if ended is None:
            process.kill()
            process.wait()
            killed += 1
        else:
            assert ended == 0, (tmp_path / "errors").read_text()
            longest = time.monotonic() - begun
        found = [opened for number in (0, 1) if (opened := results_of(index, models[number])) is not None]
        assert len(found) == 1
        held = [one is not None for one in (results_of(index, model) for model in models)].index(True)
        assert (found[0].ids, found[0].scores) == (expected[held].ids, expected[held].scores)
    figure(f"{KILLS} kills")


REPLACE = """
import sys, time
from pathlib import Path

from pvlf_hf_cli import main

rename = Path.rename

def slow_rename(path, target):
    time.sleep(1)  # so that kills hit the moment between the two renames
    return rename(path, target)

Path.rename = slow_rename
Path(sys.argv[1]).touch()
main(["index", *sys.argv[2:], "--batch-size", "1", "--json"])
"""


def results_of(index, model):
    """Search an index; None if another image encoder made it."""
    try:
        return Gallery.load(index, *model).search(text="red")
    except ValueError as error:
        assert "holds embeddings of another model" in str(error)
        return None
