"""Training without triplets: keywords, samples, each objective's batches, and training by the Trainer."""

import json

import pytest
import torch
from datasets import Dataset, Image
from error_bounds import rounding, training_error
from inverted import PLACEHOLDERS, make_processor, reference_model, tiny_clip
from PIL import Image as PILImage
from processes import run_in_processes
from transformers import AutoModel, CLIPModel

from pvlf_hf import InversionConfig, InversionModel, PVLFTrainer, PVLFTrainingArguments, load_samples
from pvlf_hf.commands.train import parse_arguments, read_settings, train
from pvlf_hf.data.keywords import find_keywords, replace_keywords
from pvlf_hf.data.samples import image_sets
from pvlf_hf.models.configuration_inversion import OTI_PROMPTS
from pvlf_hf.training.methods import METHODS
from pvlf_hf.training.objectives import SAMPLES, SampleCollator, random_crop

COLOURS = ("red", "green", "blue", "black", "white", "gold")
OWN = {"pic2word": "pic2word", "searle": "searle", "lincir": "lincir", "context_i2w": "context_i2w"}


def squares(folder, copies=2):
    """Save squares of each colour in several sizes; return samples with captions that contain their concept."""
    rows = []
    for colour in COLOURS:
        for copy in range(copies):
            file = folder / f"{colour}-{copy}.png"
            PILImage.new("RGB", (32 + 4 * copy, 36), colour).save(file)
            rows.append({"image": str(file), "caption": f"a {colour} square, or {colour} paint", "concept": colour})
    return Dataset.from_list(rows).cast_column("image", Image())


def make_model(method):
    """Return a model of the reference's sizes with new weights, and with positions for longer captions."""
    vl_config = tiny_clip(method)[0]
    vl_config.text_config.max_position_embeddings = 77
    torch.manual_seed(0)
    settings = {"placeholder_id": PLACEHOLDERS[method], "mapping_width": 64, "temperature": 0.1}
    return InversionModel(InversionConfig(vl_config=vl_config, method=method, **settings)).eval()


def make_trainer(folder, method, rows, model=None, batch_of_all=None, **settings):
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 6,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        **settings,
    }
    settings = {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "finetuning": "frozen", **settings}
    args = PVLFTrainingArguments(str(folder), **settings)
    if batch_of_all is not None:
        args.per_device_train_batch_size = batch_of_all // args.world_size
    model = model or make_model(method)
    return PVLFTrainer(model, args, rows, processing_class=make_processor(method))


