"""CompoDiff: numbers of the reference implementation, bad input, training, and what a saved model carries."""

import json
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from diffused import (
    TOLERANCES,
    conditions,
    denoiser_tensors,
    io,
    make_config,
    make_model,
    make_processor,
    moved,
    reference_model,
    within,
)
from dual_encoders import save_dual_encoder, tokenizer_of
from error_bounds import dot_error, rounding, roundoff
from forked import run_without_package
from PIL import Image
from processes import run_in_processes
from safetensors.torch import load_file
from squares import COLOURS, draw, make_benchmark, square_triplets
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

import pvlf_hf
from pvlf_hf import (
    CompoDiffConfig,
    CompoDiffModel,
    CompoDiffProcessor,
    Gallery,
    PVLFTrainer,
    PVLFTrainingArguments,
    evaluate,
)
from pvlf_hf.checkpoints.compodiff_weights import renamed
from pvlf_hf.checkpoints.loading import load_model
from pvlf_hf.commands.train import parse_arguments
from pvlf_hf.embeddings.embedding_store import images_made_by
from pvlf_hf.models import denoiser_compodiff, sampler_compodiff
from pvlf_hf.models.objective_compodiff import drop_conditions, predict_targets
from pvlf_hf.models.sampler_compodiff import add_noise, cumulative_alphas, sample, sampling_times
from pvlf_hf.training.feature_cache import accept_cached_features, cache_features

ROOT = Path(__file__).parent.parent
PICTURE = Image.linear_gradient("L").resize((40, 28)).convert("RGB")
TEXTS = ["is red", "a face with a hat", "blue"]
SCALES = (1.5, 7.5)


@pytest.fixture(scope="module")
def reference():
    return reference_model()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def error(model, queries):
    """How far apart two ways to the same embeddings may be."""
    return rounding(query_of, model, queries, draws=4)["query"]


def query_of(model, inputs, **options):
    return {"query": model.get_query_features(**inputs, **options).pooler_output}


@pytest.fixture(scope="module")
def queries():
    return dict(make_processor().process_queries([draw(row) for row in range(3)], TEXTS))


# Parity.


def noise_of(name):
    """Noise of a sampling of the reference, `(times, queries, samples, d)`."""
    return io()[f"{name}.noise"].squeeze(2).unflatten(1, (2, 2))


@torch.no_grad()
def test_the_denoiser_and_all_its_parts_equal_the_reference(reference):
    denoiser, text, image, mask = reference.denoiser, io()["text_cond"], io()["image_cond"][:, 0], io()["mask"]
    parts = {"final_norm": denoiser.norm, "time_embed": denoiser.time_embed, "mask_embed": denoiser.mask_embed}
    for number, layer in enumerate(denoiser.layers):
        parts[f"layer{number}.self_attn"] = layer.self_attention
        parts[f"layer{number}.cross_attn"] = layer.cross_attention
        parts[f"layer{number}.feed_forward"] = layer.feed_forward
    found = {}
    for name, part in parts.items():
        part.register_forward_hook(lambda *call, name=name: found.update({name: call[-1]}))
    found["text_embeds"] = denoiser.text_embed(text)
    prediction = denoiser(io()["x_t"], io()["t"], denoiser.read(text, image, mask))
    within(prediction, io()["pred"], TOLERANCES["pred"])
    for part in parts.values():
        part._forward_hooks.clear()
    theirs = {name.removeprefix("inner."): tensor for name, tensor in io().items() if name.startswith("inner.")}
    assert theirs.keys() == found.keys() and len(found) == 10
    for name, tensor in theirs.items():
        ours = found[name]
        if name == "final_norm":  # ours reads the first of the two tokens alone
            tensor = tensor[:, :1]
        within(ours.reshape(tensor.shape), tensor, TOLERANCES["pred"])


@torch.no_grad()
def test_guidance_equals_the_reference(reference):
    predict = reference.guided(*conditions(), SCALES)
    for row, time in enumerate(io()["t"].tolist()):
        within(predict(io()["x_t"], time)[row], io()["pred_cfg"][row], TOLERANCES["pred_cfg"])
    swapped = reference.guided(*conditions(), SCALES[::-1])
    assert moved(swapped(io()["x_t"], 37)[0], io()["pred_cfg"][0]) > 1


@torch.no_grad()
@pytest.mark.parametrize("steps", [5, 11])
def test_a_sampling_equals_the_reference_step_by_step(reference, steps):
    name, trace = f"sample{steps}", []
    guided = reference.guided(*conditions(), SCALES)

    def predict(noised, time):
        trace.append((noised, guided(noised, time)))
        return trace[-1][1]

    times = sampling_times(steps, 1000)
    assert times == io()[f"{name}.times"].tolist()
    samples = sample(predict, noise_of(name), times, 1000)
    assert len(trace) == steps - 1
    for ours, theirs in ((0, "x"), (1, "x0_guided")):
        stacked = torch.stack([step[ours] for step in trace]).flatten(1, 2)[:, :, None]
        within(stacked, io()[f"{name}.{theirs}"], TOLERANCES["sample"])
    out = reference.generate(*conditions(), noise_of(name), times, SCALES)
    assert torch.equal(out, samples.mean(dim=1))
    within(out, io()[f"{name}.out"], TOLERANCES["sample"])
    if steps == 11:
        within(F.normalize(out, dim=-1), io()["query"], TOLERANCES["query"])
        mixed = F.normalize(0.9 * out + 0.1 * io()["image_cond"][:, 0], dim=-1)
        within(mixed, io()["query_source_0p1"], TOLERANCES["query"])


