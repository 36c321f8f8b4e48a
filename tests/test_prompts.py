"""Prompts inside the encoders: numbers of the reference implementations, where they sit, what trains, bad input."""

import copy

import pytest
import torch
from dual_encoders import FAMILIES, save_dual_encoder
from error_bounds import assert_within, embedding_error, rounding, training_error
from forked import run_without_package
from fused import (
    ARMS,
    FIXTURES,
    GRADIENTS,
    TOLERANCES,
    io_of,
    prompted_clip,
    prompted_ids,
    prompted_model,
    relative,
    tensors_of,
    within,
)
from PIL import Image
from reference import CONFIGS
from safetensors.torch import load_file
from squares import save_squares, square_triplets
from tiny import make_inputs, make_model, make_processor
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModel, BlipConfig, CLIPConfig

from pvlf_hf import Gallery, PVLFConfig, PVLFModel, PVLFTrainer, PVLFTrainingArguments
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.commands.train import parse_arguments, train
from pvlf_hf.embeddings.fingerprints import image_fingerprint
from pvlf_hf.models.backbones_pvlf import DUAL_ENCODERS, BlipDualEncoder, gather_tokens
from pvlf_hf.models.prompts_pvlf import insert_prompts, pass_layers
from pvlf_hf.training.feature_cache import cache_features
from pvlf_hf.training.optimization import parameter_groups

LOCATIONS = ("none", "text", "vision", "both")


# --- the references --------------------------------------------------------------------------------------------------


def prompted_batch(arm):
    io = io_of("prompts_clip")
    return {
        "pixel_values": io["reference_images"],
        "input_ids": prompted_ids(arm),
        "target_pixel_values": io["images"],
    }


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.reliability(
    7,
    "CoOp, VPT, IVLP and MaPLe on CLIP are their references, to the gradient of every prompt",
    broken=(
        "src/pvlf_hf/models/prompts_pvlf.py",
        "if 0 < number < len(prompts):",
        "if 1 < number < len(prompts):",
    ),
)
def test_queries_loss_and_gradients_equal_the_reference(arm, figure):
    model, io = prompted_model(arm), io_of("prompts_clip")
    output = model(**prompted_batch(arm))
    within(output.query_embeds, io[f"{arm}.query_sum"])
    within(output.loss[None], io[f"{arm}.loss_nce"], atol=TOLERANCES["loss"])
    if f"{arm}.loss_nce_frozen_gallery" in io:
        model.config.prompt_gallery = False
        within(model(**prompted_batch(arm)).loss[None], io[f"{arm}.loss_nce_frozen_gallery"], atol=TOLERANCES["loss"])
        model.config.prompt_gallery = True
    if model.prompts is None:
        assert not output.loss.requires_grad
        return figure("plain within 1e-5")
    output.loss.backward()
    compare_gradients(model, f"{arm}.grad_nce.", GRADIENTS[arm])
    figure(f"{arm} within 1e-5")


def compare_gradients(model, prefix, names):
    """Also that nothing else has one."""
    io = io_of("prompts_clip")
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == {f"prompts.{name}" for name in names}
    for name, theirs in names.items():
        rows = [theirs] if isinstance(theirs, str) else theirs
        expected = torch.stack([io[prefix + row] for row in rows])
        assert (
            relative(found[f"prompts.{name}"], expected[0] if isinstance(theirs, str) else expected)
            < TOLERANCES["gradient"]
        ), name


@pytest.mark.parametrize("arm", ["coop_end", "vpt_shallow", "vpt_deep", "ivlp", "maple"])
def test_features_logits_and_the_classification_loss_equal_the_reference(arm):
    model, io = prompted_model(arm), io_of("prompts_clip")
    ids = prompted_ids("coop_end")  # the reference classifies by captions with its full stop
    text, position = model.encode_text_tokens(ids, None)
    text, image = gather_tokens(text, position), model.encode_image_tokens(io["images"])[:, 0]
    if f"{arm}.text_features" in io:
        within(text, io[f"{arm}.text_features"])
    if f"{arm}.image_features" in io:
        within(image, io[f"{arm}.image_features"])
    if arm.startswith("vpt"):  # its text is another sentence there
        return
    logits = 100 * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    within(logits, io[f"{arm}.logits"], atol=TOLERANCES["logits"])
    loss = F.cross_entropy(logits, io["labels"])
    within(loss[None], io[f"{arm}.loss"], atol=TOLERANCES["loss"])
    loss.backward()
    compare_gradients(model, f"{arm}.grad.", GRADIENTS[arm])


