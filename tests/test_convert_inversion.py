"""Converters of textual inversion: every parameter name at real size on the meta device, and tiny complete files."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from inverted import (
    FIXTURES,
    TOLERANCES,
    clip_tensors,
    io_of,
    make_tokenizer,
    mapping_tensors,
    query_of,
    tiny_clip,
    within,
)
from safetensors.torch import save_file
from test_convert import load_as_printed
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel
from typer.testing import CliRunner

from pvlf_hf import InversionModel
from pvlf_hf.checkpoints.inversion_weights import (
    LICENCES,
    WRAPPERS,
    check_method,
    convert_inversion,
    read_mapping,
    translate_mapping,
)
from pvlf_hf_cli import app

KEYS = json.loads((FIXTURES / "checkpoint_keys.json").read_text())
TOWERS = {
    "ViT-B/32": (512, 512, 768),
    "ViT-L/14": (768, 768, 1024),
    "ViT-H/14": (1024, 1024, 1280),
    "ViT-G/14": (1280, 1280, 1664),
}
"""Joint width, width of token embeddings and of the image encoder."""

RELEASED = [
    (method, tower, WRAPPERS[method])
    for method in WRAPPERS
    for tower in KEYS["searle" if method == "lincir" else method]
    if ("LinCIR" in tower) == (method == "lincir")
]


def meta_tensors(method, tower, wrapper):
    shapes = KEYS["searle" if method == "lincir" else method][tower][wrapper]
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def real_clip(tower):
    joint, text, vision = TOWERS[tower.split()[0]]
    sides = [{"hidden_size": width, "num_attention_heads": 8} for width in (text, vision)]
    return CLIPConfig(projection_dim=joint, text_config=sides[0], vision_config=sides[1])


@pytest.mark.parametrize(("method", "tower", "wrapper"), RELEASED)
def test_every_weight_of_the_released_files_is_converted(method, tower, wrapper):
    tensors = meta_tensors(method, tower, wrapper)
    facts = KEYS["searle" if method == "lincir" else method][tower]
    settings, weights = translate_mapping(tensors, real_clip(tower), method)
    parameters = facts.get("parameters_img2text", facts.get("parameters"))
    assert sum(weight.numel() for weight in weights.values()) == parameters and len(weights) == len(tensors)
    joint = TOWERS[tower.split()[0]][0]
    assert settings["mapping_width"] == (512 if "img2text" in wrapper else 4 * joint)
    assert settings["mapping_layers"] == 2
    if method == "context_i2w":
        names = ("latents", "extractor_layers", "extractor_heads", "extractor_head_width")
        assert tuple(settings[name] for name in names) == (4, 6, 8, 64)


@pytest.mark.parametrize(("method", "tower", "wrapper"), RELEASED)
def test_missing_or_unknown_weights_raise_with_their_name(method, tower, wrapper):
    tensors, clip = meta_tensors(method, tower, wrapper), real_clip(tower)
    for name in tensors:
        with pytest.raises(ValueError, match=r"it lacks 1 weights: \['"):
            translate_mapping({n: t for n, t in tensors.items() if n != name}, clip, method, 8)
    with pytest.raises(ValueError, match=r"it has unknown 1 weights: \['extra.weight'\]"):
        translate_mapping({**tensors, "extra.weight": torch.empty(1, device="meta")}, clip, method)


@pytest.mark.parametrize("method", WRAPPERS)
def test_mapping_network_of_another_clip_raises_with_both_widths(method):
    wrapper = WRAPPERS[method]
    tower = "ViT-L/14 (LinCIR large)" if method == "lincir" else "ViT-L/14"
    with pytest.raises(ValueError, match=r"of width 768, but those of the backbone have 512: pass the CLIP"):
        translate_mapping(meta_tensors(method, tower, wrapper), real_clip("ViT-B/32"), method)


def test_weights_of_another_shape_raise_with_their_name():
    tensors = meta_tensors("searle", "ViT-B/32", "Phi")
    tensors["layers.3.weight"] = torch.empty(2048, 2047, device="meta")
    with pytest.raises(ValueError, match=r"layers.3.weight is \(2048, 2047\) but .* \(2048, 2048\)"):
        translate_mapping(tensors, real_clip("ViT-B/32"), "searle")


# Complete files.


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Return a CLIP folder for each method, tokenizer included."""
    folders = {}
    for method in ("searle", "context_i2w"):
        vl_config, weights, _ = tiny_clip(method)
        clip = CLIPModel(vl_config)
        clip.load_state_dict(weights, strict=False)
        folders[method] = tmp_path_factory.mktemp(method)
        clip.save_pretrained(folders[method])
        make_tokenizer().save_pretrained(folders[method])
    return lambda method: str(folders["context_i2w" if method == "context_i2w" else "searle"])


def save(tensors, path, method, clip=None):
    """Save a file as the method's code does, with DataParallel's prefix if the released file has it."""
    if method in ("searle", "lincir"):
        torch.save({"epoch": 3, "Phi": tensors}, path)
        return path
    tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    clip = {f"module.{name}": tensor for name, tensor in (clip or clip_tensors(method)).items()}
    state = {
        "epoch": 3,
        "name": "run",
        "state_dict": clip,
        "state_dict_img2text": tensors,
        "optimizer": {"state": {0: {}}},
    }
    torch.save(state, path)
    return path


