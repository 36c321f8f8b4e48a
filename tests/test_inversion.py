"""Textual inversion: outputs of the reference implementations, invalid input, and saved models."""

import json
import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as DatasetImage
from error_bounds import exact_loss, rounding
from forked import run_without_package
from inverted import (
    FIXTURES,
    PALAVRA_NAMES,
    TOLERANCES,
    io_of,
    make_model,
    make_processor,
    mapping_tensors,
    prompts_of,
    query_of,
    reference_model,
    relative,
    renamed,
    tiny_clip,
    within,
)
from PIL import Image
from reference import CONFIGS
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoProcessor, CLIPModel, pipeline

from pvlf_hf import (
    CASEModel,
    CompoDiffModel,
    Gallery,
    InversionConfig,
    InversionModel,
    InversionProcessor,
    PVLFModel,
    PVLFProcessor,
    TrainingFreeModel,
)
from pvlf_hf.checkpoints.inversion_weights import translate_mapping
from pvlf_hf.models.configuration_inversion import METHODS
from pvlf_hf.models.loss_inversion import alignment_loss, cosine_distance, nt_xent
from pvlf_hf.models.optimization_inversion import (
    Sentences,
    align,
    digests,
    draw,
    optimize_palavra,
    optimize_searle,
)

BLIP = Path(__file__).parents[1] / "model_cards" / "blip-emoji-tiny"

IMAGE = Image.linear_gradient("L").resize((40, 28)).convert("RGB")

MAPPED = ("pic2word", "searle", "lincir", "context_i2w")

QUERIES = {
    "pic2word": "query_input_ids",
    "searle": "cirr_input_ids",
    "lincir": "cirr_input_ids",
    "context_i2w": "query_input_ids",
}


@torch.no_grad()
@pytest.mark.parametrize("method", MAPPED)
def test_queries_equal_the_reference(method):
    model, io = reference_model(method), io_of(method)
    query = model.get_query_features(io["pixel_values"], io[QUERIES[method]])
    within(model.encode_images(io["pixel_values"])[1], io["image_features"])
    within(query.image_embeds, F.normalize(io["image_features"], dim=-1), atol=TOLERANCES["query"])
    within(query.pseudo_words, io["pseudo_word"])
    within(query.pooler_output, query_of(method), atol=TOLERANCES["query"])
    if "query_raw" in io:
        within(model.encode_text(io[QUERIES[method]], None, query.pseudo_words), io["query_raw"])
    words = model.get_pseudo_words(io["pixel_values"], io[QUERIES[method]])
    assert torch.equal(words, query.pseudo_words)


@torch.no_grad()
@pytest.mark.parametrize("method", ["searle", "lincir"])
def test_two_captions_of_fashioniq_are_the_mean_of_both_orders(method):
    model, io = reference_model(method), io_of(method)
    orders = ("fashioniq_input_ids", "fashioniq_input_ids_reversed")
    embeds = sum(model.get_query_features(io["pixel_values"], io[order]).pooler_output for order in orders)
    within(F.normalize(embeds, dim=-1), io["fashioniq_query"], atol=TOLERANCES["query"])


@torch.no_grad()
@pytest.mark.parametrize(("method", "other"), [("searle", "all"), ("lincir", "first")])
def test_searle_fills_the_first_placeholder_and_lincir_all(method, other):
    model, io = reference_model(method), io_of(method)
    ids = io["two_dollar_input_ids"]
    assert (ids == 259).sum() == 8
    within(model.encode_text(ids, None, io["pseudo_word"]), io["two_dollar_raw"])
    model.config.replace = other
    assert (model.encode_text(ids, None, io["pseudo_word"]) - io["two_dollar_raw"]).abs().max() > 0.5
    once = io["cirr_input_ids"]
    first = model.encode_text(once, None, io["pseudo_word"])
    model.config.replace = METHODS[method].replace
    assert torch.equal(model.encode_text(once, None, io["pseudo_word"]), first)


@torch.no_grad()
def test_lincir_on_normalised_features_equals_the_reference():
    io = io_of("lincir")
    within(
        reference_model("lincir", normalize_features=True).get_pseudo_words(io["pixel_values"]),
        io["pseudo_word_l2_normalize"],
    )


@torch.no_grad()
def test_pic2word_domain_and_text_queries_equal_the_reference():
    model, io = reference_model("pic2word"), io_of("pic2word")
    ids = io["domain_input_ids"].expand(4, -1)
    within(model.encode_text(ids, None, model.get_pseudo_words(io["pixel_values"])), io["domain_query_raw"])
    within(model.encode_text(io["query_input_ids"]), io["text_features_plain"])


@torch.no_grad()
def test_every_step_of_context_i2w_equals_the_reference():
    model, io = reference_model("context_i2w"), io_of("context_i2w")
    mapping, ids = model.mapping, io["query_input_ids"]
    tokens, _ = model.encode_images(io["pixel_values"])
    within(tokens, io["image_tokens"])
    context = model.encode_text(ids)
    within(context, io["text_context"])
    within(mapping.context(context), io["context"])
    within(mapping.rotation(tokens), io["rotated"])
    gated = mapping.gate_tokens(tokens, context)
    latents = mapping.extract(gated[:, 1:])
    within(latents, io["latents"])
    within(mapping.whole(gated[:, 0]), io["pseudo_word_global"])
    within(mapping.local(latents.mean(dim=1)), io["pseudo_word_local"])
    mapping.local_gate.zero_()
    within(model.get_pseudo_words(io["pixel_values"], ids), io["pseudo_word_gate0"])