def test_the_schedule_equals_the_reference():
    alphas = cumulative_alphas(1000)
    buffers = denoiser_tensors()
    within(alphas[::37].float(), io()["schedule.alphas_cumprod"], TOLERANCES["schedule"])
    within(alphas.float(), buffers["noise_scheduler.alphas_cumprod"], TOLERANCES["schedule"])
    for name, ours in (
        ("sqrt_recip_alphas_cumprod", (1 / alphas).sqrt()),
        ("sqrt_recipm1_alphas_cumprod", (1 / alphas - 1).sqrt()),
    ):
        torch.testing.assert_close(ours[::37].float(), io()[f"schedule.{name}"], rtol=2 * roundoff(), atol=0)


@pytest.mark.parametrize(
    ("steps", "times"),
    [
        (2, [499, -1]),
        (3, [666, 332, -1]),
        (5, [799, 599, 399, 199, -1]),
        (10, [899, 799, 699, 599, 499, 399, 299, 199, 99, -1]),
    ],
)
def test_times_are_truncated(steps, times):
    """Ten steps begin at 899 and end in 99, one call of the denoiser less."""
    assert sampling_times(steps, 1000) == times


@torch.no_grad()
def test_a_step_to_time_0_adds_no_noise(reference):
    times = sampling_times(1000, 1000)
    assert times[-2:] == [0, -1]
    noise = torch.full((1000, 1, 1, 2), torch.nan)
    noise[0] = 1.0
    out = sample(lambda noised, _: noised * 0 + 2.0, noise, times[-3:], 1000)
    assert torch.equal(out, torch.full((1, 1, 2), 2.0))


def test_loss_and_gradients_equal_the_reference():
    model = reference_model()
    x0, noise = io()["train.x0"][:, 0], io()["train.noise"][:, 0]
    noised = add_noise(x0, io()["t"], noise, 1000)
    within(noised[:, None], io()["train.x_t"], TOLERANCES["pred"])
    memory = model.denoiser.read(io()["text_cond"], io()["image_cond"][:, 0], io()["mask"])
    predicted = model.denoiser(noised[:, None], io()["t"], memory)[:, 0]
    within(predicted[:, None], io()["train.pred"], TOLERANCES["pred"])
    loss = model.loss(predicted, x0)
    within(loss, io()["train.loss"][0], TOLERANCES["loss"])
    loss.backward()
    stored = {name.removeprefix("grad."): t for name, t in io().items() if name.startswith("grad.")}
    assert len(stored) == 11
    for theirs, gradient in stored.items():
        ours = model.denoiser.get_parameter(renamed(theirs)).grad
        assert ((ours - gradient).norm() / gradient.norm()).item() < TOLERANCES["grad_rel"], theirs


# Wrong details.


def edited(module, old, new):
    """A copy of a module with one edit of its source."""
    source = Path(module.__file__).read_text()
    assert source.count(old) == 1, old
    copy = ModuleType(module.__name__)
    copy.__package__ = module.__package__
    exec(compile(source.replace(old, new), module.__file__, "exec"), copy.__dict__)
    return copy


DENOISER, SAMPLER = denoiser_compodiff, sampler_compodiff
WRONG = {
    "eps 1e-6": (DENOISER, "EPS = 1e-5", "EPS = 1e-6"),
    "eps 1e-3": (DENOISER, "EPS = 1e-5", "EPS = 1e-3"),
    "no division by the maximum": (DENOISER, "first / first.amax(dim=-1, keepdim=True).detach()", "first"),
    "no rotary": (DENOISER, "return torch.cat([turned, states[..., width:]], dim=-1)", "return states"),
    "no relative bias": (DENOISER, "* cosines + bias", "* cosines"),
    "halves swapped": (DENOISER, "value * F.silu(gate)", "gate * F.silu(value)"),
    "dot product for cosine": (DENOISER, "F.normalize(query, dim=-1) @ F.normalize(key, dim=-1)", "query @ key"),
    "null key zeroed": (DENOISER, "null = self.null_key_value[", "null = 0 * self.null_key_value["),
    "cosines first": (DENOISER, "torch.cat([angles.sin(), angles.cos()]", "torch.cat([angles.cos(), angles.sin()]"),
    "alphas for those before": (SAMPLER, "before = [1.0, *alphas]", "before = alphas"),
    "eta 0": (SAMPLER, "fresh = ((1 - a / a_next) * (1 - a_next) / (1 - a)) ** 0.5", "fresh = 0.0"),
}
"""Every wrong detail of the denoiser and the sampler that was measured with the reference."""


