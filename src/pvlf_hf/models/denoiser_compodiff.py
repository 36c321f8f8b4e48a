"""The denoiser of CompoDiff: from a noised image embedding to a clean one. Saved with checkpoints.

A Transformer over two tokens, the noised embedding and the time, that attends to the conditions: all text tokens, the
reference image's embedding and a mask. The conditions do not change from step to step, so their keys and values are
computed once for all steps and samples.

Shapes: `rows` conditions, `samples` of each, `n` text tokens, `w` the text width, `d` the joint width, `h` the width
of a head.
"""

from math import log
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_compodiff import CompoDiffConfig

EPS = 1e-5
"""Epsilon of every LayerNorm. The released code takes 1e-3 outside of float32, which moves queries by 5e-3."""

COSINE_SCALE = 16.0
"""Factor of cosines in self-attention."""

ROTARY_WIDTH = 32
"""Most elements of a head that are rotated."""

BUCKETS = 32
"""Distances that the table of relative biases holds; two tokens use the first two."""


def norm(width: int) -> nn.LayerNorm:
    """Return a LayerNorm that has a gain alone."""
    return nn.LayerNorm(width, eps=EPS, bias=False)


class EmbeddingMLP(nn.Sequential):
    """Embeds a time or a mask: two hidden layers of width 2d."""

    def __init__(self, inputs: int, width: int) -> None:
        hidden = 2 * width
        layers = nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, width)
        super().__init__(*layers)


class SelfAttention(nn.Module):
    """Attention by cosines, with one key and value for all heads, and learned ones in front of them."""

    def __init__(self, config: CompoDiffConfig) -> None:
        super().__init__()
        width, self.heads, head = config.joint_width, config.denoiser_heads, config.head_width
        self.norm = norm(width)
        self.query = nn.Linear(width, self.heads * head, bias=False)
        self.key_value = nn.Linear(width, 2 * head, bias=False)
        self.null_key_value = nn.Parameter(torch.empty(2, head))
        self.output = nn.Linear(self.heads * head, width, bias=False)
        self.output_norm = norm(width)

    def forward(self, states: Tensor, bias: Tensor) -> Tensor:
        """Map `(rows, samples, 2, d)` to the same shape, with a bias `(heads, 2, 3)` of the logits."""
        states = self.norm(states)
        query = rotate(self.query(states).unflatten(-1, (self.heads, -1)).transpose(-2, -3))
        key, value = self.key_value(states).chunk(2, dim=-1)
        null_key, null_value = (null.expand(*key.shape[:-2], 1, -1) for null in self.null_key_value)
        key, value = torch.cat([null_key, rotate(key)], dim=-2), torch.cat([null_value, value], dim=-2)
        cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-1, -2)[..., None, :, :]
        out = F.softmax(COSINE_SCALE * cosines + bias, dim=-1) @ value[..., None, :, :]
        return self.output_norm(self.output(out.transpose(-2, -3).flatten(-2)))


