"""Two samples of the same items: the exact Kolmogorov-Smirnov test and the paired permutation that is due instead.

The KS test takes both samples for independent, and two models that answer the same questions are not: it finds far
too little.  It is kept because published forget qualities are its p-values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from repforget.errors import UsageError
from repforget.verify.statistics.intervals import Array

_BLOCK = 4_000_000  # entries of the matrix of permuted steps held at once
Statistic = Callable[[NDArray[np.int8]], Array]  # signs [b, units], -1 where swapped -> value [b]


@dataclass(frozen=True)
class KS:
    """Two-sided exact test: D = h / lcm(n, m) with an integer h (D = h / n for equal n), and its p-value.

    A high p says "not told apart by this test", never "forgotten".
    """

    h: int
    n: int
    m: int
    D: float
    p: float


@dataclass(frozen=True)
class Swap:
    """A statistic of two paired samples and how often swapping their labels gives at least as much."""

    statistic: float
    p: float
    permutations: int


def ks_exact(
    x: ArrayLike, y: ArrayLike, *, ids_x: Sequence[str] = (), ids_y: Sequence[str] = (), unpaired: bool = False
) -> KS:  # fmt: skip
    """Exact two-sided two-sample Kolmogorov-Smirnov test, in integers from the ranks to the p-value.

    Both samples must hold the same items (``ids_x`` and ``ids_y``); UsageError if not, unless ``unpaired``.
    """
    first, second = _finite(x), _finite(y)
    if not unpaired:
        _same_items(ids_x, ids_y, len(first), len(second))
    n, m = len(first), len(second)
    common = math.gcd(n, m)
    steps = np.unique(np.concatenate([first, second]))
    below = (np.searchsorted(np.sort(v), steps, "right").astype(np.int64) for v in (first, second))
    h = int(np.abs(next(below) * (m // common) - next(below) * (n // common)).max())
    return KS(h, n, m, h / (n * m // common), ks_p_value(h, n, m))


@lru_cache(maxsize=512)
def ks_p_value(h: int, n: int, m: int) -> float:
    """P(D >= h / lcm(n, m)) for two independent samples without ties; exact, rounded once at the end.

    Equal sizes: 2 sum_j (-1)^(j+1) C(2n, n - jh) / C(2n, n).  Else the monotone lattice paths from (0, 0) to (n, m)
    that stay strictly inside are counted, at up to n m additions of long integers.
    """
    if h <= 0:
        return 1.0
    if n == m:
        total = math.comb(2 * n, n)
        signed = (math.comb(2 * n, n - j * h) * (1 if j % 2 else -1) for j in range(1, n // h + 1))
        return 2 * sum(signed) / total
    total = math.comb(n + m, n)
    return (total - _inside(h * math.gcd(n, m), n, m)) / total


def _inside(limit: int, n: int, m: int) -> int:
    """Lattice paths all of whose points (i, j) have |i m - j n| < limit."""
    paths = [1 if j * n < limit else 0 for j in range(m + 1)]
    for i in range(1, n + 1):
        previous = 0
        for j in range(m + 1):
            previous = paths[j] + previous if abs(i * m - j * n) < limit else 0
            paths[j] = previous
    return paths[m]


def ks_critical(n: int, alpha: float) -> int:
    """Smallest h at which two samples of ``n`` differ at level ``alpha``; ``n`` + 1 if none does."""
    return next((h for h in range(1, n + 1) if ks_p_value(h, n, n) <= alpha), n + 1)


def swap_permutation(
    x: ArrayLike, y: ArrayLike, *, ids_x: Sequence[str], ids_y: Sequence[str], clusters: Sequence[str] | None = None,
    statistic: Literal["ks", "mean"] = "ks", permutations: int = 5000, seed: int = 0,
) -> Swap:  # fmt: skip
    """Paired test that two models are interchangeable: labels swapped within items, or within whole clusters.

    ``statistic``: the KS count h, or the absolute difference of means.  p = (1 + number at least as large) / (B + 1).
    A small p means "not exactly this twin"; a training recipe that differs a little is enough for that at large n, so
    it screens and never decides.
    """
    first, second = _finite(x), _finite(y)
    if len(ids_x) != len(first) or len(ids_y) != len(second) or tuple(ids_x) != tuple(ids_y):
        raise UsageError("Swapping labels needs the same items in the same order on both sides: align them by id.")
    unit = np.arange(len(first)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    steps = _mean_steps(first, second, unit) if statistic == "mean" else _ks_steps(first, second, unit)
    observed = float(steps(np.ones((1, int(unit.max()) + 1), np.int8))[0])
    generator, rows = np.random.default_rng([seed, len(first), permutations]), max(1, _BLOCK // (2 * len(first)))
    reached = 0
    for start in range(0, permutations, rows):
        size = (min(rows, permutations - start), int(unit.max()) + 1)
        signs = (2 * generator.integers(0, 2, size, dtype=np.int8) - 1).astype(np.int8)
        reached += int((steps(signs) >= observed * (1 - 1e-12)).sum())
    return Swap(observed, (1 + reached) / (permutations + 1), permutations)


def _mean_steps(x: Array, y: Array, unit: NDArray[np.int64]) -> Statistic:
    totals = np.bincount(unit, x - y) / len(x)
    return lambda signs: np.abs(signs @ totals)


def _ks_steps(x: Array, y: Array, unit: NDArray[np.int64]) -> Statistic:
    """The largest |#x - #y| up to any value, where a swapped unit counts its x for y and its y for x."""
    pooled = np.concatenate([x, y])
    order = np.argsort(pooled, kind="stable")
    last = np.flatnonzero(np.append(np.diff(pooled[order]) > 0, True))
    owner = np.concatenate([unit, unit])[order]
    side = np.where(order < len(x), 1, -1).astype(np.int32)

    def largest(signs: NDArray[np.int8]) -> Array:
        running = np.cumsum(signs[:, owner] * side, axis=1, dtype=np.int32)
        return np.asarray(np.abs(running[:, last]).max(axis=1), np.float64)

    return largest


def _finite(values: ArrayLike) -> Array:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or len(found) == 0 or not np.isfinite(found).all():
        raise UsageError("A test of two samples needs one finite number per item on both sides: leave invalid items "
                         "out of both.")  # fmt: skip
    return found


def _same_items(ids_x: Sequence[str], ids_y: Sequence[str], n: int, m: int) -> None:
    if len(ids_x) == n and len(ids_y) == m and sorted(ids_x) == sorted(ids_y):
        return
    raise UsageError("The two samples are not known to answer the same questions: give the ids of both, which must "
                     "agree, or say unpaired=True.")  # fmt: skip
