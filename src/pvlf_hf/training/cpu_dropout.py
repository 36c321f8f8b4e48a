"""Faster dropout for training on a CPU, where PyTorch draws one random number for each element.

It belongs to training, not to the model: checkpoints carry `nn.Dropout` and the library's attention.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..models.fusion_pvlf import attention_weights, eager_attention_forward
from ..models.interface_pvlf import unwrap

SUFFIX = "_with_fast_cpu_dropout"


def fast_dropout(states: Tensor, p: float, training: bool = True) -> Tensor:
    """Drop elements on a CPU: one random int64 masks four of them, 16 bits each, so `p` is rounded to 2**-16.

    Takes a sixth of the time of `F.dropout` on an AMD EPYC; that serves all other devices.
    """
    if not (training and 0 < p < 1 and states.device.type == "cpu"):
        return F.dropout(states, p, training)
    draws = torch.randint(-(2**63), 2**63 - 1, (-(-states.numel() // 4),))
    bits = draws.view(torch.int16)[: states.numel()].view(states.shape)
    return states * (bits >= int(p * 2**16) - 2**15).to(states.dtype).div_(1 - p)


class FastDropout(nn.Dropout):
    """`nn.Dropout` by [`fast_dropout`]."""

    def forward(self, input: Tensor) -> Tensor:
        """Drop elements of a tensor of any shape."""
        return fast_dropout(input, self.p, self.training)


@contextmanager
def fast_cpu_dropout(model: nn.Module) -> Iterator[None]:
    """Give a model faster dropout while it trains: modules by their class, attention by the library's interface.

    Args:
        model: a [`ComposedRetrievalModel`], or one inside an adapter of PEFT.
    """
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Dropout
    ]
    for parent, name, child in replaced:
        setattr(parent, name, FastDropout(child.p).train(child.training))
    inner = unwrap(model)
    chosen = inner.config._attn_implementation
    if chosen is not None and not chosen.startswith("flash"):
        inner.set_attn_implementation({"": register_attention(chosen)})
    try:
        yield
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child.train(getattr(parent, name).training))
        if inner.config._attn_implementation != chosen:
            inner.set_attn_implementation({"": chosen})


def register_attention(chosen: str) -> str:
    """Register an attention that uses `chosen` without dropout, else eager with [`fast_dropout`]; return its name.

    PyTorch's fused kernel for CPUs has no dropout, so that nothing is lost.
    """
    without_dropout = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_attention_forward)

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not dropout:
            return without_dropout(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        weights = attention_weights(query, key, attention_mask, scaling)
        return (fast_dropout(weights, dropout) @ value).transpose(1, 2).contiguous(), weights

    name = chosen + SUFFIX
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[chosen])
    return name


__all__ = ["FastDropout", "fast_cpu_dropout", "fast_dropout"]