# Training.


def training_inputs(method):
    io = io_of(method)
    if method == "pic2word":
        return {"pixel_values": io["pixel_values"], "input_ids": prompts_of(method)}
    if method == "context_i2w":
        inputs = {"pixel_values": io["pixel_values"], "input_ids": prompts_of(method)}
        return {**inputs, "caption_ids": io["train_replaced_ids"]}
    if method == "searle":
        ids = {"input_ids": io["phi.replaced_ids"], "caption_ids": io["phi.regularised_ids"]}
        return {"pixel_values": io["pixel_values"], "teacher_words": io["oti_tokens"], **ids}
    noise = io["train.noise_uniform"][0, :, None] * io["train.noise_normal"][0]
    return {"input_ids": io["train.replaced_ids"], "caption_ids": io["train.original_ids"], "noise": noise}


LOSSES = {"pic2word": "loss", "context_i2w": "loss", "searle": "phi.loss", "lincir": "train.losses"}
GRADIENTS = {"pic2word": "grad.", "context_i2w": "grad.", "searle": "phi.grad.", "lincir": "train.grad."}


@pytest.mark.parametrize("method", MAPPED)
def test_losses_and_gradients_equal_the_reference(method):
    model, io = reference_model(method), io_of(method)
    output = model(**training_inputs(method), return_loss=True)
    within(output.loss, io[LOSSES[method]][0])
    output.loss.backward()
    named = {name: tensor for name, tensor in io.items() if name.startswith(GRADIENTS[method])}
    stored = {name.removeprefix(GRADIENTS[method]): tensor for name, tensor in named.items()}
    assert len(stored) == (43 if method == "context_i2w" else 6)
    vl_config = model.config.vl_config
    names = {name: name for name in mapping_tensors(method)}
    ours = dict(
        zip(mapping_tensors(method), translate_mapping(mapping_tensors(method), vl_config, method, 2)[1], strict=True)
    )
    assert names.keys() == ours.keys()
    for theirs, gradient in stored.items():
        own = model.mapping.get_parameter(ours[theirs]).grad
        own = own.T if theirs in ("proj", "proj_local") else own
        if theirs == "local_gate":  # small by cancellation
            within(own, gradient, atol=TOLERANCES["gate"])
        else:
            assert relative(own, gradient) < TOLERANCES["gradient"], theirs
    assert all(parameter.grad is None for parameter in model.backbone.parameters())


def test_terms_of_searles_loss_equal_the_reference():
    model, io = reference_model("searle"), io_of("searle")
    words = model.get_pseudo_words(io["pixel_values"])
    within(nt_xent(io["oti_tokens"], words), io["phi.distillation_loss"][0])
    replaced = model.encode_text(io["phi.replaced_ids"], None, words)
    within(cosine_distance(replaced, model.encode_text(io["phi.regularised_ids"])), io["phi.gpt_loss"][0])


def test_captions_of_lincir_equal_the_reference():
    model, io = reference_model("lincir"), io_of("lincir")
    within(model.encode_text(io["train.original_ids"]), io["train.original_embeds"])


def test_lincir_draws_noise_in_training():
    model, inputs = reference_model("lincir"), training_inputs("lincir")
    del inputs["noise"]
    losses = [model(**inputs, return_loss=True).loss.item() for _ in range(2)]
    assert losses[0] != losses[1]
    torch.manual_seed(0)
    first = model(**inputs, return_loss=True).loss.item()
    torch.manual_seed(0)
    assert model(**inputs, return_loss=True).loss.item() == first


def both_ways_error(model, output, ids=None):
    """Return the error bound of InfoNCE in both directions."""
    ways = (output.query_embeds, output.target_embeds), (output.target_embeds, output.query_embeds)
    return max(exact_loss(*way, model.config.temperature, gamma=0.0, target_ids=ids)[1].value.item() for way in ways)


def test_triplet_loss_averages_both_directions():
    model, io = reference_model("pic2word"), io_of("pic2word")
    inputs = {"pixel_values": io["pixel_values"], "input_ids": io["query_input_ids"]}
    targets = io["pixel_values"].flip(0)
    output = model(**inputs, target_pixel_values=targets)
    logits = output.query_embeds.double() @ output.target_embeds.double().T / model.config.temperature
    rows = torch.arange(4)
    expected = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
    within(output.loss.double(), expected.detach(), atol=both_ways_error(model, output))
    # Two queries with the same target are not negatives of each other, in both directions.
    ids = torch.tensor([0, 0, 2, 3])
    masked = logits.masked_fill((ids[:, None] == ids) & ~torch.eye(4, dtype=torch.bool), -math.inf)
    expected = (F.cross_entropy(masked, rows) + F.cross_entropy(masked.T, rows)) / 2
    loss = model.loss(output.query_embeds, output.target_embeds, target_ids=ids)
    within(loss.double(), expected.detach(), atol=both_ways_error(model, output, ids))
    # Gathered targets: a process's own targets start at an offset.
    gathered = torch.cat([output.target_embeds.roll(1, 1), output.target_embeds])
    assert torch.isfinite(model.loss(output.query_embeds, gathered, positives=rows + 4))


