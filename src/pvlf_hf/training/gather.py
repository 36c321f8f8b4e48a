"""Gathers the targets of all processes with gradients, so that every query is ranked against the whole batch."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class GatherWithGradient(torch.autograd.Function):
    """Gathers the rows of all processes in rank order; the gradient of a row returns to the process it came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Return `(processes * rows, d)` for `(rows, d)`."""
        gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, rows.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the sum of the gradients that all processes have for this process's rows."""
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


__all__ = ["GatherWithGradient"]
