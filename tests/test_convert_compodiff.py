"""Converter of CompoDiff: every name at real size on the meta device, whole files of tiny sizes."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from diffused import FIXTURES, TOLERANCES, conditions, denoiser_tensors, io, reference_config, within
from dual_encoders import tokenizer_of
from safetensors.torch import load_file, save_file
from test_convert import load_as_printed
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

from pvlf_hf import CompoDiffConfig, CompoDiffModel, CompoDiffProcessor, convert_compodiff
from pvlf_hf.checkpoints.compodiff_weights import LICENCE, PREFIX, read_denoiser, settings_of, translate_denoiser
from pvlf_hf.models.denoiser_compodiff import Denoiser

KEYS = json.loads((FIXTURES / "compodiff_keys.json").read_text())


def real_tensors():
    """The released file's names and shapes, without prefix."""
    return {
        PREFIX.sub("", name): torch.empty(shape, dtype=getattr(torch, dtype), device="meta")
        for name, (shape, dtype) in KEYS["keys"].items()
    }


def test_every_name_of_the_real_file():
    tensors = real_tensors()
    assert len(tensors) == 222
    weights = translate_denoiser(tensors, CompoDiffConfig().vl_config)
    parameters = KEYS["parameters"] - 16  # the rotary frequencies, which all layers share
    assert sum(weight.numel() for weight in weights.values()) == parameters
    with torch.device("meta"):
        expected = Denoiser(CompoDiffConfig()).state_dict()
    assert {n: w.shape for n, w in weights.items()} == {n: w.shape for n, w in expected.items()}
    assert settings_of(tensors) == {
        "mask_size": 64,
        "head_width": 64,
        "denoiser_heads": 16,
        "cross_heads": 8,
        "denoiser_layers": 12,
        "timesteps": 1000,
    }


def test_a_missing_or_unknown_weight_is_named():
    tensors, vl_config = denoiser_tensors(), reference_config()
    for name in tensors:
        with pytest.raises(ValueError, match=r"it lacks .*not a (whole )?denoiser of CompoDiff"):
            translate_denoiser({n: t for n, t in tensors.items() if n != name}, vl_config)
    with pytest.raises(ValueError, match=r"it lacks 1 weights: \['layers.1.feed_forward.norm.weight'\]"):
        translate_denoiser({n: t for n, t in tensors.items() if n != "net.transformer.layers.1.2.0.g"}, vl_config)
    with pytest.raises(ValueError, match=r"it has unknown 1 weights: \['net.extra.weight'\] \(its own names\)"):
        translate_denoiser({**tensors, "net.extra.weight": torch.empty(1)}, vl_config)


def test_a_denoiser_of_other_encoders_is_refused_with_both_widths():
    tensors = real_tensors()
    for towers, message in (
        ({"projection_dim": 512, "text_config": {"hidden_size": 1280}}, r"image embeddings of width 768, .* have 512"),
        ({"projection_dim": 768, "text_config": {"hidden_size": 768}}, r"text tokens of width 1280, .* have 768"),
    ):
        with pytest.raises(ValueError, match=message):
            translate_denoiser(tensors, CLIPConfig(**towers))


def test_what_is_left_out_is_checked():
    vl_config = reference_config()
    for name in ("noise_scheduler.alphas_cumprod", "net.transformer.layers.1.0.rotary_emb.freqs"):
        changed = {**denoiser_tensors(), name: denoiser_tensors()[name] + 0.01}
        with pytest.raises(ValueError, match=f"{name} is not what this model computes"):
            translate_denoiser(changed, vl_config)
    shape = {**denoiser_tensors(), "net.transformer.layers.0.0.to_kv.weight": torch.zeros(15, 16)}
    with pytest.raises(ValueError, match=r"layers.0.0.to_kv.weight is \(15, 16\) but .* \(16, 16\)"):
        translate_denoiser(shape, vl_config)


# Whole files.


@pytest.fixture(scope="module")
def towers(tmp_path_factory):
    """A CLIP of the fixtures' image width, and one of their text width, tokenizer included."""
    folders = []
    small = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    vision = {**small, "hidden_size": 16, "image_size": 16, "patch_size": 8}
    text = {**small, "vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 6}
    for name, width in (("image", 16), ("text", 1280)):
        config = CLIPConfig(projection_dim=16, vision_config=vision, text_config={**text, "hidden_size": width})
        folder = tmp_path_factory.mktemp(name)
        CLIPModel(config).save_pretrained(folder)
        tokenizer_of("clip").save_pretrained(folder)
        folders.append(str(folder))
    return folders


@torch.no_grad()
def test_a_file_becomes_a_folder_that_samples_as_the_reference(towers, tmp_path, caplog):
    tensors = load_file(FIXTURES / "compodiff_tiny.safetensors")
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    for number, file in enumerate((FIXTURES / "compodiff_tiny.safetensors", tmp_path / "pytorch_model.bin")):
        convert_compodiff(file, *towers, tmp_path / f"ours{number}")
    assert LICENCE in caplog.text
    folder = tmp_path / "ours1"
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.negative_ids == processor.negative["negative_ids"] and processor.max_text_length == 6
    text, _, image, mask = conditions()
    memory = model.denoiser.read(text, image, mask)
    within(model.denoiser(io()["x_t"], io()["t"], memory), io()["pred"], TOLERANCES["pred"])
    query = model.get_query_features(**processor.process_queries(torch.zeros(3, 40, 40, dtype=torch.uint8), "red"))
    assert query.pooler_output.isfinite().all()
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert_compodiff(FIXTURES / "compodiff_tiny.safetensors", *towers, folder)


def test_convert_command_writes_a_model_that_loads_as_printed(towers, tmp_path):
    command = ["compodiff", FIXTURES / "compodiff_tiny.safetensors", "--image-encoder", towers[0]]
    model, processor = load_as_printed(*command, "--text-encoder", towers[1], "--output-dir", tmp_path / "ours")
    assert type(model) is CompoDiffModel and type(processor) is CompoDiffProcessor


def test_towers_of_another_width_are_refused_with_the_file_named(towers, tmp_path):
    file = FIXTURES / "compodiff_tiny.safetensors"
    with pytest.raises(
        ValueError, match=r"compodiff_tiny.safetensors: .* text tokens of width 1280, .* have 16: pass"
    ):
        convert_compodiff(file, towers[0], towers[0], tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_nothing_in_a_file_is_run(towers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({**denoiser_tensors(), "hyper": Harmful()}, "harmful.bin")
    Path("pickle.bin").write_bytes(pickle.dumps(Harmful(), protocol=2))
    Path("damaged.safetensors").write_bytes(b"PK\x03\x04")
    for name in ("harmful.bin", "pickle.bin", "damaged.safetensors"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as tensors alone"):
            convert_compodiff(name, *towers, "ours")
    torch.save([1], "list.bin")
    torch.save({"epoch": 3}, "epoch.bin")
    save_file({"other": torch.zeros(1)}, "other.safetensors")
    for name, message in (
        ("list.bin", "holds a list"),
        ("epoch.bin", r"\['epoch'\] are no tensors: pass the state dict"),
        ("other.safetensors", r"it lacks .*: not a denoiser of CompoDiff"),
        ("none.bin", "none.bin: no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_compodiff(name, *towers, "ours")
    assert not Path("harmed").exists() and not Path("ours").exists()


def test_prefixes_are_dropped(tmp_path):
    tensors = load_file(FIXTURES / "compodiff_tiny.safetensors")
    save_file({f"module.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "module.safetensors")
    assert read_denoiser(tmp_path / "module.safetensors").keys() == denoiser_tensors().keys()