# One call of the text tower.


@torch.no_grad()
def test_a_placeholder_replaced_by_its_own_embedding_changes_nothing():
    model, io = reference_model("pic2word"), io_of("pic2word")
    own = model.get_input_embeddings().weight[265].expand(4, -1)
    assert torch.equal(model.encode_text(io["query_input_ids"], None, own), model.encode_text(io["query_input_ids"]))


@torch.no_grad()
def test_padding_makes_no_difference():
    model, io = reference_model("searle"), io_of("searle")
    ids, words = io["cirr_input_ids"], io["pseudo_word"]
    ends = (ids == 299).long().argmax(dim=1)
    mask = (torch.arange(20) <= ends[:, None]).long()
    expected = model.encode_text(ids, None, words)
    for padding in (0, 7, 299):
        padded = ids.masked_fill(mask == 0, padding)
        assert torch.equal(model.encode_text(padded, mask, words), expected)
    assert torch.equal(model.encode_text(ids.masked_fill(mask == 0, 299), None, words), expected)


@torch.no_grad()
def test_image_and_text_embeddings_equal_those_of_clip(tmp_path):
    vl_config, weights, _ = tiny_clip("searle")
    clip = CLIPModel(vl_config).eval()
    clip.load_state_dict(weights, strict=False)
    clip.save_pretrained(tmp_path / "clip")
    io = io_of("searle")
    image = clip.get_image_features(pixel_values=io["pixel_values"]).pooler_output
    text = clip.get_text_features(input_ids=io["cirr_input_ids"]).pooler_output
    for method in METHODS:
        if method == "context_i2w":
            continue
        model = InversionModel.from_vl_pretrained(tmp_path / "clip", method=method, mapping_width=8)
        assert not model.training and model.config.method == method
        assert torch.equal(model.get_image_features(io["pixel_values"]).pooler_output, F.normalize(image, dim=-1))
        assert torch.equal(model.get_text_features(io["cirr_input_ids"]).pooler_output, F.normalize(text, dim=-1))
        gallery = {*model.image_side["vision_model"].state_dict(), *model.image_side["visual_projection"].state_dict()}
        assert len(model.image_side) == 2 and gallery


