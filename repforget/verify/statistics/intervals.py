"""Intervals for paired, clustered items: the arithmetic behind every verdict.

Items are questions inside clusters (a person, an author, a document); clusters are the unit that is resampled.  All
limits are one-sided: ``low`` and ``high`` each leave ``alpha`` outside.  Nothing here knows a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
DRAWS = 2000
ALPHA = 0.05
FEW_CLUSTERS = 10  # below this a bootstrap of clusters is too narrow; Student's t on the cluster totals is used
_BLOCK = 4_000_000  # entries of the resampling matrix held at once


@dataclass(frozen=True)
class Interval:
    """An estimate with one-sided limits, its standard error and how much data stood behind it."""

    point: float
    low: float
    high: float
    se: float
    n_items: int
    n_clusters: int

    def p_above(self, bound: float) -> float:
        """One-sided p-value of "the true value is at most ``bound``" (Student's t on clusters)."""
        return self._p(self.point - bound)

    def p_below(self, bound: float) -> float:
        """One-sided p-value of "the true value is at least ``bound``" (Student's t on clusters)."""
        return self._p(bound - self.point)

    def _p(self, beyond: float) -> float:
        if self.n_clusters < 2 or not math.isfinite(self.se):
            return 1.0
        if self.se == 0.0:
            return 0.0 if beyond > 0.0 else 1.0
        return float(stats.t.sf(beyond / self.se, self.n_clusters - 1))


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


Method = Literal["percentile", "bca"]


def bootstrap(
    statistic: Callable[[Array], float], columns: Array, clusters: Sequence[str], *,
    strata: Sequence[str] | None = None, alpha: float = ALPHA, draws: int = DRAWS, seed: int = 0,
    method: Method = "percentile",
) -> Interval:  # fmt: skip
    """Any statistic of the rows of ``columns`` (n or n, k) with one-sided limits from resampled clusters.

    ``statistic`` gets the rows of the drawn clusters and returns a number (NaN: undefined there, which widens).
    ``strata`` (one name per row) are resampled each by itself, for statistics over several sets of items.  "bca"
    corrects bias and skew (Efron 1987).  With fewer than ten clusters in a stratum: Student's t around the point,
    its error by leaving out one cluster at a time.  Costs ``draws`` calls, and one per cluster for "bca" or few
    clusters; :func:`ratio_interval` is far faster.
    """
    columns, groups = np.asarray(columns, np.float64), _groups(clusters, strata)
    n, sizes = len(columns), [len(members) for members in groups]
    count, fewest = sum(sizes), min(sizes, default=0)
    point = float(statistic(columns)) if n else math.nan
    if fewest < 2 or not math.isfinite(point):
        return Interval(point, -math.inf, math.inf, math.inf, n, count)
    if fewest < FEW_CLUSTERS:
        variance = _leave_one_out(statistic, columns, groups)[1]
        se = math.sqrt(variance) if math.isfinite(variance) else math.inf
        reach = float(stats.t.isf(alpha, fewest - 1)) * se
        return Interval(point, point - reach, point + reach, se, n, count)
    generator = np.random.default_rng([seed, count, draws])
    values = np.empty(draws)
    for draw in range(draws):
        rows = [group[i] for group in groups for i in generator.integers(0, len(group), len(group))]
        values[draw] = statistic(columns[np.concatenate(rows)])
    level, lost = expanded_level(alpha, fewest), ~np.isfinite(values)
    levels = (level, 1.0 - level)
    if method == "bca":
        levels = _bca_levels(level, point, values, _leave_one_out(statistic, columns, groups)[0])
    low = float(np.quantile(np.where(lost, -np.inf, values), levels[0], method="lower"))
    high = float(np.quantile(np.where(lost, np.inf, values), levels[1], method="higher"))
    se = math.inf if lost.all() else float(values[~lost].std(ddof=1))
    return Interval(point, min(low, point), max(high, point), se, n, count)


def _groups(clusters: Sequence[str], strata: Sequence[str] | None) -> list[list[NDArray[np.int64]]]:
    """Row numbers per stratum and cluster, both in sorted order."""
    names = np.asarray(clusters)
    layers = np.zeros(len(names), np.int64) if strata is None else np.unique(strata, return_inverse=True)[1]
    out = []
    for layer in range(int(layers.max(initial=-1)) + 1):
        rows = np.flatnonzero(layers == layer)
        _, index = np.unique(names[rows], return_inverse=True)
        order = np.argsort(index, kind="stable")
        out.append(np.split(rows[order], np.flatnonzero(np.diff(index[order])) + 1))
    return out


def _leave_one_out(
    statistic: Callable[[Array], float], columns: Array, groups: list[list[NDArray[np.int64]]]
) -> tuple[Array, float]:
    """Influence of every cluster (mean of its stratum minus the value without it), and the jackknife variance."""
    shifts, variance = [], 0.0
    for group in groups:
        without = np.array([statistic(np.delete(columns, rows, axis=0)) for rows in group])
        shift = without.mean() - without
        variance += (len(group) - 1) / len(group) * float(shift @ shift)
        shifts.append(shift)
    return np.concatenate(shifts), variance


def _bca_levels(level: float, point: float, values: Array, shifts: Array) -> tuple[float, float]:
    """Quantiles of the draws at which the bias-corrected and accelerated limits lie (Efron 1987)."""
    known, draws = values[np.isfinite(values)], len(values)
    below = float(np.mean(known < point) + 0.5 * np.mean(known == point)) if len(known) else 0.5
    bias = float(stats.norm.ppf(min(max(below, 0.5 / draws), 1 - 0.5 / draws)))
    spread = float((shifts**2).sum()) ** 1.5
    acceleration = float((shifts**3).sum()) / (6 * spread) if spread > 0 else 0.0

    def corrected(z: float) -> float:
        moved = bias + z
        # The acceleration is at most 1/6, so that only limits beyond six standard errors meet the end of the formula.
        return float(stats.norm.cdf(bias + moved / max(1.0 - acceleration * moved, 1e-6)))

    reach = float(stats.norm.isf(level))
    return corrected(-reach), corrected(reach)
