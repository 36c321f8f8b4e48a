"""Stores embeddings in fewer bytes: float16, or int8 with a scale for each vector, and bounds what that changes.

| vectors | bytes a vector of width d | scores |
|---|---|---|
| `float32` | 4 d | of the embeddings |
| `float16` | 2 d | of the embeddings rounded to float16 |
| `int8` | d + 4 | of `scale * int8` |
| `int8+float16` | 3 d + 4 | of the embeddings rounded to float16; a search reads int8, and float16 of the candidates |

A score is the cosine of a query with the stored vector, as `embeddings/similarity.py` defines it: storing changes the
vectors, and ranking them is exact.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ..embeddings.similarity import check_finite

Element = Literal["float32", "float16", "int8"]

Vectors = Literal["float32", "float16", "int8", "int8+float16"]

LARGEST = 127
"""Largest absolute int8 value: the range is symmetric, so that -x is stored as minus what x is stored as."""


class StoredVectors(NamedTuple):
    """Vectors as they are stored."""

    values: Tensor
    """float32, float16 or int8 `(n, d)`."""
    scale: Tensor | None
    """float32 `(n,)` where values are int8: a vector is `scale * values`."""


def check_vectors(name: str) -> Vectors:
    """Return the argument `vectors`; raise a `ValueError` for an unknown one."""
    if name not in get_args(Vectors):
        raise ValueError(f"vectors={name!r}: choose one of {get_args(Vectors)}")
    return name  # type: ignore[return-value]  # checked above


def encode_vectors(embeds: Tensor, element: Element) -> StoredVectors:
    """Round embeddings to what is stored.

    Args:
        embeds: float32 `(n, d)`.
        element: type of the stored numbers.

    Raises:
        ValueError: if an embedding is not finite, or too large for float16.
    """
    embeds = embeds.detach().float().cpu()
    check_finite("image", embeds)
    if element == "float32":
        return StoredVectors(embeds, None)
    if element == "float16":
        halves = embeds.half()
        check_finite("float16 image", halves)
        return StoredVectors(halves, None)
    scale = embeds.abs().amax(dim=1) / LARGEST
    divisor = torch.where(scale > 0, scale, 1.0)
    values = (embeds / divisor[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8)
    return StoredVectors(values, scale)


def decode_vectors(stored: StoredVectors) -> Tensor:
    """Return stored vectors as float32 `(n, d)`."""
    values = stored.values.float()
    return values if stored.scale is None else values.mul_(stored.scale[:, None])


def storing_error(stored: StoredVectors) -> Tensor:
    """Return the most by which storing can change the cosine of each vector with any query: float32 `(n,)`.

    Storing moves a unit vector by at most e, which turns it by at most the angle t = arcsin(e), and a cosine with a
    unit query changes by at most the chord 2 sin(t / 2). For int8, e is half a step in each of d numbers; for float16,
    a rounding of relative size 2^-11, or of 2^-25 where numbers are below 2^-14. The float32 arithmetic of both
    directions adds at most 2^-21.
    """
    values, width = stored.values, stored.values.shape[1]
    if values.dtype == torch.float32:
        return torch.zeros(len(values))
    if stored.scale is not None:
        moved = 0.5 * width**0.5 * stored.scale
    else:
        moved = torch.full((len(values),), 2.0**-11 + width**0.5 * 2.0**-25)
    moved = (moved + 2.0**-21).clamp(max=1.0).double()
    return (2 - 2 * (1 - moved.square()).sqrt()).sqrt().float() * (1 + 2.0**-20)


__all__ = ["Element", "StoredVectors", "Vectors", "check_vectors", "decode_vectors", "encode_vectors", "storing_error"]
