"""`PVLFModel`: the paper's equations written out, and the behaviour expected of a Transformers model."""

import json
import math
from itertools import product

import pytest
import torch
from error_bounds import assert_within, dot_error, embedding_error, rounding, unit_error
from reference import CONFIGS
from safetensors.torch import load_file, save_file
from tiny import BACKBONES, make_inputs, make_model, tiny_config
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertModel,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipModel,
    CLIPConfig,
    CLIPModel,
)

from pvlf_hf import PVLFConfig, PVLFModel, PVLFOutput, PVLFQueryOutput, focal_info_nce
from pvlf_hf.models.backbones_pvlf import FusedBlipAttention

FINETUNING = ("frozen", "text", "both")
RESIDUALS = ("pre_norm", "paper")
AGGREGATIONS = (("fused", "encoder"), ("fused", "fused"), ("encoder", "fused"))  # what the MLP and the sum read
QUERY = ("pixel_values", "input_ids", "attention_mask")


@pytest.fixture(params=BACKBONES)
def backbone(request):
    return request.param


def query_of(inputs):
    return {name: inputs[name] for name in QUERY}


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def same_weights(model, other):
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(torch.equal(weights[name], others[name]) for name in weights)


# --- the equations, one query at a time, one head at a time ---------------------------------------------------------


