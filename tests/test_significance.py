"""`evaluation/significance.py` against plain loops, tables, closed forms and scipy; coverage of its intervals."""

from itertools import product

import numpy as np
import pytest
import torch
from error_bounds import MEAN_ERROR, dot_error

from pvlf_hf.evaluation import significance
from pvlf_hf.evaluation.significance import (
    bootstrap_interval,
    crossed_interval,
    detectable_difference,
    paired_test,
    seed_interval,
)

GENERATOR = np.random.default_rng(7)
HITS = GENERATOR.random(40) < 0.3
PRECISIONS = GENERATOR.random(40) * (GENERATOR.random(40) < 0.5)


@pytest.mark.parametrize("values", [HITS, PRECISIONS, list(map(float, PRECISIONS))])
@pytest.mark.parametrize("values_per_batch", [1, 199, 4_000_000])
def test_bootstrap_equals_a_plain_loop(values, values_per_batch, monkeypatch):
    monkeypatch.setattr(significance, "_VALUES_PER_BATCH", values_per_batch)
    generator = np.random.default_rng(3)
    means = [np.mean([values[i] for i in generator.integers(40, size=40)]) for _ in range(300)]
    expected = np.percentile(means, [5, 95])
    assert bootstrap_interval(values, 0.9, resamples=300, seed=3) == pytest.approx(expected, abs=MEAN_ERROR)


def test_a_seed_repeats_the_interval():
    assert bootstrap_interval(PRECISIONS, seed=1) == bootstrap_interval(PRECISIONS, seed=1)
    assert bootstrap_interval(PRECISIONS, seed=1) != bootstrap_interval(PRECISIONS, seed=2)


def test_bootstrap_of_many_hits_is_the_normal_interval():
    hits = np.arange(1000) < 300
    half = 1.959964 * np.sqrt(0.3 * 0.7 / 1000)
    # Half of 0.001, the granularity of the means, plus three standard errors of a quantile of 10,000 draws
    error = 0.0005 + 3 * half / 1.959964 * np.sqrt(0.025 * 0.975 / 10_000) / 0.0584
    assert bootstrap_interval(hits) == pytest.approx((0.3 - half, 0.3 + half), abs=error)
    assert bootstrap_interval(np.full(9, 0.25)) == (0.25, 0.25)


def test_intervals_cover_the_true_mean_at_their_confidence():
    generator = np.random.default_rng(0)
    samples = generator.random((400, 200)) < 0.4
    covered = [low <= 0.4 <= high for low, high in (bootstrap_interval(s, 0.8, resamples=400) for s in samples)]
    assert np.mean(covered) == pytest.approx(0.8, abs=0.06)  # 3 standard errors of 400 trials
    runs = generator.normal(5, 2, size=(4000, 3))
    covered = [low <= 5 <= high for low, high in (seed_interval(run, 0.8) for run in runs)]
    assert np.mean(covered) == pytest.approx(0.8, abs=0.02)  # 3 standard errors of 4000 trials


def exact_p_value(a, b):
    """Compute the p-value over every combination of signs; multiples of 1/8 leave no rounding."""
    differences = a - b
    sums = [abs(np.dot(signs, differences)) for signs in product([-1, 1], repeat=len(differences))]
    return np.mean([s >= abs(differences.sum()) for s in sums])


@pytest.mark.parametrize("seed", range(4))
def test_paired_test_approaches_the_exact_permutation_test(seed):
    a, b = np.random.default_rng(seed).integers(9, size=(2, 10)) / 8
    outcome = paired_test(a, b, resamples=20_000)
    assert outcome.p_value == pytest.approx(exact_p_value(a, b), abs=0.015)  # 4 standard errors of 20,000 draws
    assert outcome.difference == (a - b).mean()
    assert (outcome.low, outcome.high) == bootstrap_interval(a - b, resamples=20_000)
    other = paired_test(b, a, resamples=20_000)
    assert (other.difference, other.p_value) == (-outcome.difference, outcome.p_value)
    assert (-other.high, -other.low) == pytest.approx((outcome.low, outcome.high), abs=MEAN_ERROR)
    tripled = paired_test(a / 3, b / 3, resamples=20_000)  # thirds are rounded; equal sums still count as equal
    assert tripled.p_value == outcome.p_value


