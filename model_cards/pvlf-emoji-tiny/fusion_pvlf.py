"""The fusion Transformer and the adaptive aggregation: equations 8 to 13 of the paper. Saved with checkpoints.

Shapes: `batch` queries, `n` text tokens, `p` prompts, `m` image patches, `d` the joint width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .backbones_pvlf import gather_tokens
from .configuration_pvlf import PVLFConfig


def attention_weights(query: Tensor, key: Tensor, attention_mask: Tensor | None, scaling: float) -> Tensor:
    """Compute softmax(scaling q k^T), `(batch, heads, k, length)`, under a boolean or an additive mask."""
    scores = query * scaling @ key.transpose(-1, -2)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention step by step; the only one of the library's implementations that returns the weights."""
    weights = attention_weights(query, key, attention_mask, scaling)
    out = F.dropout(weights, dropout, module.training) @ value
    return out.transpose(1, 2).contiguous(), weights


class PVLFFusionAttention(nn.Module):
    """Multi-head self-attention over text, prompts and image."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        self.config = config
        width = config.joint_width
        self.head_dim = width // config.fusion_heads
        self.scaling = self.head_dim**-0.5
        self.dropout = config.dropout
        self.is_causal = False  # the library's SDPA is causal by default
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(
        self,
        query_states: Tensor,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend from `(batch, k, d)` to `(batch, length, d)`; also return the weights if the kernel has them.

        With `output_attentions` this call computes attention eagerly, whatever the configuration says, so that a model
        that several threads share is never switched.
        """
        query, key, value = (
            projection(states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection, states in (
                (self.q_proj, query_states),
                (self.k_proj, hidden_states),
                (self.v_proj, hidden_states),
            )
        )  # (batch, heads, length, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        if output_attentions:
            attend = eager_attention_forward
        dropout = self.dropout if self.training else 0.0
        out, weights = attend(self, query, key, value, attention_mask, scaling=self.scaling, dropout=dropout)
        return self.out_proj(out.flatten(-2)), weights


class PVLFFusionLayer(GradientCheckpointingLayer):
    """One layer of the fusion Transformer; `config.residual` chooses what the residuals add (eq. 10-11)."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        width = config.joint_width
        self.literal_residual = config.residual == "paper"
        self.self_attn = PVLFFusionAttention(config)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.linear1 = nn.Linear(width, config.fusion_ffn_size)
        self.linear2 = nn.Linear(config.fusion_ffn_size, width)
        self.dropout = nn.Dropout(config.dropout)

    def feed_forward(self, hidden_states: Tensor) -> Tensor:
        """Map `(batch, length, d)` to the same shape."""
        return self.dropout(self.linear2(self.dropout(F.gelu(self.linear1(hidden_states)))))

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        keep_positions: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Map `(batch, length, d)` to the same shape, or to `(batch, k, d)` at k positions; add the weights."""
        normed = self.norm1(hidden_states)
        # eq. 10 feeds the attention U itself and adds LN(U); pre-norm feeds it LN(U) and adds U.
        attention_input, residual = (hidden_states, normed) if self.literal_residual else (normed, hidden_states)
        query_states = attention_input
        if keep_positions is not None:
            query_states = gather_tokens(attention_input, keep_positions)
            residual = gather_tokens(residual, keep_positions)
        attended, weights = self.self_attn(query_states, attention_input, attention_mask, output_attentions)
        hidden_states = residual + self.dropout(attended)
        normed = self.norm2(hidden_states)
        residual = normed if self.literal_residual else hidden_states
        return residual + self.feed_forward(normed), weights


class PVLFFusion(nn.Module):
    """The fusion Transformer with its context prompts (section 3.2): no positions, no final norm (TransAgg)."""

    _no_split_modules = ["PVLFFusionLayer"]  # the model collects them from its parts, and names none that it lacks

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        self.config = config
        self.prompts = None
        if count := config.fusion_prompts:
            self.prompts = nn.Parameter(torch.empty(config.prompt_depth or 1, count, config.joint_width))
        self.layers = nn.ModuleList([PVLFFusionLayer(config) for _ in range(config.fusion_layers)])

    def _attention_mask(
        self, hidden_states: Tensor, text_mask: Tensor | None, num_image_tokens: int, output_attentions: bool
    ) -> Any:
        if text_mask is None:
            return None
        visible = text_mask.new_ones(text_mask.shape[0], self.config.fusion_prompts + num_image_tokens)
        visible = torch.cat([text_mask, visible], dim=1)
        if self.config.text_padding == "transagg":
            if self.config._attn_implementation.startswith("flash"):
                raise ValueError("text_padding='transagg' adds to attention scores: use eager or sdpa attention")
            return (visible == 0).to(hidden_states.dtype)[:, None, None, :]  # added to scores: padding gains 1.0
        if output_attentions:
            return visible.bool()[:, None, None, :]  # as eager attention takes it
        mask: Any = create_bidirectional_mask(config=self.config, inputs_embeds=hidden_states, attention_mask=visible)
        # (batch, 1, length, length) with equal rows: one row will do. Flash attention's mask has no rows.
        return mask if mask is None or mask.ndim < 4 else mask[:, :, :1]

    def forward(
        self,
        text_tokens: Tensor,
        image_tokens: Tensor,
        text_mask: Tensor | None,
        keep_positions: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:
        """Run the layers over [text, prompts, image] (eq. 8-12).

        Args:
            text_tokens: `(batch, n, d)`.
            image_tokens: `(batch, 1 + m, d)`.
            text_mask: `(batch, n)`, 0 for padding, or None.
            keep_positions: int64 `(batch, k)`, the positions of the output that are needed, so that the last layer
                need not compute the others; all of them by default.
            output_attentions: compute attention eagerly, which gives its weights.

        Returns:
            the last layer's output `(batch, k, d)` and two empty tuples; without `keep_positions`
            `(batch, n + p + 1 + m, d)` and the tuples of hidden states (input first) and attention weights.
        """
        batch, n, _ = text_tokens.shape
        after_prompts = n + self.config.fusion_prompts
        prompts: Any = ()  # or (depth, batch, p, d)
        if self.prompts is not None:
            prompts = self.prompts.to(text_tokens.dtype)[:, None].expand(-1, batch, -1, -1)
        hidden_states = torch.cat([text_tokens, *prompts[:1], image_tokens], dim=1)
        attention_mask = self._attention_mask(hidden_states, text_mask, image_tokens.shape[1], output_attentions)
        states, attentions = [hidden_states], []
        for depth, layer in enumerate(self.layers):
            if 0 < depth < len(prompts):  # eq. 12: fresh prompts replace the outputs at their positions
                text, image = hidden_states[:, :n], hidden_states[:, after_prompts:]
                hidden_states = torch.cat([text, prompts[depth], image], dim=1)
            kept = keep_positions if depth == len(self.layers) - 1 else None
            hidden_states, weights = layer(hidden_states, attention_mask, kept, output_attentions)
            states.append(hidden_states)
            attentions.append(weights)
        return (hidden_states, tuple(states), tuple(attentions)) if keep_positions is None else (hidden_states, (), ())


class PVLFAggregation(nn.Module):
    """Adaptive aggregation (eq. 13): f_u = MLP([image; text]), f_q = w1 image + w2 f_u + w3 text, w linear in f_u."""

    def __init__(self, config: PVLFConfig) -> None:
        super().__init__()
        width = config.joint_width
        self.combiner = nn.Linear(2 * width, 8 * width)  # 8 d: TransAgg
        self.dropout = nn.Dropout(config.dropout)
        self.output = nn.Linear(8 * width, width)
        self.weights = nn.Linear(width, 3)  # rows: image, fused, text; free, no softmax

    def forward(
        self, mlp_image: Tensor, mlp_text: Tensor, sum_image: Tensor, sum_text: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mix features, each `(batch, d)`, to f_q `(batch, d)`; also return w `(batch, 3)`."""
        hidden = F.relu(self.combiner(torch.cat([mlp_image, mlp_text], dim=-1)))
        fused = self.output(self.dropout(hidden))  # (batch, d)
        weights = self.weights(fused)  # (batch, 3)
        w_image, w_fused, w_text = weights.unsqueeze(-1).unbind(dim=1)
        return w_image * sum_image + w_fused * fused + w_text * sum_text, weights


__all__ = [
    "PVLFAggregation",
    "PVLFFusion",
    "PVLFFusionAttention",
    "PVLFFusionLayer",
    "attention_weights",
    "eager_attention_forward",
]
