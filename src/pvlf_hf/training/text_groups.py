"""Encodes the captions of a training batch in groups of similar length, because a CPU pays for padding."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..models.configuration_pvlf import BACKBONES

GROUP_SIZE = 32
"""Captions of a group (our choice). 64 captions of EmojiCIR are padded to 30 tokens together and to 21 in two groups;
without padding they have 13."""


def encode_captions(model: Any, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Encode captions as the model's `encode_text_tokens` does, on a CPU in groups of similar length.

    The embeddings of a batch's queries are the same up to rounding. Only padding differs: its tokens are 0 beyond the
    length of a group, which makes a difference to no model that masks padding. Others are encoded in one piece.

    Args:
        model: a [`PVLFModel`].
        input_ids: int64 `(batch, n)`, padded on the right.
        attention_mask: `(batch, n)`, 0 for padding; None when nothing is padded.

    Returns:
        tokens `(batch, n, d)` and positions of the global features, int64 `(batch,)`.
    """
    groups = len(input_ids) // GROUP_SIZE
    masked = BACKBONES[model.encoder_config.model_type].padding == "longest" and model.config.text_padding == "masked"
    if attention_mask is None or groups < 2 or not masked or input_ids.device.type != "cpu":
        return model.encode_text_tokens(input_ids, attention_mask)
    lengths = attention_mask.sum(dim=1)
    order = lengths.argsort()
    encoded = []
    for rows in order.tensor_split(groups):
        longest = int(lengths[rows[-1]])
        tokens, positions = model.encode_text_tokens(input_ids[rows, :longest], attention_mask[rows, :longest])
        encoded.append((F.pad(tokens, (0, 0, 0, input_ids.shape[1] - longest)), positions))
    tokens, positions = map(torch.cat, zip(*encoded, strict=True))
    back = order.argsort()
    return tokens[back], positions[back]


__all__ = ["encode_captions"]
