"""Logistic regression of one or more columns, and Newton steps that take rows out of it or put them in."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray
from scipy.special import expit

from repforget.errors import NumericalError, UsageError
from repforget.linear._arrays import (
    EPS,
    Array,
    blocks,
    factor,
    gram,
    largest_singular_value,
    rounding,
    rows,
    solve,
    total,
)
from repforget.linear.ridge import Sign

LIPSCHITZ = 1 / (6 * np.sqrt(3.0))  # of the second derivative of log(1 + exp(-z)); Guo et al. use 1/4
FAST = 0.1  # a gradient that shrinks by less than this asks for a new Hessian
LARGEST = 1 << 24  # numbers in the Hessians of a head that does without them
MAX_STEPS, HALVINGS, ARMIJO, FLAT = 100, 40, 1e-4, 1e-10
SAMPLE = 64  # rows whose removal is tried at fitting time, to tell how many removals a budget allows


@dataclass(frozen=True)
class Logistic:
    """Columns w [d, k], each minimising ``sum_i log(1 + exp(-y_i w.x_i)) + lam n/2 |w|^2 + noise.w``, y in {-1, 1}.

    The penalty grows with the number n of rows (Guo et al. 2020): a row that goes takes ``lam/2 |w|^2`` with it.
    ``reference`` [d, k] is where ``hessian`` [k, d, d] (without penalty) was taken of the rows present now; ``gram``
    [d, d] is theirs, known up to ``error`` in spectral norm, as is the Hessian.  ``residual`` bounds the norm of the
    gradient of the objective over all columns; ``typical`` is (|v|, |X v|) of the Newton step v for one row.
    Memory: k + 1 matrices d x d; above 2^24 numbers a head without noise keeps no Hessian (an empty array).
    """

    weights: Array
    noise: Array
    reference: Array
    gram: Array
    hessian: Array
    n: int
    lam: float
    residual: float
    error: float
    typical: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Bounds:
    """What one Newton step can have added to the gradient: ``data`` from this head's sums, ``worst`` for any rows."""

    data: float
    worst: float
    step: float  # Frobenius norm of the change of the weights


def slope(x: NDArray[Any], y: NDArray[Any], w: Array) -> Array:
    """Gradient [d, k] of the losses, without penalty and noise.  Cost: 2 n d k multiplications."""

    def part(block: slice) -> Array:
        held, signs = x[block].astype(np.float64, copy=False), y[block]
        found: Array = held.T @ (-signs * expit(-signs * (held @ w)))
        return found

    return total(len(x), w.shape, part)


def curvature(x: NDArray[Any], w: Array) -> Array:
    """Hessian [d, d] of one column's losses, without penalty.  Cost: n d^2 multiplications."""
    z = np.concatenate([x[b].astype(np.float64, copy=False) @ w for b in blocks(len(x))])
    return gram(x, expit(z) * expit(-z))


def fit_logistic(
    x: NDArray[Any], y: NDArray[Any], lam: float, noise: Array | None = None, tolerance: float = 1e-10
) -> Logistic:
    """Fit to rows ``x`` [n, d] and signs ``y`` [n, k] by Newton's method, to a gradient of norm ``tolerance``.

    With many rows, rounding sets a floor above ``tolerance``; what was reached is in ``residual``.  NumericalError
    where not even that is.  Cost: k times 5 to 10 Hessians of n d^2 multiplications.
    """
    rows(x, y)
    if not (np.isfinite(lam) and lam > 0):
        raise UsageError(f"The L2 penalty is {lam}: give a positive number, so that there is one solution.")
    zeros = np.zeros((x.shape[1], y.shape[1]))
    empty = Logistic(zeros, zeros if noise is None else noise, zeros, np.zeros(0), np.zeros(0), 0, float(lam), 0.0, 0.0)
    return refit(empty, x, y, tolerance)


def refit(head: Logistic, x: NDArray[Any], y: NDArray[Any], tolerance: float = 1e-10) -> Logistic:
    """The same objective (penalty, noise) minimised on exactly these rows, starting from the head's weights.

    The Hessian that the head keeps serves while the gradient shrinks tenfold per step, so that after few removals
    this is some passes over the rows of 2 n d k multiplications each.  The result does not depend on the start,
    beyond ``residual / (lam n)`` in the weights.
    """
    rows(x, y, *head.weights.shape)
    if not np.isin(y, (-1, 1)).all():
        raise UsageError("The targets of a logistic head are -1 and 1 in every column: encode the classes so.")
    kept = head.hessian if head.n == len(x) and head.hessian.size else [None] * y.shape[1]
    columns = [_minimised(x, y[:, k : k + 1], head.weights[:, k], head.lam * len(x), head.noise[:, k], kept[k],
                          tolerance / np.sqrt(y.shape[1])) for k in range(y.shape[1])]  # fmt: skip
    weights = np.stack([w for w, _ in columns], 1)
    size = sum(float(np.linalg.norm(x[b].astype(np.float64, copy=False))) ** 2 for b in blocks(len(x)))
    lengths = np.sqrt(size * len(x) * y.shape[1])  # at least the sum of the norms of all parts of the gradient
    in_logits = size * x.shape[1] * EPS * float(np.linalg.norm(weights))
    in_sum = 4 * EPS * float(head.lam * len(x) * np.linalg.norm(weights) + np.linalg.norm(head.noise))
    residual = float(np.linalg.norm([norm for _, norm in columns]) + rounding(len(x)) * lengths + in_logits + in_sum)
    found = Logistic(weights, head.noise, weights, gram(x), np.zeros(0), len(x), head.lam, residual,
                     rounding(len(x)) * size)  # fmt: skip
    if weights.size * len(weights) > LARGEST and not head.noise.any():
        return found
    found = replace(found, hessian=np.stack([curvature(x, w) for w in weights.T]))
    return replace(found, typical=_typical(found, x, y))


