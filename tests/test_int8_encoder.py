"""The image encoder in int8: calibrated on the gallery's images, checked, kept, and mixed with no other embeddings."""

import copy
import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from error_bounds import dot_error
from forked import run_python
from PIL import Image
from test_cli import call, error
from tiny import make_model, make_processor
from torch.nn import functional as F

from pvlf_hf import Gallery, ShardedGallery
from pvlf_hf.commands.gallery import index_dtype
from pvlf_hf.embeddings import int8_encoder
from pvlf_hf.embeddings.embedding_store import images_made_by, read_provenance
from pvlf_hf.embeddings.int8_encoder import Int8Encoder, Int8Quality, calibrate, int8_made_by, int8_quality
from pvlf_hf.search import int8_index
from pvlf_hf.search.int8_index import ENCODER
from pvlf_hf.search.shard_sets import gallery_to_shards, merge_shards

pytestmark = pytest.mark.usefixtures("openvino", "few_images")
OPTIONS = {"progress": False, "int8": True}
PHOTOS = 28


def picture(seed, constant=False):
    """Return a picture of random smooth colours, or of one colour."""
    shape = (1, 1, 3) if constant else (4, 4, 3)
    colours = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(colours).resize((48, 40), Image.Resampling.BICUBIC)


def use_few_images(monkeypatch):
    """Calibrate on 21 images and check on 7."""
    for name, number in (("MOST_CALIBRATED", 20), ("MOST_HELD_OUT", 8), ("LEAST_IMAGES", PHOTOS)):
        monkeypatch.setattr(int8_index, name, number)


@pytest.fixture
def few_images(monkeypatch):
    use_few_images(monkeypatch)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for seed in range(PHOTOS):
        picture(seed).save(folder / f"{seed}.png")
    return folder


@pytest.fixture(scope="module")
def kept(photos, tmp_path_factory):
    """Return the folder of a gallery in int8; tests that write to it copy it."""
    folder, patched = tmp_path_factory.mktemp("kept") / "gallery", pytest.MonkeyPatch()
    use_few_images(patched)
    torch.nn.functional.conv2d(torch.ones(1, 3, 8, 8), torch.ones(4, 3, 3, 3))
    patched.delenv("ONEDNN_MAX_CPU_ISA", raising=False)  # both as the fixture `openvino`, which comes after this one
    Gallery.from_folder(photos, make_model(), make_processor(), folder, **OPTIONS)
    patched.undo()
    return folder


@pytest.fixture
def index(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "index")


@pytest.fixture
def more_photos(photos, tmp_path):
    """Return the photos and one more."""
    folder = shutil.copytree(photos, tmp_path / "photos")
    picture(77).save(folder / "new.png")
    return folder


@pytest.fixture
def no_calibration(monkeypatch):
    monkeypatch.setattr(int8_index, "calibrate", lambda *_: pytest.fail("calibrated"))


def pixels(*seeds):
    return make_processor().process_targets([picture(seed) for seed in seeds])["pixel_values"]


@torch.inference_mode()
def embeddings(encode, folder, ids):
    """Embed images of a folder one by one."""
    images = [Image.open(folder / name) for name in ids]
    return torch.cat([encode(make_processor().process_targets([image])["pixel_values"]) for image in images])


def test_quality_is_that_of_the_plain_definition():
    torch.manual_seed(0)
    exact = F.normalize(torch.randn(30, 6), dim=1)
    quantised = F.normalize(exact + 0.2 * torch.randn(30, 6), dim=1)
    kept = []
    for row in range(30):
        others = [other for other in range(30) if other != row]
        near, near_now = (
            sorted(others, key=lambda other: -float(exact[row] @ gallery[other]))[: int8_encoder.NEIGHBOURS]
            for gallery in (exact, quantised)
        )
        kept.append(len({*near} & {*near_now}) / int8_encoder.NEIGHBOURS)
    cosines = [float(a @ b) for a, b in zip(exact, quantised, strict=True)]
    found = int8_quality(exact, quantised)
    error = 2 * dot_error(6 + 4)  # of both cosines; the norms round, too
    assert found[:2] == pytest.approx((min(cosines), sorted(cosines)[14]), rel=0, abs=error)
    assert found.kept == pytest.approx(np.mean(kept), rel=dot_error(30))
    assert 0.3 < found.kept < 0.95


