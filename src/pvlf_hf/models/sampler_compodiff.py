"""Noise schedule and sampler of CompoDiff. Saved with checkpoints.

With abar the cumulative product of the cosine schedule, x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) noise, and the
denoiser predicts x0. A step from t to u is DDIM's with eta = 1, except that it takes abar of the time *before* t and u
while the noise in x_t is found by abar_t, as in the released code.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


@cache
def cumulative_alphas(timesteps: int) -> Tensor:
    """Return abar of the cosine schedule with s = 0.008, float64 `(timesteps,)`, on the CPU."""
    shares = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64, device="cpu")
    curve = ((shares + 0.008) / 1.008 * torch.pi / 2).cos() ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(0, 0.999)
    return (1 - betas).cumprod(dim=0)


def add_noise(clean: Tensor, times: Tensor, noise: Tensor, timesteps: int) -> Tensor:
    """Noise embeddings `(rows, d)` to the times int64 `(rows,)`."""
    alphas = cumulative_alphas(timesteps).to(times.device)[times, None]
    return alphas.sqrt().to(clean.dtype) * clean + (1 - alphas).sqrt().to(clean.dtype) * noise


def sampling_times(steps: int, timesteps: int) -> list[int]:
    """Return the times of sampling, from late to early; -1 is the clean embedding."""
    return torch.linspace(-1, timesteps, steps + 1, device="cpu")[:-1].int().tolist()[::-1]  # truncated, not rounded


def draw_noise(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Draw float32 noise where the generator lives, which decides the numbers, and move it."""
    return torch.randn(shape, generator=generator, device=generator.device).to(device)


def sample(predict: Callable[[Tensor, int], Tensor], noise: Tensor, times: list[int], timesteps: int) -> Tensor:
    """Denoise step by step.

    Args:
        predict: predicts clean embeddings from noised ones `(rows, samples, d)` and their time.
        noise: `(len(times), rows, samples, d)`, the first to start from, each other one for the step of its number.
        times: from [`sampling_times`].
        timesteps: length of the schedule.

    Returns:
        `(rows, samples, d)`.
    """
    alphas = cumulative_alphas(timesteps).tolist()
    before = [1.0, *alphas]  # before[t] is abar of the time before t
    noised = noise[0]
    for step, (now, following) in enumerate(zip(times, times[1:], strict=False), start=1):
        clean = predict(noised, now)
        if following < 0:
            return clean
        found = (noised / alphas[now] ** 0.5 - clean) / (1 / alphas[now] - 1) ** 0.5
        a, a_next = before[now], before[following]
        fresh = ((1 - a / a_next) * (1 - a_next) / (1 - a)) ** 0.5
        kept = max(0.0, 1 - a_next - fresh**2) ** 0.5  # rounding may leave it below zero
        noised = a_next**0.5 * clean + kept * found
        if following > 0:
            noised = noised + fresh * noise[step]
    raise ValueError(f"times {times} do not end in -1: make them by sampling_times")


__all__ = ["add_noise", "cumulative_alphas", "draw_noise", "sample", "sampling_times"]
