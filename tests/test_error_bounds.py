"""`error_bounds.py`: its bounds hold, also for sums in any order, and are tight enough to detect a mistake."""

import copy

import pytest
import torch
from error_bounds import Rounded, dot_error, embeds_of, exact_loss, rounding, sgd, unit_error
from test_loss import slow_loss, unit
from tiny import BACKBONES, make_inputs, make_model
from torch.nn import functional as F


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_in_any_order_are_within_the_bound(dtype):
    x, y = torch.rand(2, 60, 64).to(dtype)
    exact, sizes = (x.double() * y.double()).sum(dim=1), (x.double() * y.double()).abs().sum(dim=1)
    for seed in range(20):
        order, total = torch.randperm(64, generator=torch.Generator().manual_seed(seed)), torch.zeros(60, dtype=dtype)
        for term in order:
            total = total + x[:, term] * y[:, term]  # sequential sum, each step rounded
        off = ((total.double() - exact).abs() / sizes).max().item()
        assert dot_error(64, dtype) / 50 < off <= dot_error(64, dtype)


def test_normalised_rows_are_within_the_bound():
    rows = torch.randn(500, 33)
    off = (F.normalize(rows, dim=-1) / F.normalize(rows.double(), dim=-1) - 1).abs().max()
    assert unit_error(33) / 50 < off <= unit_error(33)


@pytest.mark.parametrize(("temperature", "gamma"), [(0.01, 2.0), (0.1, 0.3), (1.0, 0.0)])
def test_exact_loss_equals_the_slow_loop(temperature, gamma):
    queries, targets, ids = unit(7), unit(9, seed=1), [0, 1, 2, 2, 3, 4, 5, 5, 6]
    truth, bound = exact_loss(queries, targets, temperature, 0.7, gamma, target_ids=torch.tensor(ids))
    slow = slow_loss(queries, targets, temperature, 0.7, gamma, target_ids=ids)
    assert truth.value.item() == pytest.approx(slow, rel=dot_error(1000, torch.float64))
    assert bound.value < 1e-4 * truth.value  # a relative error of 1e-4 is no rounding error


def embeds(model, inputs):
    with torch.no_grad():
        return embeds_of(model, inputs)


def two_steps(model, inputs):
    return sgd(model, inputs, steps=2, rate=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compute", "dtype"), [(embeds, torch.float32), (embeds, torch.bfloat16), (two_steps, torch.float32)]
)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_model_outputs_are_within_the_bound(backbone, compute, dtype):
    """Compare with an eager float64 computation; the bound must hold and must not be much wider than the error."""
    model, inputs = make_model(backbone, temperature=1.0), make_inputs(backbone)
    error = rounding(compute, model, inputs, dtype)
    doubled = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    with Rounded(torch.float32, None):
        truth = compute(copy.deepcopy(model).double(), doubled)
    ours = compute(copy.deepcopy(model).to(dtype), inputs)
    shares = {name: ((ours[name] - truth[name]).abs().max() / error[name]).item() for name in error if error[name]}
    assert len(shares) >= 9 and max(shares.values()) <= 1, shares
    assert max(shares.values()) > 1 / 100


def test_errors_have_random_signs():
    """Move zeros by one: half of 4,095 go up, within five standard deviations of 32; another seed moves others."""
    moved = [torch.zeros(4095, dtype=torch.float64) for _ in range(2)]
    for seed, tensor in enumerate(moved):
        Rounded(torch.float32, seed).move(tensor, torch.ones_like(tensor))
        assert (tensor.abs() == 1).all() and abs((tensor == 1).sum().item() - 2048) < 5 * 32
    assert 0.4 < (moved[0] == moved[1]).double().mean() < 0.6