@pytest.mark.parametrize("at", range(3))
def test_each_of_the_three_figures_refuses(at):
    least = [int8_encoder.LEAST_COSINE, int8_encoder.LEAST_MEDIAN, int8_encoder.LEAST_KEPT]
    int8_encoder.Int8Quality(*least).check()
    least[at] -= 1e-3
    with pytest.raises(ValueError, match=r"cosine 0\.\d{4} at the lowest and .* nearest images kept.*--openvino"):
        int8_encoder.Int8Quality(*least).check()


def test_a_gallery_in_int8_has_its_own_provenance(kept, photos):
    model, processor = make_model(), make_processor()
    unquantised, encoder = images_made_by(model, processor), Int8Encoder.load(kept / ENCODER)
    assert encoder.base == unquantised["fingerprint"] and encoder.quality.median > 0.99
    (provenance,) = read_provenance(kept).values()
    assert provenance == int8_made_by(unquantised, encoder.digest)
    assert provenance["dtype"] == "int8" and provenance["fingerprint"] != unquantised["fingerprint"]
    gallery = Gallery.load(kept, model, processor)
    exact = Gallery.from_folder(photos, model, processor, progress=False)
    assert int8_quality(exact.embeds, gallery.embeds).median > 0.99 and not gallery.embeds.equal(exact.embeds)
    assert gallery.made_by == provenance and gallery.search(photos / "3.png", k=1).ids == ["3.png"]
    # queries are the unquantised model's
    assert gallery.query(photos / "3.png", "blue").fused.equal(exact.query(photos / "3.png", "blue").fused)


def test_added_images_are_embedded_by_the_kept_encoder(index, more_photos, no_calibration):
    before = Gallery.load(index, make_model(), make_processor())
    content, rows = (index / ENCODER).read_bytes(), torch.tensor([*map(before.row_of, before.ids)])
    gallery = Gallery.from_folder(more_photos, make_model(), make_processor(), index, **OPTIONS)
    assert (index / ENCODER).read_bytes() == content and {*gallery.ids} - {*before.ids} == {"new.png"}
    assert gallery.embeds[[gallery.row_of(name) for name in before.ids]].equal(before.embeds[rows])
    encode = Int8Encoder.load(index / ENCODER).encoder_of(make_model())
    added = gallery.embeds[gallery.row_of("new.png")][None]
    assert torch.equal(added, embeddings(encode, more_photos, ["new.png"]))
    exact = make_model()(target_pixel_values=pixels(77)).target_embeds
    assert F.cosine_similarity(added, exact).item() < 1 - 1e-5  # not the unquantised model's


def test_an_interrupted_run_goes_on_with_its_encoder(index, photos, no_calibration):
    for file in index.iterdir():
        if file.name != ENCODER:
            file.unlink()
    assert len(Gallery.from_folder(photos, make_model(), make_processor(), index, **OPTIONS)) == PHOTOS


def test_int8_is_not_mixed_with_other_embeddings(index, more_photos, tmp_path, no_calibration):
    model, processor = make_model(), make_processor()
    with pytest.raises(ValueError, match="try --dtype int8"):
        Gallery.from_folder(more_photos, model, processor, index, progress=False, replace=True)
    Gallery.from_folder(more_photos, model, processor, tmp_path / "exact", progress=False)
    with pytest.raises(ValueError, match="try --dtype float32"):
        Gallery.from_folder(more_photos, model, processor, tmp_path / "exact", replace=True, **OPTIONS)
    with pytest.raises(ValueError, match="another model or processor"):
        Gallery.load(index, make_model(seed=1), processor)
    with pytest.raises(ValueError, match="try --dtype int8"):
        Gallery.load(index, copy.deepcopy(model).bfloat16(), processor)
    other = Int8Encoder.load(index / ENCODER)
    other.weights = other.weights[::-1]
    other.save(index / ENCODER)
    with pytest.raises(ValueError, match="is not what embedded the images"):
        Gallery.from_folder(more_photos, model, processor, index, **OPTIONS)
    (index / ENCODER).write_bytes(b"cut")
    with pytest.raises(ValueError, match="is damaged"):
        Gallery.from_folder(more_photos, model, processor, index, **OPTIONS)
    (index / ENCODER).unlink()
    with pytest.raises(ValueError, match=f"lacks {ENCODER}"):
        Gallery.from_folder(more_photos, model, processor, index, **OPTIONS)
    assert len(Gallery.load(index, model, processor)) == PHOTOS  # searching needs no encoder


