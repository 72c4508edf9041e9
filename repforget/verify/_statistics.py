"""Intervals for paired, clustered items: the arithmetic behind every verdict (numpy and scipy only).

Items are questions inside clusters (a person, an author, a document); clusters are the unit that is resampled.  All
limits are one-sided: ``low`` and ``high`` each leave ``alpha`` outside.  Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
DRAWS = 2000
ALPHA = 0.05
FEW_CLUSTERS = 10  # below this a bootstrap of clusters is too narrow; Student's t on the cluster totals is used
POWER_Z = 1.645 + 0.84  # one-sided 5 % test with 80 % power
_BLOCK = 4_000_000  # entries of the resampling matrix held at once


@dataclass(frozen=True)
class Interval:
    """A ratio of totals with one-sided limits, its standard error and how much data stood behind it."""

    point: float
    low: float
    high: float
    se: float
    n_items: int
    n_clusters: int

    def p_above(self, bound: float) -> float:
        """One-sided p-value of "the true value is at most ``bound``" (Student's t on clusters)."""
        if self.n_clusters < 2 or not math.isfinite(self.se):
            return 1.0
        if self.se == 0.0:
            return 0.0 if self.point > bound else 1.0
        return float(stats.t.sf((self.point - bound) / self.se, self.n_clusters - 1))


def cluster_totals(columns: Array, clusters: Sequence[str]) -> Array:
    """Sum the rows of ``columns`` (n, k) within each cluster: (number of clusters, k), clusters in sorted order."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    totals = np.zeros((int(index.max()) + 1, columns.shape[1]))
    np.add.at(totals, index, columns)
    return totals


@lru_cache(maxsize=8)
def _blocks(clusters: int, draws: int, seed: int) -> tuple[NDArray[np.int64], ...]:
    """How often each cluster is drawn in each bootstrap sample, in blocks of rows."""
    rows = max(1, _BLOCK // clusters)
    generator = np.random.default_rng([seed, clusters, draws])
    share = np.full(clusters, 1.0 / clusters)
    sizes = [min(rows, draws - start) for start in range(0, draws, rows)]
    return tuple(generator.multinomial(clusters, share, size=size) for size in sizes)


def _resampled(totals: Array, draws: int, seed: int) -> Iterator[Array]:
    for block in _blocks(len(totals), draws, seed):
        yield block @ totals


def expanded_level(alpha: float, clusters: int) -> float:
    """The bootstrap quantile that gives a one-sided ``alpha`` limit for few clusters (Hesterberg 2015, section 5.2).

    A plain percentile interval is too narrow by about sqrt((C-1)/C) and uses a normal where Student's t is due.
    """
    spread = math.sqrt(clusters / (clusters - 1)) * stats.t.isf(alpha, clusters - 1)
    return float(stats.norm.sf(spread))


def ratio_interval(
    numerator: Array, denominator: Array, clusters: Sequence[str], *,
    alpha: float = ALPHA, draws: int = DRAWS, seed: int = 0,
) -> Interval:  # fmt: skip
    """Sum of ``numerator`` over sum of ``denominator`` (both per item) with limits from resampled clusters.

    With fewer than ten clusters the limits are Student's t around the linearised ratio; with one cluster, or a
    denominator of zero, they are infinite.  Deterministic for a seed; costs one (draws x clusters) product.
    """
    n = len(numerator)
    if n == 0:
        return Interval(math.nan, -math.inf, math.inf, math.inf, 0, 0)
    totals = cluster_totals(np.stack([numerator, denominator], axis=1), clusters)
    count = len(totals)
    top, bottom = totals.sum(axis=0)
    if bottom == 0.0:
        return Interval(math.nan, -math.inf, math.inf, math.inf, n, count)
    point = float(top / bottom)
    if count < 2:
        return Interval(point, -math.inf, math.inf, math.inf, n, count)
    residual = totals[:, 0] - point * totals[:, 1]
    se = math.sqrt(count / (count - 1) * float(residual @ residual)) / abs(float(bottom))
    if count < FEW_CLUSTERS:
        reach = float(stats.t.isf(alpha, count - 1)) * se
        return Interval(point, point - reach, point + reach, se, n, count)
    sums = np.concatenate(list(_resampled(totals, draws, seed)))
    # A draw whose denominator vanishes says nothing; it may not pull a limit towards the point.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(sums[:, 1] * bottom > 0, sums[:, 0] / sums[:, 1], np.nan)
    lost = np.isnan(ratios)
    low_side, high_side = np.where(lost, -np.inf, ratios), np.where(lost, np.inf, ratios)
    level = expanded_level(alpha, count)
    low = float(np.quantile(low_side, level, method="lower"))
    high = float(np.quantile(high_side, 1.0 - level, method="higher"))
    return Interval(point, low, high, se, n, count)


def mean_interval(
    values: Array, clusters: Sequence[str], *, alpha: float = ALPHA, draws: int = DRAWS, seed: int = 0
) -> Interval:
    """Mean over items with limits from resampled clusters; see :func:`ratio_interval`."""
    return ratio_interval(values, np.ones_like(values), clusters, alpha=alpha, draws=draws, seed=seed)


def auc(high: Array, low: Array) -> float:
    """Probability that a value of ``high`` exceeds one of ``low``, ties counted half (Mann-Whitney); 0.5 if empty."""
    if len(high) == 0 or len(low) == 0:
        return 0.5
    ranks = stats.rankdata(np.concatenate([high, low]))
    wins = ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2
    return float(wins / (len(high) * len(low)))


def items_needed(interval: Interval, margin: float) -> int | None:
    """Items of the same kind for 80 % power to show a true value of zero to lie below ``margin``.

    n = (1.645 + 0.84)^2 * variance * design effect / margin^2; the squared standard error times n already holds both.
    """
    if not math.isfinite(interval.se) or interval.se == 0.0 or margin <= 0.0:
        return None
    return math.ceil((POWER_Z * interval.se / margin) ** 2 * interval.n_items)


def zero_event_limit(n: int, alpha: float = ALPHA) -> float:
    """Upper limit of a proportion after no event in ``n`` trials (Clopper and Pearson 1934): 1 - alpha^(1/n)."""
    return 1.0 if n == 0 else 1.0 - alpha ** (1.0 / n)


def holm(p_values: Sequence[float], alpha: float = ALPHA) -> tuple[bool, ...]:
    """Which hypotheses are rejected at family-wise level ``alpha`` (Holm 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    rejected = [False] * len(p_values)
    for place, index in enumerate(order):
        if p_values[index] > alpha / (len(p_values) - place):
            break
        rejected[index] = True
    return tuple(rejected)