def plain_norm(norm, x):
    centred = x - x.mean(dim=1, keepdim=True)
    variance = (centred**2).mean(dim=1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


def plain_linear(linear, x):
    return x @ linear.weight.T + linear.bias


def plain_attention(attention, x, heads):
    query, key, value = (plain_linear(getattr(attention, f"{name}_proj"), x) for name in "qkv")
    width = x.shape[1] // heads
    outputs = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = (query[:, part] @ key[:, part].T / math.sqrt(width)).exp()
        outputs.append(scores / scores.sum(dim=1, keepdim=True) @ value[:, part])
    return plain_linear(attention.out_proj, torch.cat(outputs, dim=1))


def plain_layer(layer, u, config):
    def msa(x):
        return plain_attention(layer.self_attn, x, config.fusion_heads)

    def ffn(x):
        hidden = plain_linear(layer.linear1, x)
        return plain_linear(layer.linear2, hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2)

    if config.residual == "paper":
        u = msa(u) + plain_norm(layer.norm1, u)  # eq. 10
        return ffn(plain_norm(layer.norm2, u)) + plain_norm(layer.norm2, u)  # eq. 11
    u = u + msa(plain_norm(layer.norm1, u))
    return u + ffn(plain_norm(layer.norm2, u))


def plain_query(model, image, text, text_position):
    """Compute equations 8-13 for one query: `image` (1 + m, d) and `text` (n, d) without padding."""
    config, prompts = model.config, model.fusion.prompts
    u = torch.cat([text, prompts[0], image])
    for number, layer in enumerate(model.fusion.layers):
        if 0 < number < config.prompt_depth:  # new prompts replace the outputs of the previous layer's prompts
            u = torch.cat([u[: len(text)], prompts[number], u[-len(image) :]])
        u = plain_layer(layer, u, config)
    fused = (u[-len(image)], u[text_position])
    encoders = (image[0], text[text_position])
    read = {"fused": fused, "encoder": encoders}
    hidden = plain_linear(model.aggregation.combiner, torch.cat(read[config.aggregation_mlp_input])[None]).clamp(min=0)
    f_u = plain_linear(model.aggregation.output, hidden)[0]
    w_image, w_fused, w_text = plain_linear(model.aggregation.weights, f_u[None])[0]
    x, t = read[config.aggregation_sum_input]
    f_q = w_image * x + w_fused * f_u + w_text * t  # eq. 13
    return f_q / f_q.norm(), torch.stack([w_image, w_fused, w_text]), u


@pytest.mark.slow
@pytest.mark.parametrize(
    ("residual", "aggregation", "depth"),
    [(RESIDUALS[(n + depth) % 2], AGGREGATIONS[n], depth) for n, depth in product(range(3), (1, 2, 3))],
)
@torch.no_grad()
def test_query_equals_the_equations(backbone, residual, aggregation, depth):
    """Compare with equations 8 to 13: layers, prompts and aggregation share no code, so all pairs of settings do."""
    mlp_input, sum_input = aggregation
    model = make_model(
        backbone,
        fusion_layers=3,
        prompt_depth=depth,
        residual=residual,
        aggregation_mlp_input=mlp_input,
        aggregation_sum_input=sum_input,
    )
    for parameter in (*model.fusion.parameters(), *model.aggregation.parameters()):
        parameter.normal_(std=0.3)  # biases start at 0 and norms at 1, which would hide mistakes
    model.double()  # in float64, so that only a mistake makes a difference
    inputs = query_of(make_inputs(backbone))

    def states(model, inputs):
        output = model.get_query_features(**inputs, output_hidden_states=True)
        return {"weights": output.aggregation_weights, "states": output.hidden_states[-1]}

    error = rounding(states, model, inputs, torch.float64)
    output = model.get_query_features(**inputs)  # in the last layer, only the positions that are read
    everything = model.get_query_features(**inputs, output_hidden_states=True)
    close(output.aggregation_weights, everything.aggregation_weights, error["weights"])
    image = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    for row, n in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        position = 0 if backbone == "blip" else n - 1
        query, weights, u = plain_query(model, image[row], text[row, :n], position)
        # Embeddings are normalised in float32, whatever the model's dtype.
        torch.testing.assert_close(output.pooler_output[row], query.float(), rtol=unit_error(len(query)), atol=0)
        close(output.aggregation_weights[row], weights, error["weights"])
        padded = text.shape[1] - n
        kept = [*range(n), *range(n + padded, n + padded + len(u) - n)]
        close(everything.hidden_states[-1][row, kept], u, error["states"])


@torch.no_grad()
def test_deep_prompts_are_dropped_and_shallow_prompts_kept():
    shallow, deep = make_model(prompt_depth=1), make_model(prompt_depth=2)
    deep.load_state_dict({**shallow.state_dict(), "fusion.prompts": shallow.fusion.prompts.expand(2, -1, -1)})
    inputs = query_of(make_inputs())
    states = [model.get_query_features(**inputs, output_hidden_states=True).hidden_states for model in (shallow, deep)]
    assert torch.equal(states[0][1], states[1][1])  # the first layer is the same
    assert not torch.allclose(states[0][2], states[1][2])
    deep.fusion.prompts[1] = 0
    changed = deep.get_query_features(**inputs, output_hidden_states=True).hidden_states
    assert torch.equal(changed[1], states[1][1]) and not torch.allclose(changed[2], states[1][2])


# --- inputs and outputs ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forward_returns_what_its_parts_return(backbone):
    model, inputs = make_model(backbone), make_inputs(backbone)
    output = model(**inputs, output_hidden_states=True)
    assert isinstance(output, PVLFOutput)
    query = model.get_query_features(**query_of(inputs), output_hidden_states=True)
    assert isinstance(query, PVLFQueryOutput)
    target = model.get_image_features(inputs["target_pixel_values"])
    assert torch.equal(output.query_embeds, query.pooler_output)
    assert torch.equal(output.target_embeds, target.pooler_output)
    assert torch.equal(output.similarity, query.pooler_output @ target.pooler_output.T)
    assert torch.equal(output.aggregation_weights, query.aggregation_weights)
    assert torch.equal(output.loss, focal_info_nce(query.pooler_output, target.pooler_output))
    length = 8 + 3 + 1 + 16  # caption, prompts, class token, patches
    assert [state.shape for state in output.hidden_states] == [(3, length, 32)] * 3
    assert all(map(torch.equal, output.hidden_states, query.hidden_states))
    assert output.attentions is None and query.attentions is None
    assert target.last_hidden_state.shape == (3, 17, 32)
    for embeds in (output.query_embeds, output.target_embeds):
        close(embeds.norm(dim=-1), torch.ones(3), unit_error(32))


@torch.no_grad()
def test_composing_encoded_tokens_equals_encoding_them(backbone):
    model, inputs = make_model(backbone), query_of(make_inputs(backbone))
    image = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    text, position = model.backbone.text_tokens(inputs["input_ids"], inputs["attention_mask"])
    composed = model.compose(image, text, position, inputs["attention_mask"])
    assert torch.equal(composed.pooler_output, model.get_query_features(**inputs).pooler_output)


@torch.no_grad()
def test_tuple_outputs_equal_named_outputs(backbone):
    model, inputs = make_model(backbone), make_inputs(backbone)
    calls = [
        (model, inputs),
        (model.get_query_features, query_of(inputs)),
        (model.get_image_features, {"pixel_values": inputs["pixel_values"]}),
        (model.get_text_features, {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}),
    ]
    for call, arguments in calls:
        values, output = call(**arguments, return_dict=False), call(**arguments)
        assert type(values) is tuple
        for value, named in zip(values, output.to_tuple(), strict=True):
            assert torch.equal(value, named)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_output_attentions_uses_eager_attention(backbone, caplog):
    """Request attentions in one call: it switches no setting that other threads would see."""
    model, inputs = make_model(backbone), query_of(make_inputs(backbone))
    assert model.config._attn_implementation == "sdpa"
    output = model.get_query_features(**inputs, output_attentions=True)
    assert model.config._attn_implementation == "sdpa"
    close(output.pooler_output, model(**inputs).query_embeds, embedding_error(model, inputs)["query_embeds"])
    model.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation({"": "eager"})
    assert not caplog.records, "switching is silent"
    eager = model(**inputs, output_attentions=True)
    assert all(map(torch.equal, output.attentions, eager.attentions))
    model.config.output_attentions = model.config.output_hidden_states = True
    by_config = model(**inputs)
    assert all(map(torch.equal, by_config.attentions, eager.attentions)) and len(by_config.hidden_states) == 3
    model.config.output_attentions = model.config.output_hidden_states = False


def test_attentions_are_probabilities():
    model, inputs = make_model(), query_of(make_inputs())
    attentions = model(**inputs, output_attentions=True).attentions
    assert [a.shape for a in attentions] == [(3, 4, 28, 28)] * 2
    for attention in attentions:
        # rounding of the softmax's sum and of ours
        close(attention.sum(dim=-1), torch.ones(3, 4, 28), dot_error(2 * 28 + 8))
        padding = inputs["attention_mask"] == 0
        assert (attention[..., :8] * padding[:, None, None]).abs().max() == 0
    assert model(**inputs).attentions is None


def test_parts_of_a_training_input_give_parts_of_the_output():
    model, inputs = make_model(), make_inputs()
    queries = model(**query_of(inputs))
    assert queries.query_embeds is not None
    assert queries.loss is queries.similarity is queries.target_embeds is None
    targets = model(target_pixel_values=inputs["target_pixel_values"])
    assert targets.target_embeds is not None
    assert targets.loss is targets.similarity is targets.query_embeds is None
    without = model(**inputs, return_loss=False)
    assert without.loss is without.similarity is None and without.target_embeds.shape == (3, 32)
    ids = torch.tensor([0, 1, 0])
    both = model(**inputs, target_ids=ids)
    assert torch.equal(both.loss, focal_info_nce(both.query_embeds, both.target_embeds, target_ids=ids))


def test_loss_uses_the_settings():
    inputs = make_inputs()
    output = make_model(temperature=0.5, alpha=3.0, gamma=1.0)(**inputs)
    assert torch.equal(output.loss, focal_info_nce(output.query_embeds, output.target_embeds, 0.5, 3.0, 1.0))


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (("pixel_values",), "use get_image_features or get_text_features"),
        (("input_ids", "target_pixel_values"), "use get_image_features or get_text_features"),
        ((), "nothing to embed"),
        (("attention_mask",), "nothing to embed"),
    ],
)
def test_incomplete_queries_raise(given, advice):
    inputs = make_inputs()
    with pytest.raises(ValueError, match=advice):
        make_model()(**{name: inputs[name] for name in given})