def losses_of(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# Keywords and samples.


@pytest.mark.parametrize(
    ("caption", "keywords"),
    [
        ("a brown dog sleeps on the old sofa", ["a brown dog sleeps", "the old sofa"]),
        ("two cats and a bird in a tree", ["two cats", "a bird", "a tree"]),
        ("a man holding a red umbrella, standing by the sea", ["a man", "a red umbrella", "the sea"]),
        ("this is a a dog", ["a dog"]),
        ("woman: medium-dark skin tone", ["woman", "medium-dark skin tone"]),
        ("of the a", []),
        ("", []),
    ],
)
def test_keywords_are_runs_of_content_words(caption, keywords):
    assert find_keywords(caption) == keywords
    assert all(keyword in caption for keyword in keywords)


@pytest.mark.parametrize(
    ("caption", "keywords", "replaced"),
    [
        ("a cat in the category of cats", ["cat"], "a $ in the category of cats"),
        ("the red car and the car", ["car", "red car"], "the $ and the $"),
        ("costs $20 or 5$", ["costs"], "$ 20 or 5"),
        ("a photo of key $ pressed", ["key $"], "a photo of $ pressed"),  # as the emoji "keycap *" with "*"
        ("what (is) this?", ["(is)"], "what $ this?"),
        ("no such word", ["dog", " "], "no such word"),
        ("a brown dog", None, "$"),
    ],
)
def test_keywords_are_replaced_as_whole_words(caption, keywords, replaced):
    """Replace complete words only; SEARLE and LinCIR replace substrings and find "cat" in "category"."""
    assert replace_keywords(caption, "$", keywords) == replaced


def test_samples_of_a_table_beside_a_folder(tmp_path):
    squares(tmp_path, copies=1)
    table = tmp_path / "images.csv"
    table.write_text("image,caption,concept\n" + "\n".join(f"{c}-0.png,a {c} square,{c}" for c in COLOURS))
    rows = load_samples(table, ("image", "caption", "concept"), tmp_path)
    assert rows[0]["image"].size == (32, 36) and rows["image_id"][:2] == ["red-0.png", "green-0.png"]
    assert load_samples(table, ("caption",)).column_names == ["caption"]
    with pytest.raises(ValueError, match="pass image_folder"):
        load_samples(table, ("image",))
    table.write_text("image,caption\nred-0.png,\n")
    with pytest.raises(ValueError, match=r"caption is empty in 1 rows, first in data rows \[0\]"):
        load_samples(table, ("image", "caption"), tmp_path)
    table.write_text("image\npink.png\n")
    with pytest.raises(ValueError, match=r"1 of 1 images are not in .*pink.png"):
        load_samples(table, ("image",), tmp_path)


def test_sets_hold_images_of_one_concept(tmp_path, caplog):
    rows = squares(tmp_path, copies=5).shuffle(seed=0)
    sets = image_sets(rows, 2)
    assert len(sets) == 2 * len(COLOURS)  # the fifth image of a concept does not fill a set
    assert "6 of 30 images are in no set of 2 images" in caplog.text
    caplog.clear()
    assert len(image_sets(rows)) == len(COLOURS) and not caplog.text
    for row in sets:
        colours = {row[name].getpixel((0, 0)) for name in ("image_0", "image_1")}
        assert len(colours) == 1 and row["concept"] in row["caption"]
    with pytest.raises(ValueError, match="no concept has the 6 images of a set, but 5 at most"):
        image_sets(rows, 6)


def test_random_crops_are_repeatable_and_within_their_bounds():
    image = PILImage.linear_gradient("L").resize((300, 200))
    assert random_crop(image, 1.0).size == (200, 200)
    shares = []
    for seed in range(200):
        torch.manual_seed(seed)
        cropped = random_crop(image, 0.5)
        torch.manual_seed(seed)
        assert cropped.tobytes() == random_crop(image, 0.5).tobytes()
        top, bottom = cropped.getpixel((0, 0)), cropped.getpixel((0, 199))
        shares.append((bottom - top) / 255)  # share of the height in a crop of at least half the area
    assert 0.74 < min(shares) < 0.8 and 0.9 < max(shares) <= 1


# Batches.


def test_batches_hold_the_inputs_of_their_objective(tmp_path):
    rows = [*squares(tmp_path).select([0, 2, 4])]
    processor = {method: make_processor(method) for method in OWN}
    batch = {method: SampleCollator(processor[method])(rows) for method in ("pic2word", "lincir", "context_i2w")}
    pixels = processor["pic2word"].process_targets([row["image"] for row in rows])["pixel_values"]
    prompts = processor["pic2word"](text=["a photo of *"] * 3)["input_ids"]
    assert torch.equal(batch["pic2word"]["pixel_values"], pixels)
    assert torch.equal(batch["pic2word"]["input_ids"], prompts)
    captions = [row["caption"] for row in rows]
    assert "pixel_values" not in batch["lincir"]
    assert torch.equal(batch["lincir"]["caption_ids"], processor["lincir"](text=captions)["input_ids"])
    replaced = processor["lincir"](text=["$ , or $"] * 3)["input_ids"]
    assert torch.equal(batch["lincir"]["input_ids"], replaced)
    masked = processor["context_i2w"](text=["jekyll , or jekyll"] * 3)["input_ids"]
    assert torch.equal(batch["context_i2w"]["caption_ids"], masked)
    with_own = [{**row, "keywords": ["paint"]} for row in rows]
    masked = processor["lincir"](text=[caption.replace("paint", "$") for caption in captions])["input_ids"]
    assert torch.equal(SampleCollator(processor["lincir"])(with_own)["input_ids"], masked)


def test_a_caption_without_keywords_loses_a_random_word():
    processor = make_processor("lincir")
    drawn = set()
    for seed in range(20):
        torch.manual_seed(seed)
        ids = SampleCollator(processor)([{"caption": "of the and"}])["input_ids"]
        assert (ids == processor.placeholder_id).sum() == 1
        drawn.add((ids == processor.placeholder_id).nonzero()[0, 1].item())
    assert len(drawn) == 3


def test_truncated_placeholder_becomes_the_prompt():
    processor = make_processor("lincir", max_text_length=12)
    batch = SampleCollator(processor)([{"caption": "and of in at on by dog"}])
    assert torch.equal(batch["input_ids"], processor(text=["a photo of $"])["input_ids"])


@pytest.mark.slow
def test_unusable_rows_raise_with_their_number(tmp_path):
    processor = make_processor("lincir")
    with pytest.raises(ValueError, match="row 1 of a batch: caption is None, not text"):
        SampleCollator(processor)([{"caption": "a dog"}, {"caption": None}])
    rows = squares(tmp_path).remove_columns("concept").add_column("concept", ["squar"] * 12)
    with pytest.raises(ValueError, match=r"concept 'squar' is no part of its caption 'a \w+ square"):
        make_trainer(tmp_path, "searle", rows, make_model("searle"), max_steps=1).train()


# Training.


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pic2word", "lincir", "context_i2w", "palavra"])
def test_an_objective_trains_the_mapping_network_alone(method, tmp_path):
    model = make_model(method)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = make_trainer(tmp_path, method, squares(tmp_path, 5), model, max_steps=30)
    losses = losses_of(trainer)
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    changed = {name for name, weight in trainer.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and not any(name.startswith("backbone.") for name in changed)


def test_searle_optimises_its_teacher_tokens_once(tmp_path, monkeypatch):
    model, rows = make_model("searle"), squares(tmp_path)
    model.config.inversion_steps = 3
    settings = {"feature_cache": str(tmp_path / "features"), "max_steps": 2}
    trainer = make_trainer(tmp_path, "searle", rows, model, **settings)
    first = losses_of(trainer)
    teacher_tokens, digests = trainer.data_collator.teacher_words, trainer.train_dataset["image_digest"]
    config = {**model.config.to_dict(), "method": "searle_oti", "mapping_width": None}
    teacher = InversionModel(type(model.config)(**config)).eval()
    teacher.backbone = model.backbone
    processor = make_processor("searle")
    pixels = processor.process_targets([row["image"] for row in rows])["pixel_values"]
    expected = teacher.invert(pixels, processor(text=[*OTI_PROMPTS])["input_ids"])
    kept = torch.stack([teacher_tokens[digest][0] for digest in digests]).float()
    assert torch.equal(kept, expected.half().float())
    monkeypatch.setattr(InversionModel, "invert", None)  # nothing is left to optimise
    again = make_trainer(tmp_path, "searle", rows, make_model("searle"), **settings)
    again.model.config.inversion_steps = 3
    assert losses_of(again) == first


def test_cached_features_give_the_loss_of_the_images(tmp_path):
    rows, model = squares(tmp_path), make_model("pic2word")
    images = {"pixel_values": make_processor("pic2word").process_targets(rows["image"][:])["pixel_values"]}

    def features(model, inputs):
        return {"features": model.encode_images(**inputs)[1]}

    trainer = make_trainer(tmp_path, "pic2word", rows, model, feature_cache=str(tmp_path / "features"), max_steps=1)
    trainer.train()
    kept = trainer.data_collator.features
    found = torch.stack([kept[digest][0] for digest in trainer.train_dataset["image_digest"]]).float()
    with torch.no_grad():
        exact = features(model, images)["features"]
    error = rounding(features, model, images)["features"]
    torch.testing.assert_close(found, exact, atol=error, rtol=torch.finfo(torch.float16).eps)
    assert trainer.data_collator([*trainer.train_dataset])["image_features"].shape == exact.shape


def test_sets_of_cached_features_give_the_loss_of_their_images(tmp_path):
    """PALAVRA reads no more of the images of a set than their features."""
    rows, settings = squares(tmp_path, copies=5), {"max_steps": 1, "train_sampling_strategy": "sequential"}
    by_images = make_trainer(tmp_path, "palavra", rows, make_model("palavra"), **settings)
    model, cache = make_model("palavra"), str(tmp_path / "features")
    trainer = make_trainer(tmp_path, "palavra", rows, model, feature_cache=cache, **settings)
    encoded = []
    model.backbone.vision_model.register_forward_hook(lambda *_: encoded.append(1))
    trainer._keep_features()
    assert trainer.train_dataset.column_names == ["caption", "concept", *(f"image_{i}_digest" for i in range(5))]
    passes, batches = len(encoded), []
    for one in (by_images, trainer):
        torch.manual_seed(0)  # of the template
        batches.append(one.data_collator([*one.train_dataset]))
    assert batches[0]["pixel_values"].shape == (6, 5, 3, 32, 32) and batches[1]["image_features"].shape == (6, 5, 48)
    exact, kept = (model(**batch, return_loss=True).loss.detach() for batch in batches)
    assert len(encoded) == passes + 1  # the batch of images alone
    # Features are kept in float16, and those of two squares of one colour are nearly equal.
    torch.testing.assert_close(kept, exact, rtol=100 * torch.finfo(torch.float16).eps, atol=0)
    found = batches[1]["image_features"].float()
    with torch.no_grad():
        features = model.encode_images(batches[0]["pixel_values"].flatten(0, 1))[1].unflatten(0, (6, 5))
    torch.testing.assert_close(found, features, atol=1e-3, rtol=torch.finfo(torch.float16).eps)
    trainer.train()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pic2word", "lincir"])
def test_resumed_training_equals_the_uninterrupted_one(method, tmp_path):
    rows = squares(tmp_path)
    settings = {"crop_scale": 0.9} if method == "pic2word" else {}
    settings |= {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "whole", method, rows, **settings)
    expected = losses_of(whole)
    resumed = make_trainer(tmp_path / "whole", method, rows, make_model(method), **settings)
    resumed.train(str(tmp_path / "whole" / "checkpoint-3"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == expected
    weights = whole.model.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.model.state_dict().items())


def train_by_images(folder, batch):
    """Return losses and weights after three steps, on the rows in their order."""
    settings = {"max_steps": 3, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 1e-2}
    model, rows = reference_model("pic2word"), squares_of(folder)
    trainer = make_trainer(folder, "pic2word", rows, model, batch_of_all=batch, **settings)
    return losses_of(trainer), trainer.model.mapping.output.weight.detach().numpy()


def squares_of(folder):
    files = sorted(folder.glob("*.png"))
    return Dataset.from_dict({"image": [str(file) for file in files]}).cast_column("image", Image())


@pytest.mark.slow
def test_pic2word_in_two_processes_equals_one(tmp_path):
    """Train in two processes, each with the negatives of both, as in the reference."""
    squares(tmp_path)
    (alone,) = run_in_processes(1, train_by_images, tmp_path, 6)
    model, rows = reference_model("pic2word"), squares_of(tmp_path)
    moved = abs(alone[1] - model.mapping.output.weight.detach().numpy()).max()
    batch = SampleCollator(make_processor("pic2word"))([rows[row] for row in range(6)])
    error = training_error(model.train(), {**batch, "return_loss": True}, 3, 1e-2)
    assert error["mapping.output.weight"] < 1e-3 * moved
    for losses, weight in run_in_processes(2, train_by_images, tmp_path, 6):
        assert losses == pytest.approx(alone[0], rel=0, abs=error["losses"])
        assert abs(weight - alone[1]).max() <= error["mapping.output.weight"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"finetuning": "both"}, "pic2word's objective keeps both encoders as they are; set 'frozen'"),
        ({"gradient_cache_chunk_size": 2}, "gradient_cache_chunk_size works on triplets"),
        ({"crop_scale": 1.5}, r"crop_scale=1.5 must be in \(0, 1\]"),
    ],
)
def test_arguments_without_effect_on_an_objective_raise(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, "pic2word", squares(tmp_path), **settings)


