"""Learnable prompts inside the encoders: CoOp, VPT, IVLP and MaPLe for composed retrieval. Saved with checkpoints.

PVLF's own prompts are part of its fusion (`fusion_pvlf.py`). These stand in the text encoder, behind its first token,
or in the image encoder, behind all patches. Each of the first layers has prompts of its own, which replace the outputs
at their positions; later layers carry the last ones on. What leaves an encoder holds no prompts.

Shapes: `batch` rows, `n` tokens, `depth` layers with `p` prompts each, `w` an encoder's width.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .configuration_pvlf import PVLFConfig


class TowerPrompts(nn.Module):
    """The prompts of both encoders, as `config.prompt_location` and `config.prompt_coupling` say.

    Attributes:
        text_prompts: `(depth, p, w_text)`, or None.
        vision_prompts: `(depth, p, w_vision)`, or None where there are none, or they are made from `text_prompts`.
        couplings: MaPLe's Linear of each layer, from text to vision prompts, or None.
    """

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        text, vision = (c.hidden_size for c in (config.vl_config.text_config, config.vl_config.vision_config))
        depth = config.prompt_depth or 0
        self.text_prompts = self.vision_prompts = self.couplings = None
        if config.text_prompts:
            self.text_prompts = nn.Parameter(torch.empty(depth, config.text_prompts, text))
        self.is_tied = config.prompt_coupling == "tied"
        if config.prompt_coupling == "linear":
            self.couplings = nn.ModuleList([nn.Linear(text, vision) for _ in range(depth)])
        elif config.vision_prompts and not self.is_tied:
            self.vision_prompts = nn.Parameter(torch.empty(depth, config.vision_prompts, vision))

    def forward(self) -> tuple[Tensor | None, Tensor | None]:
        """Return the prompts of the text encoder `(depth, p, w_text)` and of the image encoder `(depth, p, w_vision)`.

        It is a `forward`, where weights that are offloaded come back.
        """
        text = self.text_prompts
        if self.is_tied:
            return text, text
        if self.couplings is None:
            return text, self.vision_prompts
        pairs = zip(self.couplings, text, strict=True)  # type: ignore[arg-type]  # MaPLe has text prompts
        return text, torch.stack([coupling(prompts) for coupling, prompts in pairs])


def insert_prompts(hidden_states: Tensor, prompts: Tensor, start: int) -> Tensor:
    """Insert prompts `(p, w)` into `(batch, n, w)` before position `start` -> `(batch, n + p, w)`."""
    rows = prompts.to(hidden_states.dtype).expand(hidden_states.shape[0], -1, -1)
    return torch.cat([hidden_states[:, :start], rows, hidden_states[:, start:]], dim=1)


def remove_prompts(hidden_states: Tensor, count: int, start: int) -> Tensor:
    """Remove the positions of prompts, see [`insert_prompts`]."""
    return torch.cat([hidden_states[:, :start], hidden_states[:, start + count :]], dim=1)


def pass_layers(
    layers: Iterable[nn.Module], hidden_states: Tensor, prompts: Tensor, start: int, **inputs: Any
) -> Tensor:
    """Pass tokens and the first layer's prompts through all layers; each of the next layers gets fresh prompts.

    Args:
        layers: of an encoder; a layer maps `(batch, n + p, w)` to the same shape.
        hidden_states: `(batch, n + p, w)`, the first layer's input, its prompts inserted.
        prompts: `(depth, p, w)`.
        start: position of the first prompt.
        **inputs: passed to each layer.

    Returns:
        the last layer's output without prompts, `(batch, n, w)`.
    """
    count = prompts.shape[1]
    for number, layer in enumerate(layers):
        if 0 < number < len(prompts):
            hidden_states = insert_prompts(remove_prompts(hidden_states, count, start), prompts[number], start)
        compute = partial(layer, **inputs)
        if getattr(layer, "gradient_checkpointing", False) and not layer.training and torch.is_grad_enabled():
            # The library checkpoints layers in train mode only, but gradients pass a frozen encoder to its prompts.
            hidden_states = checkpoint(compute, hidden_states, use_reentrant=False)
        else:
            hidden_states = compute(hidden_states)
    return remove_prompts(hidden_states, count, start)


def widen_mask(attention_mask: Tensor | None, count: int) -> Tensor | None:
    """Widen a mask of captions `(batch, n)` to `(batch, n + p)`; prompts behind the first token are visible."""
    if attention_mask is None:
        return None
    return torch.cat(
        [attention_mask[:, :1], attention_mask.new_ones(attention_mask.shape[0], count), attention_mask[:, 1:]], dim=1
    )


__all__ = ["TowerPrompts", "insert_prompts", "pass_layers", "remove_prompts", "widen_mask"]