def test_shards_in_int8_are_searched_and_not_mixed(kept, photos, tmp_path):
    shards = gallery_to_shards(kept, tmp_path / "shards")
    opened = ShardedGallery(shards, make_model(), make_processor())
    assert opened.search(photos / "5.png", k=1).ids == ["5.png"] and opened.made_by["dtype"] == "int8"
    with pytest.raises(ValueError, match="another image encoder"):
        ShardedGallery(shards, make_model(seed=1), make_processor())
    Gallery.from_folder(photos, make_model(), make_processor(), tmp_path / "exact", progress=False)
    exact = gallery_to_shards(tmp_path / "exact", tmp_path / "exact shards")
    with pytest.raises(ValueError, match="model"):
        merge_shards([shards, exact], tmp_path / "merged")


@pytest.mark.slow
def test_another_model_gets_another_encoder(index, photos):
    old = (index / ENCODER).read_bytes()
    other = make_model(seed=1)
    with pytest.raises(ValueError, match="another model or processor"):
        Gallery.from_folder(photos, other, make_processor(), index, **OPTIONS)
    # One by one, as below: in larger batches other roundings would decide between two levels of 8 bits.
    Gallery.from_folder(photos, other, make_processor(), index, replace=True, batch_size=1, **OPTIONS)
    assert (index / ENCODER).read_bytes() != old
    gallery = Gallery.load(index, other, make_processor())
    encode = Int8Encoder.load(index / ENCODER).encoder_of(other)
    assert torch.equal(gallery.embeds, embeddings(encode, photos, gallery.ids))


@pytest.mark.slow
def test_the_check_refuses_a_calibration_on_images_unlike_the_others(tmp_path):
    """Calibrate on images of one colour: what pictures have beyond that is cut off."""
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="int8 changes the embeddings of these images too much: cosine 0.9"):
        calibrate(model, "", range(100, 112), range(24), lambda seed: prepared(picture(seed, seed >= 100)), False)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model.image_side["vision_model"])  # the model is as it was


def test_where_int8_overflows_weights_get_half_their_range(monkeypatch):
    tried, quantise, measured = [], int8_encoder._quantise, int8_encoder.int8_quality
    monkeypatch.setattr(int8_encoder, "_quantise", lambda *args: tried.append(args[-1]) or quantise(*args))
    overflow = Int8Quality(0.9, 0.98, 1.0)
    monkeypatch.setattr(int8_encoder, "int8_quality", lambda *both: measured(*both) if tried[-1] else overflow)
    made = calibrate(make_model(), "", range(21), range(21, 28), lambda seed: prepared(picture(seed)), False)
    assert tried == [False, True] and made.quality.is_enough
    operations = int8_encoder.openvino_core().read_model(made.graph, made.weights).get_ops()
    constants = [op for op in operations if op.get_type_name() == "Constant"]
    weights = [op.data for op in constants if op.get_element_type().get_type_name() == "i8"]
    assert weights and max(abs(data.astype(int)).max() for data in weights) == 64


def prepared(image):
    return make_processor().process_targets([image])["pixel_values"]