def leaving(head: Logistic, x: NDArray[Any]) -> Logistic:
    """The head with the curvature of rows ``x`` taken out and its weights as they are: a start for :func:`refit`."""
    if not head.hessian.size:
        return head
    hessian = head.hessian - np.stack([curvature(x, r) for r in head.reference.T])
    return replace(head, hessian=hessian, n=head.n - len(x))


def change_logistic(
    head: Logistic, x: NDArray[Any], y: NDArray[Any], sign: Sign = -1
) -> tuple[Logistic, Bounds]:
    """One Newton step that takes rows ``x`` [m, d], ``y`` [m, k] out (``sign`` -1) or puts them in (+1).

    ``w -> w + H^-1 (sum_i grad l_i + m lam w)`` with the Hessian H of the rows that remain, at the ``reference``; no
    other row is read.  Rows must have norm at most 1 for the bounds (UsageError otherwise).  With G their Gram matrix
    and v the step, what is added to the gradient is at most ``g |X| (|w - r| + |w + v - r|)/2 sqrt(v'G v)``: corollary
    1 of Guo et al. (2020, arXiv 1911.03030) with the mean of the Hessian along the step in place of one point, which
    halves it, g = 1/(6 sqrt 3), and a reference r that may lie behind.  |X| is bounded from above, and what rounding
    and the solution of the linear system leave is added.  ``worst`` is theorem 1 with the same constants.
    Cost: O((m + d) d^2 k), whatever n is.
    """
    rows(x, y, *head.weights.shape)
    n, m = head.n + sign * len(x), len(x)
    if n < 1:
        raise UsageError(f"Taking {m} rows out of a head that was fitted to {head.n} leaves none: fit a new head.")
    if not head.hessian.size:
        raise UsageError("This head keeps no Hessian, being large and without noise: refit it on the remaining rows.")
    within_unit(x)
    x = x.astype(np.float64, copy=False)
    error = head.error + rounding(m) * m + EPS * float(np.linalg.norm(head.gram))
    gram_left = head.gram + sign * gram(x)
    broad = largest_singular_value(gram_left, error)
    hessian = head.hessian + sign * np.stack([curvature(x, r) for r in head.reference.T])
    asked = slope(x, y, head.weights) + m * head.lam * head.weights
    steps = np.empty_like(head.weights)
    added = np.empty(head.weights.shape[1])
    for k, (matrix, right) in enumerate(zip(hessian, -sign * asked.T, strict=True)):
        whole = matrix + head.lam * n * np.eye(len(matrix))
        v = solve(factor(whole, "The Hessian of the remaining rows"), right)
        steps[:, k] = v
        length = float(np.linalg.norm(v))
        seen = np.sqrt(max(0.0, float(v @ gram_left @ v)) + (error + len(v) * EPS * broad**2) * length**2)
        way = np.linalg.norm(head.weights[:, k] - head.reference[:, k])
        way = (way + np.linalg.norm(head.weights[:, k] + v - head.reference[:, k])) / 2
        size = length + float(np.linalg.norm(head.weights[:, k]))
        inexact = float(np.linalg.norm(whole @ v - right)) + (error + len(v) * EPS * np.linalg.norm(whole)) * length
        inexact += EPS * size * np.linalg.norm(whole) + m * (rounding(m) * (1 + head.lam * size) + len(v) * EPS * size)
        added[k] = LIPSCHITZ * broad * way * seen + inexact
    bounds = Bounds(float(np.linalg.norm(added)), _worst(head, n, m), float(np.linalg.norm(steps)))
    weights = head.weights + steps
    return replace(head, weights=weights, gram=gram_left, hessian=hessian, n=n, error=error,
                   residual=head.residual + bounds.data), bounds  # fmt: skip


def least_curvature(head: Logistic) -> float:
    """A lower bound on the eigenvalues of the columns' Hessians at the weights, without penalty, for rows within 1.

    From the Hessian kept, at the reference: a loss's second derivative falls by ``exp(-|way|)`` at most along a way
    (Bach 2010, arXiv 0910.4627), rows being no longer than 1.  Cost: O(k d^3).
    """
    found = []
    for matrix, way in zip(head.hessian, (head.weights - head.reference).T, strict=False):
        least = float(scipy.linalg.eigvalsh(matrix, subset_by_index=[0, 0])[0])
        doubt = head.error + 16 * len(matrix) * EPS * float(np.linalg.norm(matrix))
        found.append(max(0.0, least - doubt) * float(np.exp(-np.linalg.norm(way))))
    return min(found, default=0.0)