@torch.no_grad()
@pytest.mark.parametrize("detail", WRONG)
def test_a_wrong_detail_is_detected(reference, detail):
    module, *edit = WRONG[detail]
    wrong = edited(module, *edit)
    if module is DENOISER:
        denoiser = wrong.Denoiser(reference.config)
        denoiser.load_state_dict(reference.denoiser.state_dict())
        memory = denoiser.read(io()["text_cond"], io()["image_cond"][:, 0], io()["mask"])
        prediction = denoiser(io()["x_t"], io()["t"], memory)
        assert moved(prediction, io()["pred"]) > 5 * TOLERANCES["pred"]
        return
    guided = reference.guided(*conditions(), SCALES)
    samples = wrong.sample(guided, noise_of("sample11"), sampling_times(11, 1000), 1000)
    assert moved(F.normalize(samples.mean(dim=1), dim=-1), io()["query"]) > 500 * TOLERANCES["query"]


# Queries.


def embeds(model, queries, **options):
    return model.get_query_features(**queries, **options).pooler_output


def test_a_query_is_the_mean_of_samples_with_a_share_of_the_image(model, queries, error):
    times, seeds = sampling_times(4, 1000), torch.Generator().manual_seed(model.config.seed)
    noise = torch.randn(4, 1, 2, 32, generator=seeds).expand(-1, 3, -1, -1)
    text, image = (
        model.encode_text(queries["input_ids"], queries["attention_mask"]),
        model.encode_images(queries["pixel_values"]),
    )
    negative = model.encode_negative(queries["input_ids"], queries["attention_mask"])
    mask = torch.zeros(3, 4, 4)
    with torch.no_grad():
        mean = model.generate(text, negative, image, mask, noise, times, SCALES)
    output = model.get_query_features(**queries)
    within(output.pooler_output, F.normalize(0.9 * mean + 0.1 * image, dim=-1).detach(), error)
    assert torch.equal(output.image_embeds, model.get_image_features(queries["pixel_values"]).pooler_output)
    assert not output.pooler_output.requires_grad
    assert torch.equal(embeds(model, queries, source_weight=1.0), output.image_embeds)