def test_inconsistent_inputs_raise():
    model, inputs = make_model(), make_inputs()
    for given in (query_of(inputs), {"target_pixel_values": inputs["target_pixel_values"]}):
        with pytest.raises(ValueError, match="needs queries and target_pixel_values"):
            model(**given, return_loss=True)
    with pytest.raises(ValueError, match="2 reference images but 3 relative captions"):
        model(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="3 queries but 2 targets"):
        model(**{**inputs, "target_pixel_values": inputs["target_pixel_values"][:2]})
    for size in ((48, 48), (32, 40)):
        with pytest.raises(ValueError, match=r"built for \(32, 32\): use the processor"):
            model.get_image_features(torch.zeros(1, 3, *size))


@torch.no_grad()
def test_padding_changes_nothing(backbone):
    model, inputs = make_model(backbone), query_of(make_inputs(backbone))
    error = embedding_error(model, inputs)
    query = model.get_query_features(**inputs).pooler_output
    caption = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    end = CONFIGS[backbone]["text_config"]["eos_token_id"]
    for filler in (0, 7, end):  # OpenAI's CLIP tokenizer pads with the end token
        ids = torch.cat([inputs["input_ids"], torch.zeros(3, 9, dtype=torch.long)], dim=1)
        mask = F.pad(inputs["attention_mask"], (0, 9))
        ids = torch.where(mask == 1, ids, filler)
        close(model.get_query_features(inputs["pixel_values"], ids, mask).pooler_output, query, error["query_embeds"])
        close(model.get_text_features(ids, mask).pooler_output, caption, error["text_embeds"])