@torch.no_grad()
@pytest.mark.parametrize("method", [*METHODS])
def test_inversion_on_blip_reads_its_reference_and_its_index(method, blip_checkpoint):
    """Nobody published these methods on BLIP, so that the definition is ours: CLIP's, with BLIP's own text call."""
    own = {"placeholder": "z", "unpublished_backbone": True}
    processor = InversionProcessor.from_vl_pretrained(blip_checkpoint, method, **own)
    assert processor.template == METHODS[method].template.replace(METHODS[method].placeholder, "z")
    settings = {"placeholder_id": processor.placeholder_id, "inversion_steps": 2 * bool(METHODS[method].steps)}
    sizes = {"mapping_width": 64, "extractor_layers": 1, "unpublished_backbone": True}
    model = InversionModel.from_vl_pretrained(blip_checkpoint, method, **settings, **sizes)
    images, captions = [IMAGE, IMAGE.rotate(90)], ["is red", "is more dark and blue"]
    inputs = dict(processor.process_queries(images, captions))
    both = model.get_query_features(**inputs).pooler_output
    assert not torch.allclose(both[0], both[1])
    own_words = model.get_input_embeddings().weight[processor.placeholder_id].expand(2, -1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    plain = model.get_text_features(ids, mask).pooler_output
    replaced = F.normalize(model.encode_text(ids, mask, own_words), dim=-1)
    captions_alone = {"input_ids": ids, "attention_mask": mask}
    bounds = rounding(lambda m, i: {"text": m.get_text_features(**i).pooler_output}, model, captions_alone)
    within(replaced, plain, atol=bounds["text"])
    alone = model.get_query_features(**processor.process_queries(images[:1], captions[:1])).pooler_output
    if not METHODS[method].steps:
        error = rounding(queries, model, {k: inputs[k] for k in ("pixel_values", "input_ids", "attention_mask")})
        within(alone, both[:1], atol=error["query"])
    long = dict(processor.process_queries(images[:1], [" ".join(["is red and blue"] * 20)]))
    assert long["input_ids"].shape[1] == processor.max_text_length  # cut, as other models on BLIP do
    assert (long["input_ids"] == processor.placeholder_id).sum() == 1 and long["input_ids"][0, -1] == 3
    index = TrainingFreeModel.from_vl_pretrained(blip_checkpoint)
    pixels = processor.process_targets(images)["pixel_values"]
    assert torch.equal(model.get_image_features(pixels).pooler_output, index.get_image_features(pixels).pooler_output)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_is_causal_in_every_implementation(attention):
    model, io = reference_model("pic2word"), io_of("pic2word")
    model.set_attn_implementation(attention)
    assert model.backbone.text_model.config._attn_implementation == attention
    query = model.get_query_features(io["pixel_values"], io["query_input_ids"])
    within(query.pooler_output, io["query"], atol=TOLERANCES["query"])


@torch.no_grad()
@pytest.mark.parametrize(("method", "passes"), [("pic2word", 1), ("searle", 1), ("lincir", 1), ("context_i2w", 2)])
def test_a_query_costs_one_pass_of_each_tower(method, passes):
    """Count the passes: one of each tower; Context-I2W embeds the caption first, which takes a second text pass."""
    model, io = reference_model(method), io_of(method)
    counts = {"text": 0, "vision": 0}
    for name, tower in (("text", model.backbone.text_model), ("vision", model.backbone.vision_model)):
        tower.encoder.layers[0].register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    model.get_query_features(io["pixel_values"], io[QUERIES[method]])
    assert counts == {"text": passes, "vision": 1}


# Mutations.


def broken(method, **changes):
    """Yield the model with one detail mutated."""
    model = reference_model(method)
    for path, value in changes.items():
        *owners, name = path.split("__")
        part = model
        for owner in owners:
            part = getattr(part, owner)
        setattr(part, name, value)
    return model


def relu_less(mapping):
    def forward(features):
        features = F.relu(mapping.layers[0](features))
        return mapping.output(mapping.layers[1](features))

    return forward


@torch.no_grad()
def test_wrong_details_of_a_query_are_detected(monkeypatch):
    """Mutate the model: the smallest and the likeliest mistakes move a query by more than the tolerance of 2e-6."""

    def moves(model, method):
        io = io_of(method)
        query = model.get_query_features(io["pixel_values"], io[QUERIES[method]])
        return max(
            (query.pooler_output - query_of(method)).abs().max().item() / 2e-6,
            (query.pseudo_words - io["pseudo_word"]).abs().max().item() / 1e-5,
        )

    for method in MAPPED:
        assert moves(reference_model(method), method) < 1
        assert moves(broken(method, config__normalize_features=True), method) > 1 or method == "context_i2w"
        model = reference_model(method)
        model.backbone.text_model.final_layer_norm = torch.nn.Identity()
        assert moves(model, method) > 100
    model = reference_model("pic2word")
    model.mapping.forward = relu_less(model.mapping)
    assert moves(model, "pic2word") > 100
    model = reference_model("context_i2w")
    model.mapping.local_gate.copy_(model.mapping.local_gate.tanh())
    assert moves(model, "context_i2w") > 100
    for name in ("gelu", "relu"):
        changed = torch.nn.functional.relu if name == "gelu" else torch.nn.functional.gelu
        with monkeypatch.context() as patch:
            patch.setattr(f"pvlf_hf.models.mapping_inversion.F.{name}", changed)
            assert (
                moves(
                    reference_model("searle" if name == "gelu" else "pic2word"),
                    "searle" if name == "gelu" else "pic2word",
                )
                > 100
            )
    exact = F.gelu
    with monkeypatch.context() as patch:
        patch.setattr("pvlf_hf.models.mapping_inversion.F.gelu", lambda x: exact(x, approximate="tanh"))
        for method in ("searle", "lincir", "context_i2w"):
            assert moves(reference_model(method), method) > 3, method


def test_wrong_details_of_a_loss_are_detected():
    wrong = {
        "pic2word": {"input_ids": io_of("pic2word")["query_input_ids"]},
        "searle": {"teacher_words": io_of("searle")["oti_tokens"].flip(0)},
        "lincir": {"noise": torch.zeros(4, 48)},
        "context_i2w": {"caption_ids": prompts_of("context_i2w")},
    }
    for method, changes in wrong.items():
        loss = reference_model(method)(**{**training_inputs(method), **changes}, return_loss=True).loss
        assert (loss - io_of(method)[LOSSES[method]][0]).abs() > 1e-3, method
    for method, replace in (("searle", "all"), ("lincir", "first")):
        loss = reference_model(method, replace=replace)(**training_inputs(method), return_loss=True).loss
        assert (loss - io_of(method)[LOSSES[method]][0]).abs() > 1e-3, method
    loss = reference_model("pic2word", temperature=0.07)(**training_inputs("pic2word"), return_loss=True).loss
    assert (loss - io_of("pic2word")["loss"][0]).abs() > 0.1


# Optimised tokens.


def test_four_steps_of_searle_oti_equal_the_reference():
    model, io = reference_model("searle_oti"), io_of("searle")
    _, features = model.encode_images(io["pixel_values"])
    steps = map(Sentences, io["oti.template_ids"], io["oti.replaced_ids"], io["oti.regularised_ids"])
    optimized = optimize_searle(model._encode_words, features, io["oti.init"], steps)
    within(torch.tensor(optimized.losses), io["oti.losses"])
    within(optimized.words, io["oti.tokens"], atol=TOLERANCES["weights"])
    within(optimized.averaged, io["oti.ema_tokens"], atol=TOLERANCES["average"])
    alone = optimize_searle(model._encode_words, features, io["oti.init"], map(Sentences, io["oti.template_ids"]))
    assert (alone.words - io["oti.tokens"]).abs().max() > 1e-3


@torch.no_grad()
def test_queries_of_palavra_equal_the_reference():
    model, io = reference_model("palavra"), io_of("palavra")
    sets = F.normalize(model.encode_images(io["set_pixel_values"].flatten(0, 1))[1], dim=-1).unflatten(0, (4, 3))
    within(sets, io["set_features"])
    within(model.mapping(sets), io["object_token"])
    within(model.mapping(sets.flip(1)), io["object_token"])
    features = model.encode_images(io["set_pixel_values"][:, 0])[1]
    words = model.pseudo_words_of(features, features)
    within(words, io["object_token_single"])
    raw = model.encode_text(io["query_input_ids"], None, words)
    within(raw, io["query_raw"])
    within(F.normalize(raw, dim=-1), io["query"], atol=TOLERANCES["query"])


def test_the_second_stage_of_palavra_equals_the_reference():
    model, io = reference_model("palavra"), io_of("palavra")
    text = model.encode_text(io["coarse_ids"]).detach()
    coarse = align(model.text_map, F.normalize(text, dim=-1)).detach()
    within(coarse, io["coarse_aligned"])
    features = io["set_features"].mean(dim=1)
    inputs = (features, io["object_token"], coarse, io["stage2_ids"], range(3))
    optimized = optimize_palavra(model._encode_words, *inputs)
    within(torch.tensor(optimized.losses), io["stage2_losses"])
    within(optimized.words, io["stage2_token"], atol=TOLERANCES["weights"])


def test_training_of_palavra_equals_the_reference():
    model, io = reference_model("palavra"), io_of("palavra")
    names = model.get_input_embeddings()(io["concept_ids"][:, 1]).detach()
    inputs = {"input_ids": io["prompt_star_ids"], "caption_ids": io["prompt_concept_ids"], "teacher_words": names}
    inputs = {"pixel_values": io["set_pixel_values"], "align_ids": io["align_text_ids"], **inputs}
    loss = model(**inputs, return_loss=True).loss
    within(loss, io["loss"][0] + io["align_loss"][0])
    words = model.mapping(io["set_features"])
    within(alignment_loss(words, names), io["gt_object_loss"][0])
    captions = [model.encode_text(io["prompt_concept_ids"]), model.encode_text(io["prompt_star_ids"], None, words)]
    within(nt_xent(*captions), io["cycle_loss"][0])
    loss.backward()
    gradients = {name: tensor for name, tensor in io.items() if "grad." in name}
    assert len(gradients) == 15
    for name, gradient in gradients.items():
        if name.startswith("align_grad."):
            own = model.text_map.get_parameter(name.removeprefix("align_grad.layers.0.")).grad
        else:
            own = model.mapping.get_parameter(renamed(name.removeprefix("grad."), PALAVRA_NAMES)).grad
        assert relative(own, gradient) < TOLERANCES["gradient"], name


@pytest.mark.parametrize("method", ["searle_oti", "palavra"])
def test_an_image_is_inverted_once_whatever_its_batch(method, monkeypatch):
    model, processor = reference_model(method, inversion_steps=5), make_processor(method)
    images = [IMAGE, IMAGE.rotate(90), IMAGE.rotate(180)]
    queries = [processor.process_queries([image], ["is red"]) for image in images]
    alone = torch.cat([model.get_query_features(**query).pooler_output for query in queries])
    assert len(model.inverted_words) == 3
    alone_words = model.invert(torch.cat([query["pixel_values"] for query in queries]))
    # All images in one batch, one of them twice, in inference mode as in the evaluator.
    again = reference_model(method, inversion_steps=5)
    with torch.inference_mode():
        batch = processor.process_queries([*images, IMAGE], ["is red"] * 4)
        together = again(**batch)
    assert len(again.inverted_words) == 3 and all(p.grad is None for p in again.parameters())
    # Adam divides a rounding error by the gradient's size: a twentieth of a step is allowed; initial tokens of other
    # images are thirty times as far away.
    within(again.invert(batch["pixel_values"])[:3], alone_words, atol=1e-3)
    within(together.query_embeds.clone()[:3], alone.detach(), atol=1e-3)
    assert torch.equal(again.invert(batch["pixel_values"])[3], again.invert(batch["pixel_values"])[0])
    # Known images take no step, new ones do.
    monkeypatch.setattr("pvlf_hf.models.optimization_inversion._step", lambda *_: pytest.fail("a step"))
    model.get_query_features(**queries[0])
    with pytest.raises(pytest.fail.Exception, match="a step"):
        model.get_query_features(**processor.process_queries(IMAGE.rotate(30), "is red"))
    for name in ("get_query_features", "get_pseudo_words"):
        inputs = {**processor.process_queries(IMAGE.rotate(40), "is red")}
        del inputs["prompt_ids"]
        with pytest.raises(ValueError, match="optimises a token for each new image, by prompt_ids"):
            getattr(model, name)(**inputs)


def test_an_optimised_token_matches_its_image():
    model, processor = reference_model("searle_oti", inversion_steps=60), make_processor("searle_oti")
    batch = processor.process_queries([IMAGE, IMAGE.rotate(90)], ["is red"] * 2)
    prompts = batch["prompt_ids"]
    assert len(prompts) == 24 and ((prompts == 259).sum(dim=1) == 1).all()
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    start = draw(digests(batch["pixel_values"]), 64, 1, 24, 0)[0]
    words = model.invert(batch["pixel_values"], prompts)

    def likeness(words):
        sentences = model.encode_text(prompts[14:15].expand(2, -1), None, words)
        return F.cosine_similarity(sentences, features).mean().item()

    assert likeness(words) > likeness(start) + 0.1


def test_phrases_change_the_optimised_token():
    model, processor = reference_model("searle_oti", inversion_steps=4), make_processor("searle_oti")
    batch, io = processor.process_queries([IMAGE, IMAGE.rotate(90)], ["is red"] * 2), io_of("searle")
    replaced, phrases = (io[f"oti.{name}_ids"][:2].transpose(0, 1)[:2] for name in ("replaced", "regularised"))
    without = model.invert(batch["pixel_values"], batch["prompt_ids"])
    words = model.invert(batch["pixel_values"], batch["prompt_ids"], replaced, phrases)
    assert len(model.inverted_words) == 4 and (words - without).abs().max() > 1e-4
    with pytest.raises(ValueError, match="replaced_ids and phrase_ids go together"):
        model.invert(batch["pixel_values"], batch["prompt_ids"], replaced)
    with pytest.raises(ValueError, match="searle_oti trains nothing"):
        model(**batch, return_loss=True)


# Queries as text.


@torch.no_grad()
@pytest.mark.parametrize("method", METHODS)
def test_captions_are_put_into_the_template(method):
    processor = make_processor(method)
    batch = processor.process_queries([IMAGE, IMAGE], ["is red", "has longer sleeves and {caption}"])
    facts = METHODS[method]
    decoded = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert [" ".join(text.split()) for text in decoded] == [
        facts.template.replace("{caption}", "is red"),
        facts.template.replace("{caption}", "has longer sleeves and { caption }"),
    ]
    assert ((batch["input_ids"] == processor.placeholder_id).sum(dim=1) == 1).all()
    assert ("prompt_ids" in batch) == bool(facts.steps)
    alone = processor(text="is red")["input_ids"]
    assert processor.tokenizer.decode(alone[0], skip_special_tokens=True).strip() == "is red"
    assert processor.process_targets(IMAGE)["pixel_values"].shape == (1, 3, 32, 32)
    if facts.mapping and method != "palavra":
        query = make_model(method).get_query_features(**processor.process_queries(IMAGE, "is red"))
        assert query.pooler_output.shape == (1, 48 if method != "context_i2w" else 64)


def test_placeholders_have_the_ids_of_the_real_tokenizers():
    tokens = json.loads((FIXTURES / "tokens.json").read_text())
    for method, sentence in (
        ("pic2word", "a photo of * , is red"),
        ("searle", "a photo of $ that is red"),
        ("context_i2w", "a photo of <|replace|> , is red"),
    ):
        facts = METHODS[method]
        if method != "context_i2w":
            assert facts.template.replace("{caption}", "is red") == sentence
        assert tokens[method][sentence].count(facts.placeholder_id) == 1
    assert METHODS["context_i2w"].placeholder_id == tokens["searle"]["a jekyll and hyde poster"][2]
    assert METHODS["searle"].placeholder_id not in tokens["searle"]["a photo of $, red"]
    assert tokens["searle"]["a photo of $ that costs $20"].count(259) == 2


def test_a_placeholder_inside_another_token_is_refused():
    with pytest.raises(ValueError, match=r"with a blank or nothing on both sides"):
        make_processor("searle", template="a photo of $, {caption}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "a photo of $"}, r"must hold \{caption\} once"),
        ({"template": "{caption} $ {caption}"}, r"must hold \{caption\} once"),
        ({"template": "a photo that {caption}"}, r"and '\$' with a blank"),
        ({"placeholder": "red dog"}, r"placeholder 'red dog' must be one token of the vocabulary"),
        ({"placeholder": "\u4e2d"}, r"must be one token of the vocabulary"),
        ({"method": "searl"}, r"method='searl': choose one of \['context_i2w'"),
    ],
)
def test_processor_rejects_settings_that_cannot_hold_a_query(settings, message):
    with pytest.raises(ValueError, match=message):
        make_processor(**{"method": "searle", **settings})


