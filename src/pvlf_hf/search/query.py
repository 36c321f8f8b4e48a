"""Queries of a gallery: encoded once, weighed as often as wanted, and explained."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from operator import index
from typing import Any, Literal, NamedTuple

import torch
from PIL import Image as PILImage
from torch import Tensor
from torch.nn import functional as F

from ..embeddings.combined import Combine, CombinedQueries, CombinedScores

Weights = tuple[float, float, float]
"""Weights of the image, the model's composition and the text in a query, in the order of the paper's eq. 13."""

FUSION: Weights = (0.0, 1.0, 0.0)
"""Weights of the model's own composition."""

Source = Literal["text", "prompts", "image"]


class Explanation(NamedTuple):
    """Explanation of a query: the weights of image and text, and the attention of the fusion Transformer.

    Args:
        weights: w of eq. 13, for the image, the fused feature and the text; free, they need not sum to 1.
        tokens: tokens of the text, special tokens included.
        attention: float32 `(layers, length, length)`, mean over heads; row i is the attention of position i. Positions
            are the tokens, the prompts, the image as a whole, and its patches row by row.
        num_prompts: number of prompts.
    """

    weights: Weights
    tokens: list[str]
    attention: Tensor
    num_prompts: int

    @property
    def places(self) -> dict[str, slice]:
        """Return the slices of `"text"`, `"prompts"` and `"image"`."""
        text, prompts = len(self.tokens), len(self.tokens) + self.num_prompts
        return {"text": slice(0, text), "prompts": slice(text, prompts), "image": slice(prompts, None)}

    def shares(self, source: Source = "prompts") -> dict[str, Tensor]:
        """Return how a part divides its attention among all parts: float32 `(layers,)` each, which sum to 1."""
        given = self.attention[:, self.places[source]].mean(dim=1)  # (layers, length)
        return {part: given[:, positions].sum(dim=1) for part, positions in self.places.items()}

    def words(self, source: Source = "prompts", layer: int = -1) -> list[float]:
        """Return the attention from a part to each token of the text, in order."""
        return self.attention[layer, self.places[source], self.places["text"]].mean(dim=0).tolist()

    def patches(self, source: Source = "prompts", layer: int = -1) -> Tensor:
        """Return the attention from a part to each patch: float32 `(rows, columns)` of the cropped image."""
        given = self.attention[layer, self.places[source], self.places["image"]].mean(dim=0)[1:]
        return given.view(math.isqrt(len(given)), -1)


@dataclass(frozen=True)
class Query:
    """An encoded query; other weights, another k or another gallery of the same model need no encoder.

    Args:
        images: the reference images, RGB, without those that were indexed.
        text: the text, or None.
        fused: float32 `(d,)`, the model's composition; for a query of images or text alone, their embedding.
        image_embeds: float32 `(d,)`, embedding of the images alone (the mean of several); None without images.
        text_embeds: float32 `(d,)`, embedding of the text alone; None without a text.
        made_by: provenance, see [`images_made_by`].
        why: one explanation per reference image, if requested.
        combine: function of two similarities that scores images, where `fused` is image and text side by side, see
            [`ComposedRetrievalModel.combine`].
        ids: ids of indexed images that were searched by.
        away: float32 `(d,)` each: what images and texts of negative weight add to a query.
    """

    images: tuple[PILImage.Image, ...]
    text: str | None
    fused: Tensor = field(repr=False)
    image_embeds: Tensor | None = field(repr=False)
    text_embeds: Tensor | None = field(repr=False)
    made_by: dict[str, str] = field(repr=False)
    why: tuple[Explanation, ...] = field(default=(), repr=False)
    combine: Combine | None = field(default=None, repr=False)
    ids: tuple[str, ...] = ()
    away: tuple[Tensor, Tensor] | None = field(default=None, repr=False)

    def is_combined(self, weights: Weights) -> bool:
        """Return whether images are scored by two similarities, not by an embedding of the query."""
        return self.combine is not None and weights[1] != 0

    def scored_by(self, weights: Weights, embeds: Tensor, mean: Tensor | None = None) -> Tensor | CombinedScores:
        """Return what a gallery is searched by: the query's embedding, or scores that are combined.

        Args:
            weights: see [`~Query.embed`].
            embeds: of the gallery, `(images, d)`.
            mean: of them, where it is known.

        Raises:
            ValueError: as [`~Query.embed`], and if a composition without an embedding is to be mixed with one.
        """
        image, fused, text = check_weights(weights)
        if self.combine is None or fused == 0:
            return self.embed(weights)
        if image or text:
            raise ValueError(
                f"weights {weights}: this composition scores by two similarities and has no embedding to mix: weight "
                "it (0, 1, 0), or leave it out; the model's composition_weight balances image and text"
            )
        halves = self.fused if self.away is None else self.fused + torch.cat(self.away) * 0.5**0.5
        return CombinedQueries(halves[None], self.combine).against(embeds, mean)

    def embed(self, weights: Weights = FUSION) -> Tensor:
        """Return normalize(w_image image_embeds + w_fused fused + w_text text_embeds + away), float32 `(d,)`.

        Args:
            weights: (w_image, w_fused, w_text) of unit vectors: `(0, 1, 0)` is the model's composition,
                `(0.5, 1, 0)` more of the image, `(1, 0, 0)` the image alone, `(0, 0, 1)` the text alone;
                a negative weight leads away from its part.

        Raises:
            ValueError: if they are not three finite numbers, all are 0, or the query lacks a part of nonzero weight.
        """
        parts = {"image": self.image_embeds, "fused": self.fused, "text": self.text_embeds}
        total = torch.zeros(())
        for (name, embeds), weight in zip(parts.items(), check_weights(weights), strict=True):
            if weight == 0:
                continue
            if embeds is None:
                raise ValueError(f"weights {weights}: the query has no {name}; pass it to the search, or weigh it 0")
            total = total + weight * embeds
        if total.any() and self.away is not None:
            total = total + self.away[0] + self.away[1]
        if not total.any():
            raise ValueError(f"weights {weights} leave nothing of the query: pass at least one that is not 0")
        return F.normalize(total, dim=0)


def check_weights(weights: Any) -> Weights:
    """Return the weights as floats; raise a `ValueError` unless they are three finite numbers."""
    values = list(weights) if isinstance(weights, Sequence | Tensor) or hasattr(weights, "tolist") else []
    numbers = [float(value) for value in values if isinstance(value, Real | Tensor) and math.isfinite(value)]
    if len(numbers) != 3 or len(values) != 3:
        raise ValueError(
            f"weights={weights!r}: pass three numbers, of image, composition and text, such as (0.5, 1, 0)"
        )
    return numbers[0], numbers[1], numbers[2]


def check_positive(name: str, value: Any) -> int:
    """Return the value of an argument as an int; raise a `ValueError` unless it is a whole number above 0."""
    try:
        number = index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: pass a whole number of at least 1")
    return number


def check_offset(value: Any) -> int:
    """Return the number of results to pass over; raise a `ValueError` unless it is a whole number, 0 or more."""
    return 0 if isinstance(value, int) and value is not False and value == 0 else check_positive("offset", value)


def check_score(name: str, value: Any) -> float | None:
    """Return a score or None; raise a `ValueError` unless it is a finite number."""
    if value is None or (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)):
        return None if value is None else float(value)
    raise ValueError(f"{name}={value!r}: pass a number, such as 0.3, or leave it out")


__all__ = ["FUSION", "Explanation", "Query", "Weights"]
