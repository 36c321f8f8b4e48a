"""Confidence intervals and paired tests for means over queries, and intervals for means over seeds.

Two sources of chance are measured separately: other *queries* would give another mean (`bootstrap_interval`,
`paired_test`), and so would another *seed* of training (`seed_interval`). An interval over queries says nothing about
seeds; `crossed_interval` is one over both, and `detectable_difference` says what it could have seen.
`Evaluation.values` returns the per-query values of a metric.

A function whose docstring names a call of `scipy.stats` computes the same, and the tests compare the two; scipy itself
is not a dependency.

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

_VALUES_PER_BATCH = 4_000_000  # resampled values held at once: bounds the memory, does not change results


@dataclass(frozen=True)
class PairedTest:
    """The outcome of `paired_test`.

    Args:
        difference: mean of the first run minus mean of the second.
        low: lower end of the confidence interval of the difference.
        high: upper end.
        p_value: two-sided; probability of a difference at least as large between runs that are equally good.
        confidence: confidence level of the interval.
    """

    difference: float
    low: float
    high: float
    p_value: float
    confidence: float


def bootstrap_interval(
    values: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean over queries (Efron, 1979).

    Equals `scipy.stats.bootstrap((values,), np.mean, n_resamples=resamples, confidence_level=confidence,
    method="percentile", rng=np.random.default_rng(seed)).confidence_interval`.

    Queries are resampled as if they were independent. Several captions of one reference image are not, and the
    interval becomes too narrow: pass the means of such groups instead.

    Args:
        values: (Q,) one number per query; hits may be booleans.
        confidence: probability that the interval covers the true mean.
        resamples: number of resamples of Q queries.
        seed: seed of the resampling.

    Returns:
        Lower and upper end, in the unit of `values`.

    Raises:
        ValueError: if values are not a vector of finite numbers, or a setting is out of range.
    """
    values = _vector("values", values)
    _check(confidence, resamples)
    generator = np.random.default_rng(seed)
    means = np.concatenate(
        [
            values[generator.integers(len(values), size=(n, len(values)))].mean(axis=1)
            for n in _batch_sizes(resamples, len(values))
        ]
    )
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_test(
    a: ArrayLike, b: ArrayLike, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> PairedTest:
    """Compare two runs on the same queries by a sign-flip permutation test, with an interval of the difference.

    If the runs are equally good, each query's difference is as likely to have the other sign (Fisher, 1935). The
    p-value is the fraction of sign flips at least as extreme as the observed one, which is counted as well (Phipson
    and Smyth, 2010); it is never below `1 / (resamples + 1)`.

    The p-value estimates, as does `scipy.stats.permutation_test((a, b), lambda a, b: np.mean(a - b),
    permutation_type="samples", n_resamples=resamples)`, the p-value over all sign flips, which scipy returns for
    `n_resamples=np.inf`. The interval is that of `bootstrap_interval(a - b)`.

    Args:
        a: (Q,) one number per query, of the first run.
        b: (Q,) of the second, the same queries in the same order.
        confidence: confidence level of the interval, see `bootstrap_interval`.
        resamples: number of sign flips, and of resamples of the queries.
        seed: seed of both.

    Raises:
        ValueError: as `bootstrap_interval`, and if the runs have different numbers of queries.
    """
    a, b = _vector("a", a), _vector("b", b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} queries and b {len(b)}; pass the same queries in the same order")
    low, high = bootstrap_interval(a - b, confidence, resamples, seed)
    differing = (a - b)[a != b]  # flipping the sign of 0 changes nothing
    observed = abs(differing.sum()) - 1e-9 * abs(differing).sum()  # sums that differ by rounding count as equal
    generator = np.random.default_rng(seed)
    extreme = 0
    for n in _batch_sizes(resamples, len(differing)):
        signs = generator.integers(2, size=(n, len(differing))) * 2.0 - 1
        extreme += int((abs(signs @ differing) >= observed).sum())
    return PairedTest(float((a - b).mean()), low, high, (extreme + 1) / (resamples + 1), confidence)


def seed_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return Student's t interval of a mean over runs that differ only in their seed.

    Equals `scipy.stats.t.interval(confidence, len(values) - 1, np.mean(values), scipy.stats.sem(values))`.

    Args:
        values: (runs,) one number per run, such as its recall@10; at least two.
        confidence: probability that the interval covers the true mean if runs are normally distributed.

    Returns:
        Lower and upper end. Three runs give a wide interval, of 2.5 standard deviations to either side.

    Raises:
        ValueError: if values are not at least two finite numbers, or the confidence is out of range.
    """
    values = _vector("values", values)
    _check(confidence)
    if len(values) < 2:
        raise ValueError("one run shows no variation between seeds; pass the values of at least two")
    mean, error = values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    half = _student_quantile(confidence, len(values) - 1) * error
    return float(mean - half), float(mean + half)


def crossed_interval(values: ArrayLike, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval of a mean over seeds and queries, both of which could have been others.

    The variance of the mean adds what seeds contribute to what queries contribute, less what their combination
    contributes to both (Clark, 1973: quasi-F of an analysis of variance with two crossed random factors). It is taken
    to be at least that of either alone. Student's quantile has Satterthwaite's degrees of freedom, rounded down.

    Args:
        values: (S, Q) one number per seed and query, at least two of each, such as the differences between the hits
            of two methods that were trained with the same S seeds and tested on the same Q queries.
        confidence: probability that the interval covers the true mean, about.

    Returns:
        Lower and upper end, in the unit of `values`.

    Raises:
        ValueError: if values are not a matrix of finite numbers with two rows and columns or more, or the confidence
            is out of range.
    """
    mean, error, degrees = _crossed_error(values, confidence)
    half = _student_quantile(confidence, degrees) * error
    return mean - half, mean + half


def detectable_difference(values: ArrayLike, power: float = 0.8, confidence: float = 0.95) -> float:
    """Return how large a true difference had to be for [`crossed_interval`] to exclude zero with some probability.

    It says what an experiment could have seen, from the error that it found and not from its mean.

    Args:
        values: (S, Q) as for [`crossed_interval`].
        power: the probability, from 0.5, where the answer is half the width of the interval, to 1.
        confidence: that of the interval.

    Returns:
        a difference of either sign, in the unit of `values`.

    Raises:
        ValueError: as [`crossed_interval`], and if the power is out of range.
    """
    if not 0.5 <= power < 1:
        raise ValueError(f"power must be at least 0.5 and below 1, such as 0.8; got {power}")
    _, error, degrees = _crossed_error(values, confidence)
    return (_student_quantile(confidence, degrees) + _student_quantile(2 * power - 1, degrees)) * error


def _crossed_error(values: ArrayLike, confidence: float) -> tuple[float, float, int]:
    """Return mean, standard error and degrees of freedom, see [`crossed_interval`]."""
    matrix = np.asarray(values, dtype=np.float64)
    if matrix.ndim != 2 or min(matrix.shape) < 2 or not np.isfinite(matrix).all():
        raise ValueError(f"values must be finite, (seeds, queries), at least two of each; got shape {matrix.shape}")
    _check(confidence)
    seeds, queries = matrix.shape
    of_seeds, of_queries, mean = matrix.mean(axis=1), matrix.mean(axis=0), matrix.mean()
    rest = matrix - of_seeds[:, None] - of_queries + mean
    degrees = np.array([seeds - 1, queries - 1, (seeds - 1) * (queries - 1)])
    # Mean squares, in units of the variance of the mean
    squares = np.array([((of_seeds - mean) ** 2).sum() / seeds, ((of_queries - mean) ** 2).sum() / queries, 0.0])
    squares[2] = (rest**2).sum() / matrix.size
    squares /= degrees
    variance = max(squares[0] + squares[1] - squares[2], squares[0], squares[1])
    effective = variance**2 / (squares**2 / degrees).sum() if variance else 1
    return float(mean), math.sqrt(variance), max(1, int(effective))


def holm(p_values: ArrayLike) -> list[float]:
    """Adjust the p-values of several tests, so that each can be compared with the level of all (Holm, 1979).

    The smallest is multiplied by the number of tests, the next by one less, and so on; none becomes smaller than the
    one before, or greater than 1. A test whose adjusted p-value is at most 0.05 is one of a family in which a false
    finding has at most that probability.

    Args:
        p_values: (tests,) one for each test.

    Raises:
        ValueError: if they are not numbers from 0 to 1.
    """
    values = _vector("p_values", p_values)
    if (bad := (values < 0) | (values > 1)).any():
        raise ValueError(f"p_values[{bad.argmax()}] is {values[bad.argmax()]}, which is no probability")
    order = values.argsort(kind="stable")
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1)))
    return adjusted.tolist()


