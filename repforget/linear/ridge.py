"""Ridge regression whose rows can be taken out or put in: the sums a solution depends on, and Woodbury's identity."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.linear._arrays import EPS, Array, factor, gram, product, rounding, rows, solve

Sign = Literal[-1, 1]
STALE = 1e-8  # error of the inverse, seen on the weights, from which on it is computed again


@dataclass(frozen=True)
class Ridge:
    """Weights [d, k] minimising ``1/2 |X W - Y|^2 + lam/2 |W|^2``, with the sums they depend on.

    ``lam`` belongs to the whole objective and stays when rows go (scikit-learn's ``alpha``; no intercept).  ``drift``
    is how far the updated ``inverse`` [d, d] was from solving the normal equations before one step of refinement;
    ``gram_error`` and ``cross_error`` bound the rounding of the sums (spectral and Frobenius norm).
    """

    weights: Array
    inverse: Array
    gram: Array
    cross: Array
    n: int
    lam: float
    gram_error: float
    cross_error: float
    drift: float = 0.0


def fit_ridge(x: NDArray[Any], y: NDArray[Any], lam: float) -> Ridge:
    """Fit to rows ``x`` [n, d] and targets ``y`` [n, k] in float64.  Cost: n d (d + k) multiplications and O(d^3)."""
    rows(x, y)
    if not (np.isfinite(lam) and lam > 0):
        raise UsageError(f"The L2 penalty is {lam}: give a positive number, so that there is one solution.")
    share = rounding(len(x))
    size = np.linalg.norm(x) * np.linalg.norm(y)
    head = Ridge(np.zeros((x.shape[1], y.shape[1])), np.zeros(0), gram(x), product(x, y), len(x), float(lam),
                 share * float(np.linalg.norm(x)) ** 2, share * float(size))  # fmt: skip
    return refreshed(head)


def refreshed(head: Ridge) -> Ridge:
    """The same head with its inverse computed anew from the Gram matrix.  Cost: O(d^3)."""
    inverse = solve(factor(_matrix(head), "The Gram matrix with its penalty"), np.eye(len(head.gram)))
    return _solved(replace(head, inverse=(inverse + inverse.T) / 2))


def change_ridge(head: Ridge, x: NDArray[Any], y: NDArray[Any], sign: Sign = -1) -> Ridge:
    """Take rows ``x`` [m, d], ``y`` [m, k] out (``sign`` -1) or put them in (+1): equal to fitting again.

    ``(A + s x'x)^-1 = P - P x' (s I + x P x')^-1 x P`` with ``P = A^-1`` (Woodbury 1950), then one step of iterative
    refinement of the weights.  The inverse is computed anew where m exceeds d / 2 or ``drift`` exceeds 1e-8.
    Cost: O(m d^2), or O(d^3).  Which rows belong to the head is for the caller to know.
    """
    rows(x, y, head.weights.shape[0], head.weights.shape[1])
    n = head.n + sign * len(x)
    if n < 0:
        raise UsageError(f"{len(x)} rows cannot be taken out of a head that was fitted to {head.n}: name rows that it "
                         "holds.")  # fmt: skip
    x, y = x.astype(np.float64, copy=False), y.astype(np.float64, copy=False)
    share, width = rounding(len(x)), float(np.linalg.norm(x))
    gram_error = head.gram_error + share * width**2 + EPS * float(np.linalg.norm(head.gram))
    cross_error = (head.cross_error + share * width * float(np.linalg.norm(y))
                   + EPS * float(np.linalg.norm(head.cross)))  # fmt: skip
    new = replace(head, gram=head.gram + sign * gram(x), cross=head.cross + sign * product(x, y), n=n,
                  gram_error=gram_error, cross_error=cross_error)  # fmt: skip
    if 2 * len(x) > len(head.gram):
        return refreshed(new)
    narrow = head.inverse @ x.T
    inner = sign * np.eye(len(x)) + x @ narrow
    inverse = head.inverse - narrow @ scipy.linalg.solve(inner, narrow.T, assume_a="sym")
    updated = _solved(replace(new, inverse=(inverse + inverse.T) / 2))
    return updated if updated.drift <= STALE else refreshed(new)


def distance(head: Ridge) -> float:
    """Upper bound on ``|W - W*|`` (Frobenius) to the exact solution for the rows that are left.

    From the residual of the normal equations and the rounding of the sums, over the smallest eigenvalue.  Cost: O(d^3).
    """
    matrix = _matrix(head)
    least = float(scipy.linalg.eigvalsh(head.gram, subset_by_index=[0, 0])[0])
    least = max(0.0, least - head.gram_error - 16 * len(matrix) * EPS * float(np.linalg.norm(head.gram)))
    size = float(np.linalg.norm(head.weights))
    left = float(np.linalg.norm(matrix @ head.weights - head.cross))
    computing = len(matrix) * EPS * (float(np.linalg.norm(matrix)) * size + float(np.linalg.norm(head.cross)))
    return (left + computing + head.gram_error * size + head.cross_error) / (least + head.lam)


def _matrix(head: Ridge) -> Array:
    matrix: Array = head.gram + head.lam * np.eye(len(head.gram))
    return matrix


def _solved(head: Ridge) -> Ridge:
    matrix = _matrix(head)
    weights = head.inverse @ head.cross
    left = head.cross - matrix @ weights
    scale = max(float(np.linalg.norm(head.cross)), float(np.finfo(np.float64).tiny))
    return replace(head, weights=weights + head.inverse @ left, drift=float(np.linalg.norm(left)) / scale)
