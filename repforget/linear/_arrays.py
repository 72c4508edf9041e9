"""Sums over rows in blocks, in float64, with bounds on what rounding can have done to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

from repforget.errors import NumericalError, UsageError

Array: TypeAlias = NDArray[np.float64]
EPS = float(np.finfo(np.float64).eps)
BLOCK = 4096  # rows per product: bounds memory, and the length of the sums that rounding acts on


def rows(x: NDArray[Any], y: NDArray[Any], width: int | None = None, outputs: int | None = None) -> None:
    """UsageError unless ``x`` [n, d] and ``y`` [n, k] are finite, of equal length and of the width a head has."""
    fits = x.ndim == y.ndim == 2 and len(x) == len(y) > 0 and min(x.shape[1], y.shape[1]) > 0
    if not fits or width not in (None, x.shape[1]) or outputs not in (None, y.shape[1]):
        wanted = f"[n, {width or 'd'}] and [n, {outputs or 'k'}]"
        raise UsageError(f"Rows of shape {x.shape} with targets of shape {y.shape} do not fit: give {wanted}, n at "
                         "least 1.")  # fmt: skip
    if not all(np.isfinite(part).all() for part in (x, y)):
        raise UsageError("The rows hold NaN or infinite values: give finite features and targets.")


def blocks(n: int) -> Iterator[slice]:
    return (slice(start, min(n, start + BLOCK)) for start in range(0, n, BLOCK))


def total(n: int, shape: tuple[int, ...], part: Callable[[slice], Array]) -> Array:
    """The sum of ``part`` over the blocks of n rows."""
    found = np.zeros(shape)
    for block in blocks(n):
        found += part(block)
    return found


def gram(x: NDArray[Any], weights: Array | None = None) -> Array:
    """``sum_i weights_i x_i x_i'`` [d, d]; ``weights`` must be at least 0.  Cost: n d^2 multiplications."""

    def part(block: slice) -> Array:
        held = x[block].astype(np.float64, copy=False)
        held = held if weights is None else held * np.sqrt(weights[block])[:, None]
        product: Array = held.T @ held
        return product

    return total(len(x), (x.shape[1], x.shape[1]), part)


def product(x: NDArray[Any], y: NDArray[Any]) -> Array:
    """``x' y`` [d, k]."""
    return total(len(x), (x.shape[1], y.shape[1]), lambda b: np.asarray(x[b].T.astype(np.float64) @ y[b]))


def rounding(n: int) -> float:
    """Bound on the error of a sum of n products added in blocks, as a share of the sum of their absolute values."""
    return (min(n, BLOCK) + -(-n // BLOCK) + 2) * EPS


def largest_singular_value(gram: Array, error: float) -> float:
    """An upper bound on the spectral norm of the rows whose Gram matrix is ``gram`` up to ``error`` (spectral norm).

    All eigenvalues are computed, and what rounding can hide is added.  Power iteration converges from below, so that a
    residual bound that uses it can be too small.  Cost: O(d^3).
    """
    size = len(gram)
    top = max(0.0, float(scipy.linalg.eigvalsh(gram, subset_by_index=[size - 1, size - 1])[0]))
    return float(np.sqrt(top * (1 + 16 * size * EPS) + error) * (1 + 4 * EPS))


def factor(matrix: Array, what: str) -> Any:
    """Cholesky factor for ``scipy.linalg.cho_solve``; NumericalError where the matrix is not positive definite."""
    try:
        return scipy.linalg.cho_factor(matrix, lower=True, check_finite=True)
    except (scipy.linalg.LinAlgError, ValueError):
        raise NumericalError(f"{what} is not positive definite in float64: raise the L2 penalty, or scale the "
                             "features.") from None  # fmt: skip


def solve(factored: Any, right: Array) -> Array:
    found: Array = scipy.linalg.cho_solve(factored, right)
    return found