@torch.no_grad()
@pytest.mark.parametrize("method", WRAPPERS)
def test_converted_checkpoint_gives_the_references_queries(method, clips, tmp_path, caplog):
    file = save(mapping_tensors(method), tmp_path / "released.pt", method)
    heads = 2 if method == "context_i2w" else None
    convert_inversion(file, method, clips(method), tmp_path / "ours", heads)
    assert LICENCES[method] in caplog.text and "differs from the backbone" not in caplog.text
    model, processor = AutoModel.from_pretrained(tmp_path / "ours"), AutoProcessor.from_pretrained(tmp_path / "ours")
    assert (model.config.method, processor.method) == (method, method)
    assert model.config.placeholder_id == processor.placeholder_id
    io = io_of(method)
    ids = io["cirr_input_ids" if "cirr_input_ids" in io else "query_input_ids"]
    within(model.get_query_features(io["pixel_values"], ids).pooler_output, query_of(method), atol=TOLERANCES["query"])
    if method in ("pic2word", "context_i2w"):
        assert model.config.temperature == tiny_clip(method)[2]
    with pytest.raises(ValueError, match="is not an empty folder"):
        convert_inversion(file, method, clips(method), tmp_path / "ours", heads)


def test_convert_command_writes_a_model_that_loads_as_printed(clips, tmp_path):
    file = save(mapping_tensors("lincir"), tmp_path / "lincir_large.pt", "lincir")
    command = ["inversion", str(file), "--backbone", clips("lincir"), "--output-dir"]
    model, processor = load_as_printed(*command, tmp_path / "ours", "--method", "lincir")
    assert type(model) is InversionModel and processor.method == "lincir"
    done = CliRunner().invoke(app, ["convert", *command, str(tmp_path / "other"), "--method", "pic2word"])
    assert "holds 'Phi', so it is a file of lincir or searle, not of pic2word" in done.output


def test_a_bare_state_dict_is_converted(clips, tmp_path):
    save_file(mapping_tensors("lincir"), tmp_path / "phi.safetensors")
    convert_inversion(tmp_path / "phi.safetensors", "lincir", clips("lincir"), tmp_path / "ours")
    torch.save(mapping_tensors("lincir"), tmp_path / "phi.pt")
    weights, clip = read_mapping(tmp_path / "phi.pt", "lincir")
    assert weights.keys() == mapping_tensors("lincir").keys() and not clip


def test_a_clip_that_differs_from_the_backbone_is_reported(clips, tmp_path, caplog):
    changed = clip_tensors("pic2word")
    changed["ln_final.bias"] = changed["ln_final.bias"] + 1
    file = save(mapping_tensors("pic2word"), tmp_path / "released.pt", "pic2word", changed)
    convert_inversion(file, "pic2word", clips("pic2word"), tmp_path / "ours")
    assert "differs from the backbone in 1 of" in caplog.text and "text_model.final_layer_norm.bias" in caplog.text
    del changed["ln_final.bias"]
    file = save(mapping_tensors("pic2word"), tmp_path / "cut.pt", "pic2word", changed)
    named = r"missing \['text_model.final_layer_norm.bias'\], unknown \[\], of another shape \[\]"
    with pytest.raises(ValueError, match=rf"cut.pt: the CLIP in it has other weights than the backbone \({named}\)"):
        convert_inversion(file, "pic2word", clips("pic2word"), tmp_path / "other")


class Harmful:
    def __reduce__(self):
        return Path.touch, (Path("harmed"),)


def test_conversion_runs_no_code_of_the_file(clips, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"Phi": mapping_tensors("searle"), "hyper": Path("x")}, "path.pt")
    torch.save({"Phi": mapping_tensors("searle"), "hyper": Harmful()}, "harmful.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(Harmful(), protocol=2))
    Path("damaged.pt").write_bytes(b"PK\x03\x04")
    for name in ("path.pt", "harmful.pt", "pickle.pt", "damaged.pt"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read as tensors alone"):
            convert_inversion(name, "searle", clips("searle"), "ours")
    assert not Path("harmed").exists() and not Path("ours").exists()


def test_files_of_another_method_are_refused(clips, tmp_path):
    phi = save(mapping_tensors("searle"), tmp_path / "phi.pt", "searle")
    mlp = save(mapping_tensors("pic2word"), tmp_path / "mlp.pt", "pic2word")
    context = save(mapping_tensors("context_i2w"), tmp_path / "context.pt", "context_i2w")
    for file, method, message in (
        (phi, "pic2word", r"phi.pt: holds 'Phi', so it is a file of lincir or searle, not of pic2word"),
        (mlp, "searle", r"holds 'state_dict_img2text', so it is a file of context_i2w or pic2word, not of searle"),
        (context, "pic2word", r"context.pt: .*(of width 64|has unknown)"),
        (mlp, "context_i2w", r"mlp.pt: it lacks"),
        (tmp_path / "none.pt", "searle", r"no such file"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_inversion(file, method, clips(method), tmp_path / "ours")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    for name, message in (
        ("list.pt", "holds a list"),
        ("epoch.pt", r"\['epoch'\] are no tensors, and there is no 'Phi'"),
    ):
        with pytest.raises(ValueError, match=message):
            convert_inversion(tmp_path / name, "searle", clips("searle"), tmp_path / "ours")
    with pytest.raises(ValueError, match=r"method='palavra': weights were released for"):
        check_method("palavra")
