"""Checkpoints of every released version reproduce their outputs; `save_checkpoints.py` makes them (`fixtures/`)."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pvlf_hf import check_golden, write_golden

TESTS = Path(__file__).parent
SAVED = sorted(TESTS.glob("fixtures/checkpoint-*/*"))
PUBLISHED = TESTS.parent / "model_cards/pvlf-emoji-tiny"


@pytest.mark.reliability(
    8,
    "Checkpoints saved by every version so far, on BLIP and CLIP, load and reproduce their embeddings",
    broken=("src/pvlf_hf/models/fusion_pvlf.py", "cat([mlp_image, mlp_text]", "cat([mlp_text, mlp_image]"),
)
def test_saved_checkpoints_reproduce_their_outputs(figure):
    assert [f"{folder.parent.name}/{folder.name}" for folder in SAVED][:2] == [
        "checkpoint-0.1.0/blip",
        "checkpoint-0.1.0/clip",
    ]
    for folder in SAVED:
        check_golden(folder)
    figure(", ".join(f"{folder.parent.name.removeprefix('checkpoint-')} {folder.name}" for folder in SAVED))


@pytest.mark.reliability(
    8,
    "The published checkpoint reproduces its golden embeddings; changed weights, another tokenizer and a "
    "missing golden file are detected",
    broken=(
        "src/pvlf_hf/models/interface_pvlf.py",
        "return F.normalize(features.float(), dim=-1)",
        "return features.float()",
    ),
)
def test_golden_embeddings_are_reproduced(tmp_path, figure):
    check_golden(PUBLISHED)
    folder = tmp_path / "copy"
    shutil.copytree(SAVED[0], folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: tensor.roll(1, -1) if name.endswith("prompts") else tensor for name, tensor in weights.items()}
    assert any(not torch.equal(weights[name], tensor) for name, tensor in changed.items())
    save_file(changed, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="copy: embeddings are off by .*'query_embeds': .*weights or settings"):
        check_golden(folder)
    write_golden(folder)
    check_golden(folder)
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"same"', '"semi"'))
    with pytest.raises(ValueError, match="copy: 'the same but with a red hat' is now .* and was .*the tokenizer"):
        check_golden(folder)
    (folder / "golden.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"golden.safetensors: no such file; the author of the weights"):
        check_golden(folder)
    figure("1 published, 3 changes noticed")
