"""How far rounding may move a result, whatever the processor: the tolerances of the tests are made of these bounds.

A test compares with a truth in float64, and allows what floating-point arithmetic allows: roundings of half a unit in
the last place, times the terms that are summed, times the condition of what follows (Higham, "Accuracy and Stability
of Numerical Algorithms", chapters 3 and 4). Such a bound holds for every order of summation, so for every processor,
kernel and number of threads, and it says nothing of what one of them gave.
"""

from typing import NamedTuple

import torch
from torch import Tensor


def roundoff(dtype=torch.float32):
    """Returns the largest relative error of one rounding: half a unit in the last place."""
    return torch.finfo(dtype).eps / 2


def dot_error(terms, dtype=torch.float32):
    """Returns the bound of a dot product's error in units of `|x| . |y|`, which is at most 1 for unit vectors."""
    return terms * roundoff(dtype) / (1 - terms * roundoff(dtype))


# --- the loss -------------------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """The loss and its gradients, or the bounds of their errors."""

    value: Tensor
    queries: Tensor
    targets: Tensor


def exact_loss(queries, targets, temperature=0.01, alpha=1.0, gamma=2.0, positives=None, target_ids=None):
    """Computes equations 14-15 in float64, and what float32 may be off by.

    An error of the cosines is divided by the temperature. How it goes on, to the loss by the gradient in the logits
    and to that gradient by its own derivative, is computed at the very point; `e^(2 d)` bounds by how much these
    derivatives change while the logits move by d.

    Returns:
        Two [`Loss`]: the truth, and the bound of each number's error in float32.
    """
    u, (batch, width), count = roundoff(), queries.shape, len(targets)
    queries, targets = queries.detach().double(), targets.detach().double()
    own = torch.arange(batch) if positives is None else positives
    logits = queries @ targets.T / temperature
    left_out = torch.zeros_like(logits, dtype=torch.bool)
    if target_ids is not None:
        left_out = (target_ids[own][:, None] == target_ids).scatter(1, own[:, None], False)
    logits = logits.masked_fill(left_out, -1e9)  # e^-1e9 is 0

    def one(logits, own):
        log_p = logits.log_softmax(dim=0).gather(0, own[None])[0]
        return -alpha * (-torch.expm1(log_p)).clamp_min(torch.finfo(torch.float32).tiny) ** gamma * log_p

    losses = torch.func.vmap(one)(logits, own)
    slopes = torch.func.vmap(torch.func.grad(one))(logits, own)  # (batch, count), of each row's loss in its logits
    bends = torch.func.vmap(torch.func.jacrev(torch.func.grad(one)))(logits, own)  # (batch, count, count)
    truth = Loss(losses.mean(), slopes @ targets / temperature / batch, slopes.T @ queries / temperature / batch)

    # The cosine; the division by a rounded temperature, x - max and x - log(sum), in the size of the logits; the sum.
    sizes = logits.abs().masked_fill(left_out, 0).amax(dim=1, keepdim=True)
    moved = dot_error(width) * (queries.abs() @ targets.abs().T) / temperature + u * (6 * sizes + count + 4)
    moved = moved.masked_fill(left_out, 0)
    worse = torch.exp(2 * moved.amax(dim=1))
    off = worse * (slopes.abs() * moved).sum(dim=1) + u * (2 * gamma + 6 + batch) * losses
    # Before the softmax's backward: expm1, a power, products, relative to the slope in log p; and 1 - miss for p.
    p, is_own = logits.softmax(dim=1), torch.nn.functional.one_hot(own, count)
    miss = (1 - p.gather(1, own[:, None])).clamp_min(torch.finfo(torch.float32).tiny)
    log_p = logits.log_softmax(dim=1).gather(1, own[:, None])
    outer = alpha * (miss**gamma - gamma * miss ** (gamma - 1) * (1 - miss) * log_p)
    outer_off = u * ((2 * gamma + 15) * outer - alpha * gamma * miss ** (gamma - 1) * log_p)
    slopes_off = worse[:, None] * (bends.abs() @ moved[:, :, None]).squeeze(2) + (is_own + p) * outer_off
    bound = Loss(
        off.mean(),
        (slopes_off + dot_error(count + 3) * slopes.abs()) @ targets.abs() / temperature / batch,
        (slopes_off + dot_error(batch + 3) * slopes.abs()).T @ queries.abs() / temperature / batch,
    )
    return truth, bound
