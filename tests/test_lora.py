"""LoRA by PEFT, on encoders and fusion: trained weights, checkpoints, loading and merging."""

import pytest
import torch
from error_bounds import embedding_error, rounding
from peft import (
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file
from squares import make_benchmark, square_triplets
from tiny import BACKBONES, make_inputs, make_model
from transformers import AutoModel, pipeline

from pvlf_hf import Gallery, PVLFModel, PVLFTrainer, PVLFTrainingArguments, evaluate
from pvlf_hf.embeddings.embedding_store import EmbeddingStore
from pvlf_hf.embeddings.openvino_encoder import encode_by_openvino
from pvlf_hf.export import export_program
from pvlf_hf.sentence_transformer import PVLFSentenceModule

# Attention matrices: fused in BLIP's ViT, BERT's, and the names that CLIP's encoders and our fusion share.
ATTENTION = r".*(qkv|attention\.self\.(query|value)|self_attn\.(q_proj|v_proj))"

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # PEFT 0.21 still uses the old name
)


@pytest.fixture
def squares(tmp_path):
    (tmp_path / "images").mkdir()
    return square_triplets(tmp_path / "images", ["red", "green", "blue", "white"], lambda a, b: "more red")


def with_lora(model, target_modules=ATTENTION, modules_to_save=None):
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, target_modules=target_modules, modules_to_save=modules_to_save))


def base_model(folder, backbone="blip"):
    """Save a model and load it from the folder, so that an adapter finds its base."""
    make_model(backbone).save_pretrained(folder)
    return PVLFModel.from_pretrained(folder)


def make_trainer(model, folder, squares, processor, **kwargs):
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2, **kwargs}
    settings = {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, **settings}
    args = PVLFTrainingArguments(str(folder), **settings)
    return PVLFTrainer(model, args, squares, make_benchmark(), processing_class=processor)


def embed(model, backbone="blip"):
    """Return query and target embeddings."""
    inputs = make_inputs(backbone)
    targets = inputs.pop("target_pixel_values")
    with torch.no_grad():
        model.eval()
        return torch.cat(
            [model.get_query_features(**inputs).pooler_output, model(target_pixel_values=targets).target_embeds]
        )


def embed_error(model, backbone):
    """Return how far `embed` may move when the adapter is merged, which rounds weights once more."""
    error = embedding_error(model, make_inputs(backbone))
    return 2 * max(error["query_embeds"], error["target_embeds"])


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["blip", "clip"])
def test_training_moves_only_the_adapter(backbone, squares, tmp_path, tiny_processor):
    plain = base_model(tmp_path / "base", backbone)
    untouched, error = embed(plain, backbone), embed_error(plain, backbone)
    model = with_lora(plain, modules_to_save=["aggregation"])
    torch.testing.assert_close(embed(model, backbone), untouched, atol=error, rtol=0)  # LoRA starts at zero
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    make_trainer(model, tmp_path / "run", squares, tiny_processor).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    adapter = {n for n in before if "lora_" in n or "modules_to_save" in n}
    assert moved == adapter
    for part in ("vision", "text", "fusion.layers.1", "aggregation"):
        assert any(part in name for name in adapter), part