def test_noise_is_that_of_the_seed(model, queries):
    again, state = embeds(model, queries), torch.get_rng_state()
    assert torch.equal(again, embeds(model, queries)) and torch.equal(state, torch.get_rng_state())
    other = make_model(seed=0)
    other.config.seed = 1
    assert moved(embeds(other, queries), again) > 1e-2
    drawn = [embeds(model, queries, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn) and moved(drawn[0], again) > 1e-2


@pytest.mark.reliability(
    2,
    "A query that CompoDiff samples does not depend on its position or its batch, and repeats",
    broken=("src/pvlf_hf/models/modeling_compodiff.py", "(shape[0], 1, *shape[2:])", "(shape[0], *shape[1:])"),
)
def test_equal_queries_have_equal_embeddings_wherever_they_are(model, queries, error, figure):
    """Each query gets the same noise, so that neither position nor batch count."""
    turned = {name: tensor[[2, 0, 1]] for name, tensor in queries.items()}
    whole = embeds(model, queries)
    assert torch.equal(embeds(model, queries), whole)
    within(embeds(model, turned), whole[[2, 0, 1]], error)
    for row in range(3):
        within(embeds(model, {n: t[row : row + 1] for n, t in queries.items()})[0], whole[row], error)
    figure("3 queries, turned and alone")
    own = embeds(model, {n: t[[0, 0]] for n, t in queries.items()}, generator=torch.Generator().manual_seed(3))
    assert moved(own[0], own[1]) > 1e-2  # a generator draws for each query


def test_options_of_a_call_win_over_the_configuration(queries):
    options = {"steps": 7, "guidance": (2.0, 3.0), "num_samples": 3, "source_weight": 0.3}
    settings = {"steps": 7, "image_guidance": 2.0, "text_guidance": 3.0, "num_samples": 3, "source_weight": 0.3}
    found = embeds(make_model(), queries, **options)
    assert torch.equal(found, embeds(make_model(**settings), queries))
    for name, value in options.items():
        assert moved(embeds(make_model(), queries, **{name: value}), embeds(make_model(), queries)) > 1e-4, name


def test_a_scale_of_1_is_no_guidance(model, queries):
    """The reference crashes there. Neither negative text counts then."""
    dog = make_processor().process_negative("dog")
    error = rounding(partial(query_of, guidance=(1, 1)), model, {**queries, **dog}, draws=4)["query"]
    within(embeds(model, queries, guidance=(1, 1)), embeds(model, queries, guidance=(1.0, 1.0), **dog), error)
    assert moved(embeds(model, queries, **dog), embeds(model, queries)) > 1e-3


def test_a_query_by_text_alone_has_zeros_for_its_image(model, queries):
    texts = {name: queries[name] for name in ("input_ids", "attention_mask")}
    alone = model.get_query_features(None, **texts)
    assert alone.image_embeds is None
    assert torch.equal(alone.pooler_output, model.get_text_features(**texts).pooler_output)
    error = rounding(partial(query_of, pixel_values=None), model, texts, draws=4)["query"]
    within(embeds(model, {"pixel_values": None, **texts}, guidance=(0, 7.5)), alone.pooler_output, error)
    within(alone.pooler_output.norm(dim=1), torch.ones(3), dot_error(32))


def test_a_mask_marks_where_the_image_is_to_change(model, queries, error):
    plain = embeds(model, queries)
    assert torch.equal(embeds(model, queries, mask=torch.zeros(3, 4, 4)), plain)
    one = torch.zeros(3, 4, 4, dtype=torch.bool)
    one[1] = True
    masked = embeds(model, queries, mask=one)
    assert moved(masked[1], plain[1]) > 1e-4
    within(masked[[0, 2]], plain[[0, 2]], error)
    for wrong in (torch.zeros(3, 8, 8), torch.zeros(3, 1, 4, 4), torch.zeros(2, 4, 4)):
        with pytest.raises(ValueError, match=r"mask is \(.*\) but must be \(3, 4, 4\), .* resize it"):
            embeds(model, queries, mask=wrong)


def test_negative_texts(model, queries, error):
    processor = make_processor()
    ids = processor.negative
    assert ids == {"negative_ids": [0, 1], "pad_id": 1} and model.config.negative_ids == [0, 1]
    empty = processor.tokenizer("", padding="max_length", max_length=77, return_tensors="pt")
    given = {f"negative_{name}": tensor for name, tensor in empty.items()}
    assert torch.equal(embeds(model, queries, **given), embeds(model, queries))
    three = {name: tensor.expand(3, -1) for name, tensor in given.items()}
    within(embeds(model, queries, **three), embeds(model, queries), error)
    with pytest.raises(ValueError, match=r"2 negative texts for 3 queries: pass one, or as many"):
        embeds(model, queries, **{name: tensor.expand(2, -1) for name, tensor in given.items()})


def test_the_released_demo_masks_the_negative_text_as_the_caption(queries):
    plain, as_released = make_model(), make_model(negative_mask="caption")
    assert moved(embeds(plain, queries), embeds(as_released, queries)) > 1e-4
    masks = queries["attention_mask"]
    ids = torch.tensor([[0] + [1] * 76]).expand(3, -1)
    expected = as_released.encode_text(ids, masks)
    assert torch.equal(as_released.encode_negative(queries["input_ids"], masks), expected)


@pytest.mark.parametrize("family", ["blip", "metaclip_2", "siglip"])
def test_other_dual_encoders(family):
    """Ours: for comparison on one backbone."""
    model, processor = make_model(family), make_processor(family)
    inputs = processor.process_queries([PICTURE, draw(1)], ["red", "a face"])
    assert inputs["input_ids"].shape == (2, model.config.text_length)
    assert model.encode_text(inputs["input_ids"], inputs["attention_mask"]).shape[-1] == model.config.text_width
    output = model.get_query_features(**inputs)
    within(output.pooler_output.norm(dim=1), torch.ones(2), dot_error(32))
    assert moved(output.pooler_output[0], output.pooler_output[1]) > 1e-3


# The towers.


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A CLIP for images, and one of another width for texts, tokenizers included."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("images", "texts", "blip")}
    save_dual_encoder("clip", folders["images"])
    save_dual_encoder("blip", folders["blip"])
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    text = {**small, "hidden_size": 12, "vocab_size": 170, "bos_token_id": 0, "eos_token_id": 1}
    vision = {**small, "hidden_size": 8, "image_size": 16, "patch_size": 8}
    torch.manual_seed(5)
    CLIPModel(CLIPConfig(projection_dim=20, text_config=text, vision_config=vision)).save_pretrained(folders["texts"])
    tokenizer_of("clip").save_pretrained(folders["texts"])
    return {name: str(folder) for name, folder in folders.items()}


SMALL = {"denoiser_layers": 2, "denoiser_heads": 2, "head_width": 8, "mask_size": 4, "steps": 4}


@torch.no_grad()
def test_conditions_are_read_once_and_samples_are_one_batch(queries):
    """Nine calls for ten steps, of three passes of guidance with all samples; the conditions are read once."""
    model, calls = make_model(steps=10, num_samples=5), []
    layer = model.denoiser.layers[1]
    layer.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    layer.cross_attention.memory.register_forward_pre_hook(lambda _, inputs: calls.append(tuple(inputs[0].shape)))
    model.get_query_features(**queries)
    assert calls == [(9, 79, 32), *[(9, 5, 2, 32)] * 9]


@torch.no_grad()
def test_two_towers_of_different_widths(towers, queries, tmp_path):
    pair = towers["images"], towers["texts"]
    model, processor = CompoDiffModel.from_vl_pretrained(*pair, **SMALL), CompoDiffProcessor.from_vl_pretrained(*pair)
    assert not model.training and (model.config.joint_width, model.config.text_width) == (32, 12)
    assert model.config.negative_ids == [0, 1] and model.get_input_embeddings().weight.shape == (170, 12)
    assert processor.image_processor.crop_size["height"] == 32
    inputs = processor.process_queries([draw(row) for row in range(3)], TEXTS)
    texts = CLIPModel.from_pretrained(towers["texts"]).text_model
    mask = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    assert torch.equal(model.encode_text(**mask), texts(**mask).last_hidden_state)
    images = CLIPModel.from_pretrained(towers["images"])
    expected = images.get_image_features(pixel_values=inputs["pixel_values"]).pooler_output
    pixels = {"pixel_values": inputs["pixel_values"]}
    error = rounding(lambda model, images: {"images": model.encode_images(**images)}, model, pixels, draws=4)
    within(model.encode_images(**pixels), expected, error["images"])
    assert not any("text_projection" in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    within(embeds(again, inputs), embeds(model, inputs), rounding(query_of, model, dict(inputs), draws=4)["query"])
    model.resize_token_embeddings(180)
    assert model.config.get_text_config().vocab_size == 180


def _with_two_layers(folder):
    file = Path(folder, "config.json")
    config = json.loads(file.read_text())
    config["text_config"]["num_hidden_layers"] = 2
    file.write_text(json.dumps(config))
    return str(folder)


def test_towers_that_do_not_fit_are_refused(towers, tmp_path):
    with pytest.raises(ValueError, match=r"only the text encoder of a CLIP can be replaced, .* is a blip"):
        CompoDiffModel.from_vl_pretrained(towers["blip"], towers["texts"])
    with pytest.raises(ValueError, match=r"is a 'blip' checkpoint: pass a CLIP"):
        CompoDiffModel.from_vl_pretrained(towers["images"], towers["blip"], **SMALL)
    model = CLIPModel.from_pretrained(towers["texts"])
    model.text_model.encoder.layers = model.text_model.encoder.layers[:1]
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"lacks 16 weights of the text encoder, first: \['encoder.layers.1"):
        CompoDiffModel.from_vl_pretrained(towers["images"], _with_two_layers(tmp_path), **SMALL)
    with pytest.raises(ValueError, match=r"\['vl_config'\]: the checkpoint is its own"):
        CompoDiffModel.from_vl_pretrained(towers["images"], vl_config={})


@torch.no_grad()
def test_the_index_of_the_plain_encoder_is_searched(towers, tmp_path):
    plain = load_model(towers["images"])
    model = CompoDiffModel.from_vl_pretrained(towers["images"], towers["texts"], **SMALL)
    ours = model, CompoDiffProcessor.from_vl_pretrained(towers["images"], towers["texts"])
    assert images_made_by(*ours) == images_made_by(*plain)
    photos = tmp_path / "photos"
    photos.mkdir()
    for row, colour in enumerate(COLOURS):
        draw(row).save(photos / f"{colour}.png")
    old = Gallery.from_folder(photos, *plain, path=tmp_path / "index", progress=False)
    gallery = Gallery.load(tmp_path / "index", *ours)
    assert torch.equal(gallery.embeds, old.embeds)
    assert torch.equal(gallery.embeds, Gallery.from_folder(photos, *ours, progress=False).embeds)
    found = gallery.search(draw(0), "red", k=3)
    query = ours[0].get_query_features(**ours[1].process_queries(draw(0), "red")).pooler_output[0]
    scores = (gallery.embeds @ query).sort(descending=True)
    assert found.ids == [gallery.ids[i] for i in scores.indices[:3]]
    assert len(gallery.search(text="red", k=2).ids) == 2  # by text alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_denoiser_stays_in_float32(towers, dtype, queries, tmp_path):
    model = CompoDiffModel.from_vl_pretrained(towers["images"], dtype=dtype, **SMALL)
    for one in (model, None):
        if one is None:
            model.save_pretrained(tmp_path)
            one = AutoModel.from_pretrained(tmp_path, dtype=dtype)
        assert {p.dtype for p in one.denoiser.parameters()} == {torch.float32}
        assert {p.dtype for p in one.backbone.parameters()} == {dtype} and one.dtype == dtype
        query = embeds(one, queries)
        assert query.dtype == torch.float32 and query.isfinite().all()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (
                one.denoiser.read(*(torch.zeros(s) for s in ((1, 3, 40), (1, 32), (1, 4, 4))))[0].dtype
                == torch.float32
            )
    with pytest.raises(ValueError, match=r"the denoiser is in torch.*16, .* keeps it in float32"):
        embeds(model.to(dtype), queries)


# Bad input.


def test_captions_that_are_too_long_are_refused(model):
    processor = make_processor()
    with pytest.raises(ValueError, match=r"caption 1 has 82 tokens, 5 more than the text encoder reads \(77\)"):
        processor.process_queries([PICTURE, PICTURE], ["red", "a " * 80])
    assert processor(text=["red", "a " * 80], truncation=True)["input_ids"].shape == (2, 77)
    assert processor(text="a " * 75)["input_ids"].shape == (1, 77)
    on_blip = make_processor("blip")  # as all models on BLIP
    assert on_blip.truncation and on_blip(text="red " * 80)["input_ids"].shape == (1, 35)
    with pytest.raises(ValueError, match=r"caption 0 has 82 tokens, 47 more"):
        on_blip(text="red " * 80, truncation=False)
    short = processor(images=PICTURE, text="red", padding="longest")
    with pytest.raises(ValueError, match=r'5 tokens long, but .* reads all 77 .*padding="max_length"'):
        model.get_query_features(**short)


def test_what_a_query_lacks_is_named(model, queries):
    with pytest.raises(ValueError, match=r"2 reference images but 3 captions"):
        embeds(model, {**queries, "pixel_values": queries["pixel_values"][:2]})
    for options, message in (
        ({"steps": 1}, "steps=1 must be at least 2"),
        ({"steps": 1001}, "steps=1001 must be at least 2 and at most 1000"),
        ({"num_samples": 0}, "num_samples=0 must be at least 1"),
        ({"output_attentions": True}, r"\['output_attentions'\]: CompoDiff has no such option"),
    ):
        with pytest.raises(ValueError, match=message):
            embeds(model, queries, **options)
    bare = make_model(negative_ids=None, pad_id=None)
    with pytest.raises(ValueError, match=r"no negative_ids.*set model.config.negative_ids and pad_id"):
        embeds(bare, queries)
    bare.config.negative_ids, bare.config.pad_id = [0, 1], 1
    assert torch.equal(embeds(bare, queries), embeds(make_model(), queries))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 1}, r"steps=1 must lie between 2 and timesteps=1000"),
        ({"steps": 1001}, r"steps=1001 must lie between 2 and timesteps=1000"),
        ({"timesteps": 1}, r"timesteps=1"),
        ({"head_width": 7}, r"head_width=7 must be even"),
        ({"denoiser_layers": 0}, r"denoiser_layers=0 must be at least 1"),
        ({"num_samples": 0}, r"num_samples=0 must be at least 1"),
        ({"negative_mask": "none"}, r"choose 'own' or 'caption'"),
        ({"image_dropout": 1.5}, r"image_dropout=1.5 must lie between 0 and 1"),
        ({"source_weight": -0.1}, r"source_weight=-0.1 must lie"),
        ({"image_embed_scale": 0}, r"image_embed_scale=0 must be above 0"),
        ({"negative_ids": [3, 500]}, r"hold \[500\], but the vocabulary of vl_config has 160"),
        ({"negative_ids": [3] * 78}, r"negative_ids has 78 tokens: pass 77 at most"),
        ({"pad_id": None}, r"negative_ids and pad_id go together"),
        ({"vl_config": 3}, r"pass a BlipConfig, a CLIPConfig"),
        ({"vl_config": {"model_type": "bert"}}, r"model_type 'bert'"),
    ],
)
def test_settings_that_cannot_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CompoDiffConfig(**{"vl_config": make_config().vl_config, **make_processor().negative, **settings})


