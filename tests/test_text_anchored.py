"""Text-anchored tuning: an adapter of the image encoder, trained on images and captions alone."""

import json

import pytest
import torch
from datasets import Dataset, Image
from error_bounds import rounding
from PIL import Image as PILImage
from tiny import make_processor, tiny_config
from transformers import AutoModel

from pvlf_hf import PVLFTrainer, PVLFTrainingArguments, TrainingFreeModel
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.commands.train import parse_arguments, train
from pvlf_hf.models.configuration_training_free import TrainingFreeConfig
from pvlf_hf.models.loss_pvlf import focal_info_nce
from pvlf_hf.training.methods import METHODS
from pvlf_hf.training.objectives import TEXT_ANCHORED, SampleCollator
from pvlf_hf.training.text_anchored import accept_pairs, tune_image_encoder

COLOURS = ("red", "green", "blue", "dark")

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT 0.21 still uses the old name
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Return eight squares, two of each colour, with captions, and their folder."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for number in range(8):
        colour = COLOURS[number % 4]
        file = folder / f"{number}.png"
        PILImage.new("RGB", (32, 32), "black" if colour == "dark" else colour).save(file)
        rows.append({"image": str(file), "caption": f"a {colour} hat"})
    (folder / "t.csv").write_text(
        "image,caption\n" + "".join(f"{n}.png,{row['caption']}\n" for n, row in enumerate(rows))
    )
    return Dataset.from_list(rows).cast_column("image", Image()), folder


def make_model(seed=0):
    torch.manual_seed(seed)
    return TrainingFreeModel(TrainingFreeConfig(vl_config=tiny_config().vl_config)).eval()


def make_trainer(model, folder, rows, **settings):
    settings = {
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        **settings,
    }
    settings = {
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
        **settings,
    }
    return PVLFTrainer(model, PVLFTrainingArguments(str(folder), **settings), rows, processing_class=make_processor())


def test_only_the_image_encoder_s_adapter_trains():
    model = tune_image_encoder(make_model())
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name and "vision_model" in name for name in trained)


def test_the_loss_ranks_the_images_for_each_text(pairs):
    rows, _ = pairs
    model = tune_image_encoder(make_model())
    batch = SampleCollator(make_processor(), samples=TEXT_ANCHORED)(list(rows))
    accept_pairs(model)
    output = model(**{name: value for name, value in batch.items() if name != "target_ids"}, return_loss=True)
    inner = model.get_base_model()
    texts = inner.get_text_features(batch["caption_ids"], batch["caption_attention_mask"]).pooler_output
    images = inner.get_image_features(batch["target_pixel_values"]).pooler_output
    assert torch.equal(output.query_embeds, texts) and torch.equal(output.target_embeds, images)
    assert len(batch["target_ids"].unique()) == 4, "images of equal captions are no negatives of each other"
    inputs = batch["target_pixel_values"], batch["caption_ids"], batch["caption_attention_mask"]
    query = inner.get_query_features(*inputs)
    plain = model(
        pixel_values=batch["target_pixel_values"],
        input_ids=batch["caption_ids"],
        attention_mask=batch["caption_attention_mask"],
    )
    assert torch.equal(plain.query_embeds, query.pooler_output), "its own inputs work as before"


def test_training_brings_images_to_their_texts(pairs, tmp_path):
    rows, _ = pairs
    before = make_model()
    trainer = make_trainer(tune_image_encoder(make_model()), tmp_path, rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    batch = SampleCollator(make_processor(), samples=TEXT_ANCHORED)(list(rows))
    texts, images = [], []
    with torch.no_grad():
        for model in (before, trainer.model.get_base_model().eval()):
            texts.append(model.get_text_features(batch["caption_ids"], batch["caption_attention_mask"]).pooler_output)
            images.append(model.get_image_features(batch["target_pixel_values"]).pooler_output)
    assert torch.equal(*texts), "texts are the anchors"
    assert not torch.allclose(*images, atol=1e-3)

    def loss(model, inputs):
        texts = model.get_text_features(inputs["caption_ids"], inputs["caption_attention_mask"]).pooler_output
        images = model.get_image_features(inputs["target_pixel_values"]).pooler_output
        return {"loss": focal_info_nce(texts, images, 0.07, gamma=0.0, target_ids=inputs["target_ids"])}

    with torch.no_grad():
        expected, error = loss(before, batch)["loss"], rounding(loss, before, dict(batch))["loss"]
    assert losses[0] == pytest.approx(expected.item(), rel=0, abs=error)
    assert losses[-1] < losses[0] - 0.1


def test_what_cannot_be_tuned_is_refused(pairs, tmp_path):
    rows, _ = pairs
    with pytest.raises(ValueError, match="pass tune_image_encoder"):
        make_trainer(make_model(), tmp_path, rows)
    with pytest.raises(ValueError, match="no feature_cache"):
        tuned = tune_image_encoder(make_model())
        make_trainer(tuned, tmp_path, rows, feature_cache=str(tmp_path), finetuning="frozen")


def test_the_command_writes_a_model_like_any_other(pairs, blip_checkpoint, tmp_path):
    _, folder = pairs
    words = [f"--model={blip_checkpoint}", "--method=tat", f"--output_dir={tmp_path / 'run'}", "--use_cpu=true"]
    words += [f"--train_file={folder / 't.csv'}", f"--image_folder={folder}", "--max_steps=2", "--learning_rate=0.01"]
    train(*parse_arguments([*words, "--per_device_train_batch_size=4", "--save_steps=1", "--settings", "rank=2"]))
    assert (tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors").is_file()
    model, processor = load_model(str(tmp_path / "run"))
    plain, _ = load_model(str(blip_checkpoint))
    assert type(model) is type(AutoModel.from_pretrained(tmp_path / "run")) is TrainingFreeModel
    image = PILImage.new("RGB", (32, 32), "red")
    with torch.no_grad():
        inputs = processor.process_queries([image], ["a red hat"])
        caption = inputs["input_ids"], inputs["attention_mask"]
        text = [one.get_text_features(*caption).pooler_output for one in (model, plain)]
        images = [one.get_image_features(inputs["pixel_values"]).pooler_output for one in (model, plain)]
    assert torch.equal(*text) and not torch.equal(*images)
    pvlf, _ = METHODS["pvlf"].make("pvlf", str(tmp_path / "run"), {"num_prompts": 2})  # builds on the tuned encoder
    with torch.no_grad():
        assert torch.equal(pvlf.get_image_features(inputs["pixel_values"]).pooler_output, images[0])
    facts = json.loads((tmp_path / "run" / "results.json").read_text())
    assert facts["model"]["method"] == "tat" and "triplets" not in facts
