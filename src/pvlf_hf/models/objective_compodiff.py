"""Training objective of CompoDiff: predict the target's embedding from a noised one. Saved with checkpoints.

Shapes: `batch` triplets, `n` text tokens, `w` the text width, `d` the joint width.
"""

from typing import Any

import torch
from torch import Tensor

from .sampler_compodiff import add_noise


def predict_targets(
    model: Any,
    image: Tensor,
    target: Tensor,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    mask: Tensor | None = None,
    times: Tensor | None = None,
    noise: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Predict targets from their noised embeddings; in train mode, some without reference image or caption.

    Args:
        model: a [`CompoDiffModel`].
        image: `(batch, d)`, embeddings of reference images, not normalised.
        target: `(batch, d)`, likewise of targets.
        input_ids: int64 `(batch, n)`, relative captions.
        attention_mask: `(batch, n)`, 0 for padding.
        mask: `(batch, mask_size, mask_size)`; None for no mask.
        times: int64 `(batch,)`; by default drawn uniformly.
        noise: `(batch, d)`; by default drawn.
        **kwargs: none; others are refused.

    Returns:
        predictions and clean embeddings, float32 `(batch, d)` each, not normalised.

    Raises:
        ValueError: if numbers of images, captions and targets differ, or an option is unknown.
    """
    if unknown := sorted(name for name, value in kwargs.items() if value is not None and value is not False):
        raise ValueError(f"{unknown}: the denoising loss has no such option")
    if len(image) != len(target) or len(image) != len(input_ids):
        raise ValueError(
            f"{len(image)} reference images, {len(input_ids)} captions and {len(target)} target images: one of each "
            "makes a triplet"
        )
    config = model.config
    text = model.encode_text(input_ids, attention_mask)
    mask = model.checked_mask(mask, text)
    if model.training:
        image, text = drop_conditions(model, image, text, input_ids, attention_mask)
    clean = config.image_embed_scale * target.detach().float()
    times = torch.randint(config.timesteps, (len(clean),), device=clean.device) if times is None else times
    noise = torch.randn_like(clean) if noise is None else noise
    noised = add_noise(clean, times, noise, config.timesteps)
    predicted = model.denoiser(noised[:, None], times, model.denoiser.read(text, image, mask))[:, 0]
    return predicted, clean


def drop_conditions(
    model: Any, image: Tensor, text: Tensor, input_ids: Tensor, attention_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Replace some images `(batch, d)` by zeros and some captions `(batch, n, w)` by the negative text.

    Guidance asks the denoiser for predictions without them.
    """
    of_image, of_text = torch.rand(2, len(text), device=text.device)
    image = torch.where((of_image < model.config.image_dropout)[:, None], 0.0, image)
    if not model.config.text_dropout:
        return image, text
    negative = model.encode_negative(input_ids, attention_mask)
    return image, torch.where((of_text < model.config.text_dropout)[:, None, None], negative, text)


__all__ = ["drop_conditions", "predict_targets"]
