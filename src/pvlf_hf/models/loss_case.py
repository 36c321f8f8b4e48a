"""Contrastive loss with weighted negatives, as a pure function in float32. Saved with checkpoints."""

from math import log

import torch
from torch import Tensor

from .loss_pvlf import cosine_similarity

EXCLUDED = -1e30
"""Score of entries that take no part; finite, so that a row of nothing else has a gradient of 0."""


def hn_nce(
    query_embeds: Tensor,
    target_embeds: Tensor,
    temperature: float = 0.07,
    alpha: float = 1.0,
    beta: float = 0.5,
    as_released: bool = False,
    positives: Tensor | None = None,
    target_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute HN-NCE, the sum of both directions, in which hard negatives weigh more (CoVR).

    With s_ij = cos(q_i, t_j) / temperature and B targets, the negatives of row i get the weights
    w_ij = (B - 1) exp(beta s_ij) / sum_{k != i} exp(beta s_ik), the positive gets alpha, and
    L = mean_i log sum_j w_ij exp(s_ij) - s_ii; the same from targets to queries.

    Args:
        query_embeds: `(batch, d)`, L2-normalised.
        target_embeds: `(targets, d)`, L2-normalised; more than queries when gathered from other processes. Targets
            are compared with this process's queries alone.
        temperature: tau; CoVR's starts at 0.07.
        alpha: weight of the positive; 1 in CoVR.
        beta: how much more hard negatives weigh; 0.5 in CoVR, 0 for all alike.
        as_released: divide w_ij by the sum of row j instead of row i from queries to targets, a slip of CoVR's code.
        positives: int64 `(batch,)`, the row of `target_embeds` that is each query's target; row i by default.
        target_ids: int64 `(targets,)`; targets that share the id of a query's own are no negatives of it.
        chunk_size: None; the weights need all queries at once.

    Returns:
        float32 scalar; 0 for a batch of one, which has no negatives, with the default alpha.

    Raises:
        ValueError: if there is a `chunk_size`, or targets are gathered and `as_released` is True.
    """
    if chunk_size is not None:
        raise ValueError("loss_chunk_size: the weights of HN-NCE need all queries at once; leave it out")
    if positives is None:
        positives = torch.arange(len(query_embeds), device=query_embeds.device)
    if as_released and len(query_embeds) != len(target_embeds):
        raise ValueError(
            "hn_nce_as_released divides by the row of another query, so it needs as many targets as queries: train "
            "with gather_negatives=False, or without it"
        )
    scores = cosine_similarity(query_embeds, target_embeds) / temperature  # (batch, targets)
    rows = torch.arange(len(scores), device=scores.device)
    negative = torch.ones_like(scores, dtype=torch.bool)
    negative[rows, positives] = False
    if target_ids is not None:
        negative &= target_ids[positives][:, None] != target_ids[None]
    positive = scores[rows, positives]
    forth = weighted_log_sum(scores, positive, negative, alpha, beta, as_released) - positive
    own = scores[:, positives].T, negative[:, positives].T  # (batch targets, batch queries)
    back = weighted_log_sum(own[0], positive, own[1], alpha, beta) - positive
    return forth.mean() + back.mean()


def weighted_log_sum(
    scores: Tensor, positive: Tensor, negative: Tensor, alpha: float, beta: float, across: bool = False
) -> Tensor:
    """Compute log(alpha exp(s_ii) + sum_j w_ij exp(s_ij)) of each row.

    Args:
        scores: `(n, m)`.
        positive: `(n,)`, s_ii.
        negative: bool `(n, m)`, which entries are negatives of their row.
        alpha: weight of the positive.
        beta: see [`hn_nce`].
        across: divide w_ij by the sum of row j instead of row i; n must equal m.
    """
    hardness = (beta * scores).masked_fill(~negative, EXCLUDED)
    scale = negative.sum(dim=1).clamp(min=1).log() - hardness.logsumexp(dim=1)
    weighted = (hardness + (scale[None] if across else scale[:, None]) + scores).masked_fill(~negative, EXCLUDED)
    return torch.cat([weighted, positive[:, None] + log(alpha)], dim=1).logsumexp(dim=1)


__all__ = ["hn_nce"]
