"""Optimisers of this project and rounding that is right in the mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.errors import UsageError
from repforget.training.optimizers import Sign, Sophia, drawn_loss
from repforget.training.rounding import stochastic_round_

numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


def ones(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def take(optimizer: torch.optim.Optimizer, parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient
    optimizer.step()


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-6, 1e6))
def test_the_sign_of_the_step_does_not_depend_on_the_gradients_scale(scale: float) -> None:
    moved = []
    for factor in (1.0, scale):
        parameter = ones(1.0, -2.0, 3.0)
        optimizer = Sign([parameter], lr=0.1)
        for gradient in ([1.0, -2.0, 0.0], [-5.0, 1.0, 0.0]):
            take(optimizer, parameter, factor * torch.tensor(gradient, dtype=torch.float64))
        moved.append(parameter.detach())
    assert torch.equal(moved[0], moved[1])
    assert moved[0].tolist() == pytest.approx([1.0, -1.8, 3.0]), "first down then up; against the mean; not at all"


def test_decay_is_apart_from_the_step() -> None:
    for optimizer in (Sign, Sophia):
        parameter = ones(2.0)
        take(optimizer([parameter], lr=0.1, weight_decay=0.5), parameter, torch.zeros(1, dtype=torch.float64))
        assert parameter.item() == pytest.approx(2.0 * 0.95)


def test_sophia_updates_its_momentum_once_per_step() -> None:
    parameter = ones(0.0, 0.0)
    optimizer = Sophia([parameter], lr=1.0)
    gradient = torch.tensor([1.0, -4.0], dtype=torch.float64)
    take(optimizer, parameter, gradient.clone())
    torch.testing.assert_close(optimizer.state[parameter]["mean"], 0.1 * gradient)
    assert parameter.tolist() == [-1.0, 1.0], "no curvature is known yet: full steps"


def test_sophia_steps_by_momentum_over_curvature_and_never_further_than_its_rate() -> None:
    parameter = ones(0.0, 0.0, 0.0)
    optimizer = Sophia([parameter], lr=0.5, betas=(0.0, 0.0), rho=0.1)
    optimizer.refresh({parameter: torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64)}, count=5)
    take(optimizer, parameter, torch.tensor([0.4, -3.0, -1e-9], dtype=torch.float64))
    assert parameter.tolist() == pytest.approx([-0.5 * 0.4 / (0.1 * 5 * 4), 0.5, 0.5])
    optimizer = Sophia([parameter], lr=0.5)
    optimizer.refresh({parameter: torch.ones(3, dtype=torch.float64)}, count=2)
    torch.testing.assert_close(optimizer.state[parameter]["curvature"], torch.full((3,), 0.1, dtype=torch.float64))


def test_its_curvature_is_the_gauss_newton_diagonal_of_logistic_regression() -> None:
    """In expectation over drawn labels, and not what the labels of the data would give."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    p = (x @ weight.T).softmax(-1).detach()
    exact = ((p * (1 - p)).T @ x.square()) / len(x)
    draws = 3000
    optimizer = Sophia([weight], lr=0.1, betas=(0.9, 0.0))
    total, squares = torch.zeros_like(exact), torch.zeros_like(exact)
    for _ in range(draws):
        (gradient,) = torch.autograd.grad(drawn_loss(x @ weight.T, generator), [weight])
        optimizer.refresh({weight: gradient}, count=len(x))
        found = optimizer.state[weight]["curvature"]
        total += found
        squares += found.square()
    mean = total / draws
    error = ((squares / draws - mean.square()) / draws).sqrt()
    assert float(((mean - exact).abs() / error).max()) < 4.5
    assert float((error / exact).max()) < 0.1, "the estimate is sharp enough to tell"


def test_sophia_descends_a_badly_scaled_quadratic_evenly() -> None:
    scales = torch.tensor([1000.0, 1.0, 0.01], dtype=torch.float64)
    parameter = ones(1.0, 1.0, 1.0)
    optimizer = Sophia([parameter], lr=0.05, betas=(0.5, 0.0), rho=1.0)
    for _ in range(80):
        optimizer.refresh({parameter: scales.sqrt()}, count=1)
        take(optimizer, parameter, (scales * parameter).detach())
    assert float(parameter.detach().abs().max()) < 0.1
    assert float(parameter.detach().std()) < 1e-9


def test_rounding_is_right_in_the_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.tensor([1.001, -3.1417, 1e-30, 5e4]).repeat_interleave(20_000)
    target = torch.empty_like(value, dtype=torch.bfloat16)
    stochastic_round_(target, value, generator)
    found, wanted = target.double().view(4, -1), value.double().view(4, -1)
    spread = found.std(1) / math.sqrt(found.shape[1])
    assert bool(((found.mean(1) - wanted.mean(1)).abs() < 4.5 * spread).all())
    nearest = value.bfloat16().double().view(4, -1)
    assert bool(((nearest.mean(1) - wanted.mean(1)).abs() > 10 * spread).all()), "to the nearest it is not"


@settings(deadline=None, max_examples=60)
@given(st.lists(numbers, min_size=1, max_size=8), st.integers(0, 10**6))
def test_rounding_gives_a_neighbour_and_keeps_what_fits(values: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    value = torch.tensor(values)
    target = stochastic_round_(torch.empty(len(values), dtype=torch.bfloat16), value, generator)
    assert bool(((target.float() - value).abs() <= value.abs() * 2.0**-7).all())
    exact = value.bfloat16()
    again = stochastic_round_(torch.empty_like(exact), exact.float(), generator)
    assert torch.equal(again, exact)


def test_small_steps_add_up_and_the_rest_is_told() -> None:
    weight = torch.ones(4000).bfloat16()
    lost = weight.clone()
    generator = torch.Generator().manual_seed(1)
    for _ in range(40):
        stochastic_round_(weight, weight.float() - 1e-4, generator)
        lost -= 1e-4
    assert float(weight.float().mean()) == pytest.approx(1 - 40e-4, abs=4e-4)
    assert torch.equal(lost, torch.ones(4000).bfloat16()), "to the nearest, every step is lost"
    odd = torch.tensor([math.inf, -math.inf, math.nan])
    told = stochastic_round_(torch.empty(3, dtype=torch.bfloat16), odd, generator)
    torch.testing.assert_close(told.float(), odd, equal_nan=True)
    with pytest.raises(UsageError, match="bfloat16"):
        stochastic_round_(torch.empty(3), odd, generator)
