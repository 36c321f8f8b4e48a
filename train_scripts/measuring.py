"""How the benchmarks of this folder measure: alternatives in turn, in one run, as ratios with their spread."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds of every round of one alternative."""

    name: str
    seconds: list[float]

    @property
    def median(self) -> float:
        """Median of the rounds, in seconds."""
        return statistics.median(self.seconds)

    def speedup_over(self, other: "Timing") -> tuple[float, float, float]:
        """How many times faster than `other`: median, lowest and highest of the rounds, each compared in its round."""
        ratios = sorted(theirs / ours for ours, theirs in zip(self.seconds, other.seconds, strict=True))
        return statistics.median(ratios), ratios[0], ratios[-1]


def side_by_side(
    alternatives: dict[str, Callable[[], Any]], rounds: int = 5, warmup: int = 1, calls: int = 1
) -> dict[str, Timing]:
    """Times alternatives in turn, so that what else the machine does hits all of them alike.

    Args:
        alternatives: what to call, by name; the first is the one that others are compared with.
        rounds: how often each is timed.
        warmup: calls of each before the first round.
        calls: calls in a timing, for what takes less than a millisecond; seconds are those of one call.
    """
    for _ in range(warmup):
        for call in alternatives.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(rounds):
        for name, call in alternatives.items():
            start = time.perf_counter()
            for _ in range(calls):
                call()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: Timing(name, times) for name, times in seconds.items()}


def table(timings: dict[str, Timing]) -> str:
    """Markdown: median seconds, and how many times faster than the first alternative [lowest, highest round]."""
    first = next(iter(timings.values()))
    lines = ["| alternative | seconds (median) | times faster [rounds] |", "| --- | --- | --- |"]
    for timing in timings.values():
        ratio, low, high = timing.speedup_over(first)
        lines.append(f"| {timing.name} | {timing.median:.4g} | {ratio:.2f} [{low:.2f}, {high:.2f}] |")
    return "\n".join(lines)


def peak_memory(code: str) -> int:
    """Highest resident memory, in bytes, of a fresh Python process that runs `code` (Linux only).

    `resource` cannot tell: the maximum it reports starts from what the parent process held.
    """
    program = f"{code}\nprint(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def matrix_rate(size: int = 2048, rounds: int = 5, dtype: Any = None) -> float:
    """Operations a second of a square matrix product on this machine, by default in float32: the encoders' floor."""
    import torch

    a = torch.randn(size, size, dtype=dtype)
    best = min(side_by_side({"product": lambda: a @ a}, rounds)["product"].seconds)
    return 2 * size**3 / best


__all__ = ["Timing", "matrix_rate", "peak_memory", "side_by_side", "table"]