@torch.no_grad()
def test_a_row_does_not_depend_on_its_batch(backbone):
    model, inputs = make_model(backbone), make_inputs(backbone)
    batch, error = model(**inputs), embedding_error(model, inputs)
    for row, n in enumerate(inputs["attention_mask"].sum(dim=1).tolist()):
        ids = inputs["input_ids"][row : row + 1, :n]
        alone = model(inputs["pixel_values"][row : row + 1], ids)  # no padding, so no mask
        close(alone.query_embeds[0], batch.query_embeds[row], error["query_embeds"])
        masked = model(inputs["pixel_values"][row : row + 1], ids, torch.ones_like(ids))
        close(masked.query_embeds, alone.query_embeds, error["query_embeds"])
        target = model(target_pixel_values=inputs["target_pixel_values"][row : row + 1])
        close(target.target_embeds[0], batch.target_embeds[row], error["target_embeds"])


@torch.no_grad()
def test_clip_configs_with_the_old_end_token_pool_at_the_end():
    new, inputs = make_model("clip"), make_inputs("clip")
    vl_config = {**CONFIGS["clip"], "text_config": {**CONFIGS["clip"]["text_config"], "eos_token_id": 2}}
    old = PVLFModel(type(new.config)(**{**new.config.to_dict(), "vl_config": vl_config})).eval()
    old.load_state_dict(new.state_dict())
    assert old.config.vl_config.text_config.eos_token_id == 2
    assert torch.equal(old(**inputs).similarity, new(**inputs).similarity)


@pytest.mark.reliability(
    9,
    "CLIP pools captions at their end, whatever the configuration calls the end token, and with added tokens: "
    "never at position 0",
    broken=(
        "src/pvlf_hf/models/backbones_pvlf.py",
        "torch.where(is_end.any(dim=1), is_end.argmax(dim=1), positions[-1])",
        "is_end.argmax(dim=1)",
    ),
)
@torch.no_grad()
@pytest.mark.parametrize("end_token", [2, 79, 49407])
def test_clip_pools_at_the_end_of_a_caption_whatever_its_end_token_is_called(end_token, figure):
    """Pool by the mask; without one at the end token, else at the row's last token. 95 is an added token."""
    vl_config = {**CONFIGS["clip"], "text_config": {**CONFIGS["clip"]["text_config"], "vocab_size": 99}}
    vl_config["text_config"]["eos_token_id"] = end_token
    encoder = PVLFModel(PVLFConfig(vl_config=vl_config, fusion_heads=4)).backbone
    captions = torch.tensor([[90, 5, 95, 7, 91], [90, 8, 91, 0, 0]])
    assert encoder.text_tokens(captions, torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]))[1].tolist() == [4, 2]
    assert encoder.text_tokens(captions, None)[1].tolist() == [4, 4]
    captions[1, 2] = end_token if end_token < 99 else 3
    assert encoder.text_tokens(captions, None)[1].tolist() == [4, 2 if end_token == 79 else 4]
    figure(f"end token {end_token}")


@torch.no_grad()
def test_unmasked_padding_changes_outputs():
    masked, transagg = make_model(), make_model(text_padding="transagg")
    transagg.load_state_dict(masked.state_dict())
    inputs = query_of(make_inputs())
    changed = (masked.get_query_features(**inputs)[0] - transagg.get_query_features(**inputs)[0]).abs().amax(dim=1)
    assert changed[0] <= embedding_error(masked, inputs)["query_embeds"]  # the longest caption has no padding
    assert (changed[1:] > 1e-4).all()


# --- training -------------------------------------------------------------------------------------------------------


def trainable_sides(finetuning):
    return {"frozen": (False, False), "text": (False, True), "both": (True, True)}[finetuning]


@pytest.mark.parametrize("finetuning", FINETUNING)
@pytest.mark.parametrize(("residual", "aggregation", "depth"), list(product(RESIDUALS, AGGREGATIONS, (1, 2))))
def test_gradient_reaches_only_trained_weights(backbone, finetuning, residual, aggregation, depth):
    model = make_model(
        backbone,
        prompt_depth=depth,
        residual=residual,
        aggregation_mlp_input=aggregation[0],
        aggregation_sum_input=aggregation[1],
        temperature=1.0,
    )
    model.set_finetuning(finetuning)
    model.train()
    model(**make_inputs(backbone)).loss.backward()
    vision, text = trainable_sides(finetuning)
    for name, parameter in model.named_parameters():
        side = name.split(".")[1]
        trains = {
            **dict.fromkeys(model.backbone.vision_modules, vision),
            **dict.fromkeys(model.backbone.text_modules, text),
        }
        assert parameter.requires_grad == trains.get(side, True), name
        assert (parameter.grad is not None) == parameter.requires_grad, name
        # softmax ignores the keys' biases
        if parameter.requires_grad and not name.endswith(("k_proj.bias", "key.bias")):
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("finetuning", FINETUNING)
def test_frozen_encoders_stay_in_eval_mode(backbone, finetuning):
    model = make_model(backbone)
    model.set_finetuning(finetuning)
    assert not any(module.training for module in model.modules())
    model.train()
    vision, text = trainable_sides(finetuning)
    for names, trains in ((model.backbone.vision_modules, vision), (model.backbone.text_modules, text)):
        for name in names:
            assert all(module.training == trains for module in getattr(model.backbone, name).modules())
    assert all(module.training for part in (model.fusion, model.aggregation) for module in part.modules())
    model.set_finetuning("both")  # and back, in train mode
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    model.eval()
    assert not any(module.training for module in model.modules())