# Training.


@pytest.fixture
def triplets_of(queries):
    targets = make_processor().process_targets([draw(row) for row in (3, 4, 5)])["pixel_values"]
    return {**queries, "target_pixel_values": targets}


def test_the_loss_is_what_the_denoiser_predicts_wrong(triplets_of):
    model = make_model(image_embed_scale=2.0)
    times, noise = torch.tensor([3, 500, 998]), torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    output = model(**triplets_of, return_loss=True, times=times, noise=noise)
    clean = 2 * model.encode_images(triplets_of["target_pixel_values"])
    text = model.encode_text(triplets_of["input_ids"], triplets_of["attention_mask"])
    memory = model.denoiser.read(text, model.encode_images(triplets_of["pixel_values"]), torch.zeros(3, 4, 4))
    predicted = model.denoiser(add_noise(clean, times, noise, 1000)[:, None], times, memory)[:, 0]
    assert torch.equal(output.query_embeds, predicted) and torch.equal(output.target_embeds, clean)
    assert torch.equal(output.loss, F.mse_loss(predicted, clean))
    assert not output.target_embeds.requires_grad
    # In eval mode queries are sampled, and have no loss.
    plain = model(**triplets_of)
    assert plain.loss is None and plain.similarity.shape == (3, 3)
    assert torch.equal(
        plain.query_embeds, embeds(model, {n: triplets_of[n] for n in triplets_of if "target" not in n})
    )
    model.train()
    assert model(**triplets_of).loss.requires_grad and model(**triplets_of, return_loss=False).loss is None


