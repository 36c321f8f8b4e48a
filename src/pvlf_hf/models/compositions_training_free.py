"""Training-free compositions: how an image feature and a text feature become a query. Saved with checkpoints.

Notation: `v` image feature, `t` text feature, both unit vectors of the joint space; `a` the weight of the text; `x` a
gallery image.
A further composition is one function and its entry in `COMPOSITIONS`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NEARLY_PARALLEL = 0.9995
"""Cosine from which Slerp is linear (arXiv 2405.00571): the sine of the angle that it divides by is nearly 0."""


def weighted_sum(image: Tensor, text: Tensor, weight: float) -> Tensor:
    """Compute norm(a t + (1 - a) v), `(batch, d)`; WeiMoCIR (arXiv 2409.04918), PinPoint's code."""
    return F.normalize(weight * text + (1 - weight) * image, dim=-1)


def slerp(image: Tensor, text: Tensor, weight: float) -> Tensor:
    """Compute the point that lies the fraction `a` of the way from v to t on the sphere, `(batch, d)`.

    q = sin((1 - a) theta) / sin(theta) v + sin(a theta) / sin(theta) t, theta = arccos(v . t); linear interpolation,
    normalised, where |v . t| > 0.9995 (arXiv 2405.00571, equation of Slerp).
    """
    cosine = (image * text).sum(dim=-1, keepdim=True)
    theta = cosine.clamp(-NEARLY_PARALLEL, NEARLY_PARALLEL).acos()  # clamped: the gradient of arccos is infinite at 1
    on_sphere = (((1 - weight) * theta).sin() * image + (weight * theta).sin() * text) / theta.sin()
    return F.normalize(
        torch.where(cosine.abs() > NEARLY_PARALLEL, weight * text + (1 - weight) * image, on_sphere), dim=-1
    )


def side_by_side(image: Tensor, text: Tensor, weight: float) -> Tensor:
    """Compute (v, t) / sqrt(2), `(batch, 2d)`: the query of a composition other than an inner product."""
    return torch.cat([image, text], dim=-1) * 0.5**0.5


def product(image_similarity: Tensor, text_similarity: Tensor, weight: float) -> Tensor:
    """Compute max(0, s_v)^(1 - a) max(0, s_t)^a, of the shape of the similarities s_v of x with v and s_t of x with t.

    With a = 1/2 it ranks as the product of similarities that i-CIR (NeurIPS 2025) compares with. They are centred by
    the gallery's mean ([`halves`]): an image that is less similar than the average, by image or by text, scores 0.
    Raw cosines of SigLIP are small or negative, and the clamp would erase them.
    """
    return image_similarity.clamp(min=0) ** (1 - weight) * text_similarity.clamp(min=0) ** weight


class Composition(NamedTuple):
    """How a query is composed, and what it is compared by.

    Args:
        compose: takes v and t, float32 `(batch, d)`, and a; returns queries float32 `(batch, d)`, L2-normalised.
        default_weight: a where the configuration does not say.
        combine: where the composition is no inner product of x with one vector: takes the similarities of x with v
            and with t, and a; returns the score, see [`ComposedRetrievalModel.combine`]. `compose` is then
            [`side_by_side`].
    """

    compose: Callable[[Tensor, Tensor, float], Tensor]
    default_weight: float
    combine: Callable[[Tensor, Tensor, float], Tensor] | None = None


COMPOSITIONS = {
    "sum": Composition(weighted_sum, 0.8),  # PinPoint's code
    "slerp": Composition(slerp, 0.8),  # arXiv 2405.00571 on CIRCO and FashionIQ; 0.9 on CIRR
    "product": Composition(side_by_side, 0.5, product),  # i-CIR's plain product, which has no weights
}
"""Training-free compositions by name."""

__all__ = ["COMPOSITIONS", "Composition", "product", "side_by_side", "slerp", "weighted_sum"]
