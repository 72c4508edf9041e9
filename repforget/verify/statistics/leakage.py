"""What leaks when a model is sampled: the best of k answers, and upper bounds that hold for any distribution.

The bounds hold for one prompt and its independent samples; they say nothing of prompts that were not asked.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import gammaln

from repforget.errors import UsageError
from repforget.verify.statistics.intervals import ALPHA, Array


def leak_at_k(samples: ArrayLike, k: int) -> Array:
    """Expected best score among ``k`` of the N samples of each item: [..., N] -> [...], unbiased.

    Sum over i >= k of C(i-1, k-1) / C(N, k) times the i-th smallest score (arXiv 2511.04934); scores of 0 and 1 give
    the probability that at least one of ``k`` leaks.
    """
    ordered = np.sort(np.asarray(samples, np.float64), axis=-1)
    n = ordered.shape[-1] if ordered.ndim else 0
    _check_k(k, n)
    rank = np.arange(k, n + 1)
    weights = np.exp(_log_choose(rank - 1, k - 1) - _log_choose(n, k))
    return np.asarray(ordered[..., k - 1 :] @ (weights / weights.sum()), np.float64)


def leak_share(leaks: ArrayLike, n: int, k: int) -> Array:
    """Probability that at least one of ``k`` samples leaks, from ``leaks`` of ``n``: 1 - C(n-c, k) / C(n, k)."""
    _check_k(k, n)
    count = np.asarray(leaks, np.int64)
    if np.any((count < 0) | (count > n)):
        raise UsageError(f"Leaks are counted among {n} samples, not {int(count.max())}: give counts up to it.")
    missed = np.where(n - count >= k, _log_choose(np.maximum(n - count, k), k) - _log_choose(n, k), -np.inf)
    return np.asarray(0.0 - np.expm1(missed), np.float64)


def tail_bound(samples: ArrayLike, above: float, *, alpha: float = ALPHA) -> float:
    """Upper bound of P(score > ``above``) from independent samples (Dvoretzky, Kiefer, Wolfowitz; Massart 1990)."""
    values = np.asarray(samples, np.float64)
    return min(1.0, float(np.mean(values > above)) + _epsilon(values, alpha))


def anderson_mean_bound(
    samples: ArrayLike, *, alpha: float = ALPHA, low: float = 0.0, high: float = 1.0
) -> float:
    """Upper bound of the mean score from independent samples within [``low``, ``high``] (Anderson 1969).

    ``high`` minus the integral of max(F - epsilon, 0), exact over the steps of the empirical F (arXiv 2410.03523 uses
    a grid); epsilon = sqrt(ln(1 / alpha) / 2N).
    """
    values = np.sort(np.asarray(samples, np.float64))
    epsilon = _epsilon(values, alpha)
    if not low <= values[0] <= values[-1] <= high:
        raise UsageError(f"Scores must lie between {low} and {high} and reach from {values[0]} to {values[-1]}.")
    widths = np.diff(np.append(values, high))
    reached = np.arange(1, len(values) + 1) / len(values)
    return float(high - widths @ np.maximum(reached - epsilon, 0.0))


def _epsilon(values: Array, alpha: float) -> float:
    if values.ndim != 1 or len(values) == 0 or not 0.0 < alpha <= 0.5:
        raise UsageError("A bound needs the samples of one prompt (at least one) and a level between 0 and 0.5.")
    return math.sqrt(math.log(1.0 / alpha) / (2 * len(values)))


def _log_choose(n: int | NDArray[np.int64], k: int) -> Array:
    return np.asarray(gammaln(np.asarray(n) + 1.0) - gammaln(k + 1.0) - gammaln(np.asarray(n) - k + 1.0), np.float64)


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise UsageError(f"The best of {k} cannot be told from {n} samples: draw at least as many.")