@pytest.mark.parametrize(
    ("method", "captions", "message"),
    [
        (
            "searle",
            ["is red", "costs $20"],
            r"caption 1, 'costs \$20', holds '\$', the placeholder .* write it in other",
        ),
        ("pic2word", ["a * on the hat"], r"caption 0, 'a \* on the hat', holds '\*'"),
        ("context_i2w", ["a jekyll and hyde poster"], r"caption 0, .* holds 'jekyll'"),
        ("lincir", ["red", "$ $"], r"caption 1, '\$ \$', holds"),
        (
            "searle",
            ["is red", "a " * 80],
            r"caption 1 has 90 tokens in the template .* 13 more than the text encoder",
        ),
        ("searle", [" "], r"caption 0 is empty"),
        ("searle", [], r"text is empty"),
    ],
)
def test_ambiguous_captions_raise(method, captions, message):
    processor = make_processor(method)
    for call in (processor.process_queries, lambda images, text: processor(images=images, text=text)):
        with pytest.raises(ValueError, match=message):
            call([IMAGE] * len(captions), captions)


def test_truncated_template_raises():
    processor = make_processor("searle", template="{caption} , as in $")
    processor.process_queries(IMAGE, "a " * 60)
    with pytest.raises(ValueError, match=r"shorten it, or pass a shorter template"):
        processor.process_queries(IMAGE, "a " * 74)
    whole = processor.process_queries(IMAGE, "a " * 60)["input_ids"]
    for settings in ({"truncation": True}, {"text_kwargs": {"truncation": True}}):
        cut = processor.process_queries(IMAGE, "a " * 74, **settings)["input_ids"]
        assert cut.shape[1] == 77 and torch.equal(cut[0, -5:], whole[0, -5:])  # the template's end is kept
    with pytest.raises(ValueError, match=r"caption 0 has \d+ tokens in the template .* \(20\): shorten it"):
        processor.process_queries(IMAGE, "a " * 60, max_length=20)
    assert processor.process_queries(IMAGE, "a " * 60, max_length=20, truncation=True)["input_ids"].shape == (1, 20)


