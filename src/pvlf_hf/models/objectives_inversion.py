"""Objectives by which mapping networks of textual inversion train, without triplets. Saved with checkpoints.

Each takes the model and a batch, and returns the loss; shapes as in `modeling_inversion.py`. `input_ids` hold
placeholders, other ids do not. The dual encoder is frozen in all methods: `model.set_finetuning("frozen")`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .interface_pvlf import ComposedRetrievalOutput, normalize
from .loss_inversion import alignment_loss, cycle_loss, distillation_loss, reconstruction_loss
from .optimization_inversion import align


def encoded(model: Any, pixel_values: Tensor | None, image_features: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """Encode images, or take their features, `(batch, d)` and not normalised, where they were encoded before."""
    if image_features is not None:
        return None, image_features.to(model.dtype)
    return model.encode_images(pixel_values)


def image_contrast(
    model: Any,
    input_ids: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    caption_ids: Tensor | None = None,
    caption_attention_mask: Tensor | None = None,
    image_features: Tensor | None = None,
) -> ComposedRetrievalOutput:
    """Contrast images with the sentences that their pseudo words make (Pic2Word, Context-I2W).

    Args:
        model: the model.
        input_ids: int64 `(batch, n)`, the prompt ("a photo of *"), for every image.
        pixel_values: `(batch, 3, height, width)`.
        attention_mask: `(batch, n)`, 0 for padding.
        caption_ids: int64 `(batch, k)`, captions with objects masked, which Context-I2W's mapping network reads.
        caption_attention_mask: `(batch, k)`, 0 for padding.
        image_features: `(batch, d)`, see [`encoded`].
    """
    tokens, features = encoded(model, pixel_values, image_features)
    words = model.pseudo_words_of(tokens, features, caption_ids, caption_attention_mask)
    queries = normalize(model.encode_text(input_ids, attention_mask, words))
    targets = normalize(features).detach()  # no gradient in the reference
    return ComposedRetrievalOutput(loss=model.loss(queries, targets), query_embeds=queries, target_embeds=targets)


def distillation(
    model: Any,
    input_ids: Tensor,
    caption_ids: Tensor,
    teacher_words: Tensor,
    pixel_values: Tensor | None = None,
    attention_mask: Tensor | None = None,
    caption_attention_mask: Tensor | None = None,
    image_features: Tensor | None = None,
) -> ComposedRetrievalOutput:
    """Distil tokens that SEARLE-OTI optimised into phi (SEARLE).

    Args:
        model: the model.
        input_ids: int64 `(batch, n)`, phrases with the placeholder for their concept.
        caption_ids: int64 `(batch, k)`, the phrases as they are.
        teacher_words: `(batch, w)`, optimised tokens of the images.
        pixel_values: `(batch, 3, height, width)`.
        attention_mask: `(batch, n)`, 0 for padding.
        caption_attention_mask: `(batch, k)`, 0 for padding.
        image_features: `(batch, d)`, see [`encoded`].
    """
    words = model.pseudo_words_of(*encoded(model, pixel_values, image_features))
    phrases = model.encode_text(caption_ids, caption_attention_mask).detach()
    replaced = model.encode_text(input_ids, attention_mask, words)
    return ComposedRetrievalOutput(loss=distillation_loss(words, teacher_words, replaced, phrases))


def reconstruction(
    model: Any,
    input_ids: Tensor,
    caption_ids: Tensor,
    attention_mask: Tensor | None = None,
    caption_attention_mask: Tensor | None = None,
    noise: Tensor | None = None,
) -> ComposedRetrievalOutput:
    """Reconstruct features of captions from their own pseudo words; there is no image (LinCIR).

    Args:
        model: the model.
        input_ids: int64 `(batch, n)`, captions with placeholders for keywords.
        caption_ids: int64 `(batch, k)`, the captions as they are.
        attention_mask: `(batch, n)`, 0 for padding.
        caption_attention_mask: `(batch, k)`, 0 for padding.
        noise: `(batch, d)`, added to features of captions; by default normal, scaled by a uniform number a row.
    """
    captions = model.encode_text(caption_ids, caption_attention_mask).detach()
    if noise is None:
        noise = torch.rand_like(captions[:, :1]) * torch.randn_like(captions)
    noisy = captions + noise
    replaced = model.encode_text(input_ids, attention_mask, model.pseudo_words_of(noisy, noisy))
    return ComposedRetrievalOutput(loss=reconstruction_loss(replaced, captions))


def cycle(
    model: Any,
    input_ids: Tensor,
    caption_ids: Tensor,
    align_ids: Tensor,
    pixel_values: Tensor | None = None,
    teacher_words: Tensor | None = None,
    name_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    caption_attention_mask: Tensor | None = None,
    align_attention_mask: Tensor | None = None,
    image_features: Tensor | None = None,
) -> ComposedRetrievalOutput:
    """Train the mapping network to turn a set of images of one object into a token for its name (PALAVRA).

    The loss of the map A is added; the two losses share no weights.

    Args:
        model: the model.
        input_ids: int64 `(batch, n)`, sentences with the placeholder for the object's name.
        caption_ids: int64 `(batch, k)`, the sentences as they are.
        align_ids: int64 `(batch, j)`, captions of the first image of each set.
        pixel_values: `(batch, set, 3, height, width)`.
        teacher_words: `(batch, w)`, embedding of the first token of each name.
        name_ids: int64 `(batch,)`, those tokens, in place of their embeddings.
        attention_mask: `(batch, n)`, 0 for padding.
        caption_attention_mask: `(batch, k)`, 0 for padding.
        align_attention_mask: `(batch, j)`, 0 for padding.
        image_features: `(batch, set, d)`, see [`encoded`].
    """
    if image_features is None and pixel_values is not None:
        image_features = model.encode_images(pixel_values.flatten(0, 1))[1].unflatten(0, pixel_values.shape[:2])
    sets = F.normalize(encoded(model, None, image_features)[1], dim=-1).detach()
    words = model.mapping(sets)
    if teacher_words is None:
        teacher_words = model.get_input_embeddings()(name_ids).detach()
    named = model.encode_text(caption_ids, caption_attention_mask).detach()
    loss = cycle_loss(named, model.encode_text(input_ids, attention_mask, words), teacher_words, words)
    texts = align(model.text_map, model.encode_text(align_ids, align_attention_mask).detach())
    return ComposedRetrievalOutput(loss=loss + alignment_loss(texts, sets[:, 0]))


OBJECTIVES: dict[str, tuple[Callable[..., ComposedRetrievalOutput], tuple[str, ...]]] = {
    "pic2word": (image_contrast, ("pixel_values", "input_ids")),
    "context_i2w": (image_contrast, ("pixel_values", "input_ids", "caption_ids")),
    "searle": (distillation, ("pixel_values", "input_ids", "caption_ids", "teacher_words")),
    "lincir": (reconstruction, ("input_ids", "caption_ids")),
    "palavra": (cycle, ("pixel_values", "input_ids", "caption_ids", "align_ids")),
}
"""Objective of each method, by name, and the inputs that it needs."""


def own_objective(model: Any, inputs: dict[str, Tensor]) -> ComposedRetrievalOutput:
    """Compute the objective of the model's own method.

    Raises:
        ValueError: if the method has none, or inputs are missing.
    """
    method = model.config.method
    if method not in OBJECTIVES:
        raise ValueError(f"{method} trains nothing: it optimises a token for each image")
    objective, needed = OBJECTIVES[method]
    encoded_before = {"pixel_values"} if "image_features" in inputs else set()
    if missing := [name for name in needed if name not in {*inputs, *encoded_before}]:
        raise ValueError(f"the training loss of {method} needs {list(needed)}; {missing} missing")
    return objective(model, **inputs)


__all__ = ["OBJECTIVES", "own_objective"]
