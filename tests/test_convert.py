"""Converters: every parameter name at real size on the meta device, outputs of tiny checkpoints as the reference."""

import json
import pickle
import re

import pytest
import torch
from error_bounds import dot_error
from reference import CONFIGS, FIXTURES, TOLERANCES, reference_inputs, reference_io
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoProcessor,
    BlipConfig,
    BlipForImageTextRetrieval,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
)
from typer.testing import CliRunner

from pvlf_hf import PVLFModel, PVLFProcessor
from pvlf_hf.checkpoints.convert import (
    blip_from_salesforce,
    convert_salesforce_blip,
    convert_transagg,
    pvlf_from_transagg,
    resize_positions,
)
from pvlf_hf.models.configuration_pvlf import BLIP_BASE
from pvlf_hf_cli import app

HEADS = {"blip": {"vision_heads": 4, "text_heads": 4}, "clip": {}}


def transagg_tensors(backbone):
    return load_file(FIXTURES / f"transagg_{backbone}_tiny.safetensors")


def salesforce_tensors():
    """Return the tensors of Salesforce's BLIP, which TransAgg's file holds unchanged under a prefix."""
    prefix = "pretrained_model."
    tensors = transagg_tensors("blip")
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def meta_tensors(file, prefix=""):
    """Return meta tensors with the names and shapes of a real checkpoint, and those that TransAgg adds."""
    facts = json.loads((FIXTURES / file).read_text())

    def make(keys):
        return {n: torch.empty(s, dtype=getattr(torch, dtype), device="meta") for n, (s, dtype) in keys.items()}

    named = {prefix + name: tensor for name, tensor in make(facts["keys"]).items()}
    return facts, named, make(facts["transagg"]["extra_keys"])


def write_tokenizer(backbone, path, missing=0):
    """Save a tokenizer with as many tokens as the tiny checkpoint, or with `missing` fewer."""
    size = CONFIGS[backbone]["text_config"]["vocab_size"] - missing
    if backbone == "blip":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", *(f"word{i}" for i in range(size - 8))]
        path /= "vocab.txt"  # [DEC] and [ENC] are not in BERT's vocabulary
        path.write_text("\n".join(words))
    else:
        tokens = [*"der", *(f"{c}</w>" for c in "der"), *(f"word{i}" for i in range(size - 8))]
        vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
        CLIPTokenizer(vocab=vocab, merges=[]).save_pretrained(path)
    return path