def test_a_row_without_its_placeholder_is_refused():
    model, io = reference_model("searle"), io_of("searle")
    ids = io["cirr_input_ids"].clone()
    ids[1:3][ids[1:3] == 259] = 17
    with pytest.raises(ValueError, match=r"rows \[1, 2\] of input_ids hold no placeholder \(token 259\)"):
        model.get_query_features(io["pixel_values"], ids)
    with pytest.raises(ValueError, match=r"3 reference images but 4 captions"):
        model.get_query_features(io["pixel_values"][:3], io["cirr_input_ids"])
    model, io = reference_model("context_i2w"), io_of("context_i2w")
    with pytest.raises(ValueError, match=r"depend on the caption: pass input_ids"):
        model.get_pseudo_words(io["pixel_values"])
    with pytest.raises(ValueError, match=r"3 reference images but 4 captions"):
        model.get_query_features(io["pixel_values"][:3], io["query_input_ids"])


@pytest.mark.parametrize(
    "kind", [InversionModel, InversionProcessor, PVLFModel, PVLFProcessor, CASEModel, CompoDiffModel]
)
def test_a_model_is_no_dual_encoder_to_build_on(kind, tmp_path):
    reference_model("searle").save_pretrained(tmp_path)
    make_processor("searle").save_pretrained(tmp_path)
    advice = (
        r"is a composed retrieval model \(model_type 'textual_inversion'\), .* load it by AutoModel.from_pretrained "
        "and AutoProcessor.from_pretrained, or pass the dual encoder that it was built on"
    )
    with pytest.raises(ValueError, match=advice):
        kind.from_vl_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)) is InversionModel
    assert type(AutoProcessor.from_pretrained(tmp_path)) is InversionProcessor


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vl_config": CONFIGS["blip"]}, r"model_type 'blip', but textual inversion is defined on CLIP alone"),
        (
            {"vl_config": {"model_type": "siglip"}, "unpublished_backbone": True},
            r"'siglip', whose text encoder takes no pseudo words",
        ),
        ({"vl_config": 3}, r"pass a CLIPConfig"),
        ({"method": "pic2words"}, r"method='pic2words': choose one of"),
        ({"replace": "last"}, r"choose 'first' or 'all'"),
        ({"vl_config": CONFIGS["clip"]}, r"placeholder_id=265 is not a token of vl_config, whose vocabulary has 80"),
        ({"mapping_width": 0}, r"mapping_width=0 must be at least 1"),
        ({"dropout": 1.0}, r"dropout=1.0 is out of range"),
        (
            {"method": "context_i2w", "vl_config": CONFIGS["clip"], "placeholder_id": 3},
            r"not 32 and 128: use ViT-B/32",
        ),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        InversionConfig(**settings)


