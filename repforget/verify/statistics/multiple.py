"""Many tests at once: corrections, the best of several candidates, and repeated looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.verify.statistics.intervals import ALPHA, Array, cluster_totals


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> tuple[bool, ...]:
    """Which hypotheses are rejected at family-wise level ``alpha`` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - place):
            break
        rejected[index] = True
    return tuple(rejected)


def benjamini_hochberg(p_values: Sequence[float], rate: float = 0.1) -> tuple[bool, ...]:
    """Which hypotheses are listed at false discovery ``rate`` (1995); for exploring items, never for a verdict."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    below = np.flatnonzero(p[order] <= rate * np.arange(1, len(p) + 1) / max(len(p), 1))
    rejected = np.zeros(len(p), bool)
    rejected[order[: below[-1] + 1 if len(below) else 0]] = True
    return tuple(bool(r) for r in rejected)


@dataclass(frozen=True)
class MaxT:
    """The best of several candidates against the best of them on the reference.

    ``difference`` = the largest mean on the target minus the largest mean on the floor, and ``p`` its one-sided
    p-value; ``adjusted`` holds a p-value per candidate, for "this one is above the floor", that counts all of them.
    """

    best: int
    difference: float
    p: float
    adjusted: tuple[float, ...]


def max_t(
    target: Array, floor: Array, clusters: Sequence[str], *, permutations: int = 5000, seed: int = 0
) -> MaxT:  # fmt: skip
    """Test the best of n paraphrases, layers, seeds, ... with the same choice made on the reference (max-T).

    ``target`` and ``floor`` are (items, candidates).  Labels of both are swapped for whole clusters and for all
    candidates at once, so that their correlation is kept (Westfall and Young 1993).
    """
    if target.shape != floor.shape or target.ndim != 2 or len(target) != len(clusters) or target.size == 0:
        raise UsageError(f"Candidates must be (items, candidates) on both sides, with one cluster per item, and are "
                         f"{target.shape}, {floor.shape} and {len(clusters)} clusters.")  # fmt: skip
    gap, both = cluster_totals(target - floor, clusters), (target + floor).sum(axis=0)
    scale = np.sqrt((gap**2).sum(axis=0))  # unchanged by a swap
    signs = np.random.default_rng([seed, len(gap), permutations]).integers(0, 2, (permutations, len(gap))) * 2.0 - 1.0
    sums, observed = signs @ gap, gap.sum(axis=0)

    def best_of(moved: Array) -> Array:
        return np.asarray((both + moved).max(axis=-1) - (both - moved).max(axis=-1)) / (2 * len(target))

    def share(reached: NDArray[np.bool_]) -> float:
        return float((1 + reached.sum()) / (permutations + 1))

    difference = float(best_of(observed))
    with np.errstate(invalid="ignore"):
        standing = np.nan_to_num(observed / scale)
        largest = np.nan_to_num(sums / scale).max(axis=1)
    adjusted = tuple(share(largest >= t - 1e-12) for t in standing)
    return MaxT(int(target.sum(axis=0).argmax()), difference, share(best_of(sums) >= difference - 1e-12), adjusted)


def spend_alpha(look: int, alpha: float = ALPHA) -> float:
    """Level of the ``look``-th look (1, 2, ...) at the same items: alpha / 2^look, which never sums above alpha."""
    if look < 1:
        raise UsageError(f"Looks are counted from 1, and {look} was given.")
    return alpha / 2.0**look