def test_unknown_finetuning_raises(tiny_model):
    with pytest.raises(ValueError, match="'all': choose one of .*'both', 'frozen', 'text'"):
        tiny_model.set_finetuning("all")


@pytest.mark.slow
@pytest.mark.parametrize("finetuning", ["frozen", "both"])
def test_activation_checkpointing_computes_the_same(backbone, finetuning):
    runs = []
    for checkpointing in (False, True):
        model = make_model(backbone, temperature=1.0)
        model.set_finetuning(finetuning)
        model.train()
        if checkpointing:
            model.activation_checkpointing_enable()
        calls = []
        model.fusion.layers[0].linear1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        runs.append(gradients(model))
        assert len(calls) == 1 + checkpointing
    model.activation_checkpointing_disable()
    assert_within(*runs, lambda: gradient_error(model))


def gradients(model, inputs=None, **kwargs):
    """Return loss and gradients of a batch of five; dropout draws the same mask in every call."""
    torch.manual_seed(0)
    model.zero_grad()
    inputs = inputs or make_inputs(model.config.vl_config.model_type, batch=5)
    loss = model(**inputs, **kwargs).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters() if p.grad is not None}}


def gradient_error(model, dtype=torch.float32):
    """Return how far apart two computations of the same `gradients` may be, by name."""
    return rounding(gradients, model, make_inputs(model.config.vl_config.model_type, batch=5), dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "residual", "attention"),
    [
        ("blip", "pre_norm", "eager"),
        ("blip", "paper", "sdpa"),
        ("clip", "pre_norm", "sdpa"),
        ("clip", "paper", "eager"),
    ],
)
def test_skipped_outputs_do_not_change_gradients(backbone, residual, attention):
    """Compare gradients with the last layer computed at the positions that are read, and at all positions.

    The layer reads none of the three settings together with another, so each pair of them is enough.
    """
    model = make_model(backbone, residual=residual, temperature=1.0)
    model.set_attn_implementation(attention)
    read, everywhere = gradients(model), gradients(model, output_hidden_states=True)
    assert_within(read, everywhere, lambda: gradient_error(model))


def test_training_lowers_the_loss(backbone):
    model, inputs = make_model(backbone, dropout=0.0, temperature=0.1), make_inputs(backbone)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(20):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


@torch.no_grad()
def test_autocast_outputs_stay_close(backbone):
    model, inputs = make_model(backbone, temperature=0.1), make_inputs(backbone)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(**inputs)
    full = model(**inputs)
    assert half.loss.dtype == half.similarity.dtype == half.query_embeds.dtype == torch.float32
    error = embedding_error(model, inputs, torch.bfloat16)
    close(half.similarity, full.similarity, error["similarity"])
    close(half.loss, full.loss, error["loss"])


# --- attention, precision, devices, compilation ---------------------------------------------------------------------