def shapes(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def count(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def test_every_weight_of_the_released_blip_is_converted(caplog):
    facts, tensors, _ = meta_tensors("salesforce_blip_keys.json")
    model = blip_from_salesforce(tensors)
    counts = [int(number) for number in re.findall(r"\((\d+) tensors\)", caplog.text)]
    assert len(counts) == 3 and sum(counts) + len(model.state_dict()) == len(tensors) == facts["n_keys"]
    with torch.device("meta"):
        expected = BlipForImageTextRetrieval(BlipConfig(**BLIP_BASE))
    assert shapes(model.state_dict()) == shapes(expected.state_dict())
    assert count(model.state_dict()) == facts["n_parameters_without_momentum"] - 1  # the temperature
    assert model.config.to_dict() == expected.config.to_dict()


@pytest.mark.parametrize(
    ("file", "vl_model", "vl_config", "left_over", "fusion_parameters"),
    [
        ("salesforce_blip_keys.json", BlipForImageTextRetrieval, BlipConfig(**BLIP_BASE), "itm_head|cross", 4_206_339),
        ("openai_clip_vitb32_keys.json", CLIPModel, CLIPConfig(), "logit_scale", 12_602_883),
    ],
)
def test_every_weight_of_the_released_transagg_is_converted(file, vl_model, vl_config, left_over, fusion_parameters):
    _, tensors, added = meta_tensors(file, "module.pretrained_model.")
    model = pvlf_from_transagg({**tensors, **{f"module.{name}": tensor for name, tensor in added.items()}})
    with torch.device("meta"):
        expected = {
            f"backbone.{name}": shape
            for name, shape in shapes(vl_model(vl_config).state_dict()).items()
            if not re.search(left_over, name)
        }
    weights = model.state_dict()
    towers = {name: tensor for name, tensor in weights.items() if name.startswith("backbone.")}
    assert shapes(towers) == expected
    assert count(weights) - count(towers) == count(added) == fusion_parameters
    for side in ("text_config", "vision_config"):
        ours, theirs = (getattr(config, side).to_dict() for config in (model.config.vl_config, vl_config))
        free = {"is_decoder", "pad_token_id", "_attn_implementation"}
        assert {k: v for k, v in ours.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}
    assert (model.config.num_prompts, model.config.prompt_depth, model.config.gamma) == (1, 1, 0.0)
    assert (model.config.fusion_layers, model.config.fusion_ffn_size) == (2, 2048)
    assert model.config.text_padding == "masked"


@pytest.mark.parametrize(
    ("backbone", "prefix", "everywhere", "suffix"),
    [
        ("blip", "pretrained_model.", "", ".pth"),
        ("blip", "blip_model.", "", ".pt"),
        ("blip", "pretrained_model.", "module.", ".safetensors"),
        ("clip", "pretrained_model.", "", ".pth"),
        ("clip", "pretrained_model.", "module.", ".pth"),
    ],
)
@torch.no_grad()
def test_transagg_gives_the_references_outputs(backbone, prefix, everywhere, suffix, tmp_path):
    tensors = {
        everywhere + name.replace("pretrained_model.", prefix): tensor
        for name, tensor in transagg_tensors(backbone).items()
    }
    file, folder = tmp_path / f"model{suffix}", tmp_path / "converted"
    (save_file if suffix == ".safetensors" else torch.save)(tensors, file)
    (tmp_path / "tokenizer").mkdir()
    tokenizer = write_tokenizer(backbone, tmp_path / "tokenizer")
    convert_transagg(file, folder, tokenizer=tokenizer, **HEADS[backbone])

    model, io, inputs = AutoModel.from_pretrained(folder), reference_io(backbone), reference_inputs(backbone)
    assert type(model) is PVLFModel
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.float32}
    output = model(**inputs)
    torch.testing.assert_close(output.query_embeds, io["query_bool"], atol=TOLERANCES["query"], rtol=0)
    torch.testing.assert_close(output.similarity, io["logits_bool"] / 100, atol=TOLERANCES["similarity"], rtol=0)
    weights = io["mix_weights_bool"].flip(1)
    torch.testing.assert_close(output.aggregation_weights, weights, atol=TOLERANCES["mix_weights"], rtol=0)
    torch.testing.assert_close(output.loss, io["loss_bool"][0], atol=TOLERANCES["loss"], rtol=0)

    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor) is PVLFProcessor and processor.max_text_length == {"blip": 35, "clip": 77}[backbone]
    image = torch.zeros(3, 40, 40, dtype=torch.uint8)
    assert model(**processor(images=image, text="red", target_images=image)).similarity.shape == (1, 1)


@torch.no_grad()
def test_salesforce_blip_gives_the_references_features(tmp_path):
    torch.save({"model": salesforce_tensors(), "epoch": 5}, tmp_path / "blip.pth")
    tokenizer = write_tokenizer("blip", tmp_path)
    convert_salesforce_blip(tmp_path / "blip.pth", tmp_path / "converted", tokenizer, **HEADS["blip"])

    io, inputs = reference_io("blip"), reference_inputs("blip")
    model = PVLFModel.from_vl_pretrained(tmp_path / "converted")
    image = model.get_image_features(inputs["pixel_values"]).last_hidden_state
    text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    torch.testing.assert_close(image, io["image_tokens_ref"], atol=TOLERANCES["image_tokens"], rtol=0)
    torch.testing.assert_close(text, io["text_tokens"], atol=TOLERANCES["text_tokens"], rtol=0)

    blip, theirs = BlipForImageTextRetrieval.from_pretrained(tmp_path / "converted"), salesforce_tensors()
    for name in ("itm_head.weight", "text_encoder.encoder.layer.1.crossattention.self.key.weight"):
        assert blip.state_dict()[name].equal(theirs[name])  # all of BLIP, including the parts that PVLF does not use
    assert AutoProcessor.from_pretrained(tmp_path / "converted").image_processor.size["height"] == 32
    processor = PVLFProcessor.from_vl_pretrained(tmp_path / "converted")
    assert processor(text="red")["input_ids"].tolist() == [[2, 5, 3]]
    assert processor.image_processor.crop_size["height"] == 32


