"""Logistic and softmax heads: residuals stay below their bounds, steps come close to retraining, budgets end."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression

from repforget.errors import ResourceError, UsageError
from repforget.linear import (
    Budget,
    Logistic,
    change_logistic,
    draw_noise,
    fit_logistic,
    fit_softmax,
    refit,
)  # fmt: skip
from repforget.linear._arrays import gram, largest_singular_value
from repforget.linear.budget import LARGEST, for_rows, steps_left, within
from repforget.linear.logistic import LIPSCHITZ, curvature, distance, least_curvature, residual_at

LAM = 1e-3


def rows(n: int = 2000, d: int = 20, k: int = 1, seed: int = 0, signal: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Unit rows and signs that depend on them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    y = np.where(rng.random((n, k)) < expit(x @ (signal * rng.normal(size=(d, k)))), 1.0, -1.0)
    return x, y


def residual(head: Logistic, x: np.ndarray, y: np.ndarray) -> float:
    """The gradient of the objective on these rows, written once more and plainly."""
    gradient = head.lam * len(x) * head.weights + head.noise
    for row, signs in zip(x, y, strict=True):
        for k, sign in enumerate(signs):
            gradient = gradient.copy()
            gradient[:, k] -= sign * row / (1 + math.exp(sign * float(row @ head.weights[:, k])))
    return float(np.linalg.norm(gradient))


def test_the_example_of_the_paper_has_the_known_orders() -> None:
    x, y = rows()
    head = fit_logistic(x, y, LAM, draw_noise(10.0, (20, 1), seed=1))
    assert residual(head, x, y) < 1e-8
    for k, true_below, data_below, worst in ((1, 5e-3, 0.1, 500.0), (10, 2e-2, 1.0, 5e4)):
        new, bounds = change_logistic(head, x[:k], y[:k])
        again = fit_logistic(x[k:], y[k:], LAM, head.noise)
        true = residual(new, x[k:], y[k:])
        assert 1e-6 < true <= bounds.data <= bounds.worst, k
        assert true < true_below and bounds.data < data_below
        # theorem 1 as printed (gamma 1/4, no mean along the step) is 4 gamma k^2 / (lam^2 (n - k))
        printed = 4 * 0.25 * k**2 / (LAM**2 * (2000 - k))
        assert printed == pytest.approx(worst, rel=0.02)
        assert bounds.worst == pytest.approx(printed * LIPSCHITZ / 0.25 / 2, rel=0.1)
        moved, missed = np.linalg.norm(head.weights - again.weights), np.linalg.norm(new.weights - again.weights)
        assert missed < 0.05 * moved
        assert missed <= new.residual / (LAM * new.n)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 6), st.sampled_from([1e-3, 1e-2, 0.3]),
       st.sampled_from([0.0, 1.0, 10.0]), st.integers(0, 99))  # fmt: skip
def test_true_residual_below_data_bound_below_worst_bound(
    d: int, k: int, batch: int, lam: float, sigma: float, seed: int
) -> None:
    """Over several steps, so that the reference lies behind: the sum of bounds covers the gradient that is there."""
    x, y = rows(80, d, k, seed)
    x[::3] *= 0.5  # not all of norm 1
    head = fit_logistic(x, y, lam, draw_noise(sigma, (d, k), seed) if sigma else None)
    for step in range(1, 4):
        head, bounds = change_logistic(head, x[(step - 1) * batch : step * batch], y[(step - 1) * batch : step * batch])
        assert residual(head, x[step * batch :], y[step * batch :]) <= head.residual
        assert bounds.data <= bounds.worst * (1 + 1e-6) + 1e-9
    back, _ = change_logistic(head, x[: 3 * batch], y[: 3 * batch], sign=1)
    assert residual(back, x, y) <= back.residual


def test_the_bound_is_tight_where_the_third_derivative_is_largest() -> None:
    """One feature of 1 and a logit near 1.32: each step's bound covers what it adds, the way from the reference too."""
    y = np.where(np.arange(1000) < 789, 1.0, -1.0)[:, None]
    x = np.ones((1000, 1))
    head = fit_logistic(x, y, 1e-6)
    before = 0.0
    for step in range(1, 6):
        gone, left = slice(20 * step - 20, 20 * step), slice(20 * step, None)
        head, bounds = change_logistic(head, x[gone], y[gone])
        after = residual(head, x[left], y[left])
        assert 0.8 * bounds.data < after - before <= bounds.data
        before = after


