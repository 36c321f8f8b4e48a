"""Training-free models: their formulas, and a plain dual encoder as a composed retrieval model."""

import json
import math
import re
import shutil

import pytest
import torch
from dual_encoders import FAMILIES, save_dual_encoder
from error_bounds import dot_error, embedding_error, exact_loss, roundoff, unit_error
from foreign import make_foreign
from forked import run_without_package
from miniatures import make_cirr
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from test_backbones import CAPTIONS, close, random_images
from tiny import make_model, make_processor
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoProcessor,
    BertConfig,
    BertModel,
    CLIPTextModelWithProjection,
    CLIPVisionModelWithProjection,
    Siglip2Model,
    pipeline,
)
from typer.testing import CliRunner

from pvlf_hf import PVLFModel, PVLFProcessor, TrainingFreeConfig, TrainingFreeModel
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.commands.evaluate import main as evaluate_command
from pvlf_hf.models.compositions_training_free import COMPOSITIONS
from pvlf_hf.models.pipeline_pvlf import TASK
from pvlf_hf.sentence_transformer import PVLFSentenceModule
from pvlf_hf_cli import app


def unit(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, 7, generator=generator, dtype=torch.float64), dim=-1)


# --- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_slerp_divides_the_angle_and_stays_in_the_plane(weight):
    image, text = unit(50), unit(50, seed=1)
    query = COMPOSITIONS["slerp"].compose(image, text, weight)
    angle = (image * text).sum(-1).acos()
    # The cosine's error, of its sum and of rows that are not quite unit ones, is divided by the sine in the arc
    # cosine, and twice more in the derivatives of the two factors, whose numerators are at most 2.
    error = 5 * (dot_error(7, torch.float64) + 2 * unit_error(7, torch.float64)) / angle.sin() ** 3
    assert (((query * image).sum(-1) - (weight * angle).cos()).abs() <= error).all()
    assert (((query * text).sum(-1) - ((1 - weight) * angle).cos()).abs() <= error).all()
    assert ((query.norm(dim=-1) - 1).abs() <= unit_error(7, torch.float64)).all()


def test_slerp_equals_numbers_computed_by_hand():
    image, text = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    # roundings of the angle pi / 2, its share, sine, quotient, product, sum; or of a norm of two
    error = 8 * roundoff()
    query = COMPOSITIONS["slerp"].compose(image, text, 0.8)
    close(query, torch.tensor([[math.cos(0.8 * math.pi / 2), math.sin(0.8 * math.pi / 2)]]), error)
    query = COMPOSITIONS["sum"].compose(image, text, 0.8)
    close(query, torch.tensor([[0.2, 0.8]]) / math.hypot(0.2, 0.8), error)


def test_slerp_is_linear_where_the_sine_vanishes():
    v = unit(1)
    for t in (v, F.normalize(v + 1e-4 * unit(1, seed=3), dim=-1), -v):
        image, text = v.clone().requires_grad_(), t.clone().requires_grad_()
        query = COMPOSITIONS["slerp"].compose(image, text, 0.8)
        # Both are normalised, and 1 - 0.8 is not quite 0.2: three roundings of 1 or less, in a sum of 0.6 or more.
        error = 2 * unit_error(7, torch.float64) + 2 * 3 / 0.6 * roundoff(torch.float64)
        close(query, F.normalize(0.8 * text + 0.2 * image, dim=-1), error)
        query.sum().backward()
        assert image.grad.isfinite().all() and text.grad.isfinite().all()


# --- configuration --------------------------------------------------------------------------------------------------


def test_a_composition_has_its_published_weight_by_default():
    assert TrainingFreeConfig().composition == "slerp"
    for name, composition in COMPOSITIONS.items():
        assert TrainingFreeConfig(composition=name).composition_weight == composition.default_weight
        assert composition.default_weight == (0.5 if name == "product" else 0.8)
    assert TrainingFreeConfig(composition_weight=0).composition_weight == 0


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"composition": "mean"}, r"composition='mean': choose one of \['product', 'slerp', 'sum'\]"),
        ({"composition_weight": 1.5}, "composition_weight=1.5.*from 0 .the image alone. to 1 .the text alone"),
        ({"temperature": 0}, "temperature=0 must be above 0"),
        ({"vl_config": {"model_type": "bert"}}, "vl_config has model_type 'bert'.*one of .'blip', 'clip'"),
    ],
)
def test_impossible_settings_raise_with_a_remedy(settings, advice):
    with pytest.raises(ValueError, match=advice):
        TrainingFreeConfig(**settings)