def distance(head: Logistic, curvature: float = 0.0) -> float:
    """Upper bound on the distance (Frobenius) to the minimiser, from the residual, the penalty and curvature.

    ``lam n r + curvature (1 - exp(-r)) <= residual`` for the distance r, since along the way to the minimiser the
    curvature falls no faster than above; without it this is strong convexity by the penalty alone.
    """
    r = head.residual / (head.lam * head.n)
    for _ in range(50):  # from above, each turn a bound
        r = head.residual / (head.lam * head.n + curvature * (-np.expm1(-r) / r if r else 1.0))
    return float(r * (1 + 64 * EPS))


def residual_at(head: Logistic, distance: float, curvature: float) -> float:
    """The residual at which :func:`distance` is this large."""
    return float(head.lam * head.n * distance - curvature * np.expm1(-distance))


def within_unit(x: NDArray[Any]) -> None:
    """UsageError unless every row has a norm of at most 1, which the bounds assume."""
    longest = max(float(np.linalg.norm(x[b].astype(np.float64, copy=False), axis=1).max()) for b in blocks(len(x)))
    if longest > 1 + 1e-12:
        raise UsageError(f"A row has the norm {longest:.4g} and the bounds hold for rows of norm 1 at most: give a "
                         "radius, by which rows are divided and to which longer ones are cut.")  # fmt: skip


def _worst(head: Logistic, n: int, m: int) -> float:
    """Theorem 1 of Guo et al. for m rows, with |noise| and the residual in the bound on the weights' norm."""
    k = head.weights.shape[1]
    behind = float(np.linalg.norm(head.weights - head.reference))
    extra = (float(np.linalg.norm(head.noise)) + head.residual) / head.n
    step = m * (2 * np.sqrt(k) + extra) / (head.lam * n)
    return float(LIPSCHITZ * n * (behind + step / 2) * step)


def _typical(head: Logistic, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, float]:
    """Root mean square over a sample of rows of (|v|, |X v|), v being the step that takes one of them out."""
    chosen = np.linspace(0, len(x) - 1, min(SAMPLE, len(x))).astype(int)
    held, signs = x[chosen].astype(np.float64), y[chosen]
    lengths = np.zeros(2)
    for k, w in enumerate(head.weights.T):
        parts = held * (-signs[:, k] * expit(-signs[:, k] * (held @ w)))[:, None] + head.lam * w
        matrix = head.hessian[k] + head.lam * head.n * np.eye(len(w))
        v = solve(factor(matrix, "The Hessian"), parts.T)
        lengths += np.array([(v**2).sum(), (v * (head.gram @ v)).sum()]) / len(chosen)
    return float(np.sqrt(lengths[0])), float(np.sqrt(lengths[1]))


def _minimised(
    x: NDArray[Any], y: NDArray[Any], w: Array, penalty: float, noise: Array, hessian: Array | None, tolerance: float
) -> tuple[Array, float]:
    """One column by damped Newton steps: the weights and the norm of the gradient reached."""

    def measured(at: Array) -> tuple[float, Array]:
        value = penalty / 2 * float(at @ at) + float(noise @ at)
        for b in blocks(len(x)):
            value += float(np.logaddexp(0.0, -y[b, 0] * (x[b].astype(np.float64, copy=False) @ at)).sum())
        return value, slope(x, y, at[:, None])[:, 0] + penalty * at + noise

    # what a gradient of many terms can be trusted to, as a random walk of their rounding
    floor = 8 * EPS * (np.sqrt(len(x)) + penalty * float(np.linalg.norm(w)) + float(np.linalg.norm(noise)))
    value, g = measured(w)
    norm, factored = float(np.linalg.norm(g)), None
    for _ in range(MAX_STEPS):
        if norm <= max(tolerance, floor):
            return w, norm
        fresh = factored is None and hessian is None
        if factored is None:
            held = curvature(x, w) if hessian is None else hessian
            try:
                factored = factor(held + penalty * np.eye(len(w)), "The Hessian")
            except NumericalError:
                if fresh:
                    raise
                hessian = None  # rounding of sums that large rows have left
                continue
        step, size = solve(factored, g), 1.0
        for _ in range(HALVINGS):
            lower, trial = measured(w - size * step)
            reached = float(np.linalg.norm(trial))
            flat = abs(lower - value) <= FLAT * abs(value)  # too close for the objective to tell
            if lower < value - ARMIJO * size * float(g @ step) or (flat and reached < norm):
                slow, w, value, g, norm = reached > FAST * norm, w - size * step, lower, trial, reached
                break
            size /= 2
        else:
            if fresh:
                break  # rounding: no shorter step helps
            slow = True
        if slow:
            factored = hessian = None
    if norm > 1e-6 * (1 + penalty):
        raise NumericalError(f"The logistic head was not fitted: after {MAX_STEPS} Newton steps the gradient has the "
                             f"norm {norm:.2g}; raise the L2 penalty, or scale the features.")  # fmt: skip
    return w, norm