def test_the_loss_has_no_negatives():
    model = make_model()
    predicted, targets = torch.randn(2, 32), torch.randn(4, 32)
    assert torch.equal(
        model.loss(predicted, targets, positives=torch.tensor([2, 3])), F.mse_loss(predicted, targets[2:])
    )
    ids = torch.tensor([5, 5])
    assert torch.equal(model.loss(predicted, targets[:2], target_ids=ids), model.loss(predicted, targets[:2]))
    with pytest.raises(ValueError, match=r"loss_chunk_size=4: the denoising loss .* nothing to split: leave it out"):
        model.loss(predicted, targets[:2], chunk_size=4)
    with pytest.raises(ValueError, match=r"finetuning='both': .* pass finetuning='frozen'"):
        model.set_finetuning("both")


def test_conditions_are_dropped_at_the_rates_of_the_configuration(queries):
    model = make_model(image_dropout=0.3, text_dropout=0.6).train()
    ids, mask = (queries[name][:1].expand(2000, -1) for name in ("input_ids", "attention_mask"))
    text, image = torch.ones(2000, 77, 40), torch.ones(2000, 32)
    torch.manual_seed(0)
    dropped_image, dropped_text = drop_conditions(model, image, text, ids, mask)
    negative = model.encode_negative(ids[:1], mask[:1])[0]
    no_image, no_text = (dropped_image == 0).all(dim=1), (dropped_text == negative).all(dim=2).all(dim=1)
    assert (no_image | (dropped_image == 1).all(dim=1)).all()
    assert (no_text | (dropped_text == 1).all(dim=2).all(dim=1)).all()
    rates = [no_image.float().mean(), no_text.float().mean(), (no_image & no_text).float().mean()]
    torch.testing.assert_close(torch.stack(rates), torch.tensor([0.3, 0.6, 0.18]), atol=0.05, rtol=0)
    model.eval()  # nothing is dropped for a loss in eval mode
    image = model.encode_images(queries["pixel_values"])
    settings = {"times": torch.tensor([5, 6, 7]), "noise": torch.zeros(3, 32)}
    losses = [predict_targets(model, image, image, queries["input_ids"], queries["attention_mask"], **settings)[0]]
    model.config.image_dropout = model.config.text_dropout = 0.0
    losses.append(predict_targets(model, image, image, queries["input_ids"], queries["attention_mask"], **settings)[0])
    assert torch.equal(*losses)