@pytest.mark.parametrize("text_padding", ["masked", "transagg"])
@torch.no_grad()
def test_sdpa_equals_eager(backbone, text_padding, tmp_path):
    make_model(backbone, text_padding=text_padding).save_pretrained(tmp_path)
    models = {name: PVLFModel.from_pretrained(tmp_path, attn_implementation=name) for name in ("sdpa", "eager")}
    inputs = make_inputs(backbone)
    outputs = [model(**inputs, output_hidden_states=True) for model in models.values()]
    for name, model in models.items():
        assert model.config._attn_implementation == name

    def states(model, inputs):
        output = model(**inputs, output_hidden_states=True)
        return {"query": output.query_embeds, **dict(enumerate(output.hidden_states))}

    error = rounding(states, models["eager"], inputs)
    for number, (sdpa, eager) in enumerate(zip(*(output.hidden_states for output in outputs), strict=True)):
        close(sdpa, eager, error[number])
    close(*(output.query_embeds for output in outputs), error["query"])
    assert PVLFModel.from_pretrained(tmp_path).config._attn_implementation == "sdpa"  # the default


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "text_padding", "attention"),
    [
        ("blip", "masked", "eager"),
        ("blip", "transagg", "sdpa"),
        ("clip", "masked", "sdpa"),
        ("clip", "transagg", "eager"),
    ],
)
def test_attention_masks_are_kept_under_dropout(backbone, text_padding, attention):
    """Use a dropout so small that it keeps everything and scales by 1; attention on a CPU has its own path for it.

    The mask is made before attention is chosen, by the same code for both backbones: each pair of settings is enough.
    """
    model = make_model(backbone, text_padding=text_padding, dropout=2.0**-25)
    model.set_finetuning("frozen")
    model.set_attn_implementation({"": attention})
    inputs = query_of(make_inputs(backbone))
    assert inputs["attention_mask"].eq(0).any()
    dropping, without = (model.train(mode)(**inputs).query_embeds for mode in (True, False))
    close(dropping, without, embedding_error(model, inputs)["query_embeds"])


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fused_blip_attention_equals_eager(tmp_path, dropout):
    """Compare outputs and gradients of the ViT, as built and as loaded, with Transformers' eager attention."""
    original = save_dual_encoder("blip", tmp_path, attention_dropout=dropout).vision_model
    fused = PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4).backbone.vision_model
    built = PVLFModel(tiny_config()).backbone.vision_model
    pixels = make_inputs("blip")["pixel_values"]
    for layer in (*fused.encoder.layers, *built.encoder.layers):
        assert type(layer.self_attn) is FusedBlipAttention
    assert not any(isinstance(module, FusedBlipAttention) for module in original.modules())

    def step(tower, inputs):
        tower.zero_grad()
        states = tower(**inputs).last_hidden_state
        states.sin().sum().backward()
        return {"states": states.detach(), **{name: p.grad for name, p in tower.named_parameters()}}

    inputs = {"pixel_values": pixels}
    ours, theirs = step(fused, inputs), step(original, inputs)
    for name, error in rounding(step, original, inputs).items():
        close(ours[name], theirs[name], error)
    fused.train()
    torch.manual_seed(0)
    runs = [fused(pixels).last_hidden_state for _ in range(2)]
    assert torch.equal(*runs) == (dropout == 0)  # in training the tower's own attention dropout still acts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_weights_stay_close(backbone, dtype, tmp_path):
    model, inputs = make_model(backbone), make_inputs(backbone)
    model.save_pretrained(tmp_path)
    half = PVLFModel.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {half.dtype} == {dtype}
    output, full = half(**inputs), model(**inputs)
    assert output.query_embeds.dtype == output.target_embeds.dtype == output.loss.dtype == torch.float32
    close(output.query_embeds.norm(dim=-1), torch.ones(3), unit_error(32))
    close(output.similarity, full.similarity, embedding_error(model, inputs, dtype)["similarity"])
    assert half.get_text_features(inputs["input_ids"]).pooler_output.dtype == torch.float32
    half.save_pretrained(tmp_path / "half")
    assert PVLFModel.from_pretrained(tmp_path / "half").dtype == dtype


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
@torch.no_grad()
def test_device_map_loads_the_same_model(tiny_model, device_map, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    placed = PVLFModel.from_pretrained(tmp_path, device_map=device_map)
    inputs = {name: value.to(placed.device) for name, value in make_inputs().items()}
    error = embedding_error(tiny_model, make_inputs())["similarity"]
    close(placed(**inputs).similarity.cpu(), tiny_model(**make_inputs()).similarity, error)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_query_without_graph_breaks(backbone):
    torch.compiler.reset()
    model, inputs = make_model(backbone), query_of(make_inputs(backbone))
    compiled = torch.compile(model.get_query_features, fullgraph=True, backend="eager")
    assert torch.equal(compiled(**inputs).pooler_output, model.get_query_features(**inputs).pooler_output)


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "dropout"), [("blip", 0.5), ("clip", 0.0)])
def test_compiled_training_step_without_graph_breaks(backbone, dropout):
    """Compile each backbone, and the fusion, which is the same for both, with and without dropout."""
    torch.compiler.reset()
    model, inputs = make_model(backbone, dropout=dropout), make_inputs(backbone)
    model.train()

    def step(call, inputs):
        torch.manual_seed(0)
        loss = call(**inputs, target_ids=torch.tensor([0, 1, 0])).loss
        found = torch.autograd.grad(loss, list(call.parameters()))
        return {"loss": loss.detach(), **dict(enumerate(found))}

    plain, compiled = (step(call, inputs) for call in (model, torch.compile(model, fullgraph=True, backend="eager")))
    assert_within(compiled, plain, lambda: rounding(step, model, inputs))


