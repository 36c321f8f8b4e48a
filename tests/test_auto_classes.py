"""The `Auto*` classes: with the package imported, and from a checkpoint folder alone where it is not installed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import run_without_package
from PIL import Image
from safetensors.torch import load_file
from tiny import BACKBONES, make_model, make_processor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor

import pvlf_hf
from pvlf_hf import PVLFConfig, PVLFImageProcessor, PVLFModel, PVLFProcessor

TRAVELLING = sorted(path.name for path in (Path(pvlf_hf.__file__).parent / "models").glob("*_pvlf.py"))
CAPTION = "the same face but with a red hat"

# Runs without the package, as on a machine that has only Transformers: the finder blocks its import.
STRANGER = """
import sys
try:
    import pvlf_hf
except ImportError:
    pass
else:
    raise SystemExit("the package is not hidden")

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor

root = Path(sys.argv[1])
image = Image.open(root / "image.png")
outputs = {}
for backbone in ("blip", "clip"):
    folder = root / backbone
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    image_processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        output = model(**processor(images=image, text=sys.argv[2], target_images=image))
    for name in ("query_embeds", "target_embeds", "similarity"):
        outputs[f"{backbone}.{name}"] = output[name].contiguous()
    outputs[f"{backbone}.pixel_values"] = image_processor(image, return_tensors="pt")["pixel_values"]
    model.save_pretrained(root / "again" / backbone)
    processor.save_pretrained(root / "again" / backbone)
save_file(outputs, root / "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Return a folder with a checkpoint of model and processor for each backbone, and an image."""
    root = tmp_path_factory.mktemp("checkpoints")
    for backbone in BACKBONES:
        make_model(backbone).save_pretrained(root / backbone)
        make_processor().save_pretrained(root / backbone)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "image.png")
    return root


def outputs_of(folder, image):
    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=CAPTION, target_images=image)
    with torch.no_grad():
        output = model(**inputs)
    names = ("query_embeds", "target_embeds", "similarity")
    return {**{name: output[name] for name in names}, "pixel_values": inputs["pixel_values"]}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_auto_classes_return_package_classes(checkpoints, backbone):
    folder = checkpoints / backbone
    assert type(AutoConfig.from_pretrained(folder)) is PVLFConfig
    assert type(AutoModel.from_pretrained(folder)) is PVLFModel
    assert type(AutoProcessor.from_pretrained(folder)) is PVLFProcessor
    assert type(AutoImageProcessor.from_pretrained(folder)) is PVLFImageProcessor
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(folder))) is PVLFModel
    assert type(AutoConfig.for_model("pvlf", num_prompts=2)) is PVLFConfig


@pytest.mark.parametrize("backbone", BACKBONES)
def test_checkpoint_contains_its_code(checkpoints, backbone):
    folder = checkpoints / backbone
    assert len(TRAVELLING) == 13
    assert sorted(path.name for path in folder.glob("*.py")) == TRAVELLING
    for name in TRAVELLING:
        assert (folder / name).read_text() == (Path(pvlf_hf.__file__).parent / "models" / name).read_text()
    auto_map = {
        "AutoConfig": "configuration_pvlf.PVLFConfig",
        "AutoModel": "modeling_pvlf.PVLFModel",
    }
    assert json.loads((folder / "config.json").read_text())["auto_map"] == auto_map
    processor = json.loads((folder / "processor_config.json").read_text())
    assert processor["auto_map"]["AutoProcessor"] == "processing_pvlf.PVLFProcessor"
    image_processor = processor["image_processor"]
    assert image_processor["auto_map"]["AutoImageProcessor"] == "image_processing_pvlf.PVLFImageProcessor"


@pytest.mark.slow
def test_checkpoint_loads_without_the_package(checkpoints, tmp_path):
    run_without_package(STRANGER, tmp_path, checkpoints, CAPTION)
    theirs = load_file(checkpoints / "outputs.safetensors")
    image = Image.open(checkpoints / "image.png")
    for backbone in BACKBONES:
        again = checkpoints / "again" / backbone  # loaded without the package, saved there
        assert sorted(path.name for path in again.glob("*.py")) == TRAVELLING
        for folder in (checkpoints / backbone, again):
            for name, ours in outputs_of(folder, image).items():
                assert torch.equal(theirs[f"{backbone}.{name}"], ours), (folder, name)
