"""Focal InfoNCE against manual computations and a slow loop in float64."""

import math

import pytest
import torch
from error_bounds import exact_loss, roundoff
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pvlf_hf import focal_info_nce


def unit(rows, d=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, d, generator=generator), dim=-1)


def slow_loss(queries, targets, temperature=0.01, alpha=1.0, gamma=2.0, positives=None, target_ids=None):
    """Compute equations 14-15 one number at a time, in Python's floats."""
    positives = list(range(len(queries))) if positives is None else positives
    ids = list(range(len(targets))) if target_ids is None else target_ids
    queries, targets = queries.double().tolist(), targets.double().tolist()
    total = 0.0
    for query, own in zip(queries, positives, strict=True):
        scores = [sum(a * b for a, b in zip(query, target, strict=True)) / temperature for target in targets]
        kept = [s for j, s in enumerate(scores) if j == own or ids[j] != ids[own]]
        top = max(kept)
        denominator = sum(math.exp(s - top) for s in kept)
        p = math.exp(scores[own] - top) / denominator
        log_p = scores[own] - top - math.log(denominator)
        total += -alpha * (1 - p) ** gamma * log_p
    return total / len(queries)


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 0.0), (1.0, 2.0), (0.5, 1.0)])
def test_without_any_similarity_every_target_is_as_likely(batch, alpha, gamma):
    queries, targets = torch.eye(16)[:batch], torch.eye(16)[batch : 2 * batch]
    # p = 1/B, so the loss is alpha (1 - 1/B)^gamma log B
    expected = alpha * (1 - 1 / batch) ** gamma * math.log(batch)
    error = exact_loss(queries, targets, alpha=alpha, gamma=gamma)[1].value.item()
    assert focal_info_nce(queries, targets, alpha=alpha, gamma=gamma).item() == pytest.approx(expected, abs=error)


def test_two_queries_equal_numbers_computed_by_hand():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    # Cosines [[.6, .8], [.8, .6]] at temperature 0.1 differ by 2, so p = 1 / (1 + e^2) in both rows.
    p = 1 / (1 + math.exp(2))
    loss = focal_info_nce(queries, targets, temperature=0.1, alpha=3.0)
    error = exact_loss(queries, targets, temperature=0.1, alpha=3.0)[1].value.item()
    # .6 and .8 are rounded: two a row, and the derivative of the loss is at most 3
    error += 3 * 2 * 3 * roundoff() / 0.1
    assert loss.item() == pytest.approx(-3 * (1 - p) ** 2 * math.log(p), abs=error)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
def test_gamma_zero_is_cross_entropy(temperature):
    queries, targets = unit(6).requires_grad_(), unit(6, seed=1)
    ours = focal_info_nce(queries, targets, temperature, gamma=0.0)
    theirs = F.cross_entropy(queries @ targets.T / temperature, torch.arange(6))
    _, error = exact_loss(queries, targets, temperature, gamma=0.0)  # for each of the two losses
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2 * error.value.item())
    ours, theirs = (torch.autograd.grad(loss, queries)[0] for loss in (ours, theirs))
    assert ((ours - theirs).abs() <= 2 * error.queries).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0])
def test_loss_equals_the_slow_loop(gamma, temperature):
    queries, targets = unit(5), unit(5, seed=1)
    fast = focal_info_nce(queries, targets, temperature, alpha=0.7, gamma=gamma)
    error = exact_loss(queries, targets, temperature, 0.7, gamma)[1].value.item()
    assert fast.item() == pytest.approx(slow_loss(queries, targets, temperature, 0.7, gamma), abs=error)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_gradient_equals_differences_of_the_slow_loop(gamma):
    queries, targets = unit(3, 4), unit(3, 4, seed=1)
    queries.requires_grad_()
    focal_info_nce(queries, targets, 0.5, gamma=gamma).backward()
    step, numeric = 1e-5, torch.zeros(3, 4)
    for row in range(3):
        for column in range(4):
            ends = []
            for sign in (1, -1):
                moved = queries.detach().double()
                moved[row, column] += sign * step
                ends.append(slow_loss(moved, targets, 0.5, gamma=gamma))
            numeric[row, column] = (ends[0] - ends[1]) / (2 * step)
    # Error of a central difference: its ends' rounding divided by the step, plus a sixth of the step's square times
    # a third derivative, which the temperature divides three times and which is below 100 here.
    differences = 100 * roundoff(torch.float64) / step + step**2 / 6 * 100 / 0.5**3
    error = exact_loss(queries, targets, 0.5, gamma=gamma)[1].queries + differences
    assert ((queries.grad - numeric).abs() <= error).all()


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("sign", [1, -1], ids=["certain", "hopeless"])
def test_extreme_probabilities_stay_finite(gamma, sign):
    queries = torch.eye(4, requires_grad=True)
    targets = sign * torch.eye(4)  # temperature 0.01: p is 1 to the last bit, or e^-100 / 3
    loss = focal_info_nce(queries, targets, gamma=gamma)
    loss.backward()
    truth, error = exact_loss(queries, targets, gamma=gamma)
    assert loss.item() == pytest.approx(0.0 if sign == 1 else 100 + math.log(3), abs=error.value.item())
    assert queries.grad.isfinite().all()
    assert ((queries.grad - truth.queries).abs() <= error.queries).all()
    if sign == 1:
        assert (queries.grad.abs() <= error.queries).all()
    else:  # d(-log p)/ds = -1 at the own target; the focal factor is 1 there
        assert ((queries.grad.diagonal() - 100 / 4).abs() <= error.queries.diagonal()).all()


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_confident_queries_lose_no_digits(gamma):
    """Compute 1 - p from log p in float32 without cancellation between numbers near 1."""
    for logit in (5.0, 8.0, 10.0, 12.0, 14.0):  # 1 - p from 0.02 to 2.5e-6
        logits = torch.eye(4) / (1 / logit)
        log_p = logits.log_softmax(dim=1).diagonal().double()
        truth = (-torch.expm1(log_p)) ** gamma * -log_p
        loss = focal_info_nce(torch.eye(4), torch.eye(4), temperature=1 / logit, gamma=gamma)
        # Roundings: expm1; the power, which multiplies its base's error; the product; a mean of four.
        assert loss.item() == pytest.approx(truth.mean().item(), rel=roundoff() * (2 * gamma + 6 + 4))