def _student_quantile(confidence: float, degrees: int) -> float:
    """Return t with P(|T| <= t) = confidence, as `scipy.stats.t.ppf((1 + confidence) / 2, degrees)`.

    Bisects the angle arctan(t / sqrt(degrees)).
    """
    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_central(middle, degrees) < confidence else (low, middle)
    return math.sqrt(degrees) * math.tan(low)


def _student_central(theta: float, degrees: int) -> float:
    """Return P(|T| <= sqrt(degrees) * tan(theta)) by a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    odd = degrees % 2
    total = term = 0.0 if degrees == 1 else math.cos(theta) ** odd
    for i in range(2 + odd, degrees, 2):
        term *= (i - 1) / i * math.cos(theta) ** 2
        total += term
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def _batch_sizes(resamples: int, num_values: int) -> Iterator[int]:
    """Split resamples into batches of bounded memory."""
    size = max(1, _VALUES_PER_BATCH // max(1, num_values))
    for start in range(0, resamples, size):
        yield min(size, resamples - start)


def _vector(name: str, values: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or not len(vector):
        raise ValueError(f"{name} must be one number per query or run, at least one; got shape {vector.shape}")
    if not (finite := np.isfinite(vector)).all():
        raise ValueError(f"{name}[{finite.argmin()}] is {vector[finite.argmin()]}; pass finite numbers")
    return vector


def _check(confidence: float, resamples: int = 1) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95; got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")


__all__ = [
    "PairedTest",
    "bootstrap_interval",
    "crossed_interval",
    "detectable_difference",
    "holm",
    "paired_test",
    "seed_interval",
]