@pytest.mark.parametrize("method", MAPPED)
def test_loss_without_required_inputs_raises_with_their_names(method):
    inputs = training_inputs(method)
    for name in set(inputs) - {"noise"}:
        with pytest.raises(ValueError, match=rf"the training loss of {method} needs .*\['{name}'\] missing"):
            make_model(method)(**{k: v for k, v in inputs.items() if k != name}, return_loss=True)


def test_an_image_alone_trains_pic2word():
    model, processor = make_model("pic2word"), make_processor("pic2word")
    batch = processor.process_prompts([IMAGE, IMAGE.rotate(90)])
    assert (batch["input_ids"] == 265).sum() == 2
    model.set_finetuning("frozen")
    model.train()
    model(**batch, return_loss=True).loss.backward()
    assert all(parameter.grad is not None for parameter in model.mapping.parameters())
    assert not model.backbone.text_model.training and model.mapping.training


# Checkpoints.


STRANGER = """
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

outputs = {}
image = Image.open(Path(sys.argv[1]) / "image.png")
for folder in sorted(path for path in Path(sys.argv[1]).iterdir() if path.is_dir()):
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert "pvlf_hf" not in sys.modules
    with torch.no_grad():
        query = model.get_query_features(**processor.process_queries(image, "is red"))
    outputs[folder.name] = query.pooler_output.contiguous()
save_file(outputs, Path(sys.argv[1]) / "outputs.safetensors")
"""

TRAVELLING = {
    "configuration_inversion.py",
    "loss_inversion.py",
    "mapping_inversion.py",
    "modeling_inversion.py",
    "objectives_inversion.py",
    "optimization_inversion.py",
    "processing_inversion.py",
}


def queries(model, inputs):
    return {"query": model.get_query_features(**inputs).pooler_output}