def arguments(folder, **settings):
    defaults = {
        "finetuning": "frozen",
        "learning_rate": 3e-3,
        "max_steps": 3,
        "per_device_train_batch_size": 6,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "logging_steps": 1,
    }
    return PVLFTrainingArguments(str(folder), **{**defaults, **settings})


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return square_triplets(tmp_path_factory.mktemp("squares"), COLOURS[:4], lambda _, target: f"but {target}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [{}, {"feature_cache": "features"}, {"gradient_cache_chunk_size": 2}, {"finetuning": "text"}]
)
def test_the_trainer_trains_it_on_triplets(settings, squares, tmp_path):
    if "feature_cache" in settings:
        settings = {"feature_cache": str(tmp_path / "features")}
    model, before = make_model(), make_model().state_dict()
    trainer = PVLFTrainer(model, arguments(tmp_path, **settings), squares, processing_class=make_processor())
    trainer.train()
    trained = {name.split(".")[0] for name, weight in model.state_dict().items() if not weight.equal(before[name])}
    assert trained == ({"denoiser", "backbone"} if "finetuning" in settings else {"denoiser"})
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < loss < 10 for loss in losses)
    if "finetuning" not in settings:
        sides = [*model.image_side.values(), *model.text_side.values()]
        assert not any(module.training for module in sides) and model.denoiser.training


def test_cached_features_give_the_loss_of_the_images(squares, tmp_path):
    model, processor = make_model(), make_processor()
    model.set_finetuning("frozen")
    known, collator = cache_features(model, processor, squares, tmp_path, progress=False)
    batch = collator([known[row] for row in range(3)])
    del batch["target_ids"]
    assert {*batch} == {"encoder_outputs", "input_ids", "attention_mask"}  # captions are encoded as they come
    drawn = {"times": torch.tensor([5, 300, 900]), "noise": torch.randn(3, 32, generator=torch.Generator())}
    pixels = [processor.process_targets(squares[column][:3])["pixel_values"] for column in ("reference", "target")]
    accept_cached_features(model)
    ours = model(**batch, **drawn, return_loss=True).loss
    theirs = model(pixels[0], batch["input_ids"], batch["attention_mask"], pixels[1], return_loss=True, **drawn).loss

    def loss(model, images):
        return {"loss": model.denoise(*images, batch["input_ids"], batch["attention_mask"], **drawn).loss}

    images = [model.encode_images(part).detach() for part in pixels]
    within(ours, theirs.detach(), rounding(loss, model, images, stored=torch.float16, draws=4)["loss"])


