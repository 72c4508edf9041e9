"""How many items a claim would need, and how much less than its items a clustered sample tells."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from repforget.verify.statistics.intervals import ALPHA, Array, Interval

POWER = 0.8


def items_needed(
    interval: Interval, margin: float, *, alpha: float = ALPHA, both_sides: bool = False
) -> int | None:  # fmt: skip
    """Items of the same kind for 80 % power to show a true value of zero to lie below ``margin`` at level ``alpha``.

    n = (z_alpha + z_power)^2 * variance * design effect / margin^2, at 5 % (1.645 + 0.84)^2; the squared standard
    error times n already holds both.  ``both_sides``: to show it to lie within (-margin, margin), where half of what
    may be missed is missed on each side.  None where there is no spread or no margin.
    """
    if not math.isfinite(interval.se) or interval.se == 0.0 or margin <= 0.0:
        return None
    return math.ceil((_reach(alpha, both_sides) * interval.se / margin) ** 2 * interval.n_items)


def sample_size(
    sd: float, margin: float, effect: float = 1.0, *, alpha: float = ALPHA, both_sides: bool = False
) -> int:  # fmt: skip
    """The same number from a standard deviation of items and a design ``effect``, before anything is measured."""
    return math.ceil((_reach(alpha, both_sides) * sd / margin) ** 2 * effect)


def _reach(alpha: float, both_sides: bool) -> float:
    missed = (1.0 - POWER) / (2.0 if both_sides else 1.0)
    return float(stats.norm.isf(alpha) + stats.norm.isf(missed))


def icc(values: Array, clusters: Sequence[str]) -> float:
    """Intra-cluster correlation by one-way analysis of variance; NaN with one cluster or one item in each.

    (MSB - MSW) / (MSB + (m0 - 1) MSW), m0 the mean cluster size corrected for inequality; may be negative.
    """
    _, index, sizes = np.unique(np.asarray(clusters), return_inverse=True, return_counts=True)
    n, count = len(values), len(sizes)
    if count < 2 or n == count:
        return math.nan
    means = np.bincount(index, values) / sizes
    between = float((sizes * (means - values.mean()) ** 2).sum()) / (count - 1)
    within = float(((values - means[index]) ** 2).sum()) / (n - count)
    size = (n - float((sizes**2).sum()) / n) / (count - 1)
    whole = between + (size - 1) * within
    return (between - within) / whole if whole > 0 else math.nan


def design_effect(values: Array, clusters: Sequence[str]) -> float:
    """Variance of the mean relative to independent items: 1 + (m - 1) ICC (Kish 1965).

    m = sum of squared cluster sizes / n, the size of the cluster that an item lies in.
    """
    correlation = icc(values, clusters)
    _, sizes = np.unique(np.asarray(clusters), return_counts=True)
    return 1.0 if math.isnan(correlation) else 1.0 + (float((sizes**2).sum()) / len(values) - 1.0) * correlation