@pytest.mark.parametrize("side", [3, 6])
def test_positions_are_interpolated_as_by_salesforce(side):
    io = reference_io("blip")
    given = io["pos_embed_interp.in_4x4"]
    resized = resize_positions(given, side)
    # A sum of 16 terms whose weights are products of two, with magnitudes of at most 1.375 in total; both are rounded.
    error = 2 * dot_error(16 + 8) * 1.375**2 * given.abs().max().item()
    torch.testing.assert_close(resized, io[f"pos_embed_interp.out_{side}x{side}"], atol=error, rtol=0)


@torch.no_grad()
def test_image_size_can_be_changed(tmp_path):
    save_file(salesforce_tensors(), tmp_path / "blip.safetensors")
    convert_salesforce_blip(tmp_path / "blip.safetensors", tmp_path / "converted", image_size=48, **HEADS["blip"])
    model = PVLFModel.from_vl_pretrained(tmp_path / "converted")
    positions = model.backbone.vision_model.embeddings.position_embedding
    assert positions.equal(resize_positions(salesforce_tensors()["visual_encoder.pos_embed"], 6))
    assert model.get_image_features(torch.zeros(1, 3, 48, 48)).last_hidden_state.shape == (1, 37, 32)


class Evil:
    """Object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("store", [torch.save, lambda what, file: file.write_bytes(pickle.dumps(what, protocol=2))])
@pytest.mark.parametrize("convert", [convert_salesforce_blip, convert_transagg])
def test_checkpoints_cannot_run_code(store, convert, tmp_path):
    store({"model": {"temp": Evil(tmp_path / "ran")}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"evil\.pth: cannot be read as tensors alone.*save_file"):
        convert(tmp_path / "evil.pth", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.pth"]
    pickle.loads(pickle.dumps(Evil(tmp_path / "ran"))).close()
    assert (tmp_path / "ran").exists()  # shows that an unrestricted load does run it


def half(file):
    torch.save(salesforce_tensors(), file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "store", "message"),
    [
        ("half.pth", half, "half.pth: cannot be read as tensors alone"),
        ("half.safetensors", half, "half.safetensors: cannot be read as tensors alone"),
        ("random.pt", lambda file: file.write_bytes(bytes(range(256)) * 9), "random.pt: cannot be read"),
        ("empty.pt", lambda file: file.touch(), "empty.pt: cannot be read"),
        ("tensor.pt", lambda file: torch.save(torch.zeros(3), file), "holds a Tensor, not a state dict"),
        ("run.pt", lambda file: torch.save({"state_dict": {}, "epoch": 1}, file), "'state_dict', 'epoch'.* not named"),
        ("other.pt", lambda file: torch.save({"fc.weight": torch.zeros(3)}, file), "other.pt: .*(lacks|not a TransA)"),
        ("none.pt", lambda file: None, "none.pt: no such file"),
    ],
)
@pytest.mark.parametrize("convert", [convert_salesforce_blip, convert_transagg])
def test_files_that_are_not_checkpoints_raise(convert, name, store, message, tmp_path):
    store(tmp_path / name)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def without(*names):
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(names)}


def with_more(name, *shape):
    return lambda tensors: {**tensors, name: torch.zeros(shape)}


def as_captioning(tensors):
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("visual_encoder.")}
    return {**kept, "text_decoder.bert.embeddings.word_embeddings.weight": torch.zeros(99, 20)}


LAST_BIAS = "text_encoder.encoder.layer.1.output.dense.bias"
SALESFORCE = [
    (as_captioning, {}, "lacks text_encoder.*must be a retrieval checkpoint"),
    (without("vision_proj.weight"), {}, "lacks vision_proj.weight.*must be a retrieval checkpoint"),
    (without(LAST_BIAS), {}, f"lacks 1 weights, first .'{LAST_BIAS}'"),
    (with_more("text_encoder.pooler.dense.weight", 20, 20), {}, "has unknown 1 weights, .*text_encoder.pooler.dense"),
    (with_more("sep_token", 1, 1, 32), {}, "has unknown 1 weights, first .'sep_token'"),
    (with_more("module.temp"), {}, "module.temp and another weight both become temp"),
    (with_more(LAST_BIAS, 21), {}, f"{LAST_BIAS} is .21,. but the other weights call for .20,."),
    (with_more("visual_encoder.pos_embed", 1, 16, 24), {}, "16 image positions are not .CLS. and a square"),
    (dict, {"vision_heads": None}, "width 24 is not one of the released models': pass vision_heads"),
    (dict, {"text_heads": None}, "width 20 is not one of the released models': pass text_heads"),
    (dict, {"text_heads": 3}, "text_heads=3 does not divide the width 20"),
    (dict, {"image_size": 36}, "image_size=36 must be a multiple of the patch size 8"),
]


@pytest.mark.parametrize(("change", "settings", "message"), SALESFORCE)
def test_unfit_salesforce_checkpoints_raise(change, settings, message):
    with pytest.raises(ValueError, match=message):
        blip_from_salesforce(change(salesforce_tensors()), **{**HEADS["blip"], **settings})


@pytest.mark.parametrize("backbone", ["blip", "clip"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("combiner_layer.weight"), "not a TransAgg checkpoint.*convert_salesforce_blip"),
        (without("cls_token", "visual.class_embedding"), "not a TransAgg checkpoint"),
        (without("weighted_layer.bias"), "lacks 1 weights, first .'aggregation.weights.bias'"),
        (with_more("weighted_layer.bias", 4), "aggregation.weights.bias is .4,."),
        (with_more("sep_token", 1, 2, 32), "fusion.prompts is .1, 2, 32."),
        (with_more("fusion.layers.3.norm1.bias", 32), "lacks 31 weights, first .'fusion.layers.2.linear1.bias"),
        (with_more("pretrained_model.extra", 3), "has unknown 1 weights, first .'backbone.extra'"),
    ],
)
def test_unfit_transagg_checkpoints_raise(backbone, change, message):
    with pytest.raises(ValueError, match=message):
        pvlf_from_transagg(change(transagg_tensors(backbone)), **HEADS[backbone])


@pytest.mark.parametrize("backbone", ["blip", "clip"])
def test_other_vocabularies_and_full_folders_raise(backbone, tmp_path):
    torch.save(transagg_tensors(backbone), tmp_path / "model.pth")
    (tmp_path / "tokenizer").mkdir()
    tokenizer = write_tokenizer(backbone, tmp_path / "tokenizer", missing=1)
    for name, message in ((tokenizer, "has .* tokens but the checkpoint"), (tmp_path / "no/t", "cannot|has . tokens")):
        with pytest.raises(ValueError, match=f"{name.name} {message}"):
            convert_transagg(tmp_path / "model.pth", tmp_path / "out", tokenizer=name, **HEADS[backbone])
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert_transagg(tmp_path / "model.pth", tmp_path, **HEADS[backbone])


def load_as_printed(*command):
    """Run `pvlf-hf convert` and what it prints; return model and processor."""
    done = CliRunner().invoke(app, ["convert", *map(str, command)])
    assert done.exit_code == 0, done.output
    names = {}
    exec("\n".join(line.strip() for line in done.stdout.partition("Load it with:")[2].splitlines()), names)
    return names["model"], names["processor"]


def test_convert_command_prints_how_to_load_the_result(tmp_path):
    def convert(*arguments):
        done = CliRunner().invoke(app, ["convert", *map(str, arguments)])
        assert done.exit_code == 0, done.output
        return done.stdout

    torch.save({"model": salesforce_tensors()}, tmp_path / "blip.pth")
    torch.save(transagg_tensors("clip"), tmp_path / "clip.pt")
    heads = ["--vision_heads", "4", "--text_heads", "4", "--tokenizer", str(write_tokenizer("blip", tmp_path))]
    output = convert("blip", tmp_path / "blip.pth", "--output_dir", tmp_path / "b", "--image_size", 16, *heads)
    assert (
        "model.safetensors" in output and f'processor = PVLFProcessor.from_vl_pretrained("{tmp_path / "b"}")' in output
    )
    output = convert("transagg", tmp_path / "clip.pt", "--output-dir", tmp_path / "c")
    assert f'model = AutoModel.from_pretrained("{tmp_path / "c"}")' in output and "pass --tokenizer" in output
    names = {}
    exec("\n".join(line.strip() for line in output.partition("Load it with:")[2].splitlines()[1:3]), names)
    assert type(names["model"]) is PVLFModel