# --- saving, loading, initialisation --------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"prompt_depth": 1, "residual": "paper", "num_prompts": 1}])
@torch.no_grad()
def test_saved_and_loaded_is_the_same_to_the_bit(backbone, settings, tmp_path):
    model, inputs = make_model(backbone, **settings), make_inputs(backbone)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for folder in ("whole", "sharded"):
        again, info = PVLFModel.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(info.values()), info
        assert not again.training
        assert same_weights(again, model)
        assert torch.equal(again(**inputs).similarity, model(**inputs).similarity)


def assert_uniform(weight, bound):
    assert bound * 0.8 < weight.abs().max() <= bound
    assert weight.mean().abs() < 5 * bound / math.sqrt(3 * weight.numel())


@pytest.mark.parametrize("way", ["created", "loaded without them"])
def test_new_weights_start_from_their_distributions(backbone, way, tmp_path):
    settings = {"num_prompts": 40, "prompt_init_std": 0.5, "fusion_ffn_size": 48}
    model = make_model(backbone, **settings)
    if way == "loaded without them":
        model.save_pretrained(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        kept = {name: value for name, value in weights.items() if name.startswith("backbone.")}
        save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
        model, info = PVLFModel.from_pretrained(tmp_path, output_loading_info=True)
        assert set(info["missing_keys"]) == weights.keys() - kept.keys()
        loaded = model.state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in kept.items())
    prompts = model.fusion.prompts  # 2 x 40 x 32 draws
    # Five standard errors of a mean, and of a normal standard deviation
    assert prompts.mean().abs() < 5 * 0.5 / prompts.numel() ** 0.5
    assert prompts.std().item() == pytest.approx(0.5, rel=5 / (2 * prompts.numel()) ** 0.5)
    for layer in model.fusion.layers:
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj):
            assert_uniform(projection.weight, math.sqrt(6 / (4 * 32)))  # Xavier of one (3d, d) matrix
            assert (projection.bias == 0).all()
        assert_uniform(attention.out_proj.weight, 32**-0.5)
        assert (attention.out_proj.bias == 0).all()
        for norm in (layer.norm1, layer.norm2):
            assert (norm.weight == 1).all() and (norm.bias == 0).all()
    aggregation = model.aggregation
    linears = [aggregation.combiner, aggregation.output, aggregation.weights]
    for linear in (
        *linears,
        *(getattr(layer, name) for layer in model.fusion.layers for name in ("linear1", "linear2")),
    ):
        bound = linear.in_features**-0.5  # PyTorch's own default
        assert_uniform(linear.weight, bound)
        assert linear.bias.abs().max() <= bound and linear.bias.std() > 0