# --- the model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def pretrained(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    save_dual_encoder(request.param, folder)
    return folder


@pytest.mark.parametrize("composition", COMPOSITIONS)
@torch.no_grad()
def test_a_plain_dual_encoder_composes_queries(pretrained, composition, caplog):
    model = TrainingFreeModel.from_vl_pretrained(pretrained, composition=composition)
    processor = PVLFProcessor.from_vl_pretrained(pretrained)
    inputs = processor.process_queries(random_images(3), CAPTIONS)
    output = model.get_query_features(**inputs)
    pvlf = PVLFModel.from_vl_pretrained(pretrained, fusion_heads=4)
    caplog.clear()
    image = pvlf.get_image_features(inputs["pixel_values"]).pooler_output
    text = pvlf.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    assert torch.equal(output.image_embeds, image) and torch.equal(output.text_embeds, text)
    assert torch.equal(output.pooler_output, COMPOSITIONS[composition].compose(image, text, 0.8))
    assert model.embedding_width == 32 and not model.training
    targets = processor.process_targets(random_images(3, seed=1))["pixel_values"]
    assert torch.equal(
        model(target_pixel_values=targets).target_embeds, pvlf.get_image_features(targets).pooler_output
    )
    assert {name for name, _ in model.named_parameters()} == {
        name for name, _ in pvlf.named_parameters() if name.startswith("backbone.")
    }


def test_training_free_model_can_be_fine_tuned(pretrained):
    model = TrainingFreeModel.from_vl_pretrained(pretrained)
    processor = PVLFProcessor.from_vl_pretrained(pretrained)
    inputs = processor(images=random_images(3), text=CAPTIONS, target_images=random_images(3, seed=1))
    output = model.train()(**inputs)
    truth, error = exact_loss(output.query_embeds, output.target_embeds, 0.07, gamma=0.0)
    assert (output.loss - truth.value).abs() <= error.value
    logits = output.query_embeds.double() @ output.target_embeds.double().T / 0.07
    torch.testing.assert_close(
        truth.value, F.cross_entropy(logits, torch.arange(3)), rtol=dot_error(100, torch.float64), atol=0
    )
    output.loss.backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    model.set_finetuning("text")
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains and all("text" in name for name in trains)


def test_inconsistent_inputs_raise_in_training_free_models(pretrained):
    model = TrainingFreeModel.from_vl_pretrained(pretrained)
    inputs = PVLFProcessor.from_vl_pretrained(pretrained)(images=random_images(3), text=CAPTIONS)
    with pytest.raises(ValueError, match="2 reference images but 3 relative captions"):
        model.get_query_features(inputs["pixel_values"][:2], inputs["input_ids"])
    with pytest.raises(ValueError, match="output_attentions.*'slerp' is a formula"):
        model.get_query_features(**inputs, output_attentions=True)
    with pytest.raises(ValueError, match="vl_config.*the checkpoint is its own vl_config"):
        TrainingFreeModel.from_vl_pretrained(pretrained, vl_config={})


# --- one loader, and the command line --------------------------------------------------------------------------------


def test_load_model_loads_every_model_type(pretrained, tmp_path, caplog):
    model, processor = load_model(str(pretrained))
    assert type(model) is TrainingFreeModel and model.config.composition == "slerp" and not model.training
    assert "is a plain" in caplog.text and "Fine-tuning PVLF on it" in caplog.text
    assert load_model(str(pretrained), "sum", "bfloat16")[0].dtype == torch.bfloat16
    model.config.composition_weight = 0.4
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    caplog.clear()
    again, processor = load_model(str(tmp_path))
    assert (again.config.composition, again.config.composition_weight) == ("slerp", 0.4)
    assert type(processor) is PVLFProcessor and not caplog.text
    other = load_model(str(tmp_path), "sum")[0].config
    assert (other.composition, other.composition_weight) == ("sum", 0.8)
    with pytest.raises(ValueError, match=r"composition='mean': choose one of \['product', 'slerp', 'sum'\]"):
        load_model(str(pretrained), "mean")