def test_mismatched_training_sets_raise(tmp_path):
    rows = squares(tmp_path)
    with pytest.raises(ValueError, match=r"train_dataset: missing column\(s\) \['caption', 'concept'\]"):
        make_trainer(tmp_path, "searle", rows.select_columns("image"))
    with pytest.raises(ValueError, match=r"row 1 of train_dataset: image is None"):
        holes = Dataset.from_dict({"image": [str(tmp_path / "red-0.png"), None]}).cast_column("image", Image())
        make_trainer(tmp_path, "pic2word", holes, per_device_train_batch_size=2)
    with pytest.raises(ValueError, match="takes a datasets.Dataset with the columns"):
        make_trainer(tmp_path, "pic2word", rows.to_iterable_dataset())
    cache = {"feature_cache": str(tmp_path / "features")}
    for method, settings, reason in (
        ("context_i2w", {}, "for context_i2w: its objective reads all tokens of an image; leave feature_cache out"),
        ("lincir", {}, "for lincir: its objective reads no images"),
        ("pic2word", {"crop_scale": 0.9}, r"for pic2word: its images are cropped at random \(crop_scale\)"),
    ):
        with pytest.raises(ValueError, match=f"features of images cannot be kept {reason}"):
            make_trainer(tmp_path, method, rows, **cache, **settings).train()
    triplets = rows.rename_column("image", "reference").add_column("target", [str(tmp_path / "red-0.png")] * 12)
    with pytest.raises(ValueError, match="crop_scale crops single images"):
        make_trainer(tmp_path, "pic2word", triplets, crop_scale=0.9)


