"""Encoded queries and the explanation of a query."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from ..models.modeling_pvlf import PVLFModel, PVLFQueryOutput

Weights = tuple[float, float, float]
"""Of picture, fusion and words in a query, in the order of the paper's eq. 13."""


FUSION: Weights = (0.0, 1.0, 0.0)
"""The model's own composition."""


class Explanation(NamedTuple):
    """Why a query is what it is: how the model weighed and where its fusion Transformer looked.

    Args:
        weights: w of eq. 13, for the picture, the fused feature and the words; free, they need not sum to 1.
        tokens: of the text, special ones included.
        attention: float32 `(layers, length, length)`, mean over heads; row i says where place i looked. Places are
            the tokens, the prompts, the picture as a whole, and its patches row by row.
        num_prompts: how many places the prompts take.
    """

    weights: Weights
    tokens: list[str]
    attention: Tensor
    num_prompts: int

    @property
    def places(self) -> dict[str, slice]:
        """Where `"text"`, `"prompts"` and `"image"` stand."""
        text, prompts = len(self.tokens), len(self.tokens) + self.num_prompts
        return {"text": slice(0, text), "prompts": slice(text, prompts), "image": slice(prompts, None)}

    def shares(self, source: Literal["text", "prompts", "image"] = "prompts") -> dict[str, Tensor]:
        """How much of its attention a part gave to each part: float32 `(layers,)` each, together 1."""
        looked = self.attention[:, self.places[source]].mean(dim=1)  # (layers, length)
        return {part: looked[:, place].sum(dim=1) for part, place in self.places.items()}

    def words(self, source: Literal["text", "prompts", "image"] = "prompts", layer: int = -1) -> list[float]:
        """Attention that a part gave to each token, in their order."""
        return self.attention[layer, self.places[source], self.places["text"]].mean(dim=0).tolist()

    def patches(self, source: Literal["text", "prompts", "image"] = "prompts", layer: int = -1) -> Tensor:
        """Attention that a part gave to each patch: float32 `(rows, columns)`, a map of the cropped picture."""
        looked = self.attention[layer, self.places[source], self.places["image"]].mean(dim=0)[1:]
        return looked.view(math.isqrt(len(looked)), -1)


@dataclass(frozen=True)
class Query:
    """A query as encoded once; other weights, another k or another gallery of the same model need no encoder.

    Args:
        images: the reference pictures, RGB.
        text: the words, or None.
        fused: float32 `(d,)`, the model's composition, or the only half that there is.
        image_embeds: float32 `(d,)`, of the pictures alone (their mean, where several), None without.
        text_embeds: float32 `(d,)`, of the words alone, None without.
        made_by: of which model, as [`EmbeddingStore`] states it.
        why: one explanation a reference picture, if asked for.
    """

    images: tuple[PILImage.Image, ...]
    text: str | None
    fused: Tensor = field(repr=False)
    image_embeds: Tensor | None = field(repr=False)
    text_embeds: Tensor | None = field(repr=False)
    made_by: dict[str, str] = field(repr=False)
    why: tuple[Explanation, ...] = field(default=(), repr=False)

    def embed(self, weights: Weights = FUSION) -> Tensor:
        """normalize(w_image image_embeds + w_fused fused + w_text text_embeds), float32 `(d,)`.

        Args:
            weights: (w_image, w_fused, w_text) of unit vectors: `(0, 1, 0)` is the model's composition,
                `(0.5, 1, 0)` more of the picture, `(1, 0, 0)` the picture alone, `(0, 0, 1)` the words alone;
                a negative one leads away from it.

        Raises:
            ValueError: if all weights are 0, or one is of a half that the query does not have.
        """
        parts = {"image": self.image_embeds, "fused": self.fused, "text": self.text_embeds}
        total = torch.zeros_like(self.fused)
        for (name, embeds), weight in zip(parts.items(), weights, strict=True):
            if weight == 0:
                continue
            if embeds is None:
                raise ValueError(f"weights {weights}: the query has no {name}; pass it to the search, or weigh it 0")
            total = total + weight * embeds
        if not total.any():
            raise ValueError(f"weights {weights} leave nothing of the query: pass at least one that is not 0")
        return F.normalize(total, dim=0)


@contextmanager
def eval_mode(model: PVLFModel, eager: bool) -> Iterator[None]:
    """For the time being, without dropout and, where asked for, with the fusion's attention that returns weights."""
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if eager:
        # Not set_attn_implementation, which warns of BLIP's encoders, although they are to stay as they are; without
        # vl_config, the library would set theirs to None, and BLIP would attend to text padding.
        model.config._attn_implementation = {"": "eager", "vl_config": {}}
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
        model.config._attn_implementation = {"": attention, "vl_config": {}}


def explanation(output: PVLFQueryOutput, row: int, words: list[str], num_prompts: int) -> Explanation:
    """Explains one row of a composed batch whose attentions were asked for; `words` are the caption's tokens."""
    image, fused, text = output.aggregation_weights[row].tolist()  # type: ignore[index]  # composed with attentions
    attention = torch.stack([layer[row].float().mean(dim=0) for layer in output.attentions]).cpu()  # type: ignore[union-attr]
    return Explanation((image, fused, text), words, attention, num_prompts)


def mean_embedding(embeds: Tensor) -> Tensor:
    """`(n, d)` -> float32 `(d,)`, normalised, on the CPU."""
    return F.normalize(embeds.float().mean(dim=0), dim=0).cpu()
