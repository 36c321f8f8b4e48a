"""Mapping networks of textual inversion: image features to pseudo words. Saved with checkpoints.

Shapes: `batch` images, `d` the joint width, `w` the width of token embeddings, `v` the width of the image encoder,
`m` image patches.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_inversion import METHODS, InversionConfig


def init_linear(linear: nn.Linear) -> None:
    """Initialise as `nn.Linear` does, through the library's functions, which leave loaded weights alone."""
    bound = linear.in_features**-0.5
    init.uniform_(linear.weight, -bound, bound)
    if linear.bias is not None:
        init.uniform_(linear.bias, -bound, bound)


class Mapping(nn.Module):
    """Base class of mapping networks.

    Attributes:
        reads_tokens: whether `forward` takes image tokens and text features, or pooled image features.
    """

    reads_tokens = False

    def initialize(self) -> None:
        """Initialise the weights as the method's own code does: PyTorch's defaults for linear layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)


class MLPMapping(Mapping):
    """Pic2Word's mapping network: hidden layers of one width with ReLU, without norm or residual."""

    def __init__(self, config: InversionConfig, in_width: int | None = None) -> None:
        super().__init__()
        width: int = config.mapping_width  # type: ignore[assignment]  # set by the configuration
        widths = [in_width or config.joint_width, *[width] * config.mapping_layers]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.output = nn.Linear(width, config.word_width)
        self.dropout = nn.Dropout(config.dropout)  # type: ignore[arg-type]  # set by the configuration

    def forward(self, features: Tensor) -> Tensor:
        """Map `(..., d)` to pseudo words `(..., w)`."""
        for layer in self.layers:
            features = F.relu(self.dropout(layer(features)))
        return self.output(features)


class PhiMapping(Mapping):
    """SEARLE's phi, which LinCIR shares: two wide hidden layers with exact GELU."""

    def __init__(self, config: InversionConfig) -> None:
        super().__init__()
        width: int = config.mapping_width  # type: ignore[assignment]
        self.layers = nn.ModuleList([nn.Linear(config.joint_width, width), nn.Linear(width, width)])
        self.output = nn.Linear(width, config.word_width)
        self.dropout = nn.Dropout(config.dropout)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Map `(..., d)` to pseudo words `(..., w)`."""
        for layer in self.layers:
            features = self.dropout(F.gelu(layer(features)))
        return self.output(features)


class Rotation(nn.Module):
    """A linear layer under weight norm: each output row has a direction and a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(width, width))
        self.gain = nn.Parameter(torch.empty(width, 1))

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(..., v)` to `(..., v)`."""
        return F.linear(tokens, self.gain * F.normalize(self.direction, dim=1))


class ExtractorLayer(nn.Module):
    """Cross-attention of latents to image tokens and themselves, then a feed-forward network, both residual."""

    def __init__(self, config: InversionConfig, width: int) -> None:
        super().__init__()
        inner = config.extractor_heads * config.extractor_head_width
        self.heads = config.extractor_heads
        self.norm_tokens, self.norm_latents, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.query = nn.Linear(width, inner, bias=False)
        self.key_value = nn.Linear(width, 2 * inner, bias=False)
        self.output = nn.Linear(inner, width, bias=False)
        self.fc1 = nn.Linear(width, 4 * width, bias=False)
        self.fc2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor) -> Tensor:
        """Update latents `(batch, latents, v)` by image tokens `(batch, m, v)`."""
        normed = self.norm_latents(latents)
        key_value = self.key_value(torch.cat([self.norm_tokens(tokens), normed], dim=1))
        parts = (self.query(normed), *key_value.chunk(2, dim=-1))
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        latents = latents + self.output(attended)
        return latents + self.fc2(F.gelu(self.fc1(self.norm(latents))))


class WordBranch(nn.Module):
    """LayerNorm, projection to the joint width, and Pic2Word's MLP: one of Context-I2W's two branches."""

    def __init__(self, config: InversionConfig, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(width, config.word_width, bias=False)
        self.mlp = MLPMapping(config, config.word_width)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, v)` to `(batch, w)`."""
        return self.mlp(self.projection(self.norm(features)))


class ContextMapping(Mapping):
    """Context-I2W's mapping network: the caption gates the image tokens, learned latents attend to the gated patches.

    The pseudo word is `global + tanh(gate) * local`; the gate starts at 0.
    """

    reads_tokens = True
    _no_split_modules = ["ExtractorLayer"]  # the model collects them from its parts, and names none that it lacks

    def __init__(self, config: InversionConfig) -> None:
        super().__init__()
        width = config.vl_config.vision_config.hidden_size
        self.context = nn.Linear(config.joint_width, width, bias=False)
        self.rotation = Rotation(width)
        self.latents = nn.Parameter(torch.empty(config.latents, width))
        self.layers = nn.ModuleList(ExtractorLayer(config, width) for _ in range(config.extractor_layers))
        self.norm = nn.LayerNorm(width)
        self.whole = WordBranch(config, width)
        self.local = WordBranch(config, width)
        self.local_gate = nn.Parameter(torch.empty(1))

    def initialize(self) -> None:
        """Initialise the weights, see [`Mapping.initialize`]; latents and projections are normal."""
        super().initialize()
        init.normal_(self.latents)
        init.zeros_(self.local_gate)
        width = self.rotation.gain.shape[0]
        init.uniform_(self.rotation.direction, -(width**-0.5), width**-0.5)
        # A row of a uniform matrix of this bound has the norm 1/sqrt(3): the layer starts as a plain linear one.
        init.constant_(self.rotation.gain, 3**-0.5)
        for branch in (self.whole, self.local):
            init.normal_(branch.projection.weight, std=width**-0.5)

    def forward(self, tokens: Tensor, text_features: Tensor) -> Tensor:
        """Map images, conditioned on captions, to pseudo words.

        Args:
            tokens: `(batch, 1 + m, v)`, outputs of the last image encoder layer, before its final norm.
            text_features: `(batch, d)`, projected features of the captions, not normalised.

        Returns:
            `(batch, w)`.
        """
        gated = self.gate_tokens(tokens, text_features)
        local = self.local(self.extract(gated[:, 1:]).mean(dim=1))
        return self.whole(gated[:, 0]) + self.local_gate.tanh() * local

    def gate_tokens(self, tokens: Tensor, text_features: Tensor) -> Tensor:
        """Rotate image tokens `(batch, 1 + m, v)` and multiply them by the caption's context."""
        return self.rotation(tokens) * self.context(text_features)[:, None]

    def extract(self, patches: Tensor) -> Tensor:
        """Let the latents attend to gated patches `(batch, m, v)`; return `(batch, latents, v)`."""
        latents = self.latents.expand(len(patches), -1, -1)
        for layer in self.layers:
            latents = layer(latents, patches)
        return self.norm(latents)