@torch.no_grad()
def wrong(detail):
    """The features with one wrong detail, and the reference's."""
    io = io_of("prompts_clip")
    side, _, kind = detail.partition(": ")
    model = prompted_model("vpt_deep" if side == "image" else "ivlp")
    backbone = model.backbone
    tower = backbone.vision_model if side == "image" else backbone.text_model
    prompts = model.prompts()[side == "image"]
    if kind == "eps":
        for module in tower.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-6
    elif kind == "GELU":
        for layer in tower.encoder.layers:
            layer.mlp.activation_fn = torch.nn.GELU()
    if side == "text":
        tokens, position = backbone.text_tokens(prompted_ids("ivlp"), None, prompts)
        if kind == "end position":
            position = position - prompts.shape[1]
        return gather_tokens(tokens, position), io["ivlp.text_features"]
    hidden = tower.embeddings(io["images"])
    count = hidden.shape[1]
    start = 1 if kind == "after [CLS]" else count
    hidden = insert_prompts(hidden, prompts[0], start)
    if kind == "after the norm":
        hidden = insert_prompts(tower.pre_layrnorm(hidden[:, :count]), prompts[0], count)
    else:
        hidden = tower.pre_layrnorm(hidden)
    for number, layer in enumerate(tower.encoder.layers):
        rows = slice(start, start + prompts.shape[1])
        if number == 1:
            hidden[:, rows] = prompts[1] + (hidden[:, rows] if kind == "added" else 0)
        if number == 2 and kind == "dropped":
            hidden = hidden[:, :count]
        hidden = layer(hidden, None)
    return backbone.visual_projection(tower.post_layernorm(hidden[:, 0])), io["vpt_deep.image_features"]


@pytest.mark.parametrize(
    ("detail", "effect"),
    [
        ("image: after [CLS]", 0.0),  # must not matter
        ("image: after the norm", 1.6e-1),
        ("image: added", 2.7e-1),
        ("image: dropped", 2.3e-1),
        ("image: eps", 2.3e-3),
        ("image: GELU", 1.2e-2),
        ("text: eps", 5.3e-3),
        ("text: GELU", 2.3e-2),
        ("text: end position", 2.1),
    ],
)
def test_each_wrong_detail_moves_the_features(detail, effect):
    """By the order of what was measured with the reference, and far more than the tolerance."""
    ours, theirs = wrong(detail)
    moved = (ours - theirs).abs().max().item()
    assert moved < TOLERANCES["features"] if effect == 0 else effect / 4 < moved < 4 * effect


VIT_NAMES = (
    ("transformer.embeddings.cls_token", "embeddings.class_embedding"),
    ("transformer.embeddings.patch_embeddings", "embeddings.patch_embedding"),
    ("transformer.embeddings.position_embeddings", "embeddings.position_embedding"),
    ("transformer.encoder.encoder_norm", "post_layernorm"),
    ("transformer.encoder.layer.", "encoder.layers."),
    (".attention_norm", ".layer_norm1"),
    (".ffn_norm", ".layer_norm2"),
    (".ffn.", ".mlp."),
    (".attn.out", ".self_attn.projection"),
)