def test_paired_test_has_exact_results_for_identical_and_opposite_runs():
    same = paired_test(PRECISIONS, PRECISIONS)
    assert (same.difference, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    opposite = paired_test(np.ones(60), np.zeros(60, dtype=bool), resamples=999)
    assert (opposite.difference, opposite.low, opposite.high, opposite.p_value) == (1, 1, 1, 1 / 1000)


def test_p_values_of_equally_good_runs_are_uniform():
    runs = np.random.default_rng(1).normal(size=(2, 400, 30))
    p_values = [paired_test(a, b, resamples=200).p_value for a, b in zip(*runs, strict=True)]
    for level in (0.1, 0.5):
        assert np.mean(np.array(p_values) <= level) == pytest.approx(level, abs=0.075)  # 3 standard errors


def test_batches_do_not_change_the_test(monkeypatch):
    outcome = paired_test(PRECISIONS, HITS, resamples=500)
    monkeypatch.setattr(significance, "_VALUES_PER_BATCH", 400)
    assert paired_test(PRECISIONS, HITS, resamples=500) == outcome


# Two-sided quantiles of Student's t as printed in tables: degrees of freedom, confidence, t.
@pytest.mark.parametrize(
    ("degrees", "confidence", "t"),
    [
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (3, 0.95, 3.18245),
        (4, 0.99, 4.60409),
        (5, 0.9, 2.01505),
        (9, 0.95, 2.26216),
        (10, 0.99, 3.16927),
        (120, 0.95, 1.97993),
    ],
)
def test_seed_interval_equals_published_tables(degrees, confidence, t):
    values = np.random.default_rng(degrees).normal(size=degrees + 1)
    half = t * values.std(ddof=1) / np.sqrt(degrees + 1)
    expected = (values.mean() - half, values.mean() + half)
    # The tables have six digits.
    assert seed_interval(values, confidence) == pytest.approx(expected, abs=0.5e-5 * half + 10 * MEAN_ERROR)


@pytest.mark.parametrize("values", [HITS.astype(float), PRECISIONS])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_intervals_equal_scipy(values, confidence):
    stats = pytest.importorskip("scipy.stats")
    settings = {"n_resamples": 500, "confidence_level": confidence, "method": "percentile"}
    theirs = stats.bootstrap((values,), np.mean, **settings, rng=np.random.default_rng(5)).confidence_interval
    assert bootstrap_interval(values, confidence, 500, seed=5) == pytest.approx(tuple(theirs), abs=MEAN_ERROR)
    for runs in (np.random.default_rng(size).random(size) for size in (2, 3, 40)):
        degrees = len(runs) - 1
        theirs = stats.t.interval(confidence, degrees, np.mean(runs), stats.sem(runs))
        # The probability is a sum of `degrees / 2` terms, each off by one rounding more than the one before; its
        # error moves the quantile t by the inverse of the density, and the angle's moves the tangent.
        t, one = stats.t.ppf((1 + confidence) / 2, degrees), dot_error(1, torch.float64)
        off = dot_error(2 * degrees + 10, torch.float64) / (2 * stats.t.pdf(t, degrees))
        off += 2 * one * (degrees**0.5 + t**2 / degrees**0.5)
        # scipy states no accuracy; the same error is allowed for it
        error = 2 * off * stats.sem(runs) + 10 * MEAN_ERROR
        assert seed_interval(runs, confidence) == pytest.approx(theirs, rel=0, abs=error)


def crossed_by_loops(values, stats):
    """Compute the 95 % interval from the table of an analysis of variance, one cell at a time."""
    seeds, queries = len(values), len(values[0])
    mean = sum(map(sum, values)) / (seeds * queries)
    of_seeds = [sum(row) / queries for row in values]
    of_queries = [sum(row[q] for row in values) / seeds for q in range(queries)]
    degrees = seeds - 1, queries - 1, (seeds - 1) * (queries - 1)
    by_seed = queries * sum((m - mean) ** 2 for m in of_seeds) / degrees[0]
    by_query = seeds * sum((m - mean) ** 2 for m in of_queries) / degrees[1]
    cells = product(range(seeds), range(queries))
    rest = sum((values[s][q] - of_seeds[s] - of_queries[q] + mean) ** 2 for s, q in cells) / degrees[2]
    total = max(by_seed + by_query - rest, by_seed, by_query)
    effective = total**2 / sum(square**2 / d for square, d in zip((by_seed, by_query, rest), degrees, strict=True))
    half = stats.t.ppf(0.975, int(effective)) * (total / seeds / queries) ** 0.5
    return mean - half, mean + half


@pytest.mark.parametrize("seed", range(4))
def test_crossed_interval_equals_plain_loops(seed):
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(seed).normal(size=(3 + seed, 30))
    # Sums of a hundred squares in float64 differ by 1e-14 of their size, the ends by no more than a thousandfold.
    assert crossed_interval(values) == pytest.approx(crossed_by_loops(values.tolist(), stats), rel=1e-9)
    alike = np.tile(values[:1], (4, 1))  # seeds change nothing: the interval over queries
    theirs = stats.t.interval(0.95, 29, alike[0].mean(), stats.sem(alike[0]))
    assert crossed_interval(alike) == pytest.approx(theirs, rel=1e-9)
    assert crossed_interval(np.ones((2, 3))) == (1, 1)


def test_crossed_intervals_cover_the_true_mean():
    """Hits of five seeds on 300 queries, which differ in seed, in query and by chance."""
    generator = np.random.default_rng(0)
    covered = []
    for _ in range(1000):
        values = 5 + generator.normal(0, 0.1, (5, 1)) + generator.normal(0, 1, 300) + generator.normal(0, 1, (5, 300))
        low, high = crossed_interval(values, 0.8)
        covered.append(low <= 5 <= high)
    assert np.mean(covered) == pytest.approx(0.8, abs=0.04)  # 3 standard errors of 1,000 trials


def test_detectable_differences_are_detected_with_their_power():
    generator = np.random.default_rng(0)
    detected = []
    for _ in range(400):
        noise = generator.normal(0, 0.1, (5, 1)) + generator.normal(0, 1, 300) + generator.normal(0, 1, (5, 300))
        true = detectable_difference(noise)
        low, high = crossed_interval(noise - noise.mean() + generator.normal(true, np.sqrt(0.01 / 5 + 1.2 / 300)))
        detected.append(low > 0 or high < 0)
    assert np.mean(detected) == pytest.approx(0.8, abs=0.06)  # 3 standard errors of 400 trials
    low, high = crossed_interval(noise)
    assert detectable_difference(noise, power=0.5) == pytest.approx((high - low) / 2, rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_paired_test_equals_scipy(seed):
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(seed).integers(9, size=(2, 10)) / 8

    def difference(a, b, axis):
        return np.mean(a - b, axis=axis)

    settings = {"permutation_type": "samples", "vectorized": True}
    exact = stats.permutation_test((a, b), difference, n_resamples=np.inf, **settings).pvalue
    assert exact == exact_p_value(a, b)  # eighths are added without rounding
    rng = np.random.default_rng(0)
    theirs = stats.permutation_test((HITS, PRECISIONS), difference, n_resamples=20_000, **settings, rng=rng).pvalue
    assert paired_test(a, b, resamples=20_000).p_value == pytest.approx(exact, abs=0.015)
    assert paired_test(HITS, PRECISIONS, resamples=20_000, seed=seed).p_value == pytest.approx(theirs, abs=0.015)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval([]), r"values must be one number per query .* got shape \(0,\)"),
        (lambda: bootstrap_interval([[1.0]]), r"values must be one number per query .* got shape \(1, 1\)"),
        (lambda: paired_test([1.0, 0.0], [1.0, np.nan]), r"b\[1\] is nan; pass finite numbers"),
        (lambda: paired_test([1.0, 0.0], [1.0]), "a has 2 queries and b 1"),
        (lambda: bootstrap_interval([1.0], confidence=95), "confidence must lie between 0 and 1, .* got 95"),
        (lambda: seed_interval([1.0, 2.0], confidence=1.0), "confidence must lie between 0 and 1"),
        (lambda: paired_test([1.0], [0.0], resamples=0), "resamples must be at least 1"),
        (lambda: seed_interval([1.0]), "one run shows no variation"),
        (lambda: crossed_interval([[1.0, 0.0]]), r"at least two of each; got shape \(1, 2\)"),
        (lambda: crossed_interval([[1.0, 0.0], [1.0, np.nan]]), "values must be finite"),
        (lambda: crossed_interval(np.eye(2), confidence=95), "confidence must lie between 0 and 1"),
        (lambda: detectable_difference(np.eye(2), power=80), "power must be at least 0.5 and below 1"),
    ],
)
def test_invalid_inputs_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()
