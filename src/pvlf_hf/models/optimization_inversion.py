"""Optimisation of a token for an image: SEARLE-OTI, and PALAVRA's second stage. Saved with checkpoints.

Shapes: `batch` images, `steps` optimisation steps, `n` text tokens, `d` the joint width, `w` the width of token
embeddings.
"""

from collections.abc import Callable, Iterable
from hashlib import blake2b
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils import logging

from .loss_inversion import nt_xent, optimization_loss

EncodeText = Callable[[Tensor, Tensor | None], Tensor]
"""Token ids `(batch, n)` and pseudo words `(batch, w)`, or None, to features `(batch, d)`."""


INVERTED_AT_ONCE = 32
"""Images optimised together, as in SEARLE."""


class Sentences(NamedTuple):
    """Sentences of one step of SEARLE-OTI.

    Args:
        prompt_ids: int64 `(batch, n)`, templates with the placeholder.
        replaced_ids: int64 `(batch, n)`, phrases with the placeholder for their concept; None for no such term.
        phrase_ids: int64 `(batch, n)`, the phrases as they are.
    """

    prompt_ids: Tensor
    replaced_ids: Tensor | None = None
    phrase_ids: Tensor | None = None


class Optimized(NamedTuple):
    """Optimised tokens.

    Args:
        words: `(batch, w)`, after the last step.
        averaged: `(batch, w)`, their moving average, started at the initial tokens.
        losses: the loss before each step.
    """

    words: Tensor
    averaged: Tensor
    losses: list[float]


def optimize_searle(
    encode_text: EncodeText,
    image_features: Tensor,
    words: Tensor,
    steps: Iterable[Sentences],
    learning_rate: float = 2e-2,
    weight_decay: float = 0.01,
    decay: float = 0.99,
) -> Optimized:
    """Optimise tokens so that sentences with them match their images (SEARLE-OTI).

    Args:
        encode_text: the text encoder.
        image_features: `(batch, d)`.
        words: `(batch, w)`, initial tokens.
        steps: sentences of each step.
        learning_rate: AdamW's, 2e-2 in the reference.
        weight_decay: AdamW's, 0.01 in the reference.
        decay: weight of the past in the moving average, 0.99 in the reference.
    """
    words = words.clone().requires_grad_()
    averaged, losses = words.detach().clone(), []
    optimizer = torch.optim.AdamW([words], lr=learning_rate, weight_decay=weight_decay)
    for sentences in steps:
        replaced = phrases = None
        if sentences.replaced_ids is not None and sentences.phrase_ids is not None:
            with torch.no_grad():
                phrases = encode_text(sentences.phrase_ids, None)
            replaced = encode_text(sentences.replaced_ids, words)
        loss = optimization_loss(encode_text(sentences.prompt_ids, words), image_features, replaced, phrases)
        losses.append(_step(optimizer, words, loss))
        averaged = decay * averaged + (1 - decay) * words.detach()
    return Optimized(words.detach(), averaged, losses)


def optimize_palavra(
    encode_text: EncodeText,
    image_features: Tensor,
    words: Tensor,
    coarse_features: Tensor,
    prompt_ids: Tensor,
    steps: Iterable[int],
    learning_rate: float = 0.01,
) -> Optimized:
    """Optimise tokens so that each, alone, matches its image better than a coarse word does (PALAVRA's mode 1).

    Args:
        encode_text: the text encoder.
        image_features: `(batch, d)`, L2-normalised, of a set of images their mean.
        words: `(batch, w)`, tokens from the mapping network.
        coarse_features: `(batch, d)`, features of the coarse word in the space of images.
        prompt_ids: int64 `(batch, n)`, the placeholder alone.
        steps: as many items as there are steps.
        learning_rate: Adam's, 0.01 in the reference.
    """
    words = words.clone().requires_grad_()
    losses = []
    optimizer = torch.optim.Adam([words], lr=learning_rate)
    for _ in steps:
        features = encode_text(prompt_ids, words)
        pairs = zip(image_features, features, coarse_features, strict=True)
        loss = torch.stack([nt_xent(torch.stack([i, c]), torch.stack([f, c])) for i, f, c in pairs]).mean()
        losses.append(_step(optimizer, words, loss))
    return Optimized(words.detach(), words.detach(), losses)


def _step(optimizer: torch.optim.Optimizer, words: Tensor, loss: Tensor) -> float:
    """Take one step by the gradient of the words alone: none is computed for the text encoder's weights."""
    (words.grad,) = torch.autograd.grad(loss, [words])
    optimizer.step()
    return loss.item()