def test_the_step_uses_the_hessian_of_what_remains_and_the_penalty_of_what_goes() -> None:
    """Rows that carry much of the curvature: with the full Hessian, or without m lam w, the step is far worse."""
    x, y = rows(60, 6, seed=3)
    head = fit_logistic(x, y, 0.05)
    new, _ = change_logistic(head, x[:20], y[:20])
    again = fit_logistic(x[20:], y[20:], 0.05)
    gradient = -(x[:20].T @ (y[:20] * expit(-y[:20] * (x[:20] @ head.weights))))
    full = head.hessian[0] + 0.05 * 60 * np.eye(6)
    left = new.hessian[0] + 0.05 * 40 * np.eye(6)
    whole = head.weights + np.linalg.solve(full, gradient + 20 * 0.05 * head.weights)
    bare = head.weights + np.linalg.solve(left, gradient)
    off = np.linalg.norm(new.weights - again.weights)
    for other in (whole, bare, head.weights):
        assert off < 0.5 * np.linalg.norm(other - again.weights)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 25), st.floats(0, 2), st.integers(0, 999))
def test_the_spectral_norm_is_bounded_from_above(n: int, d: int, decay: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * np.exp(-decay * np.arange(d))
    true = np.linalg.norm(x, 2)
    bound = largest_singular_value(gram(x), 1e-15 * np.linalg.norm(x) ** 2)
    assert true <= bound <= true * (1 + 1e-6)


def test_power_iteration_would_have_been_too_small() -> None:
    x, _ = rows()
    v = np.ones(20) / np.sqrt(20.0)
    for _ in range(20):
        v = x.T @ (x @ v)
        v /= np.linalg.norm(v)
    true = np.linalg.norm(x, 2)
    assert np.linalg.norm(x @ v) < 0.999 * true <= largest_singular_value(gram(x), 0.0)


def test_steps_and_retraining_agree_with_scikit_learn() -> None:
    x, y = rows(400, 6)
    head = refit(fit_logistic(x, y, 0.01), x[30:], y[30:])
    peer = LogisticRegression(C=1 / (0.01 * 370), fit_intercept=False, tol=1e-12, max_iter=10000)
    peer.fit(x[30:], y[30:, 0])
    assert np.abs(head.weights[:, 0] - peer.coef_[0]).max() < 1e-5
    assert np.abs(head.weights - fit_logistic(x[30:], y[30:], 0.01).weights).max() < 1e-9
    assert residual(head, x[30:], y[30:]) < 1e-9


def test_a_large_head_without_noise_keeps_no_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.linear import logistic as room

    x, y = rows(300, 6, 2)
    small = fit_logistic(x, y, 0.01)
    monkeypatch.setattr(room, "LARGEST", 71)
    large = fit_logistic(x, y, 0.01)
    assert small.hessian.shape == (2, 6, 6) and large.hessian.size == 0
    found = refit(room.leaving(large, x[:9]), x[9:], y[9:])
    assert np.abs(found.weights - refit(room.leaving(small, x[:9]), x[9:], y[9:]).weights).max() < 1e-10
    assert fit_logistic(x, y, 0.01, np.ones((6, 2))).hessian.size
    with pytest.raises(UsageError, match="keeps no Hessian"):
        change_logistic(large, x[:1], y[:1])


def test_softmax_agrees_with_scikit_learn_and_forgets_exactly() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 5))
    y = (x @ rng.normal(size=(5, 4)) + rng.gumbel(size=(200, 4))).argmax(1)
    whole, left = fit_softmax(x, y, 4, 2.0), fit_softmax(x[40:], y[40:], 4, 2.0)
    found = fit_softmax(x[40:], y[40:], 4, 2.0, start=whole.change)
    assert np.linalg.norm(found.change - left.change) <= found.distance + left.distance < 1e-7
    assert np.abs(found.change - left.change).max() < 1e-10
    assert np.abs(whole.change - left.change).max() > 1e-2
    peer = LogisticRegression(C=1 / 2.0, fit_intercept=False, tol=1e-12, max_iter=10000).fit(x[40:], y[40:])
    assert np.abs(found.change.T - peer.coef_).max() < 1e-5