def weights_after(folder, squares, gather=True, resume=None, **settings):
    """The denoiser's weights after four steps, in one process or several."""
    run = arguments(
        folder,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        gather_negatives=gather,
        per_device_train_batch_size=3,
        **settings,
    )
    trainer = PVLFTrainer(make_model(), run, squares, processing_class=make_processor())
    trainer.train(resume)
    return {name: weight.detach().numpy() for name, weight in trainer.model.denoiser.named_parameters()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all((weight == theirs[name]).all() for name, weight in ours.items())


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_noise(squares, tmp_path):
    whole = weights_after(tmp_path, squares)
    assert same(weights_after(tmp_path, squares, resume=str(tmp_path / "checkpoint-2")), whole)
    assert not same(weights_after(tmp_path / "other", squares, seed=1), whole)


@pytest.mark.slow
def test_several_processes_train_alike(squares, tmp_path):
    """Gathered targets change nothing: each prediction finds its own again."""
    first, second = run_in_processes(2, weights_after, tmp_path / "gathered", squares)
    assert isinstance(first, dict), first
    own, _ = run_in_processes(2, weights_after, tmp_path / "own", squares, False)
    assert same(first, second) and same(first, own)
    assert not same(first, weights_after(tmp_path / "alone", squares))


def test_the_trainer_refuses_what_has_no_meaning(squares, tmp_path):
    with pytest.raises(ValueError, match=r"finetuning='both'.*pass finetuning='frozen'"):
        PVLFTrainer(make_model(), arguments(tmp_path, finetuning="both"), squares, processing_class=make_processor())
    chunked = arguments(tmp_path, loss_chunk_size=2)
    with pytest.raises(ValueError, match=r"loss_chunk_size=2: .* leave it out"):
        PVLFTrainer(make_model(), chunked, squares, processing_class=make_processor()).train()


@pytest.mark.slow
def test_it_learns_to_generate_what_the_caption_calls_for(squares, tmp_path):
    model = make_model(image_embed_scale=30.0, image_guidance=1.0, text_guidance=1.0, source_weight=0.0)
    settings = arguments(tmp_path, max_steps=150, per_device_train_batch_size=12, logging_steps=50)
    trainer = PVLFTrainer(model, settings, squares, processing_class=make_processor())
    before = hits(model, squares)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    assert before < 0.5 and hits(model, squares) > 0.8


def hits(model, triplets):
    """Share of queries whose nearest of the four squares is their target."""
    model.eval()
    processor, names = make_processor(), COLOURS[:4]
    images = {row["target_id"]: row["target"] for row in triplets}
    gallery = model.get_image_features(processor.process_targets([images[name] for name in names])["pixel_values"])
    inputs = processor.process_queries([row["reference"] for row in triplets], list(triplets["caption"]))
    nearest = (embeds(model, inputs) @ gallery.pooler_output.T).argmax(dim=1)
    return sum(names[n] == row["target_id"] for n, row in zip(nearest, triplets, strict=True)) / len(triplets)


def test_an_evaluation_is_repeatable(model):
    benchmark, processor = make_benchmark(), make_processor()
    first, second = (evaluate(model, processor, benchmark, batch_size=size, progress=False) for size in (1, 5))
    assert first.metrics == second.metrics and first.counts == {"queries": 5, "gallery": 9}


# The command and a checkpoint.


def test_the_recipe_is_one_command(tmp_path):
    recipe = ROOT / "train_scripts" / "configs" / "methods" / "compodiff-emoji.yaml"
    model_args, data_args, args = parse_arguments([str(recipe), f"--output_dir={tmp_path}"])
    model, processor = model_args.build()
    assert type(model) is CompoDiffModel and type(processor) is CompoDiffProcessor
    assert (model.config.denoiser_layers, model.config.text_guidance, args.finetuning) == (4, 3.0, "frozen")
    assert data_args.dataset == "emoji-cir" and model.config.negative_ids == processor.negative["negative_ids"]
    wrong, *_ = parse_arguments([str(recipe), f"--output_dir={tmp_path}", "--num_prompts=5"])
    with pytest.raises(ValueError, match=r"\['num_prompts'\]: compodiff has no such setting"):
        wrong.build()
    wrong, *_ = parse_arguments(["--model=x", f"--output_dir={tmp_path}", "--settings", "text_encoder=y"])
    with pytest.raises(ValueError, match=r"\['text_encoder'\]: pvlf has no such setting"):
        wrong.build()


STRANGER = """
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

root = Path(sys.argv[1])
model = AutoModel.from_pretrained(root / "model", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(root / "model", trust_remote_code=True)
assert "pvlf_hf" not in sys.modules
query = model.get_query_features(**processor.process_queries(Image.open(root / "picture.png"), "is red"))
save_file({"query": query.pooler_output.contiguous()}, root / "outputs.safetensors")
"""

TRAVELLING = {
    f"{name}_compodiff.py" for name in "configuration denoiser modeling objective processing sampler".split()
}


@pytest.mark.slow
def test_a_saved_model_loads_with_and_without_the_package(tmp_path):
    root = tmp_path / "checkpoints"
    model, processor = make_model(), make_processor()
    for part in (model, processor):
        part.save_pretrained(root / "model")
    files = {path.name for path in (root / "model").glob("*.py")}
    assert TRAVELLING <= files and "modeling_pvlf.py" not in files
    config = json.loads((root / "model" / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_compodiff.CompoDiffModel"
    loaded, again = AutoModel.from_pretrained(root / "model"), AutoProcessor.from_pretrained(root / "model")
    assert type(loaded) is CompoDiffModel and type(again) is CompoDiffProcessor
    expected = embeds(loaded, again.process_queries(PICTURE, "is red"))
    PICTURE.save(root / "picture.png")
    run_without_package(STRANGER, tmp_path, root)
    error = rounding(query_of, loaded, dict(again.process_queries(PICTURE, "is red")))["query"]
    within(load_file(root / "outputs.safetensors")["query"], expected, error)


def test_the_package_exports_it():
    assert {"CompoDiffConfig", "CompoDiffModel", "CompoDiffProcessor", "convert_compodiff"} <= {*pvlf_hf.__all__}