def plain_vit():
    """The plain ViT of VPT's own code as BLIP's image encoder, with a projection that changes nothing."""
    vision = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 48,
        "image_size": 32,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    }
    encoder = BlipDualEncoder(
        BlipConfig(vision_config=vision, text_config=CONFIGS["blip"]["text_config"], image_text_hidden_size=24)
    )
    weights = {}
    for name, tensor in tensors_of("vpt_vit").items():
        for theirs, ours in VIT_NAMES:
            name = name.replace(theirs, ours)
        weights[name] = tensor
    for number in range(3):
        parts = [f"encoder.layers.{number}.attn.{part}" for part in ("query", "key", "value")]
        for kind in ("weight", "bias"):
            qkv = torch.cat([weights.pop(f"{part}.{kind}") for part in parts])
            weights[f"encoder.layers.{number}.self_attn.qkv.{kind}"] = qkv
    kept = {n: t for n, t in weights.items() if n.startswith(("embeddings.", "encoder.", "post_layernorm."))}
    encoder.vision_model.load_state_dict(kept)
    with torch.no_grad():
        encoder.vision_proj.weight.copy_(torch.eye(24))
        encoder.vision_proj.bias.zero_()
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize("run", ["none", "shallow", "deep", "deep_projected"])
@pytest.mark.reliability(
    7,
    "VPT on a plain ViT is its reference",
    broken=(
        "src/pvlf_hf/models/backbones_pvlf.py",
        "hidden = vision.post_layernorm(pass_layers(vision.encoder.layers, hidden, prompts, count))",
        "hidden = vision.post_layernorm(pass_layers(vision.encoder.layers, hidden, prompts[:1], count))",
    ),
)
def test_vpt_on_a_plain_vit_equals_its_own_code(run, figure):
    """Order: [CLS], prompts, patches there, where the prompts' own outputs are kept."""
    io, theirs, encoder = io_of("vpt_vit"), tensors_of("vpt_vit"), plain_vit()
    names = [f"{run}.transformer.{name}" for name in ("prompt_embeddings", "deep_prompt_embeddings")]
    own = [theirs[name].clone().requires_grad_() for name in names if name in theirs]
    prompts = torch.cat(own) if own else None
    if run == "deep_projected":  # VPT has one Linear for all layers, which no setting offers: only insertion is ours
        prompts = F.linear(prompts, *(theirs[f"{run}.transformer.prompt_proj.{kind}"] for kind in ("weight", "bias")))
    tokens = encoder.image_tokens(io["images"], prompts)
    hidden = io[f"{run}.hidden"]
    within(tokens, torch.cat([hidden[:, :1], hidden[:, -16:]], dim=1))
    logits = F.linear(tokens[:, 0], theirs["head.weight"], theirs["head.bias"])
    within(logits, io[f"{run}.logits"])
    if own:
        F.cross_entropy(logits, io["labels"]).backward()
        for name, prompt in zip(names, own, strict=False):
            assert relative(prompt.grad, io[name.replace("transformer", "grad.transformer")]) < TOLERANCES["gradient"]
    figure(f"{run} within 1e-5")


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT 0.21 asks for it
@pytest.mark.parametrize("family", ["blip", "clip", "metaclip_2"])
def test_prompted_text_equals_placeholders_with_peft(family):
    """CoOp is PEFT's `TrainableTokensConfig` on placeholder tokens behind the first."""
    peft = pytest.importorskip("peft")
    config, encoder, ids, mask, prompts = text_case(family, depth=1)
    tower = getattr(encoder, encoder.text_modules[0])
    plain, _ = encoder.text_tokens(ids, mask)
    ours, position = encoder.text_tokens(ids, mask, prompts)
    places = [5, 7, 9]
    layer = "word_embeddings" if family == "blip" else "token_embedding"
    tuned = peft.get_peft_model(
        copy.deepcopy(tower), peft.TrainableTokensConfig(token_indices=places, target_modules=[layer])
    )
    name = next(name for name, _ in tuned.named_parameters() if "trainable_tokens_delta" in name)
    tuned.get_parameter(name).copy_(prompts[0])
    spelled = torch.cat([ids[:, :1], torch.tensor([places]).expand(len(ids), -1), ids[:, 1:]], dim=1)
    wide = torch.cat([mask[:, :1], torch.ones(len(ids), 3, dtype=mask.dtype), mask[:, 1:]], dim=1)
    hidden = tuned(input_ids=spelled, attention_mask=wide).last_hidden_state
    hidden = torch.cat([hidden[:, :1], hidden[:, 4:]], dim=1)
    theirs = getattr(encoder, encoder.text_modules[1])(hidden)
    kept = mask.bool()
    error = tokens_error(encoder, "text", prompts, ids, mask)
    torch.testing.assert_close(ours[kept], theirs[kept], rtol=0, atol=error)
    assert (ours[kept] - plain[kept]).abs().max() > 1e-3
    assert torch.equal(position, encoder.text_tokens(ids, mask)[1])


def tokens_error(encoder, side, prompts, *inputs):
    """Return how far apart two computations of the tokens may be, where prompts pass an encoder."""

    def tokens(encoder, inputs):
        if side == "image":
            return {"tokens": encoder.image_tokens(*inputs)}
        tokens = encoder.text_tokens(inputs[0], inputs[1], inputs[2])[0]
        return {"tokens": tokens[inputs[1].bool()]}  # of no padding

    return rounding(tokens, encoder, [*inputs, prompts])["tokens"]