@pytest.mark.slow
@torch.no_grad()
def test_a_saved_model_loads_with_and_without_the_package(tmp_path):
    root = tmp_path / "checkpoints"
    expected = {}
    for method in MAPPED:
        model, processor = make_model(method), make_processor(method)
        model.save_pretrained(root / method)
        processor.save_pretrained(root / method)
        assert TRAVELLING <= {path.name for path in (root / method).glob("*.py")}
        assert "modeling_pvlf.py" not in {path.name for path in (root / method).glob("*.py")}
        config = json.loads((root / method / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_inversion.InversionModel"
        query = model.get_query_features(**processor.process_queries(IMAGE, "is red"))
        expected[method] = query.pooler_output
        assert type(AutoConfig.from_pretrained(root / method)) is InversionConfig
        loaded, again = AutoModel.from_pretrained(root / method), AutoProcessor.from_pretrained(root / method)
        assert type(loaded) is InversionModel and type(again) is InversionProcessor
        assert (again.method, again.template, again.placeholder) == (method, processor.template, processor.placeholder)
        assert again.image_processor.do_target_pad == METHODS[method].target_pad
        inputs = dict(again.process_queries(IMAGE, "is red"))
        query, error = loaded.get_query_features(**inputs), rounding(queries, model, inputs)["query"]
        within(query.pooler_output, expected[method], atol=error)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())
        expected[method] = query.pooler_output  # weights whose memory layout is that of loaded ones
    IMAGE.save(root / "image.png")
    run_without_package(STRANGER, tmp_path, root)
    theirs = load_file(root / "outputs.safetensors")
    assert theirs.keys() == expected.keys()
    for method, embeds in expected.items():
        assert torch.equal(theirs[method], embeds), method


@torch.no_grad()
def test_custom_template_is_saved(tmp_path):
    processor = make_processor("lincir", template="this * but {caption}", placeholder="*")
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    ids = again.process_queries(IMAGE, "is red")["input_ids"]
    assert torch.equal(ids, processor.process_queries(IMAGE, "is red")["input_ids"]) and 265 in ids[0]


def test_a_checkpoint_is_not_loaded_as_that_of_another_method(tmp_path):
    """Pic2Word's and SEARLE's weights have the same names."""
    make_model("pic2word").save_pretrained(tmp_path)
    for load in (InversionModel.from_pretrained, AutoModel.from_pretrained, InversionConfig.from_pretrained):
        with pytest.raises(ValueError, match="method='searle': this is a checkpoint of 'pic2word'; load it without"):
            load(tmp_path, method="searle")
        load(tmp_path, method="pic2word")


def test_fresh_weights_are_those_of_pytorch(tmp_path):
    """New weights do not follow the library's normal(0, 0.02), and the gate of Context-I2W starts closed."""
    for method in (*MAPPED, "palavra"):
        for name, module in make_model(method, reference=False).mapping.named_modules():
            if isinstance(module, torch.nn.Linear) and "projection" not in name:
                bound = module.in_features**-0.5
                assert 0.9 * bound < module.weight.abs().max() <= bound, (method, name)
    mapping = make_model("context_i2w", reference=False).mapping
    assert mapping.local_gate.item() == 0 and 0.9 < mapping.latents.std() < 1.1
    plain = torch.nn.Linear(128, 128, bias=False).weight
    rotated = mapping.rotation.gain * F.normalize(mapping.rotation.direction, dim=1)
    assert abs(rotated.std() / plain.std() - 1) < 0.05


def test_loading_reports_new_weights(tmp_path, caplog):
    vl_config, weights, _ = tiny_clip("searle")
    clip = CLIPModel(vl_config)
    clip.load_state_dict(weights, strict=False)
    clip.save_pretrained(tmp_path / "clip")
    make_processor("searle").tokenizer.save_pretrained(tmp_path / "clip")
    InversionModel.from_vl_pretrained(tmp_path / "clip", method="searle")
    assert "6 other weights are new" in caplog.text
    processor = InversionProcessor.from_vl_pretrained(tmp_path / "clip", method="searle")
    assert processor.image_processor.do_target_pad and processor.max_text_length == 20
    with pytest.raises(ValueError, match="a device is set by model.to"):
        InversionModel.from_vl_pretrained(tmp_path / "clip", device_map="cpu")
    for build in (InversionModel.from_vl_pretrained, InversionProcessor.from_vl_pretrained):
        with pytest.raises(ValueError, match="textual inversion is defined on CLIP alone"):
            build(BLIP, method="searle")


@pytest.mark.parametrize("method", ["pic2word", "context_i2w"])
def test_pipeline_and_gallery_search_by_inversion(method):
    """Search by pipeline and gallery, which prepare the caption without its image, but in the template too."""
    model, processor = make_model(method), make_processor(method)
    side = processor.image_processor.crop_size["height"]
    images = [Image.new("RGB", (side, side), colour) for colour in ("red", "gold", "navy")]
    search = pipeline("composed-image-retrieval", model=model, processor=processor, gallery=images)
    with torch.no_grad():
        query = model.get_query_features(**processor.process_queries(images[0], "is blue")).pooler_output
        gallery = model.get_image_features(**processor.process_targets(images)).pooler_output
    order = (query @ gallery.T)[0].argsort(descending=True).tolist()
    assert [result["index"] for result in search({"image": images[0], "text": "is blue"})] == order
    features = Features({"image": DatasetImage(), "image_id": Value("string")})
    rows = Dataset.from_dict({"image": images, "image_id": list("abc")}, features)
    found = Gallery.from_dataset(rows, model, processor, progress=False).search(images[0], "is blue", k=3)
    assert found.ids == ["abc"[index] for index in order]
