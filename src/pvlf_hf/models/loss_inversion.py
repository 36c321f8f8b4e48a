"""Losses of textual inversion as pure functions, in float32. Saved with checkpoints."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .loss_pvlf import focal_info_nce


def symmetric_info_nce(
    query_embeds: Tensor,
    target_embeds: Tensor,
    temperature: float = 0.01,
    positives: Tensor | None = None,
    target_ids: Tensor | None = None,
    chunk_size: int | None = None,
    all_query_embeds: Tensor | None = None,
) -> Tensor:
    """Compute the mean of the cross-entropies from queries to targets and back (CLIP's loss, Pic2Word).

    Args:
        query_embeds: `(batch, d)`, L2-normalised.
        target_embeds: `(targets, d)`, L2-normalised; more than queries when gathered from other processes.
        temperature: inverse of the logit scale.
        positives: see [`focal_info_nce`], as are the next two.
        target_ids: likewise.
        chunk_size: likewise.
        all_query_embeds: `(targets, d)`, queries of all processes in the order of the targets, which this process's
            targets are compared with; by default this process's queries alone.

    Returns:
        float32 scalar.
    """
    forth = focal_info_nce(query_embeds, target_embeds, temperature, 1.0, 0.0, positives, target_ids, chunk_size)
    if positives is None:
        positives = torch.arange(len(query_embeds), device=query_embeds.device)
    own, ids = target_embeds[positives], target_ids
    if all_query_embeds is None:
        all_query_embeds, ids = query_embeds, None if target_ids is None else target_ids[positives]
        positives = None
    back = focal_info_nce(own, all_query_embeds, temperature, 1.0, 0.0, positives, ids, chunk_size)
    return (forth + back) / 2


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.25) -> Tensor:
    """Compute the contrastive loss of pairs of vectors, each against all others of both kinds (SEARLE, PALAVRA).

    Args:
        first: `(batch, w)`.
        second: `(batch, w)`, the partners in order.
        temperature: 0.25 in both methods.

    Returns:
        float32 scalar, the mean over all `2 * batch` vectors.
    """
    vectors = F.normalize(torch.cat([first, second]).float(), dim=-1)
    similarity = (vectors @ vectors.T) / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
    partners = torch.arange(len(vectors), device=vectors.device).roll(len(first))
    return F.cross_entropy(similarity.masked_fill(itself, -torch.inf), partners)


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """Compute the mean of 1 - cosine of the rows of two `(batch, d)` (SEARLE), as a float32 scalar."""
    return (1 - F.cosine_similarity(first.float(), second.float(), dim=-1)).mean()


def distillation_loss(
    pseudo_words: Tensor,
    teacher_words: Tensor,
    replaced_features: Tensor,
    phrase_features: Tensor,
    phrase_weight: float = 0.75,
) -> Tensor:
    """Compute SEARLE's loss of phi.

    Args:
        pseudo_words: `(batch, w)`, from phi.
        teacher_words: `(batch, w)`, optimised for the same images by SEARLE-OTI.
        replaced_features: `(batch, d)`, features of phrases with the concept replaced by the pseudo word.
        phrase_features: `(batch, d)`, features of the phrases as they are.
        phrase_weight: weight of the second term, 0.75 in the reference.

    Returns:
        float32 scalar.
    """
    return nt_xent(teacher_words, pseudo_words) + phrase_weight * cosine_distance(replaced_features, phrase_features)


def optimization_loss(
    prompt_features: Tensor,
    image_features: Tensor,
    replaced_features: Tensor | None = None,
    phrase_features: Tensor | None = None,
    phrase_weight: float = 0.5,
) -> Tensor:
    """Compute SEARLE-OTI's loss of a token, the weighted mean of two cosine distances.

    Args:
        prompt_features: `(batch, d)`, features of templates with the token.
        image_features: `(batch, d)`.
        replaced_features: `(batch, d)`, features of phrases with the concept replaced by the token; None for no
            second term.
        phrase_features: `(batch, d)`, features of the phrases as they are.
        phrase_weight: weight of the second term beside 1 of the first, 0.5 in the reference.

    Returns:
        float32 scalar.
    """
    content = cosine_distance(prompt_features, image_features)
    if replaced_features is None or phrase_features is None:
        return content
    return (content + phrase_weight * cosine_distance(replaced_features, phrase_features)) / (1 + phrase_weight)


def reconstruction_loss(replaced_features: Tensor, caption_features: Tensor) -> Tensor:
    """Compute LinCIR's loss: the mean squared error of unnormalised `(batch, d)` features, a float32 scalar."""
    return F.mse_loss(replaced_features.float(), caption_features.float())


def cycle_loss(
    named_features: Tensor,
    replaced_features: Tensor,
    names: Tensor,
    words: Tensor,
    name_weight: float = 512.0,
) -> Tensor:
    """Compute PALAVRA's loss of its mapping network.

    Args:
        named_features: `(batch, d)`, features of sentences with the objects' names.
        replaced_features: `(batch, d)`, features of the same with words for the names.
        names: `(batch, w)`, token embeddings of the names.
        words: `(batch, w)`, from the mapping network.
        name_weight: weight of the second term, 512 in the reference.

    Returns:
        float32 scalar.
    """
    return nt_xent(named_features, replaced_features) + name_weight * alignment_loss(words, names)


def alignment_loss(first: Tensor, second: Tensor) -> Tensor:
    """Compute the mean squared error of the normalised rows of two `(batch, w)`, a float32 scalar (PALAVRA)."""
    return F.mse_loss(F.normalize(first.float(), dim=-1), F.normalize(second.float(), dim=-1))


__all__ = [
    "alignment_loss",
    "cosine_distance",
    "cycle_loss",
    "distillation_loss",
    "nt_xent",
    "optimization_loss",
    "reconstruction_loss",
    "symmetric_info_nce",
]