@pytest.mark.parametrize("n", [30, 5, 1])
def test_softmax_towards_a_base_returns_to_it_without_rows(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer rows than features only as many directions are solved for: what inverses cost is told by the rows."""
    rng, sizes, inverted = np.random.default_rng(0), [], np.linalg.inv
    monkeypatch.setattr(np.linalg, "inv", lambda held: sizes.append(held.shape[-1]) or inverted(held))
    x, y, base, bias = rng.normal(size=(n, 8)), rng.integers(0, 7, n), rng.normal(size=(8, 7)), rng.normal(size=7)
    if n == 5:
        x[4] = x[3]
    start = rng.normal(size=(8, 7))
    none = fit_softmax(x[:0], y[:0], 7, 1.0, base=base, start=start)
    assert np.abs(none.change).max() < 1e-10
    some, other = (fit_softmax(x, y, 7, 1.0, base=base, bias=bias, start=s) for s in (None, start))
    z = x @ (base + some.change) + bias
    chances = np.exp(z - z.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    gradient = x.T @ (chances - np.eye(7)[y]) + some.change
    assert np.linalg.norm(gradient) <= some.residual < 1e-8
    assert np.linalg.norm(some.change - other.change) <= some.distance + other.distance
    assert set(sizes) == {min(n, 8)}


def test_shared_blocks_precondition_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.linear import softmax as room

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 6)), rng.integers(0, 9, 50)
    one = fit_softmax(x, y, 9, 0.5)
    monkeypatch.setattr(room, "MEMORY", 3 * 8 * 36)
    assert np.abs(fit_softmax(x, y, 9, 0.5).change - one.change).max() < 1e-9


def test_a_budget_is_spent_and_then_refuses() -> None:
    x, y = rows(500, 5)
    budget = Budget(0.5, 1e-4, 1.0)
    head = fit_logistic(x, y, 1e-2, draw_noise(1.0, (5, 1), seed=0))
    left, taken = [steps_left(budget.limit, head)], 0
    with pytest.raises(ResourceError, match="retrain"):
        for k in range(500):
            new, bounds = change_logistic(head, x[k : k + 1], y[k : k + 1])
            assert new.residual == pytest.approx(head.residual + bounds.data)
            head, taken = within(budget, new, 1), k + 1
            left.append(steps_left(budget.limit, head))
    assert head.residual <= budget.limit < new.residual
    assert 0.3 * taken < left[0] < 3 * taken, "the estimate is of the right order"
    assert left[-1] <= 3
    again = refit(head, x[taken:], y[taken:])
    assert again.residual < 1e-6 * budget.limit and np.array_equal(again.noise, head.noise)


def test_the_budget_is_that_of_the_theorem_and_impossible_promises_are_refused() -> None:
    budget = Budget(1.0, 1e-4, 10.0)
    assert 1.5 * math.exp(-(budget.c**2) / 2) == pytest.approx(1e-4)
    assert budget.limit == pytest.approx(10.0 / budget.c)
    assert budget.spent_epsilon(0.12) == pytest.approx(0.0526, rel=1e-2)  # 0.053 at a residual of 0.12
    with pytest.raises(UsageError, match="exceeds 1/n"):
        for_rows(budget.delta, 20_000)
    for epsilon, delta, sigma in ((0, 1e-4, 1), (LARGEST * 1.01, 1e-4, 1), (1, 0, 1), (1, 1, 1), (1, 1e-4, 0)):
        with pytest.raises(UsageError):
            Budget(epsilon, delta, sigma)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, LARGEST])
def test_delta_covers_a_gaussian_shifted_by_the_limit(epsilon: float) -> None:
    """The hockey-stick divergence of N(0, sigma^2) and its shift by the whole budget is at most delta."""
    from scipy.stats import norm

    for delta in (1e-2, 1e-4, 1e-8):
        budget = Budget(epsilon, delta, 3.0)
        shift = budget.limit / budget.sigma
        real = norm.cdf(shift / 2 - epsilon / shift) - math.exp(epsilon) * norm.cdf(-shift / 2 - epsilon / shift)
        assert real <= delta


def test_in_one_dimension_the_promise_holds_for_the_densities_themselves() -> None:
    """The whole mechanism (step, or retraining where the budget is spent) over all noise, against retraining."""
    x, y = np.array([[1.0], [-0.8], [0.5], [0.9], [-1.0], [0.7]]), np.array([[1.0], [-1], [-1], [1], [1], [1]])
    budget = Budget(0.5, 0.05, 2.0)
    noises = np.linspace(-9, 9, 361)
    pairs = []
    for b in noises:
        head = fit_logistic(x, y, 0.5, np.array([[b]]))
        again = fit_logistic(x[1:], y[1:], 0.5, np.array([[b]]))
        new, _ = change_logistic(head, x[:1], y[:1])
        pairs.append((new if new.residual <= budget.limit else again, again))
    stepped = sum(a is not b for a, b in pairs)
    assert stepped > 0.9 * len(pairs), "the case is one of retraining"
    chances = np.exp(-(noises**2) / 8)
    chances /= chances.sum()
    edges = np.linspace(-4, 4, 41)
    ours, theirs = (np.histogram([pair[k].weights[0, 0] for pair in pairs], edges, weights=chances)[0] for k in (0, 1))
    for one, other in ((ours, theirs), (theirs, ours)):
        assert np.maximum(one - math.exp(0.5) * other, 0).sum() <= 0.05
    wrong = np.histogram([fit_logistic(x, y, 0.5, np.array([[0.01 * b]])).weights[0, 0] for b in noises], edges,
                         weights=chances)[0]  # fmt: skip
    assert np.maximum(wrong - math.exp(0.5) * theirs, 0).sum() > 0.05, "the test would not notice a breach"


def precisely(head: Logistic, x: np.ndarray, y: np.ndarray) -> float:
    """The norm of the gradient, in longer floats."""
    wide, w = x.astype(np.longdouble), head.weights.astype(np.longdouble)
    gradient = wide.T @ (-y / (1 + np.exp(y * (wide @ w)))) + np.longdouble(head.lam) * len(x) * w + head.noise
    return float(np.sqrt((gradient**2).sum()))


def test_the_residual_covers_the_rounding_of_large_noise() -> None:
    """Rows so short that the gradient is noise and penalty alone; and what a step adds to it is rounding alone."""
    grew = 0
    for seed in range(40):
        x, y = rows(30, 6, seed=seed)
        for scale, sigma, lam in ((1e-6, 1e3, 1e-2), (1e-20, 1.0, 1e3)):
            short = scale * x
            head = fit_logistic(short, y, lam, draw_noise(sigma, (6, 1), seed=seed))
            before = precisely(head, short, y)
            assert before <= head.residual
            new, bounds = change_logistic(head, short[:3], y[:3])
            added = precisely(new, short[3:], y[3:]) - before
            assert added <= bounds.data
            grew += added > 0 and lam > 1
    assert grew > 5, "the steps add no rounding"


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.floats(0, 6), st.floats(0, 4), st.sampled_from([1e-3, 0.1]),
       st.integers(0, 99))  # fmt: skip
def test_distance_and_curvature_hold_far_from_reference_and_minimum(
    d: int, k: int, out: float, way: float, lam: float, seed: int
) -> None:
    """Weights anywhere, a Hessian from elsewhere: the curvature is no larger than it is, the distance no smaller."""
    x, y = rows(40, d, k, seed, signal=9.0)
    best, rng = fit_logistic(x, y, lam), np.random.default_rng(seed)
    w, off = out * rng.normal(size=(2, d, k))
    reference = w + way * off / max(1e-9, float(np.linalg.norm(off)))
    head = dataclasses.replace(best, weights=w, reference=reference,
                               hessian=np.stack([curvature(x, r) for r in reference.T]))  # fmt: skip
    head = dataclasses.replace(head, residual=residual(head, x, y))
    least = least_curvature(head)
    assert least <= min(np.linalg.eigvalsh(curvature(x, column))[0] for column in w.T) + 1e-12
    assert np.linalg.norm(w - best.weights) <= distance(head, least) + 1e-6
    assert head.residual <= residual_at(head, distance(head, least), least) * (1 + 1e-12) <= 1.05 * head.residual


def test_the_curvature_falls_on_the_way_to_a_far_minimum() -> None:
    x, y = np.ones((50, 1)), np.ones((50, 1))
    best, zeros = fit_logistic(x, y, 1e-3), np.zeros((1, 1))
    head = dataclasses.replace(best, weights=zeros, reference=zeros, hessian=curvature(x, zeros[:, 0])[None])
    head = dataclasses.replace(head, residual=residual(head, x, y))
    far, least = float(best.weights[0, 0]), least_curvature(head)
    assert least == pytest.approx(12.5) and far <= distance(head, least) < distance(head)
    assert head.residual / (head.lam * head.n + least) < far, "curvature that stayed would have said too little"


def test_rounding_is_no_curvature() -> None:
    """A feature that is the sum of others: along it no row curves, whatever the eigenvalue is computed to."""
    for seed in range(10):
        x, y = rows(40, 4, seed=seed)
        head = fit_logistic(np.hstack([x, x.sum(1, keepdims=True)]) / 3, y, 1e-3)
        assert least_curvature(head) == 0.0 < head.residual == pytest.approx(distance(head) * head.lam * head.n)


def test_rows_longer_than_one_have_no_bound() -> None:
    x, y = rows(50, 4)
    head = fit_logistic(2 * x, y, LAM)
    with pytest.raises(UsageError, match="radius"):
        change_logistic(head, 2 * x[:1], y[:1])
    with pytest.raises(UsageError, match="-1 and 1"):
        fit_logistic(x, y * 0.5, LAM)
    with pytest.raises(UsageError, match="leaves none"):
        change_logistic(head, x, y)
