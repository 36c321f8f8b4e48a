"""Golden file of a checkpoint: a query and a target with their embeddings, to check the checkpoint on any machine.

`train_pvlf.py` writes it beside the trained model. Replay it after a download, or after a library was updated:

    check_golden("outputs/mine")
"""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from ..atomic_files import whole

GOLDEN = "golden.safetensors"

CAPTION = "the same but with a red hat"

TOLERANCE = 1e-4
"""Largest difference in an entry of a unit vector (our choice): float32 differs by some 1e-6 between machines."""


def write_golden(folder: str | Path) -> Path:
    """Write `golden.safetensors` beside a checkpoint: the embeddings of a drawn image and a caption.

    Args:
        folder: has model and processor, as `save_pretrained` leaves them.

    Returns:
        The file: `picture` uint8 `(48, 64, 3)`, `input_ids` int64 `(n,)`, `query_embeds` and `target_embeds` float32
        `(d,)`; the caption and the versions that made it in its metadata.
    """
    file = Path(folder, GOLDEN)
    image = draw_image()
    made_with = {name: version(name) for name in ("torch", "transformers", "pillow")}
    tensors = {"picture": image, **_outputs(folder, image, CAPTION)}
    with whole(file) as partial:
        save_file(tensors, partial, {"caption": CAPTION, **made_with})
    return file


def check_golden(folder: str | Path) -> dict[str, float]:
    """Replay a golden file, in float32 on the CPU.

    Args:
        folder: a checkpoint with its golden file.

    Returns:
        The largest differences of `query_embeds` and `target_embeds`.

    Raises:
        OSError: if there is no golden file.
        ValueError: if tokens differ, or embeddings by more than `TOLERANCE`.
    """
    file = Path(folder, GOLDEN)
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; the author of the weights makes it by write_golden(folder)")
    with safe_open(file, framework="pt") as opened:
        golden = {name: opened.get_tensor(name) for name in opened.keys()}  # `opened` has no items()
        made_with: Mapping[str, str] = opened.metadata()
    ours = _outputs(folder, golden["picture"], made_with["caption"])
    if not torch.equal(ours["input_ids"], golden["input_ids"]):
        raise ValueError(
            f"{folder}: {made_with['caption']!r} is now {ours['input_ids'].tolist()} and was "
            f"{golden['input_ids'].tolist()}: the tokenizer differs, or is loaded differently"
        )
    off = {name: (ours[name] - golden[name]).abs().max().item() for name in ("query_embeds", "target_embeds")}
    if not max(off.values()) <= TOLERANCE:  # also if one is NaN
        raise ValueError(
            f"{folder}: embeddings are off by {off}, more than {TOLERANCE}, from the published ones, made with "
            f"{dict(made_with)}: weights or settings differ, or a library computes differently"
        )
    return off


def draw_image() -> Tensor:
    """Draw uint8 `(48, 64, 3)` without symmetries, by integer arithmetic, so that all machines draw the same."""
    rows, columns = torch.meshgrid(torch.arange(48), torch.arange(64), indexing="ij")
    return torch.stack([rows * 5, columns * 4, (rows - 20) * (columns - 30) % 256], dim=-1).to(torch.uint8)


@torch.no_grad()
def _outputs(folder: str | Path, image: Tensor, caption: str) -> dict[str, Tensor]:
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(images=image, text=caption, target_images=image)
    output = model(**inputs, return_loss=False)
    return {
        "input_ids": inputs["input_ids"][0],
        "query_embeds": output.query_embeds[0],
        "target_embeds": output.target_embeds[0],
    }


__all__ = ["check_golden", "write_golden"]