def draw(keys: list[str], width: int, steps: int, choices: int, phrases: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw initial tokens and the sentences of each step, for each image from its own key.

    So the token of an image does not depend on what it is optimised with.

    Args:
        keys: hexadecimal digest of each image.
        width: `w`.
        steps: optimisation steps.
        choices: templates to choose from.
        phrases: phrases to choose from; 0 for none.

    Returns:
        tokens `(batch, w)` of a normal of standard deviation 0.02, and int64 `(batch, steps)` template numbers and
        phrase numbers.
    """
    drawn: list[list[Tensor]] = []
    for key in keys:
        generator = torch.Generator().manual_seed(int(key[:15], 16))
        numbers = [torch.randint(max(count, 1), (steps,), generator=generator) for count in (choices, phrases)]
        drawn.append([0.02 * torch.randn(width, generator=generator), *numbers])
    words, templates, chosen = (torch.stack(column) for column in zip(*drawn, strict=True))
    return words, templates, chosen


def digests(*batches: Tensor | None) -> list[str]:
    """Return a hexadecimal digest of each row of some batches, taken together."""
    raw = [batch.detach().cpu().contiguous() for batch in batches if batch is not None]
    keys = []
    for row in range(len(raw[0])):
        hasher = blake2b(digest_size=16)
        for batch in raw:
            hasher.update(batch[row].reshape(-1).view(torch.uint8).numpy().tobytes())
        keys.append(hasher.hexdigest())
    return keys


def through_cache(cache: dict[str, Tensor], keys: list[str], invert: Callable[[list[int]], Tensor]) -> Tensor:
    """Look up pseudo words by the keys of their images; invert each image that is not in the cache, once.

    Args:
        cache: key to word, float32 on the CPU; new ones are added.
        keys: digest of each image.
        invert: inverts the images of some rows, at most `INVERTED_AT_ONCE`, to `(rows, w)`.

    Returns:
        float32 `(batch, w)` on the CPU.
    """
    new = [row for row, key in enumerate(keys) if key not in cache and key not in keys[:row]]
    # Not in inference mode, whose tensors have no gradient.
    with torch.inference_mode(False), torch.enable_grad():
        for start in range(0, len(new), INVERTED_AT_ONCE):
            rows = new[start : start + INVERTED_AT_ONCE]
            words = invert(rows).detach().float().cpu()
            cache.update(zip((keys[row] for row in rows), words, strict=True))
    return torch.stack([cache[key] for key in keys])


def progress_bar(steps: int, images: int) -> Iterable[int]:
    """Count optimisation steps, with the library's progress bar."""
    return logging.tqdm(range(steps), desc=f"inverting {images} images")


def align(text_map: torch.nn.Linear, features: Tensor) -> Tensor:
    """Map text features `(batch, d)` into the space of image features (PALAVRA's A)."""
    return text_map(features) + features


def searle_words(
    encode_text: EncodeText,
    image_features: Tensor,
    keys: list[str],
    width: int,
    steps: int,
    prompt_ids: Tensor,
    replaced_ids: Tensor | None = None,
    phrase_ids: Tensor | None = None,
) -> Tensor:
    """Invert images by SEARLE-OTI.

    Args:
        encode_text: the text encoder.
        image_features: `(batch, d)`.
        keys: digest of each image.
        width: `w`.
        steps: optimisation steps.
        prompt_ids: int64 `(templates, n)`, sentences to choose from, with the placeholder.
        replaced_ids: int64 `(batch, phrases, n)`, phrases to choose from, with the placeholder.
        phrase_ids: int64 `(batch, phrases, n)`, the phrases as they are.

    Returns:
        float32 `(batch, w)`, the moving averages.
    """
    phrases = 0 if phrase_ids is None else phrase_ids.shape[1]
    words, templates, chosen = (
        t.to(image_features.device) for t in draw(keys, width, steps, len(prompt_ids), phrases)
    )
    rows = torch.arange(len(keys), device=image_features.device)

    def sentences(step: int) -> Sentences:
        prompts = prompt_ids[templates[:, step]]
        if replaced_ids is None or phrase_ids is None:
            return Sentences(prompts)
        return Sentences(prompts, replaced_ids[rows, chosen[:, step]], phrase_ids[rows, chosen[:, step]])

    return optimize_searle(encode_text, image_features, words, map(sentences, progress_bar(steps, len(keys)))).averaged


def palavra_words(
    encode_text: EncodeText,
    image_features: Tensor,
    words: Tensor,
    text_map: torch.nn.Linear,
    steps: int,
    prompt_ids: Tensor,
) -> Tensor:
    """Refine the words of PALAVRA's mapping network.

    Args:
        encode_text: the text encoder.
        image_features: `(batch, d)`.
        words: `(batch, w)`, from the mapping network.
        text_map: the map A.
        steps: optimisation steps.
        prompt_ids: int64 `(2, n)`, the placeholder alone and the coarse word alone.

    Returns:
        float32 `(batch, w)`.
    """
    count = len(words)
    with torch.no_grad():
        coarse = align(text_map, F.normalize(encode_text(prompt_ids[1:], None), dim=-1)).expand(count, -1)
    prompts, bar = prompt_ids[:1].expand(count, -1), progress_bar(steps, count)
    return optimize_palavra(encode_text, F.normalize(image_features, dim=-1), words, coarse, prompts, bar).words


__all__ = [
    "Optimized",
    "Sentences",
    "digests",
    "optimize_palavra",
    "optimize_searle",
    "palavra_words",
    "searle_words",
    "through_cache",
]