class Memory(nn.Module):
    """Keys and values of the conditions, with learned ones in front of them that the heads share."""

    def __init__(self, config: CompoDiffConfig) -> None:
        super().__init__()
        self.heads, head = config.cross_heads, config.head_width
        self.key_value = nn.Linear(config.joint_width, 2 * self.heads * head, bias=False)
        self.null_key_value = nn.Parameter(torch.empty(2, head))

    def forward(self, context: Tensor) -> Tensor:
        """Compute keys and values of `(rows, n + 2, d)`: `(2, rows, heads, n + 3, h)`."""
        parts = self.key_value(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        null = self.null_key_value[:, None, None, None].expand(-1, *parts.shape[1:3], 1, -1)
        return torch.cat([null, parts], dim=-2)


class CrossAttention(nn.Module):
    """Attention to the conditions."""

    def __init__(self, config: CompoDiffConfig) -> None:
        super().__init__()
        width, self.heads, head = config.joint_width, config.cross_heads, config.head_width
        self.norm = norm(width)
        self.query = nn.Linear(width, self.heads * head, bias=False)
        self.memory = Memory(config)
        self.output = nn.Linear(self.heads * head, width, bias=False)
        self.output_norm = norm(width)

    def forward(self, states: Tensor, memory: Tensor) -> Tensor:
        """Map `(rows, samples, 2, d)` to the same shape; `memory` are the keys and values of the conditions."""
        query = self.query(self.norm(states)).unflatten(-1, (self.heads, -1))
        query = query.flatten(1, 2).transpose(1, 2)  # samples share the conditions: one sequence
        key, value = memory.unbind()
        out = F.scaled_dot_product_attention(query, key, value)
        out = out.transpose(1, 2).flatten(-2).unflatten(1, states.shape[1:3])
        return self.output_norm(self.output(out))


class FeedForward(nn.Module):
    """Gated feed-forward block: u SiLU(v)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = norm(width)
        self.input = nn.Linear(width, 8 * width, bias=False)
        self.output = nn.Linear(4 * width, width, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        """Map `(..., d)` to the same shape."""
        value, gate = self.input(self.norm(states)).chunk(2, dim=-1)
        return self.output(value * F.silu(gate))


class DenoiserLayer(GradientCheckpointingLayer):
    """One layer: both attentions and the feed-forward block, each added to what it read."""

    def __init__(self, config: CompoDiffConfig) -> None:
        super().__init__()
        self.self_attention = SelfAttention(config)
        self.cross_attention = CrossAttention(config)
        self.feed_forward = FeedForward(config.joint_width)

    def forward(self, states: Tensor, memory: Tensor, bias: Tensor) -> Tensor:
        """Map `(rows, samples, 2, d)` to the same shape."""
        states = states + self.self_attention(states, bias)
        states = states + self.cross_attention(states, memory)
        return states + self.feed_forward(states)


class Denoiser(nn.Module):
    """Predicts clean image embeddings, in float32 whatever the encoders compute in."""

    def __init__(self, config: CompoDiffConfig) -> None:
        super().__init__()
        width = config.joint_width
        self.text_embed = nn.Linear(config.text_width, width)
        self.time_embed = EmbeddingMLP(width, width)
        self.mask_embed = EmbeddingMLP(config.mask_size**2, width)
        self.relative_bias = nn.Embedding(BUCKETS, config.denoiser_heads)
        self.layers = nn.ModuleList(DenoiserLayer(config) for _ in range(config.denoiser_layers))
        self.norm = norm(width)
        self.output = nn.Linear(width, width, bias=False)

    def context(self, text: Tensor, image: Tensor, mask: Tensor) -> Tensor:
        """Join the conditions to `(rows, n + 2, d)`; arguments as [`~Denoiser.read`]."""
        dtype = self.output.weight.dtype
        parts = self.text_embed(text.to(dtype)), image.to(dtype)[:, None]
        return torch.cat([*parts, self.mask_embed(mask.to(dtype).flatten(1))[:, None]], dim=1)

    def read(self, text: Tensor, image: Tensor, mask: Tensor) -> list[Tensor]:
        """Compute all that layers need of the conditions.

        Args:
            text: `(rows, n, w)`, all tokens of captions, padding included.
            image: `(rows, d)`, embeddings of reference images, not normalised; zeros for none.
            mask: `(rows, mask_size, mask_size)`, 1 where the image is to change, all 0 for no mask.

        Returns:
            for each layer `(2, rows, heads, n + 3, h)`.

        Raises:
            ValueError: if the weights are in half precision.
        """
        if self.output.weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the denoiser is in {self.output.weight.dtype}, which moves queries visibly: load the model by "
                "from_pretrained(..., dtype=...), which keeps it in float32, or call model.denoiser.float()"
            )
        with torch.autocast(text.device.type, enabled=False):
            context = self.context(text, image, mask)
            layers: Any = self.layers
            return [layer.cross_attention.memory(context) for layer in layers]

    def forward(self, noised: Tensor, times: Tensor, memory: list[Tensor]) -> Tensor:
        """Predict clean embeddings.

        Args:
            noised: `(rows, samples, d)`.
            times: int64 `(rows,)`, or a scalar for all rows.
            memory: what [`~Denoiser.read`] returned.

        Returns:
            `(rows, samples, d)`, float32.
        """
        with torch.autocast(noised.device.type, enabled=False):
            noised = noised.to(self.output.weight.dtype)
            time = self.time_embed(sinusoid(times, noised.shape[-1]).to(noised.dtype))
            states = torch.stack([noised, time[..., None, :].expand_as(noised)], dim=2)
            bias = self.logit_bias(noised.device)
            for layer, of_layer in zip(self.layers, memory, strict=True):
                states = layer(states, of_layer, bias)
            first = states[:, :, 0]
            return self.output(self.norm(first / first.amax(dim=-1, keepdim=True).detach()))

    def logit_bias(self, device: torch.device) -> Tensor:
        """Return the biases of self-attention `(heads, 2, 3)`, the learned key being column 0."""
        # T5's causal buckets: small distances are their own bucket, and later columns count as distance 0.
        distances = torch.arange(2, device=device)[:, None] - torch.arange(3, device=device)
        return self.relative_bias(distances.clamp(min=0)).permute(2, 0, 1)


def sinusoid(times: Tensor, width: int) -> Tensor:
    """Embed times `(...)` as float32 `(..., width)`: all sines, then all cosines."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, device=times.device) * (-log(10000) / (half - 1)))
    angles = times[..., None].float() * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def rotary_frequencies(head_width: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the frequency of each pair of elements that is rotated."""
    width = min(ROTARY_WIDTH, head_width)
    return 10000.0 ** (torch.arange(0, width, 2, device=device) / -width)


def rotate(states: Tensor) -> Tensor:
    """Rotate neighbouring elements of `(..., length, h)` by an angle that grows with the position."""
    frequencies = rotary_frequencies(states.shape[-1], states.device)
    angles = torch.arange(states.shape[-2], device=states.device)[:, None] * frequencies
    cos, sin = angles.cos().to(states.dtype), angles.sin().to(states.dtype)
    width = 2 * len(frequencies)
    even, odd = states[..., :width].unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return torch.cat([turned, states[..., width:]], dim=-1)


__all__ = ["Denoiser", "DenoiserLayer"]
