"""L2-regularised logistic regression for many layers, folds, penalties and labellings in one optimisation.

All fits of a layer read the same features, so each iteration is two matrix products for all of them together, and
they share a sketch of the principal axes, which inverts the Hessian's dominant part for every penalty at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.errors import NumericalError

HISTORY = 8
ARMIJO = 1e-4
HALVINGS = 12
COMPACT = 0.8  # continue with fewer fits once this share or less is unfinished
Pair = tuple[Tensor, Tensor, Tensor]  # step [l, j, p], change of gradient [l, j, p], 1 / their product [l, j]


@dataclass(frozen=True)
class Problem:
    """j fits on the same n rows.

    ``labels`` [j, n] are class numbers, ``weights`` [j, n] row weights that sum to 1 per fit (0 for held-out rows),
    ``penalty`` [l, j] the factor of half the squared norm beside the mean cross-entropy (scikit-learn's 1 / (C n)).
    """

    labels: Tensor
    weights: Tensor
    penalty: Tensor
    n_classes: int

    def only(self, fits: Tensor) -> Problem:
        return Problem(self.labels[fits], self.weights[fits], self.penalty[:, fits], self.n_classes)

    @property
    def columns(self) -> int:
        """Logits per fit: one for two classes, otherwise one per class, as in scikit-learn."""
        return 1 if self.n_classes == 2 else self.n_classes


@dataclass(frozen=True)
class Fits:
    """``theta`` [l, j, c, d + 1]: weights and, last, the intercept; ``logits`` [l, j, c, n] of all rows;
    ``converged`` [l, j]: no step promised a gain above the tolerance."""

    theta: Tensor
    logits: Tensor
    converged: Tensor


@dataclass(frozen=True)
class Axes:
    """Leading principal axes of each layer: ``basis`` [l, r, d], ``variance`` [l, r], and ``rest`` [l], the mean
    variance of the directions outside."""

    basis: Tensor
    variance: Tensor
    rest: Tensor


def principal_axes(x: Tensor, rank: int, seed: int = 0) -> Axes:
    """Sketch the leading second moments of features [l, n, d] by one randomised power iteration.

    An approximation only changes how fast :func:`fit` converges, never where.  Cost: three products of [n, d] with
    [d, r].  Source: Halko, Martinsson and Tropp, 2011, arXiv 0909.4061, algorithm 4.4.
    """
    depth, n, d = x.shape
    rank = min(rank, n, d)
    draws = torch.Generator().manual_seed(seed)
    sketch = torch.randn(rank, d, generator=draws, dtype=x.dtype).to(x.device)
    rows = (x @ sketch.T).mT @ x  # [l, r, d]
    basis = torch.linalg.qr(rows.mT).Q.mT
    inside = basis @ x.mT
    variance, turn = torch.linalg.eigh(inside @ inside.mT / n)
    total = x.square().sum((1, 2)) / n
    rest = ((total - variance.sum(1)) / max(1, d - rank)).clamp(min=0)
    return Axes(turn.mT @ basis, variance.clamp(min=0), rest)


def with_constant(x: Tensor) -> Tensor:
    """Features [l, n, d] with a column of ones for the intercept, [l, n, d + 1]."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def linear(theta: Tensor, features: Tensor) -> Tensor:
    """Logits [l, j, c, n] of ``theta`` [l, j, c, d + 1] on features [l, n, d + 1]."""
    depth, j, c, p = theta.shape
    return (theta.reshape(depth, j * c, p) @ features.mT).reshape(depth, j, c, -1)


def fit(features: Tensor, axes: Axes, problem: Problem, *, tol: float, max_iter: int) -> Fits:
    """Minimise mean cross-entropy + penalty / 2 |weights|^2 (intercept free) by preconditioned L-BFGS.

    ``features`` [l, n, d + 1] end with the constant.  A fit stops when its quasi-Newton step promises to lower
    the objective by less than the share ``tol`` of it, which is free of any scale.  Cost: two
    products of [j c, d] with [d, n] per layer and iteration.  Source: Liu and Nocedal, 1989, Mathematical
    Programming 45.
    """
    state = _begin(features, problem)
    theta, logits = torch.empty_like(state.theta), torch.empty_like(state.logits)
    converged = torch.zeros_like(problem.penalty, dtype=torch.bool)
    alive = torch.arange(len(problem.labels), device=features.device)
    for iteration in range(max_iter + 1):
        direction = _direction(state, axes, problem)
        active = -_dot(state.gradient, direction) > tol * state.loss
        going = active.any(0)
        last = iteration == max_iter or not bool(going.any())
        if last or int(going.sum()) <= COMPACT * len(alive):  # carry on with the unfinished fits only
            theta[:, alive], logits[:, alive], converged[:, alive] = state.theta, state.logits, ~active
            if last:
                break
            problem, state, alive = problem.only(going), state.only(going), alive[going]
            direction, active = direction[:, going], active[:, going]
        state = _advance(features, problem, state, direction * active[:, :, None, None])
    if not bool(torch.isfinite(theta).all()):
        raise NumericalError("Logistic probing diverged to values that are not finite: check the features' scale.")
    return Fits(theta, logits, converged)


@dataclass(frozen=True)
class _State:
    """Where j fits stand: parameters, logits, objective, gradient, mean curvature, and the steps behind them."""

    theta: Tensor  # [l, j, c, d + 1]
    logits: Tensor  # [l, j, c, n]
    loss: Tensor  # [l, j]
    gradient: Tensor  # [l, j, c, d + 1]
    curvature: Tensor  # [l, j]
    ridge: Tensor  # [l, j, 1, d + 1]
    memory: tuple[Pair, ...] = ()

    def only(self, fits: Tensor) -> _State:
        values = (self.theta, self.logits, self.loss, self.gradient, self.curvature, self.ridge)
        memory = tuple((s[:, fits], y[:, fits], rho[:, fits]) for s, y, rho in self.memory)
        theta, logits, loss, gradient, curvature, ridge = (value[:, fits] for value in values)
        return _State(theta, logits, loss, gradient, curvature, ridge, memory)


def _begin(features: Tensor, problem: Problem) -> _State:
    ridge = torch.ones_like(features[:, None, :1])  # the intercept is not penalised
    ridge[..., -1] = 0
    ridge = ridge * problem.penalty[:, :, None, None].to(features)
    theta = _start(features, problem)
    logits = linear(theta, features)
    loss, residual, curvature = _loss(problem, theta, ridge, logits)
    return _State(theta, logits, loss, _gradient(features, theta, ridge, residual), curvature, ridge)


def _advance(features: Tensor, problem: Problem, state: _State, direction: Tensor) -> _State:
    """One step of every fit along its direction."""
    size, logits, loss, residual, curvature = _search(problem, state, direction, linear(direction, features))
    step = size * direction
    theta = state.theta + step
    gradient = _gradient(features, theta, state.ridge, residual)
    memory = (*state.memory, _pair(step, gradient - state.gradient))[-HISTORY:]
    return _State(theta, logits, loss, gradient, curvature, state.ridge, memory)


@dataclass(frozen=True)
class _Metric:
    """Inverse of the Hessian that every fit would have if all its rows had their mean ``curvature`` [l, j]."""

    axes: Axes
    curvature: Tensor
    penalty: Tensor

    def apply(self, g: Tensor) -> Tensor:
        depth, j, c, p = g.shape
        outside = 1.0 / (self.curvature * self.axes.rest[:, None] + self.penalty)
        inside = 1.0 / (self.curvature[..., None] * self.axes.variance[:, None] + self.penalty[..., None])
        flat = g[..., :-1].reshape(depth, j * c, p - 1)
        along = (flat @ self.axes.basis.mT).reshape(depth, j, c, -1) * (inside - outside[..., None])[:, :, None]
        out = torch.empty_like(g)
        out[..., :-1] = (along.reshape(depth, j * c, -1) @ self.axes.basis).reshape(depth, j, c, p - 1)
        out[..., :-1].addcmul_(outside[:, :, None, None], g[..., :-1])
        out[..., -1] = g[..., -1] / self.curvature[..., None]
        return out


def _start(features: Tensor, problem: Problem) -> Tensor:
    """Zero weights and the intercepts of the class frequencies, [l, j, c, d + 1]."""
    share = torch.zeros(len(problem.labels), problem.n_classes, dtype=features.dtype, device=features.device)
    share = share.scatter_add_(1, problem.labels, problem.weights.to(features)).clamp(min=1e-6)
    start = (share[:, 1:] / share[:, :1]).log() if problem.columns == 1 else share.log()
    shape = (features.shape[0], len(problem.labels), problem.columns, features.shape[2])
    theta = torch.zeros(shape, dtype=features.dtype, device=features.device)
    theta[..., -1] = start - (0.0 if problem.columns == 1 else start.mean(1, keepdim=True))
    return theta


def _loss(problem: Problem, theta: Tensor, ridge: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Objective [l, j] summed in fp64, weighted residuals [l, j, c, n] and mean curvature [l, j]."""
    weights = problem.weights[:, None]  # [j, 1, n]
    if problem.columns == 1:
        sign = 1.0 - 2.0 * problem.labels[:, None].to(logits)  # -1 for class 1
        wrong = (sign * logits).sigmoid()
        value = torch.nn.functional.softplus(sign * logits)
        curvature = (wrong * (1 - wrong) * weights).sum((2, 3))
        residual = sign * wrong * weights
    else:
        labels = problem.labels[:, None].expand(logits.shape[0], -1, 1, -1)
        residual = logits.log_softmax(2)
        value = -residual.gather(2, labels)
        residual.exp_()
        curvature = ((1 - residual.square().sum(2, keepdim=True)) * weights).sum((2, 3)) / (problem.n_classes - 1)
        residual.scatter_add_(2, labels, torch.full_like(value, -1.0))
        residual *= weights
    data = (value * weights).sum((2, 3), dtype=torch.float64)
    return data + 0.5 * (ridge * theta.square()).sum((2, 3), dtype=torch.float64), residual, curvature


def _gradient(features: Tensor, theta: Tensor, ridge: Tensor, residual: Tensor) -> Tensor:
    depth, j, c, n = residual.shape
    return (
        (residual.reshape(depth, j * c, n) @ features).reshape(depth, j, c, -1).addcmul_(ridge.expand_as(theta), theta)
    )


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((2, 3))


def _direction(state: _State, axes: Axes, problem: Problem) -> Tensor:
    """Quasi-Newton direction [l, j, c, d + 1] by the two-loop recursion; every fit has its own history."""
    metric = _Metric(axes, state.curvature.clamp(min=1e-4), problem.penalty.to(state.theta))
    memory, q = state.memory, state.gradient.clone()
    alphas = []
    for s, y, rho in reversed(memory):
        alpha = rho * _dot(s, q)
        q.addcmul_(alpha[:, :, None, None], y, value=-1)
        alphas.append(alpha)
    q = metric.apply(q)
    if memory:
        _, y, rho = memory[-1]
        scale = 1.0 / (rho * _dot(y, metric.apply(y))).clamp(min=1e-30)
        q *= torch.where(rho > 0, scale, torch.ones_like(rho))[:, :, None, None]
    for (s, y, rho), alpha in zip(memory, reversed(alphas), strict=True):
        q.addcmul_((alpha - rho * _dot(y, q))[:, :, None, None], s)
    return q.neg_()


def _search(
    problem: Problem, state: _State, direction: Tensor, change: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Armijo backtracking per fit; logits are linear in the step, so a trial costs no matrix product."""
    slope = _dot(state.gradient, direction).double()
    slack = 1e-6 if direction.dtype == torch.float32 else 1e-13  # rounding must not reject a step at the optimum
    size = torch.ones_like(slope)
    for _ in range(HALVINGS):
        factor = size[:, :, None, None].to(direction)
        trial = state.logits + factor * change
        value, residual, curvature = _loss(problem, state.theta + factor * direction, state.ridge, trial)
        bad = value > state.loss + ARMIJO * size * slope + slack * state.loss.abs()
        if not bool(bad.any()):
            break
        size = torch.where(bad, 0.5 * size, size)
    return factor, trial, value, residual, curvature


def _pair(step: Tensor, change: Tensor) -> Pair:
    """A curvature pair; fits that moved by rounding only get weight zero, which leaves them out."""
    product = _dot(step, change)
    usable = product > 1e-12 * _dot(change, change)
    return step, change, torch.where(usable, 1.0 / product.clamp(min=1e-30), torch.zeros_like(product))