def test_a_refused_calibration_leaves_no_index(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(int8_encoder, "LEAST_KEPT", 1.01)
    monkeypatch.setattr(int8_encoder, "_quantise", lambda graph, *_: quantised_before(tmp_path, graph))
    with pytest.raises(ValueError, match="int8 changes the embeddings"):
        Gallery.from_folder(photos, make_model(), make_processor(), tmp_path / "index", **OPTIONS)
    assert not [*(tmp_path / "index").glob("*.int8")] and not [*(tmp_path / "index").glob("*.safetensors")]


def quantised_before(folder, graph):
    """Return the files of a graph as it is, which quantises nothing."""
    from openvino import serialize

    serialize(graph, folder / "a.xml", folder / "a.bin")
    return (folder / "a.xml").read_bytes(), (folder / "a.bin").read_bytes()


def test_the_sample_is_of_different_readable_images_in_the_order_of_digests(photos, tmp_path, monkeypatch):
    monkeypatch.undo()
    folder = shutil.copytree(photos, tmp_path / "photos")
    shutil.copy(folder / "3.png", folder / "again.png")
    (folder / "text.jpg").write_text("no image")
    with pytest.raises(ValueError, match="at least 100 different images, and 28 can be read here.*--openvino"):
        Gallery.from_folder(folder, make_model(), make_processor(), tmp_path / "index", **OPTIONS)
    chosen = []
    monkeypatch.setattr(int8_index, "LEAST_IMAGES", 28)
    monkeypatch.setattr(int8_index, "calibrate", lambda model, base, *rows: chosen.append(rows[:2]) or 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            Gallery.from_folder(folder, make_model(), make_processor(), tmp_path / "index", **OPTIONS)
    assert chosen[0] == chosen[1] and [*map(len, chosen[0])] == [21, 7] and len({*sum(chosen[0], [])}) == 28


def test_impossible_settings_raise_a_message(photos, tmp_path, monkeypatch):
    def build(model, **options):
        Gallery.from_folder(photos, model, make_processor(), tmp_path / "index", **OPTIONS, **options)

    with pytest.raises(ValueError, match="load it in float32"):
        build(make_model().bfloat16())
    with pytest.raises(ValueError, match="with prompts, which int8 leaves out"):
        build(make_model(prompt_location="vision", prompt_gallery=True))
    with pytest.raises(ValueError, match="int8=True: pass path"):
        Gallery.from_folder(photos, make_model(), make_processor(), **OPTIONS)
    monkeypatch.setitem(sys.modules, "nncf", None)
    with pytest.raises(ImportError, match=r"OpenVINO and NNCF come with `pip install \"pvlf-hf\[openvino\]\""):
        build(make_model())


@pytest.mark.slow
def test_the_command_keeps_int8_and_searches_it(index, more_photos, tiny_checkpoint, tmp_path, no_calibration):
    made = call("index", more_photos, "--model", tiny_checkpoint, "--path", index, "--openvino", "--json")
    assert json.loads(made.stdout)["new"] == 1 and index_dtype(index) == "int8"
    assert "0 new" in call("index", more_photos, "--model", tiny_checkpoint, "--path", index, "--dtype", "int8").stdout
    wanted = ("--image", more_photos / "7.png", "-k", 1, "--json")
    found = call("search", index, "--model", tiny_checkpoint, *wanted)
    assert json.loads(found.stdout)["results"][0]["id"] == "7.png"
    refused = call("index", more_photos, "--model", tiny_checkpoint, "--path", index, "--dtype", "float32")
    assert "try --dtype int8" in error(refused)
    ray = ("--engine", "ray", "--dtype", "int8")
    assert call("index", more_photos, "--model", tiny_checkpoint, "--path", tmp_path / "s", *ray).exit_code == 2


QUIET = """
import sys
calls = []
sys.addaudithook(lambda event, args: event in ("socket.connect", "socket.getaddrinfo") and calls.append(args))
from tiny import make_model
from test_int8_encoder import picture, prepared
sys.modules.pop("pytest")  # whose presence turns NNCF's telemetry off
from pvlf_hf.embeddings.int8_encoder import calibrate
made = calibrate(make_model(), "", range(12), range(20, 28), lambda seed: prepared(picture(seed)), False)
assert not calls, calls
assert "openvino_telemetry" not in sys.modules
"""


@pytest.mark.slow
def test_calibration_sends_no_telemetry_and_prints_nothing(tmp_path):
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    done = run_python(["-c", QUIET], env=environment | {"PYTHONPATH": path, "HOME": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert not done.stdout and not (tmp_path / "intel").exists()  # where the telemetry keeps the user's number
