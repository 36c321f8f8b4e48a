"""How far a mean over queries, or over seeds, can be trusted. Numbers in, numbers out; knows no metric.

Two sources of chance, measured apart: another draw of *queries* would give another mean (`bootstrap_interval`,
`paired_test`), and so would another *seed* of training (`seed_interval`). An interval over queries says nothing about
seeds. The per-query values of recall@k are the hits `ranks < k`, those of mAP@k are `average_precision_at_k`.

Example:
    >>> hits = [True] * 60 + [False] * 40  # of 100 queries, such as evaluate(...).values("recall@10")
    >>> low, high = bootstrap_interval(hits)
    >>> round(low, 2), round(high, 2)
    (0.5, 0.69)
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

_DRAWS_AT_ONCE = 4_000_000  # bounds the memory; results do not depend on it


@dataclass(frozen=True)
class PairedTest:
    """The outcome of `paired_test`.

    Args:
        difference: mean of the first run minus mean of the second.
        low: lower end of the interval of the difference.
        high: upper end.
        p_value: probability of a difference at least as large, in either direction, between runs that are equally
            good.
        confidence: of the interval.
    """

    difference: float
    low: float
    high: float
    p_value: float
    confidence: float


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean over queries (Efron, 1979).

    Queries are drawn with replacement, as if independent. Several captions of one reference image are not; the
    interval is then too narrow: pass the means of the groups instead.

    Args:
        values: (Q,) one number a query; hits may be booleans.
        confidence: how often such intervals hold the true mean.
        resamples: number of draws of Q queries.
        seed: the interval is the same for the same seed.

    Returns:
        Lower and upper end, in the unit of `values`.

    Raises:
        ValueError: if values are not a vector of finite numbers, or a setting is out of its range.
    """
    values = _vector("values", values)
    _check(confidence, resamples)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[generator.integers(len(values), size=(n, len(values)))].mean(axis=1)
            for n in _shares(resamples, values)
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_test(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compares two runs on the same queries: a sign-flip permutation test and a bootstrap interval of the difference.

    If the runs were equally good, each query's difference could as well have had the other sign (Fisher, 1935). The
    p-value counts the flips at least as extreme as what was seen, the latter among them (Phipson and Smyth, 2010), so
    it is never below `1 / (resamples + 1)`.

    Args:
        a: (Q,) one number a query, of the first run.
        b: (Q,) of the second, the same queries in the same order.
        confidence: of the interval, see `bootstrap_interval`.
        resamples: number of draws, of signs and of queries.
        seed: the outcome is the same for the same seed.

    Raises:
        ValueError: as `bootstrap_interval`, and if the runs have different numbers of queries.
    """
    a, b = _vector("a", a), _vector("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} queries and b {len(b)}; pass the same queries in the same order")
    low, high = bootstrap_interval(a - b, confidence, resamples, seed)
    differing = (a - b)[a != b]  # a sign changes nothing elsewhere
    seen = abs(differing.sum()) - 1e-9 * abs(differing).sum()  # rounding must not tell equal sums apart
    generator = np.random.default_rng(seed)
    extreme = 0
    for n in _shares(resamples, differing):
        signs = generator.integers(2, size=(n, len(differing))) * 2.0 - 1
        extreme += int((abs(signs @ differing) >= seen).sum())
    return PairedTest(float((a - b).mean()), low, high, (extreme + 1) / (resamples + 1), confidence)


def seed_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Student's t interval of a mean over runs that differ in nothing but the seed.

    Args:
        values: (runs,) one number a run, such as its recall@10; at least two.
        confidence: how often such intervals hold the true mean, where runs scatter normally.

    Returns:
        Lower and upper end. Three runs give a wide interval, of 2.5 standard deviations to either side.

    Raises:
        ValueError: if values are not at least two finite numbers, or the confidence is out of its range.
    """
    values = _vector("values", values)
    _check(confidence)
    if len(values) < 2:
        raise ValueError("one run shows no scatter between seeds; pass the values of at least two")
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    half = _student_quantile(confidence, len(values) - 1) * error
    return float(mean - half), float(mean + half)


def _student_quantile(confidence: float, degrees: int) -> float:
    """The t with P(|T| <= t) = confidence, by bisection of the angle arctan(t / sqrt(degrees))."""
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_central(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student_central(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) * tan(theta)), a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    total = term = 0.0 if degrees == 1 else math.cos(theta) ** odd
    for i in range(2 + odd, degrees, 2):
        term *= (i - 1) / i * math.cos(theta) ** 2
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def _shares(resamples: int, values: NDArray[np.float64]) -> Iterator[int]:
    """Splits resamples so that a share needs bounded memory."""
    share = max(1, _DRAWS_AT_ONCE // max(1, len(values)))
    for start in range(0, resamples, share):
        yield min(share, resamples - start)


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be one number a query or run, at least one; got shape {vector.shape}")
    if not (finite := np.isfinite(vector)).all():
        raise ValueError(f"{name}[{finite.argmin()}] is {vector[finite.argmin()]}; pass finite numbers")
    return vector


def _check(confidence: float, resamples: int = 1) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


__all__ = ["PairedTest", "bootstrap_interval", "paired_test", "seed_interval"]
