"""Multinomial logistic regression, as a change of a given linear map, by Newton's method with conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from repforget.errors import NumericalError, UsageError
from repforget.linear._arrays import EPS, Array, rounding, total

MAX_STEPS, MAX_PRODUCTS, HALVINGS, ARMIJO, FLAT = 60, 2000, 30, 1e-4, 1e-10
TINY = float(np.finfo(np.float64).tiny)
MEMORY = 128 << 20  # bytes of Hessian blocks that precondition


@dataclass(frozen=True)
class Softmax:
    """``change`` [d, k] minimising ``sum_i -log softmax(x_i (base + change) + bias)[y_i] + lam/2 |change|^2``.

    ``lam`` belongs to the whole objective and stays when rows go: without any row the change is zero.  ``residual`` is
    the norm of the gradient, rounding included, so that ``residual / lam`` bounds the distance to the one minimiser.
    """

    change: Array
    n: int
    lam: float
    residual: float

    @property
    def distance(self) -> float:
        """Upper bound on ``|change - change*|`` (Frobenius), by strong convexity."""
        return self.residual / self.lam


def fit_softmax(
    x: NDArray[Any], y: NDArray[Any], classes: int, lam: float, *, base: NDArray[Any] | None = None,
    bias: NDArray[Any] | None = None, start: NDArray[Any] | None = None, tolerance: float = 1e-10,
    told: Callable[[float], None] | None = None,
) -> Softmax:  # fmt: skip
    """Fit to rows ``x`` [n, d] and class numbers ``y`` [n], n possibly 0, to a gradient of norm ``tolerance``.

    With ``start`` near the solution (rows that go are few) this is the removal of those rows: the minimiser is unique,
    so that the start shows in the result by ``residual / lam`` at most.  ``told`` hears the norm after each step.
    Cost: some ten Newton steps of as many Hessian products as conjugate gradients need, each 6 n min(n, d) k
    multiplications; memory of a block of rows times k.
    """
    _check(x, y, classes, lam)
    shape = (x.shape[1], classes)
    if not len(x):
        return Softmax(np.zeros(shape), 0, float(lam), 0.0)
    held = np.zeros(shape) if start is None else start.astype(np.float64)
    problem = _Problem(x, y, np.zeros(shape) if base is None else base.astype(np.float64),
                       np.zeros(classes) if bias is None else bias.astype(np.float64), float(lam))  # fmt: skip
    if len(x) < len(held):  # the change is a sum of rows: as many numbers per class as there are rows say it all
        axes, within = np.linalg.qr(x.T.astype(np.float64))
        small = _Problem(within.T, y, np.zeros((len(x), classes)), x @ problem.base + problem.bias, problem.lam)
        held = axes @ _minimised(small, axes.T @ held, tolerance, told)[0]
        norm = float(np.linalg.norm(problem.measured(held)[1]))
    else:
        held, norm = _minimised(problem, held, tolerance, told)
    if norm > 1e-6 * (1 + lam):
        raise NumericalError(f"The softmax head was not fitted: its gradient has the norm {norm:.2g} after {MAX_STEPS} "
                             "Newton steps; raise the L2 penalty, or scale the features.")  # fmt: skip
    logits = float(np.linalg.norm(problem.base + held)) * x.shape[1] * EPS
    size, given = float(np.linalg.norm(x)), 4 * EPS * float(np.abs(problem.bias).max())
    doubt = ((rounding(len(x)) + given) * np.sqrt(len(x) + 1.0) + logits * size) * size
    return Softmax(held, len(x), float(lam), float(norm + doubt))


def _check(x: NDArray[Any], y: NDArray[Any], classes: int, lam: float) -> None:
    if x.ndim != 2 or y.shape != (len(x),) or not np.isfinite(x).all():
        raise UsageError(f"Rows of shape {x.shape} with classes of shape {y.shape} do not fit: give finite [n, d] and "
                         "[n].")  # fmt: skip
    if len(y) and not (np.issubdtype(y.dtype, np.integer) and 0 <= int(y.min()) <= int(y.max()) < classes):
        raise UsageError(f"The classes of a softmax head are whole numbers from 0 to {classes - 1}: encode them so.")
    if not (np.isfinite(lam) and lam > 0):
        raise UsageError(f"The L2 penalty is {lam}: give a positive number, so that there is one solution.")


def _minimised(
    problem: _Problem, held: Array, tolerance: float, told: Callable[[float], None] | None
) -> tuple[Array, float]:
    """The change and the norm of the gradient reached, by damped Newton steps from ``held``."""
    value, gradient = problem.measured(held)
    norm = float(np.linalg.norm(gradient))
    floor = 64 * EPS * np.sqrt(len(problem.x) + 1.0)
    for _ in range(MAX_STEPS):
        if told is not None:
            told(norm)
        if norm <= max(tolerance, floor):
            break
        step, size = _conjugate(problem, held, gradient, max(min(0.1, norm) * norm, 0.1 * tolerance)), 1.0
        slope = float((gradient * step).sum())
        for _ in range(HALVINGS):
            lower, trial = problem.measured(held - size * step)
            reached = float(np.linalg.norm(trial))
            flat = abs(lower - value) <= FLAT * abs(value)  # too close for the objective to tell
            if lower < value - ARMIJO * size * slope or (flat and reached < norm):
                break
            size /= 2
        else:
            break  # rounding: no shorter step helps
        held, value, gradient, norm = held - size * step, lower, trial, reached
    return held, norm


@dataclass(frozen=True)
class _Problem:
    """Rows, their classes, what is added to the change (``base`` [d, k]) and to the logits (``bias`` [k] or [n, k])."""

    x: NDArray[Any]
    y: NDArray[Any]
    base: Array
    bias: Array
    lam: float

    def _chances(self, block: slice, weights: Array) -> tuple[Array, Array]:
        held = self.x[block].astype(np.float64, copy=False)
        z = held @ weights + (self.bias if self.bias.ndim == 1 else self.bias[block])
        chances: Array = np.exp(z - logsumexp(z, axis=1, keepdims=True))
        return held, chances

    def measured(self, change: Array) -> tuple[float, Array]:
        """The objective and its gradient [d, k]."""
        weights = self.base + change
        value = 0.5 * self.lam * float((change**2).sum())

        def part(block: slice) -> Array:
            nonlocal value
            held, chances = self._chances(block, weights)
            own = np.arange(len(held)), self.y[block]
            value -= float(np.log(np.maximum(chances[own], TINY)).sum())
            chances[own] -= 1
            found: Array = held.T @ chances
            return found

        gradient = total(len(self.x), change.shape, part) + self.lam * change
        return value, gradient

    def blocks(self, change: Array) -> tuple[NDArray[np.intp], Array]:
        """Classes of most curvature with their own blocks of the Hessian [c, d, d], and last one block for the rest."""
        size = self.x.shape[1]
        weights = self.base + change
        curved = total(len(self.x), (change.shape[1],), lambda b: _curved(self._chances(b, weights)[1]).sum(0))
        own = np.argsort(-curved)[: max(1, MEMORY // (8 * size * size))]
        rest = np.setdiff1d(np.arange(change.shape[1]), own)

        def part(block: slice) -> Array:
            held, chances = self._chances(block, weights)
            each = _curved(chances)
            shared = each[:, rest].mean(1, keepdims=True) if len(rest) else np.zeros((len(held), 1))
            return np.stack([held.T @ (column[:, None] * held) for column in np.hstack([each[:, own], shared]).T])

        found = total(len(self.x), (len(own) + 1, size, size), part)
        return own, found + self.lam * np.eye(size)

    def product(self, change: Array, direction: Array) -> Array:
        weights = self.base + change

        def part(block: slice) -> Array:
            held, chances = self._chances(block, weights)
            moved = chances * (held @ direction)
            found: Array = held.T @ (moved - chances * moved.sum(1, keepdims=True))
            return found

        return total(len(self.x), change.shape, part) + self.lam * direction


def _curved(chances: Array) -> Array:
    found: Array = chances * (1 - chances)
    return found


def _conjugate(problem: _Problem, change: Array, right: Array, tolerance: float) -> Array:
    """``H^-1 right`` by conjugate gradients, to a residual of norm ``tolerance``.

    Preconditioned by the Hessian's blocks of single classes.  What is the same for all classes is treated apart: there
    the Hessian is the penalty alone.
    """
    own, blocks = problem.blocks(change)
    inverses = np.linalg.inv(blocks)
    rest = np.setdiff1d(np.arange(right.shape[1]), own)

    def centred(x: Array) -> Array:
        shifted: Array = x - x.mean(1, keepdims=True)
        return shifted

    def conditioned(x: Array) -> Array:
        flat = centred(x)
        turned = np.empty_like(x)
        turned[:, own] = np.einsum("cde,ec->dc", inverses[:-1], flat[:, own], optimize=True)
        turned[:, rest] = inverses[-1] @ flat[:, rest]
        return centred(turned) + (x - flat) / problem.lam

    found = np.zeros_like(right)
    left = right.copy()
    direction = conditioned(left)
    size = float((left * direction).sum())
    for _ in range(MAX_PRODUCTS):
        if float(np.linalg.norm(left)) <= tolerance:
            break
        turned = problem.product(change, direction)
        length = size / float((direction * turned).sum())
        found += length * direction
        left -= length * turned
        better = conditioned(left)
        size, before = float((left * better).sum()), size
        direction = better + (size / before) * direction
    return found