# The command.


def test_settings_of_another_method_raise():
    with pytest.raises(ValueError, match=r"\['num_prompts'\]: lincir has no such setting"):
        METHODS["lincir"].make("lincir", "nowhere", {"num_prompts": 3})
    assert read_settings(["mapping_width=8", "placeholder=*", "normalize_features=true"]) == {
        "mapping_width": 8,
        "placeholder": "*",
        "normalize_features": True,
    }
    with pytest.raises(ValueError, match="write name=value"):
        read_settings(["mapping_width 8"])


@pytest.mark.slow
@pytest.mark.parametrize("method", [*SAMPLES])
def test_train_command_trains_on_a_table(method, tmp_path):
    squares(tmp_path, copies=5)
    CLIPModel(make_model(method).config.vl_config).save_pretrained(tmp_path / "clip")
    make_processor(method).tokenizer.save_pretrained(tmp_path / "clip")
    lines = [f"{c}-{n}.png,a photo of {c},{c}" for c in COLOURS for n in range(5)]
    (tmp_path / "images.csv").write_text("\n".join(["image,caption,concept", *lines]))
    arguments = [f"--model={tmp_path / 'clip'}", f"--method={method}", f"--output_dir={tmp_path / 'run'}"]
    arguments += [f"--train_file={tmp_path / 'images.csv'}", f"--image_folder={tmp_path}", "--finetuning=frozen"]
    arguments += [
        "--max_steps=2",
        "--per_device_train_batch_size=4",
        "--use_cpu=true",
        "--settings",
        "mapping_width=8",
    ]
    train(*parse_arguments([*arguments, "inversion_steps=2"] if method == "searle" else arguments))
    model = AutoModel.from_pretrained(tmp_path / "run")
    assert type(model) is InversionModel and model.config.mapping_width == 8
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts["model"]["method"] == method and "triplets" not in facts
