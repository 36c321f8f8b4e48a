"""Similarities and the focal InfoNCE loss as pure functions of embeddings. Saved with checkpoints."""

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


def cosine_similarity(query_embeds: Tensor, target_embeds: Tensor) -> Tensor:
    """Compute the cosine similarity of L2-normalised embeddings, in float32 even under autocast.

    Args:
        query_embeds: `(num_queries, d)`, unit rows.
        target_embeds: `(num_targets, d)`, unit rows.

    Returns:
        float32 `(num_queries, num_targets)`, in [-1, 1].
    """
    with torch.autocast(query_embeds.device.type, enabled=False):
        return query_embeds.float() @ target_embeds.float().T


def exact_unit_rows(embeds: Tensor) -> Tensor:
    """Return the rows (n, d) in float64, divided by their norms; zeros stay zeros."""
    rows = embeds.double()
    return rows / pairwise_sum(rows * rows).sqrt().clamp(min=1e-12)[:, None]


def pairwise_sum(rows: Tensor) -> Tensor:
    """Sum rows (n, d) -> (n,) by adding halves; unlike a library's sum, in an order that depends on d alone."""
    while rows.shape[1] > 1:
        half = rows.shape[1] // 2
        rest = rows[:, 2 * half :]  # one column if d is odd
        rows = rows[:, :half] + rows[:, half : 2 * half]
        rows = torch.cat([rows, rest], dim=1) if rest.numel() else rows
    return rows[:, 0]


def focal_info_nce(
    query_embeds: Tensor,
    target_embeds: Tensor,
    temperature: float = 0.01,
    alpha: float = 1.0,
    gamma: float = 2.0,
    positives: Tensor | None = None,
    target_ids: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    r"""Compute focal InfoNCE from queries to the targets of the batch (equations 14-15).

    With s_ij = cos(q_i, t_j) / temperature and p_i the softmax of row i at its own target,
    L = mean_i -alpha (1 - p_i)^gamma log p_i. `gamma=0, alpha=1` is cross-entropy. Computed in float32 from
    log-softmax whatever the embeddings' dtype: with gamma 2 and temperature 0.01 half precision underflows. It is a
    mean over rows against in-batch negatives, so accumulating two batches is not the same as one of double size.

    Args:
        query_embeds: `(num_queries, d)`, unit rows.
        target_embeds: `(num_targets, d)`, unit rows; more than queries when gathered from other processes.
        temperature: tau of eq. 14; the paper uses 0.01.
        alpha: factor of eq. 15; the paper uses 1.
        gamma: focusing exponent of eq. 15; the paper uses 2.
        positives: int64 `(num_queries,)`, the row of `target_embeds` that is each query's target; row i by default.
        target_ids: int64 `(num_targets,)`; targets that share the id of a query's own are left out of its
            denominator instead of counting as negatives (several queries of a batch may want the same image).
        chunk_size: queries compared at once. The backward pass recomputes each chunk, so that at most
            `(chunk_size, num_targets)` similarities are in memory; by default all queries at once.

    Returns:
        float32 scalar. A batch of one has no negatives, p = 1 and loss 0.

    Raises:
        ValueError: if there are fewer targets than queries and no `positives`.
    """
    num_queries, num_targets = len(query_embeds), len(target_embeds)
    if positives is None:
        if num_queries > num_targets:
            raise ValueError(f"{num_queries} queries but {num_targets} targets: pass each query's target")
        positives = torch.arange(num_queries, device=query_embeds.device)

    def losses(queries: Tensor, own: Tensor) -> Tensor:
        """Return the losses `(chunk,)` of queries `(chunk, d)` whose targets are the rows `own`, `(chunk,)`."""
        logits = cosine_similarity(queries, target_embeds) / temperature  # (chunk, num_targets)
        own = own[:, None]
        if target_ids is not None:
            same_target = target_ids[own] == target_ids[None]
            same_target = same_target.scatter(1, own, False)
            logits = logits.masked_fill(same_target, -torch.inf)
        log_p = F.log_softmax(logits, dim=-1).gather(1, own).squeeze(1)
        # 1 - p without cancellation as p -> 1; the clamp keeps the gradient of x^gamma finite at x = 0.
        miss = (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)
        return -alpha * miss**gamma * log_p

    if chunk_size is None:
        return losses(query_embeds, positives).mean()
    chunks = zip(query_embeds.split(chunk_size), positives.split(chunk_size), strict=True)
    return torch.cat([checkpoint(losses, *chunk, use_reentrant=False) for chunk in chunks]).mean()


__all__ = ["cosine_similarity", "focal_info_nce"]