def test_every_registered_model_loads_as_itself(tmp_path):
    for (model, processor), name in (((make_model(), make_processor()), "pvlf"), (make_foreign(), "foreign")):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        assert type(load_model(str(tmp_path / name))[0]) is type(model)
        with pytest.raises(ValueError, match="composes queries as it has learnt to: leave composition='sum' out"):
            load_model(str(tmp_path / name), "sum")


def test_other_models_are_refused_with_a_remedy(pretrained, tmp_path):
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match="'bert' model, which does not embed images and texts in one space: pass a PVLF"
    ):
        load_model(str(tmp_path / "bert"))
    shutil.copytree(pretrained, tmp_path / "mute", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(ValueError, match="tokenizer.*AutoTokenizer.from_pretrained.original..save_pretrained"):
        load_model(str(tmp_path / "mute"))
    with pytest.raises(ValueError, match="no model .*/nothing"):
        load_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (CLIPTextModelWithProjection, "'clip_text_model' model, which does not embed images and texts in one space"),
        (CLIPVisionModelWithProjection, "'clip_vision_model' model, which does not embed images and texts in one"),
        (Siglip2Model, "SigLIP 2 of variable resolution .NaFlex., .*such as google/siglip2-base-patch16-256"),
    ],
)
def test_half_an_encoder_and_naflex_are_refused_with_a_remedy(kind, sentence, tmp_path):
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    parts = {"text_config": {**tower, "vocab_size": 9}, "vision_config": {**tower, "num_patches": 4}}
    kind.config_class(**(parts if kind is Siglip2Model else tower)).save_pretrained(tmp_path)
    indexing = ["index", str(tmp_path), "--model", str(tmp_path), "--path", str(tmp_path / "index")]
    refused = CliRunner().invoke(app, indexing)
    assert refused.exit_code == 1 and re.search(sentence, refused.stderr) and ": pass " in refused.stderr


@pytest.mark.slow
def test_a_folder_is_indexed_and_searched_by_a_plain_encoder(pretrained, tmp_path):
    (tmp_path / "photos").mkdir()
    images = random_images(4)
    for number, image in enumerate(images):
        image.save(tmp_path / "photos" / f"{number}.png")
    index, options = tmp_path / "index", ["--composition", "sum", "--json"]

    def call(*arguments):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    assert call("index", tmp_path / "photos", "--model", pretrained, "--path", index, *options)["new"] == 4
    query = ["--image", tmp_path / "photos" / "0.png", "--text", "red dog"]
    results = call("search", index, "--model", pretrained, *query, *options)["results"]
    model, processor = load_model(str(pretrained), "sum")
    with torch.no_grad():
        query = model.get_query_features(**processor.process_queries(images[0], "red dog")).pooler_output
        scores = query @ model.get_image_features(**processor.process_targets(images)).pooler_output.T
    order = scores[0].argsort(descending=True)
    assert [one["id"] for one in results] == [f"{row}.png" for row in order]
    inputs = processor(images=images[:1] * 4, text=["red dog"] * 4, target_images=images)
    error = embedding_error(model, dict(inputs))["similarity"]
    close(torch.tensor([one["score"] for one in results]), scores[0][order], error)
    refused = ["search", str(index), "--model", str(pretrained), "--text", "dog", "--composition", "mean"]
    refused = CliRunner().invoke(app, refused)
    assert refused.exit_code == 1 and "choose one of ['product', 'slerp', 'sum']" in refused.stderr


def test_a_plain_encoder_is_evaluated_by_its_composition(pretrained, tmp_path):
    make_cirr(tmp_path / "cirr")
    measured = {}
    for composition in COMPOSITIONS:
        arguments = ["--model", pretrained, "--protocols", "cirr-val", "--data_root", tmp_path, "--no_check_counts"]
        arguments += ["--composition", composition, "--methods", "composed", "image+text"]
        folder = tmp_path / composition
        evaluate_command([str(a) for a in (*arguments, "--output_dir", folder)])
        results = json.loads((folder / "results.json").read_text())["evaluations"]
        measured[composition] = {one["method"]: one["metrics"] for one in results}
        assert measured[composition].keys() == {"composed", "image+text"}
    assert measured["sum"]["image+text"] == measured["slerp"]["image+text"]