def text_case(family, depth):
    """An encoder, two captions of different lengths that hold no placeholder, and prompts."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{"model_type": family, **copy.deepcopy(FAMILIES[family])})
    if family == "blip":
        config.text_config.is_decoder = False
    encoder = DUAL_ENCODERS[family](config).eval()
    text = config.text_config
    first, last = (2, 3) if family == "blip" else (text.bos_token_id, text.eos_token_id)
    ids = torch.tensor([[first, 40, 41, 42, last], [first, 43, last, text.pad_token_id or 0, text.pad_token_id or 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return config, encoder, ids, mask, torch.randn(depth, 3, text.hidden_size)


@torch.no_grad()
@pytest.mark.parametrize("family", ["blip", "clip", "metaclip_2"])
@pytest.mark.parametrize("side", ["text", "image"])
def test_deep_prompts_equal_hooks_on_the_library_model(family, side):
    """The recipe with hooks that reproduces the references, on the model of Transformers as it is."""
    config, encoder, ids, mask, prompts = text_case(family, depth=2)
    tower = getattr(encoder, encoder.text_modules[0] if side == "text" else encoder.vision_modules[0])
    count = prompts.shape[1]
    if side == "image":
        prompts = torch.randn(2, count, config.vision_config.hidden_size)
    rows = slice(1, 1 + count) if side == "text" else slice(-count, None)

    def overwrite(values):
        def hook(module, args, kwargs=None):
            hidden = args[0].clone()
            hidden[:, rows] = values
            return (hidden, *args[1:])

        return hook

    layers = tower.encoder.layer if family == "blip" and side == "text" else tower.encoder.layers
    handles = [layers[1].register_forward_pre_hook(overwrite(prompts[1]))]
    if side == "text":
        expected = encoder.text_tokens(ids, mask, prompts)[0]

        def fill(module, args, output):
            output = output.clone()
            output[:, rows] = prompts[0]
            return output

        handles.append(tower.get_input_embeddings().register_forward_hook(fill))
        spelled = torch.cat([ids[:, :1], torch.full((2, count), 5), ids[:, 1:]], dim=1)
        wide = torch.cat([mask[:, :1], torch.ones(2, count, dtype=mask.dtype), mask[:, 1:]], dim=1)
        hidden = tower(input_ids=spelled, attention_mask=wide if family == "blip" else None).last_hidden_state
        hidden = torch.cat([hidden[:, :1], hidden[:, 1 + count :]], dim=1)
        found = getattr(encoder, encoder.text_modules[1])(hidden)
        kept = mask.bool()
        found, expected, inputs = found[kept], expected[kept], (ids, mask)
    else:
        pixels = torch.randn(2, 3, 32, 32)
        expected = encoder.image_tokens(pixels, prompts)
        handles.append(
            tower.embeddings.register_forward_hook(
                lambda module, args, output: torch.cat([output, prompts[:1].expand(2, -1, -1)], dim=1)
            )
        )
        hidden = tower(pixel_values=pixels).last_hidden_state[:, :-count]
        hidden = hidden if family == "blip" else tower.post_layernorm(hidden)
        found, inputs = getattr(encoder, encoder.vision_modules[1])(hidden), (pixels,)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(expected, found, rtol=0, atol=tokens_error(encoder, side, prompts, *inputs))


# --- settings --------------------------------------------------------------------------------------------------------

CLIP_B = CLIPConfig(projection_dim=512)
CLIP_L = CLIPConfig(
    projection_dim=768,
    text_config={"hidden_size": 768, "num_attention_heads": 12},
    vision_config={"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24},
)


@pytest.mark.parametrize(
    ("vl_config", "budget", "text", "vision", "halves"),
    [(None, 12_800, 8, 8, (4, 4)), (CLIP_B, 25_600, 25, 17, (12, 8)), (CLIP_L, 38_400, 25, 19, (12, 9))],
    ids=["BLIP", "CLIP-B", "CLIP-L"],
)
def test_default_numbers_have_the_weights_of_pvlf_deep(vl_config, budget, text, vision, halves):
    def config(location, **settings):
        return PVLFConfig(vl_config=vl_config, prompt_location=location, **settings)

    assert config("fusion").num_prompts * 2 * config("fusion").joint_width == budget
    assert (config("text").text_prompts, config("text").vision_prompts, config("text").fusion_prompts) == (text, 0, 0)
    assert (config("vision").text_prompts, config("vision").vision_prompts) == (0, vision)
    both = config("both")
    assert (both.text_prompts, both.vision_prompts) == halves
    assert config("both", prompt_coupling="linear").vision_prompts == text
    widths = both.vl_config.text_config.hidden_size, both.vl_config.vision_config.hidden_size
    for one in (config("text"), config("vision"), both):
        weights = one.prompt_depth * (one.text_prompts * widths[0] + one.vision_prompts * widths[1])
        assert abs(weights / budget - 1) < 0.07 and one.prompt_depth == 2 and one.prompt_init_std == 0.02
    none = config("none")
    assert (none.num_prompts, none.prompt_depth, none.fusion_prompts) == (0, 0, 0)
    fusion = PVLFConfig(vl_config=vl_config)
    assert (fusion.num_prompts, fusion.prompt_depth, fusion.prompt_init_std) == (25, 2, 1.0)


def test_maple_has_the_published_number_of_weights():
    config = PVLFConfig(
        vl_config=CLIP_B, prompt_location="both", prompt_coupling="linear", num_prompts=2, prompt_depth=9
    )
    with torch.device("meta"):
        model = PVLFModel(config)
    assert sum(p.numel() for p in model.prompts.parameters()) == 3_555_072


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt_location": "image"}, "prompt_location='image': choose one of"),
        ({"prompt_location": "none", "num_prompts": 4}, "prompt_location='none' has no prompts"),
        (
            {"prompt_location": "text", "prompt_depth": 3},
            "prompt_depth=3 must lie between 1 and the encoder's layers=2",
        ),
        (
            {"prompt_location": "text", "prompt_coupling": "tied"},
            "prompt_coupling='tied' is for prompt_location='both'",
        ),
        (
            {"prompt_location": "both", "prompt_coupling": "tied"},
            "encoders of one width.*not 20 and 24: choose 'linear'",
        ),
        ({"prompt_location": "text", "num_vision_prompts": 3}, "num_vision_prompts=3 is for prompt_location='both'"),
        ({"prompt_location": "text", "prompt_gallery": True}, "needs prompts in the image encoder, not 'text'"),
        ({"prompt_gallery": True}, "needs prompts in the image encoder, not 'fusion'"),
        ({"composition": "sum"}, "composition='sum' has no fusion: choose"),
        ({"composition": "mean"}, "composition='mean': choose one of"),
        ({"prompt_location": "text", "num_prompts": 38}, "num_prompts=38 leave 2 of 40 positions"),
        ({"prompt_location": "text", "num_prompts": 0}, "num_prompts=0 must be at least 1"),
        (
            {"prompt_location": "text", "vl_config": {"model_type": "siglip", **FAMILIES["siglip"]}},
            "defined on .*not on 'siglip': choose 'fusion'",
        ),
    ],
)
def test_a_wrong_setting_is_refused_with_the_fix(settings, message):
    with pytest.raises(ValueError, match=message):
        PVLFConfig(**{"vl_config": CONFIGS["blip"], "fusion_heads": 4, **settings})


def arm_model(location, backbone="blip", **settings):
    """A tiny model with prompts in its encoders."""
    counts = {} if location == "none" else {"num_prompts": 3}
    depth = 1 if backbone == "clip" else 2  # its towers have one layer
    if location != "none":
        counts["prompt_depth"] = depth
    settings = {"dropout": 0.0, **counts, **settings}
    torch.manual_seed(0)
    config = PVLFConfig(
        vl_config=CONFIGS[backbone], fusion_heads=4, fusion_ffn_size=40, prompt_location=location, **settings
    )
    return PVLFModel(config).eval()


def test_tied_prompts_are_one_parameter():
    vision = {**CONFIGS["blip"]["vision_config"], "hidden_size": 20}
    config = PVLFConfig(
        vl_config={**CONFIGS["blip"], "vision_config": vision},
        fusion_heads=4,
        prompt_location="both",
        prompt_coupling="tied",
        num_prompts=3,
    )
    model = PVLFModel(config).eval()
    assert [name for name, _ in model.prompts.named_parameters()] == ["text_prompts"]
    assert model.prompts() == (model.prompts.text_prompts, model.prompts.text_prompts)
    inputs = make_inputs()
    before = model.get_query_features(*(inputs[n] for n in ("pixel_values", "input_ids", "attention_mask")))
    with torch.no_grad():
        model.prompts.text_prompts.mul_(50)
    after = model.get_query_features(*(inputs[n] for n in ("pixel_values", "input_ids", "attention_mask")))
    assert not torch.equal(before.text_embeds, after.text_embeds)
    assert not torch.equal(
        model.encode_image_tokens(inputs["pixel_values"], as_query=True),
        model.encode_image_tokens(inputs["pixel_values"]),
    )


@torch.no_grad()
@pytest.mark.parametrize("location", LOCATIONS)
def test_the_fusion_sees_captions_and_images_alone(location):
    model, inputs = arm_model(location), make_inputs()
    inputs.pop("target_pixel_values")
    output = model.get_query_features(**inputs, output_hidden_states=True, output_attentions=True)
    length = inputs["input_ids"].shape[1] + 1 + 16
    assert {tuple(state.shape) for state in output.hidden_states} == {(3, length, 32)}
    assert not [name for name in model.state_dict() if name.endswith("fusion.prompts")]
    plain = model.get_query_features(**inputs)
    error = embedding_error(model, inputs)["query_embeds"]
    torch.testing.assert_close(plain.pooler_output, output.pooler_output, rtol=0, atol=error)


@torch.no_grad()
@pytest.mark.parametrize("location", ["text", "both"])
def test_padding_does_not_matter_beside_prompts(location):
    model, inputs = arm_model(location), make_inputs()
    wide = {
        **inputs,
        "input_ids": F.pad(inputs["input_ids"], (0, 5)),
        "attention_mask": F.pad(inputs["attention_mask"], (0, 5)),
    }
    error = embedding_error(model, inputs)["query_embeds"]
    torch.testing.assert_close(model(**wide).query_embeds, model(**inputs).query_embeds, rtol=0, atol=error)


def test_captions_that_leave_no_position_for_prompts_are_refused():
    model = arm_model("text")
    assert model.config.text_positions == 37
    with pytest.raises(ValueError, match="captions of 38 tokens and 3 prompts.*max_text_length to 37"):
        model.get_text_features(torch.full((1, 38), 9))
    assert model.get_text_features(torch.full((1, 37), 9)).pooler_output.shape == (1, 32)


# --- galleries -------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("location", ["vision", "both"])
@pytest.mark.reliability(
    7,
    "Prompted galleries have another fingerprint, and those without prompts are the plain encoder's",
    broken=(
        "src/pvlf_hf/embeddings/fingerprints.py",
        "({} if prompts is None else",
        "({} if True else",
    ),
)
def test_the_gallery_is_prompted_if_asked(location, tmp_path, figure):
    processor, photos = make_processor(), save_squares(tmp_path)
    plain, prompted = arm_model(location), arm_model(location, prompt_gallery=True)
    bare = arm_model("none")
    for model in (bare, prompted):
        model.backbone.load_state_dict(plain.backbone.state_dict())
    pixels = processor.process_targets(Image.new("RGB", (32, 32), "red"))["pixel_values"]
    embeds = [model.get_image_features(pixels).pooler_output for model in (bare, plain, prompted)]
    assert torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[0], embeds[2])
    digests = [image_fingerprint(model, processor) for model in (bare, plain, prompted)]
    assert digests[0] == digests[1] != digests[2]
    prompted.prompts.vision_prompts.add_(1)
    assert image_fingerprint(prompted, processor) != digests[2]
    Gallery.from_folder(photos, bare, processor, path=tmp_path / "index", progress=False)
    gallery = Gallery.load(tmp_path / "index", plain, processor)
    red = Image.open(photos / "red.png")
    query, alone = gallery.query(red, "is blue"), gallery.query(red)
    # Search by the image alone compares what the gallery holds: the encoder without prompts.
    error = embedding_error(plain, dict(processor(images=[red], text=["is blue"])))["image_embeds"]
    torch.testing.assert_close(query.image_embeds.cpu(), alone.fused.cpu(), rtol=0, atol=error)
    with pytest.raises(ValueError, match="index holds embeddings of another model"):
        Gallery.load(tmp_path / "index", prompted, processor)
    figure(f"{location}: one index without, another with prompts")


@torch.no_grad()
@pytest.mark.parametrize("location", LOCATIONS)
def test_sums_are_composed_of_known_embeddings_where_they_are_the_query(location):
    model, inputs = arm_model(location, composition="sum"), make_inputs()
    query = model.get_query_features(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
    image = model.get_image_features(inputs["pixel_values"]).pooler_output
    composed = model.compose_embeds(image, query.text_embeds)
    assert model.fusion is None and not model.explains
    if location in ("vision", "both"):
        assert composed is None and query.image_embeds is None
    else:
        error = embedding_error(model, inputs)["query_embeds"]
        torch.testing.assert_close(composed, query.pooler_output, rtol=0, atol=error)
    with pytest.raises(ValueError, match="composition='sum' has neither"):
        model.get_query_features(inputs["pixel_values"], inputs["input_ids"], output_attentions=True)


# --- training --------------------------------------------------------------------------------------------------------

COLOURS = ("red", "green", "blue", "black", "white", "yellow")


@pytest.fixture
def squares(tmp_path):
    return square_triplets(tmp_path, COLOURS, lambda reference, target: f"make it {target} and {reference}")


def fit(model, triplets, folder, **settings):
    args = PVLFTrainingArguments(
        str(folder / "run"),
        finetuning="frozen",
        max_steps=3,
        per_device_train_batch_size=6,
        optim="sgd",
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **settings,
    )
    trainer = PVLFTrainer(model, args, triplets, processing_class=make_processor())
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.slow
@pytest.mark.parametrize("location", ["text", "vision", "both"])
def test_only_prompts_train_beside_a_sum(squares, tmp_path, location):
    coupling = {"prompt_coupling": "linear"} if location == "both" else {}
    model = arm_model(location, composition="sum", temperature=0.1, **coupling)
    before = copy.deepcopy(model.state_dict())
    losses = fit(model, squares, tmp_path)
    moved = {name for name, w in model.state_dict().items() if not torch.equal(w, before[name])}
    assert losses.isfinite().all() and moved == {name for name in before if name.startswith("prompts.")}


@pytest.mark.slow
def test_prompted_text_trains_from_cached_images(squares, tmp_path):
    models = [arm_model("text", temperature=0.1, prompt_init_std=0.5) for _ in range(2)]
    losses = fit(models[0], squares, tmp_path)
    cached = fit(models[1], squares, tmp_path, feature_cache=str(tmp_path / "cache"))
    models[1].set_finetuning("frozen")
    known, collate = cache_features(models[1], make_processor(), squares, tmp_path / "cache", progress=False)
    assert collate.texts is None
    batch = collate([known[row] for row in range(6)])
    batch = tree_map(lambda t: t.float() if t.is_floating_point() else t, batch)
    error = training_error(models[1].train(), batch, 3, 1e-2, stored=torch.float16)["losses"]
    torch.testing.assert_close(cached, losses, rtol=0, atol=error)
    fresh = arm_model("text", temperature=0.1, prompt_init_std=0.5)
    assert not torch.equal(models[1].prompts.text_prompts, fresh.prompts.text_prompts)
    assert (losses[0] - losses[-1]).abs() > error


@pytest.mark.parametrize("location", ["vision", "both"])
def test_prompted_images_are_not_cached(squares, tmp_path, location):
    model = arm_model(location)
    model.set_finetuning("frozen")
    with pytest.raises(ValueError, match=f"prompt_location='{location}' puts prompts.*leave feature_cache out"):
        cache_features(model, make_processor(), squares, tmp_path / "cache", progress=False)


@pytest.mark.parametrize("location", ["text", "vision"])
def test_checkpointing_reaches_a_frozen_encoder(location):
    """Its layers are computed once more in backward, and gradients stay."""
    model, inputs = arm_model(location, composition="sum"), make_inputs()
    model.set_finetuning("frozen")
    model.train()
    side = (
        model.image_side["vision_model"].encoder.layers
        if location == "vision"
        else (model.text_side["text_encoder"].encoder.layer)
    )
    calls = []
    side[1].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))

    def gradient(model, inputs):
        model.zero_grad()
        calls.clear()
        query = model.get_query_features(inputs["pixel_values"], inputs["input_ids"], inputs["attention_mask"])
        query.pooler_output[:, 0].sum().backward()
        return {"prompts": next(model.prompts.parameters()).grad}

    plain, once = gradient(model, inputs), len(calls)
    model.activation_checkpointing_enable()
    again = gradient(model, inputs)
    assert (once, len(calls)) == (1, 2)
    model.activation_checkpointing_disable()
    assert_within(again, plain, lambda: rounding(gradient, model, inputs))


def test_prompts_train_at_the_rate_of_new_weights_and_do_not_decay(tmp_path):
    model = arm_model("both", composition="sum")
    args = PVLFTrainingArguments(str(tmp_path), decay_norms_and_biases=False, weight_decay=0.1, finetuning="frozen")
    model.set_finetuning("frozen")
    groups, rates = parameter_groups(model, args, {name for name, _ in model.named_parameters()})
    assert rates == ["learning_rate"] and groups[0]["weight_decay"] == 0 and len(groups[0]["params"]) == 2
    bare = arm_model("none", composition="sum")
    bare.set_finetuning("frozen")
    with pytest.raises(ValueError, match="nothing trains"):
        parameter_groups(bare, args, set())


RECIPES = ("prompts_none", "coop", "vpt", "ivlp", "maple", "pvlf")


def test_recipes_differ_only_in_their_prompts(tmp_path):
    shared = {"num_prompts", "prompt_location", "prompt_coupling", "prompt_gallery", "feature_cache", "output_dir"}
    seen = []
    for recipe in RECIPES:
        file = FIXTURES.parents[2] / "train_scripts" / "configs" / "methods" / f"{recipe}.yaml"
        model_args, data_args, args = parse_arguments([str(file)])
        settings = {**vars(model_args), **vars(data_args), **args.settings()}
        seen.append({name: value for name, value in settings.items() if name not in shared})
        model, _ = model_args.build()
        prompts = sum(p.numel() for n, p in model.named_parameters() if n.endswith("prompts"))
        assert (prompts == 0) == (recipe == "prompts_none") and (not prompts or abs(prompts / 6400 - 1) < 0.07), recipe
        model.set_finetuning(args.finetuning)
        assert bool(args.feature_cache) == (not model.config.vision_prompts)
    assert all(one == seen[0] for one in seen)


@pytest.mark.slow
def test_training_cuts_captions_to_the_positions_that_prompts_leave(tmp_path):
    save_dual_encoder("blip", tmp_path / "blip")
    (tmp_path / "photos").mkdir()
    for colour in COLOURS[:3]:
        Image.new("RGB", (32, 32), colour).save(tmp_path / "photos" / f"{colour}.png")
    rows = [f"{a}.png,make it {' '.join([b] * 60)},{b}.png" for a in COLOURS[:3] for b in COLOURS[:3] if a != b]
    (tmp_path / "triplets.csv").write_text("\n".join(["reference,caption,target", *rows]))
    arguments = parse_arguments(
        [
            f"--model={tmp_path / 'blip'}",
            f"--train_file={tmp_path / 'triplets.csv'}",
            f"--image_folder={tmp_path / 'photos'}",
            f"--output_dir={tmp_path / 'run'}",
            "--prompt_location=text",
            "--num_prompts=10",
            "--fusion_heads=4",
            "--finetuning=frozen",
            "--max_steps=1",
            "--per_device_train_batch_size=3",
        ]
    )
    train(*arguments)
    model, processor = load_model(str(tmp_path / "run"))
    assert (model.config.prompt_location, processor.max_text_length) == ("text", 30)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_pvlf_have_the_names_they_had():
    names = {name for name in make_model().state_dict() if not name.startswith("backbone.")}
    assert "fusion.prompts" in names and not [name for name in names if name.startswith("prompts.")]
    assert make_model().prompts is None


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("backbone", ["blip", "clip"])
@pytest.mark.parametrize("composition", ["sum", "transagg"])
def test_saved_and_loaded_embeds_the_same(tmp_path, backbone, composition):
    model = arm_model(
        "both", backbone, prompt_coupling="linear", prompt_gallery=True, composition=composition, prompt_init_std=1.0
    )
    model.save_pretrained(tmp_path)
    again, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    names = (*PVLFConfig.added_settings, "num_prompts", "prompt_depth", "prompt_init_std")
    assert all(getattr(again.config, name) == getattr(model.config, name) for name in names)
    inputs = make_inputs(backbone)
    ours, theirs = model(**inputs), again(**inputs)
    for name in ("query_embeds", "target_embeds"):
        error = rounding(lambda m, i, n=name: {n: m(**i)[n]}, model, inputs)[name]
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=error)


STRANGER = """
import sys
from safetensors.torch import load_file, save_file
from transformers import AutoModel

folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
output = model(**load_file(folder + "/inputs.st"))
save_file({n: output[n].detach() for n in ("query_embeds", "target_embeds")}, folder + "/outputs.st")
"""


@pytest.mark.slow
@torch.no_grad()
def test_loads_without_the_package(tmp_path):
    from safetensors.torch import save_file

    folder = tmp_path / "maple"
    arm_model("both", prompt_coupling="linear", prompt_gallery=True, prompt_init_std=1.0).save_pretrained(folder)
    save_file(make_inputs(), folder / "inputs.st")
    expected = AutoModel.from_pretrained(folder)(**make_inputs())
    run_without_package(STRANGER, tmp_path, folder)
    theirs = load_file(folder / "outputs.st")
    assert all(torch.equal(theirs[name], expected[name]) for name in theirs)


def test_layers_get_their_own_prompts_once():
    """What a layer gets, and what leaves, by layers that only record."""
    seen = []

    class Layer(torch.nn.Module):
        def forward(self, hidden_states):
            seen.append(hidden_states.clone())
            return hidden_states + 1

    prompts, hidden = torch.arange(4.0).view(2, 2, 1) + 100, torch.zeros(1, 5, 1)
    out = pass_layers([Layer(), Layer(), Layer()], insert_prompts(hidden, prompts[0], 1), prompts, 1)
    assert out.flatten().tolist() == [3.0] * 5
    assert [state[0, :, 0].tolist() for state in seen] == [
        [0, 100, 101, 0, 0, 0, 0],
        [1, 102, 103, 1, 1, 1, 1],
        [2, 103, 104, 2, 2, 2, 2],
    ]


def test_prompted_clip_is_the_plain_one_without_prompts():
    _, weights = prompted_clip()
    model = prompted_model("plain")
    assert all(torch.equal(model.backbone.state_dict()[name], tensor) for name, tensor in weights.items())