def test_adapter_has_the_learning_rate_of_the_fusion(squares, tmp_path, tiny_processor):
    model = with_lora(make_model(), modules_to_save=["text_proj"])
    args = {"learning_rate": 1e-4, "encoder_learning_rate": 1e-6}
    optimizer = make_trainer(model, tmp_path, squares, tiny_processor, **args).create_optimizer()
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    rates = {name: rate_of[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert len(rates) == len(rate_of)
    for name, rate in rates.items():
        assert rate == (1e-6 if "text_proj" in name else 1e-4), name  # the encoder's own weights keep its rate


@pytest.mark.slow
def test_checkpoint_holds_only_the_adapter_and_resumes(squares, tmp_path, tiny_processor):
    def run(folder, resume=None, **kwargs):
        model = with_lora(base_model(tmp_path / "base"), modules_to_save=["aggregation"])
        trainer = make_trainer(model, folder, squares, tiny_processor, save_steps=2, save_strategy="steps", **kwargs)
        trainer.train(resume_from_checkpoint=resume)
        return model

    whole = run(tmp_path / "whole", max_steps=4)
    saved = load_file(tmp_path / "whole" / "checkpoint-2" / "adapter_model.safetensors")
    assert saved and all("lora_" in name or "aggregation" in name for name in saved)
    assert not (tmp_path / "whole" / "checkpoint-2" / "model.safetensors").exists()
    assert (tmp_path / "whole" / "checkpoint-2" / "processor_config.json").exists()
    again = run(tmp_path / "again", str(tmp_path / "whole" / "checkpoint-2"), max_steps=4)
    for (name, a), (_, b) in zip(whole.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["blip", "clip"])
def test_adapter_saves_loads_and_merges(backbone, squares, tmp_path, tiny_processor):
    base = base_model(tmp_path / "base", backbone)
    untouched = embed(base, backbone)
    model = with_lora(base)
    trainer = make_trainer(model, tmp_path / "run", squares, tiny_processor)
    trainer.train()
    trainer.save_model(tmp_path / "adapter")
    trained = embed(model, backbone)
    assert (trained - untouched).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(PVLFModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(embed(loaded, backbone), trained)
    # finds the base model by its path
    assert torch.equal(embed(AutoModel.from_pretrained(tmp_path / "adapter"), backbone), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is PVLFModel
    merged.save_pretrained(tmp_path / "merged")
    again = PVLFModel.from_pretrained(tmp_path / "merged")
    assert again.state_dict().keys() == make_model(backbone).state_dict().keys()
    error = embed_error(merged, backbone)
    torch.testing.assert_close(embed(again, backbone), trained, atol=error, rtol=0)
    torch.testing.assert_close(embed(merged, backbone), trained, atol=error, rtol=0)
    make_trainer(merged, tmp_path / "more", squares, tiny_processor)
    assert all(p.requires_grad for p in merged.parameters())  # PEFT had frozen them


@pytest.mark.slow
def test_evaluation_and_gallery_use_the_adapter(squares, tmp_path, tiny_processor):
    model = with_lora(make_model())
    trainer = make_trainer(model, tmp_path / "run", squares, tiny_processor)
    trainer.train()
    metrics = trainer.evaluate()
    for name in ("epoch", "eval_runtime", "eval_samples_per_second"):
        del metrics[name]
    trainer.create_model_card()
    assert "adapter" in (tmp_path / "run" / "README.md").read_text()
    images = sorted((tmp_path / "images").glob("*.png"))
    galleries = [Gallery.from_images(images, m, tiny_processor, progress=False) for m in (model, make_model())]
    found = [gallery.search(images[0], "red", k=4, explain=True) for gallery in galleries]
    assert found[0].scores != found[1].scores
    merged = model.merge_and_unload()
    after = evaluate(merged, tiny_processor, make_benchmark(), progress=False)
    assert {f"eval_{name}": value for name, value in after.metrics.items()} == metrics
    gallery = Gallery.from_images(images, merged, tiny_processor, progress=False)
    inputs = tiny_processor(images=squares["reference"][:4], text=["red"] * 4, target_images=squares["target"][:4])
    error = embedding_error(merged, dict(inputs))  # and merging rounds the weights once more
    torch.testing.assert_close(gallery.embeds, galleries[0].embeds, atol=2 * error["target_embeds"], rtol=0)
    again = gallery.search(images[0], "red", k=4)
    assert again.scores == pytest.approx(found[0].scores, abs=2 * error["similarity"])


def test_features_are_cached_where_only_the_fusion_adapts(squares, tmp_path, tiny_processor):
    args = {"finetuning": "frozen", "feature_cache": str(tmp_path / "features")}
    model = with_lora(make_model(), r"fusion\..*_proj")
    make_trainer(model, tmp_path / "run", squares, tiny_processor, **args).train()
    assert list((tmp_path / "features").rglob("*.safetensors"))
    with pytest.raises(ValueError, match="the image encoder trains"):
        make_trainer(with_lora(make_model()), tmp_path / "run", squares, tiny_processor, **args).train()


def adapter_gradients(model, inputs):
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_adapters_train_under_activation_checkpointing(backbone):
    """Compare gradients with and without checkpointing, for either order of enabling the two."""
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = make_model(backbone, dropout=0.0)
        model.add_adapter(config)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        gradients.append(adapter_gradients(model, make_inputs(backbone)))
    assert gradients[0].keys() == gradients[1].keys() and any("lora_" in name for name in gradients[0])
    model.activation_checkpointing_disable()
    for name, error in rounding(adapter_gradients, model, make_inputs(backbone)).items():
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=0, atol=error, msg=name)


# --- prompt learning -------------------------------------------------------------------------------------------------

PROMPT_LEARNING = (PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig, MultitaskPromptTuningConfig)


def with_prompts(kind):
    """Wrap a model for prompt learning, with sizes that PEFT cannot find in a configuration of two encoders."""
    sizes = {"token_dim": 20, "num_layers": 2, "num_attention_heads": 4, "num_virtual_tokens": 4}
    return get_peft_model(make_model(), kind(task_type="FEATURE_EXTRACTION", **sizes))


@pytest.mark.parametrize("kind", PROMPT_LEARNING)
def test_prompt_learning_is_refused_by_the_trainer(kind, squares, tmp_path, tiny_processor):
    refused = f"{kind.__name__} is prompt learning.*use an adapter such as LoraConfig"
    with pytest.raises(ValueError, match=refused):
        make_trainer(with_prompts(kind), tmp_path, squares, tiny_processor)
    with pytest.raises(ValueError, match=refused):
        make_model().add_adapter(kind(num_virtual_tokens=4))
    args = PVLFTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=4)
    made = {"model_init": lambda: with_prompts(kind), "processing_class": tiny_processor}
    with pytest.raises(ValueError, match=refused):
        PVLFTrainer(args=args, train_dataset=squares, **made).train()


ENTRIES = {
    "evaluate": lambda model, processor, folder: evaluate(model, processor, make_benchmark(), progress=False),
    "a store": lambda model, processor, folder: EmbeddingStore(folder / "store").claim(model, processor),
    "a gallery": lambda model, processor, folder: Gallery.from_folder(folder / "images", model, processor),
    "a search": lambda model, processor, folder: gallery_of(folder, model, processor).search(text="red"),
    "the pipeline": lambda model, processor, folder: pipeline(
        "composed-image-retrieval", model=model, processor=processor, image_processor=processor.image_processor
    ),
    "sentence-transformers": lambda model, processor, folder: PVLFSentenceModule(model, processor),
    "export": lambda model, processor, folder: export_program(model.eval(), "query"),
    "OpenVINO": lambda model, processor, folder: encode_by_openvino(model),
}


def gallery_of(folder, model, processor):
    """Return the gallery of a plain model, with another one in its place."""
    gallery = Gallery.from_folder(folder / "images", make_model(), processor, progress=False)
    gallery.model = model
    return gallery


@pytest.mark.reliability(
    9,
    "A model that PEFT wrapped for prompt learning is refused wherever it enters: the plain model would answer "
    "in its place",
    broken=(
        "src/pvlf_hf/models/interface_pvlf.py",
        '    if getattr(settings, "is_prompt_learning", False):',
        "    if False:",
    ),
)
@pytest.mark.parametrize("entry", ENTRIES)
def test_prompt_learning_is_refused_wherever_a_model_enters(entry, squares, tmp_path, tiny_processor, figure):
    """The vectors of such an adapter never reach the methods that embed: the plain model would answer."""
    with pytest.raises(ValueError, match="PromptTuningConfig is prompt learning"):
        ENTRIES[entry](with_prompts(PromptTuningConfig), tiny_processor, tmp_path)
    figure(entry)