class EquivariantLayer(nn.Module):
    """A layer of a deep set: each element, less the mean of the set."""

    def __init__(self, in_width: int, width: int) -> None:
        super().__init__()
        self.element = nn.Linear(in_width, width)
        self.mean = nn.Linear(in_width, width, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        """Map `(batch, set, in_width)` to `(batch, set, width)`."""
        return F.elu(self.element(features) - self.mean(features.mean(dim=1, keepdim=True)))


class DeepSetMapping(Mapping):
    """PALAVRA's f_theta: a deep set of image features of one object; a query has a set of one."""

    def __init__(self, config: InversionConfig) -> None:
        super().__init__()
        width: int = config.mapping_width  # type: ignore[assignment]
        self.layers = nn.ModuleList(EquivariantLayer(w, width) for w in (config.joint_width, width, width))
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, config.word_width)
        self.dropout = nn.Dropout(config.dropout)  # type: ignore[arg-type]

    def forward(self, features: Tensor) -> Tensor:
        """Map features `(batch, d)`, or sets of them `(batch, set, d)`, L2-normalised, to `(batch, w)`."""
        if features.ndim == 2:
            features = features[:, None]
        for layer in self.layers:
            features = layer(features)
        features = F.elu(self.hidden(self.dropout(features.mean(dim=1))))
        return self.output(self.dropout(features))


MAPPINGS: dict[str, Any] = {
    "mlp": MLPMapping,
    "phi": PhiMapping,
    "context": ContextMapping,
    "deep_set": DeepSetMapping,
}
"""Kind of a mapping network, which `METHODS` names, to its class."""


def build_mapping(config: InversionConfig) -> Mapping | None:
    """Build the mapping network of a configuration's method; None for one that has none."""
    kind = METHODS[config.method].mapping
    return None if kind is None else MAPPINGS[kind](config)


__all__ = [
    "MAPPINGS",
    "ContextMapping",
    "DeepSetMapping",
    "MLPMapping",
    "Mapping",
    "PhiMapping",
    "build_mapping",
]