def test_batch_of_one_has_zero_loss():
    queries = unit(1).requires_grad_()
    for gamma in (0.0, 0.5, 2.0):
        loss = focal_info_nce(queries, unit(1, seed=1), gamma=gamma)
        (gradient,) = torch.autograd.grad(loss, queries)
        assert loss.item() == 0
        assert (gradient == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    queries, targets = unit(4).to(dtype).requires_grad_(), unit(4, seed=1).to(dtype)
    loss = focal_info_nce(queries, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert queries.grad.dtype == dtype and queries.grad.isfinite().all()
    torch.testing.assert_close(loss, focal_info_nce(queries.float(), targets.float()), rtol=0, atol=0)


def test_loss_ignores_autocast():
    queries, targets = unit(4), unit(4, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = focal_info_nce(queries, targets)
    assert torch.equal(loss, focal_info_nce(queries, targets))


def test_equal_targets_are_no_negatives():
    queries, targets = unit(4), unit(4, seed=1)
    targets[2] = targets[0]  # queries 0 and 2 have the same target
    loss = focal_info_nce(queries, targets, 0.1, target_ids=torch.tensor([5, 6, 5, 7]))
    error = exact_loss(queries, targets, 0.1, target_ids=torch.tensor([5, 6, 5, 7]))[1].value.item()
    assert loss.item() == pytest.approx(slow_loss(queries, targets, 0.1, target_ids=[5, 6, 5, 7]), abs=error)
    # each row's columns except those with the same target
    without = [[0, 1, 3], [0, 1, 2, 3], [1, 2, 3], [0, 1, 2, 3]]
    rows = [
        focal_info_nce(queries[i : i + 1], targets[columns], 0.1, positives=torch.tensor([columns.index(i)]))
        for i, columns in enumerate(without)
    ]
    torch.testing.assert_close(loss, torch.stack(rows).mean(), rtol=0, atol=2 * error)
    different = focal_info_nce(queries, targets, 0.1, target_ids=torch.arange(4))
    assert torch.equal(different, focal_info_nce(queries, targets, 0.1))


def test_all_targets_equal_leaves_no_negative():
    queries = unit(3).requires_grad_()
    loss = focal_info_nce(queries, unit(1, seed=1).expand(3, -1), target_ids=torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert queries.grad.isfinite().all()


def test_positives_may_be_targets_of_other_processes():
    queries, targets = unit(3), unit(9, seed=1)
    positives = torch.tensor([3, 4, 5])  # the second of three processes
    loss = focal_info_nce(queries, targets, 0.1, positives=positives)
    error = exact_loss(queries, targets, 0.1, positives=positives)[1].value.item()
    assert loss.item() == pytest.approx(slow_loss(queries, targets, 0.1, positives=[3, 4, 5]), abs=error)
    order = [3, 4, 5, 0, 1, 2, 6, 7, 8]
    torch.testing.assert_close(loss, focal_info_nce(queries, targets[order], 0.1), rtol=0, atol=2 * error)
    ids = [0, 1, 2, 0, 1, 1, 2, 3, 0]
    masked = focal_info_nce(queries, targets, 0.1, positives=positives, target_ids=torch.tensor(ids))
    error = exact_loss(queries, targets, 0.1, positives=positives, target_ids=torch.tensor(ids))[1].value.item()
    assert masked.item() == pytest.approx(slow_loss(queries, targets, 0.1, 1.0, 2.0, [3, 4, 5], ids), abs=error)


@pytest.mark.parametrize("chunk_size", [1, 3, 7, 64])
@pytest.mark.parametrize("settings", [{}, {"alpha": 0.5, "gamma": 0.3, "temperature": 0.1}])
def test_chunks_change_neither_loss_nor_gradient(chunk_size, settings):
    positives = torch.arange(7) + 7  # the second of three processes
    ids = torch.arange(21) // 2  # equal targets, also across chunks
    for extra in ({"positives": positives}, {"positives": positives, "target_ids": ids}, {}):
        truth, bound = exact_loss(unit(7), unit(21, seed=1), **settings, **extra)
        for size in (None, chunk_size):
            embeds = unit(7).requires_grad_(), unit(21, seed=1).requires_grad_()
            loss = focal_info_nce(*embeds, **settings, **extra, chunk_size=size)
            for ours, exact, error in zip((loss, *torch.autograd.grad(loss, embeds)), truth, bound, strict=True):
                assert ((ours - exact).abs() <= error).all(), (size, extra)


def test_chunks_hold_few_similarities():
    """Watch all tensors: none is larger than a chunk's similarities, and none is stored for backward."""
    made, kept = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.append(max(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)))
            return out

    queries, targets = (unit(60, d=2, seed=seed).requires_grad_() for seed in (0, 1))
    with Watch(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        focal_info_nce(queries, targets, chunk_size=4, target_ids=torch.arange(60)).backward()
    assert max(made) == 4 * 60
    assert sum(kept) < 4 * 60


def test_too_few_targets_raise():
    with pytest.raises(ValueError, match="3 queries but 2 targets"):
        focal_info_nce(unit(3), unit(2))