# Runs without the package, as on a machine that has only Transformers.
STRANGER = """
import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor, pipeline

root, errors = Path(sys.argv[1]), json.loads(sys.argv[2])
image, outputs = Image.open(root / "image.png"), {}
for family in errors:
    folder = root / family
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        outputs[family] = model(**processor(images=image, text="red", target_images=image)).similarity
    pipe = pipeline(
        "composed-image-retrieval", model=str(folder), trust_remote_code=True, gallery=[image], device="cpu"
    )
    (result,) = pipe(image, text="red")
    assert abs(result["score"] - outputs[family].item()) <= errors[family]
    model.save_pretrained(root / "again" / family)
    processor.save_pretrained(root / "again" / family)
save_file(outputs, root / "outputs.safetensors")
"""


@pytest.mark.slow
def test_every_family_is_a_pipeline_and_a_sentence_transformer_by_name(pretrained):
    folder = pretrained
    queries = [{"image": image, "text": text} for image, text in zip(random_images(3), CAPTIONS, strict=False)]
    images = [query["image"] for query in queries]
    for settings in ({}, {"composition": "sum", "composition_weight": 0.3}):
        model = TrainingFreeModel.from_vl_pretrained(folder, **settings)
        processor = PVLFProcessor.from_vl_pretrained(folder)
        by_name = pipeline(TASK, model=str(folder), gallery=images, model_kwargs=settings, device="cpu")
        made = pipeline(TASK, model=model, processor=processor, gallery=images, device="cpu")
        assert [by_name(query) for query in queries] == [made(query) for query in queries]
        module = PVLFSentenceModule.load(str(folder), model_kwargs=settings)
        encoded = SentenceTransformer(modules=[module], device="cpu").encode(queries, convert_to_tensor=True)
        expected = SentenceTransformer(modules=[PVLFSentenceModule(model, processor)], device="cpu")
        assert encoded.equal(expected.encode(queries, convert_to_tensor=True))
    with pytest.raises(ValueError, match=r"plain dual encoder: set \['max_text_length'\] on the processor"):
        PVLFSentenceModule.load(str(folder), processor_kwargs={"max_text_length": 9})


@pytest.mark.slow
def test_a_saved_model_is_loaded_with_and_without_the_package(tmp_path):
    (image,) = random_images(1)
    image.save(tmp_path / "image.png")
    ours, errors = {}, {}
    for family, composition in zip(FAMILIES, ("slerp", "sum", "product", "slerp", "sum"), strict=True):
        folder = tmp_path / family
        save_dual_encoder(family, tmp_path / "pretrained")
        model = TrainingFreeModel.from_vl_pretrained(
            tmp_path / "pretrained", composition=composition, composition_weight=0.6
        )
        model.save_pretrained(folder)
        PVLFProcessor.from_vl_pretrained(tmp_path / "pretrained").save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        assert config["model_type"] == "training_free_cir" and config["composition"] == composition
        assert config["auto_map"] == {
            "AutoConfig": "configuration_training_free.TrainingFreeConfig",
            "AutoModel": "modeling_training_free.TrainingFreeModel",
        }
        assert type(AutoConfig.from_pretrained(folder)) is TrainingFreeConfig
        again, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
        assert type(again) is TrainingFreeModel and type(processor) is PVLFProcessor
        assert again.config.composition_weight == 0.6
        inputs = processor(images=image, text="red", target_images=image)
        with torch.no_grad():
            ours[family] = again(**inputs).similarity
            assert torch.equal(ours[family], model(**inputs).similarity)
        errors[family] = embedding_error(model, dict(inputs))["similarity"]
        pipe = pipeline("composed-image-retrieval", model=str(folder), gallery=[image], device="cpu")
        assert abs(pipe(image, text="red")[0]["score"] - ours[family].item()) <= errors[family]
    save_file(ours, tmp_path / "ours.safetensors")
    run_without_package(STRANGER, tmp_path, tmp_path, json.dumps(errors))
    theirs = load_file(tmp_path / "outputs.safetensors")
    assert all(torch.equal(theirs[family], ours[family]) for family in FAMILIES)
    names = sorted(path.name for path in (tmp_path / "clip").glob("*.py"))
    assert names == sorted(path.name for path in (tmp_path / "again" / "clip").glob("*.py"))
    assert "modeling_training_free.py" in names and "modeling_pvlf.py" not in names