def test_missing_prompts_are_initialised(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights.pop("fusion.prompts")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(PVLFModel.from_pretrained(tmp_path).fusion.prompts)
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert 0.8 < draws[0].std() < 1.2
    again = PVLFModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


@torch.no_grad()
def test_resized_vocabulary_survives_saving(backbone, tmp_path):
    model, inputs = make_model(backbone), make_inputs(backbone)
    before, error = model(**inputs).similarity, embedding_error(model, inputs)["similarity"]
    model.resize_token_embeddings(110)
    assert model.config.vl_config.text_config.vocab_size == 110
    close(model(**inputs).similarity, before, error)
    inputs["input_ids"][0, 1] = 109
    after = model(**inputs).similarity
    model.save_pretrained(tmp_path)
    again, info = PVLFModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert again.get_input_embeddings().weight.shape[0] == 110
    assert torch.equal(again(**inputs).similarity, after)


def test_blip_carries_no_cross_attention():
    decoder = {**CONFIGS["blip"], "text_config": {**CONFIGS["blip"]["text_config"], "is_decoder": True}}
    names = PVLFModel(type(tiny_config())(vl_config=decoder, fusion_heads=4)).state_dict()
    assert not [name for name in names if "crossattention" in name or "cls." in name or "pooler" in name]


# --- from a pretrained dual encoder ---------------------------------------------------------------------------------


def save_dual_encoder(backbone, folder, **vision):
    """Save a checkpoint as on the Hub, where BLIP's text tower is a decoder with cross-attention."""
    torch.manual_seed(3)
    if backbone == "clip":
        original = CLIPModel(CLIPConfig(**CONFIGS["clip"]))
    else:
        text = {**CONFIGS["blip"]["text_config"], "is_decoder": True, "encoder_hidden_size": 24}
        vision = {**CONFIGS["blip"]["vision_config"], **vision}
        original = BlipForImageTextRetrieval(
            BlipConfig(**{**CONFIGS["blip"], "text_config": text, "vision_config": vision})
        )
        assert any("crossattention" in name for name in original.state_dict())
    original.save_pretrained(folder)
    return original.eval()


@torch.no_grad()
def test_features_equal_those_of_the_original(backbone, tmp_path, caplog):
    original, inputs = save_dual_encoder(backbone, tmp_path), make_inputs(backbone)
    model = PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4)
    pixels, ids, mask = (inputs[name] for name in QUERY)
    image = model.get_image_features(pixels)
    text = model.get_text_features(ids, mask)
    error = embedding_error(model, inputs)
    if backbone == "blip":
        image_tokens = original.vision_proj(original.vision_model(pixels).last_hidden_state)
        text_tokens = original.text_proj(original.text_encoder(ids, attention_mask=mask).last_hidden_state)
        kept = mask.bool()
        close(image.last_hidden_state, image_tokens, error["image_tokens"])
        close(text.last_hidden_state[kept], text_tokens[kept], error["text_tokens"])
        close(image.pooler_output, F.normalize(image_tokens[:, 0], dim=-1), error["image_embeds"])
        close(text.pooler_output, F.normalize(text_tokens[:, 0], dim=-1), error["text_embeds"])
        # The original's own cosines: images x captions
        cosines = original(ids, pixels, attention_mask=mask, use_itm_head=False).itm_score
        close(image.pooler_output @ text.pooler_output.T, cosines, error["image_text_similarity"])
    else:
        wanted = original.get_image_features(pixels).pooler_output, original.get_text_features(ids, mask).pooler_output
        for ours, theirs, name in zip((image, text), wanted, ("image_embeds", "text_embeds"), strict=True):
            close(ours.pooler_output, F.normalize(theirs, dim=-1), error[name])
    names = model.state_dict().keys()
    assert not [name for name in names if "crossattention" in name]
    for name in names:  # the log names what is new, and only that
        assert (f"'{name}'" in caplog.text) == (not name.startswith("backbone."))
    assert "must be trained before use" in caplog.text


@torch.no_grad()
def test_pvlf_on_a_pretrained_encoder_trains_and_saves(backbone, tmp_path):
    save_dual_encoder(backbone, tmp_path)
    model = PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4, num_prompts=5, prompt_depth=1, dtype=torch.bfloat16)
    assert not model.training
    assert (model.config.num_prompts, model.config.prompt_depth, model.dtype) == (5, 1, torch.bfloat16)
    assert model.fusion.prompts.shape == (1, 5, 32)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    model = PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4)
    assert model.dtype == torch.float32
    inputs = make_inputs(backbone)
    with torch.enable_grad():
        model.train()(**inputs).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval().save_pretrained(tmp_path / "pvlf")
    again, info = PVLFModel.from_pretrained(tmp_path / "pvlf", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(again(**inputs).similarity, model(**inputs).similarity)


def test_from_vl_pretrained_rejects_model_arguments(backbone, tmp_path):
    save_dual_encoder(backbone, tmp_path)
    model = PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    for refused in ({"device_map": "cpu"}, {"vl_config": CONFIGS[backbone]}):
        with pytest.raises(ValueError, match=f"{next(iter(refused))}.*the checkpoint is its own vl_config"):
            PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4, **refused)


@pytest.mark.parametrize("kind", [BlipModel, BlipForConditionalGeneration])
def test_other_blip_checkpoints_raise(kind, tmp_path):
    text = {**CONFIGS["blip"]["text_config"], "encoder_hidden_size": 24}
    kind(BlipConfig(**{**CONFIGS["blip"], "text_config": text})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ weights of BlipForImageTextRetrieval.*blip-itm-base-coco"):
        PVLFModel.from_vl_pretrained(tmp_path, fusion_heads=4)


def test_other_architectures_raise(tmp_path):
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(bert).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'bert'; PVLF is built on one of .*Pass a BlipConfig or a CLIPConfig"):
        PVLFModel.from_vl_pretrained(tmp_path)


def test_blip_base_with_eight_text_heads_raises(tmp_path):
    BlipConfig().save_pretrained(tmp_path)  # the library's default, also in old conversions of BLIP base
    assert json.loads((tmp_path / "config.json").read_text())["text_config"]["num_attention_heads"] == 8
    with pytest.raises(ValueError, match="Set text_config.num_attention_heads to 12"):
        PVLFModel.from_vl_pretrained(tmp_path)
