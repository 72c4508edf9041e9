"""How well a score tells two groups apart: area under the curve and true positives at few false ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from repforget.verify.statistics.intervals import ALPHA, DRAWS, FEW_CLUSTERS, Array, Interval
from repforget.verify.statistics.proportions import zero_event_limit

_BLOCK = 2_000_000  # entries of the matrix of item weights held at once
Evaluate = Callable[[Array], Array]  # weights of the clusters [b, c] -> value [b]


class _Sides(NamedTuple):
    """Cluster number of every item of both sides; names that occur on both are one cluster, else none is."""

    high: NDArray[np.int64]
    low: NDArray[np.int64]
    total: int
    shared: bool


def auc(high: Array, low: Array) -> float:
    """Probability that a value of ``high`` exceeds one of ``low``, ties counted half (Mann-Whitney); 0.5 if empty."""
    if len(high) == 0 or len(low) == 0:
        return 0.5
    ranks = stats.rankdata(np.concatenate([high, low]))
    wins = ranks[: len(high)].sum() - len(high) * (len(high) + 1) / 2
    return float(wins / (len(high) * len(low)))


def auc_interval(
    high: Array, low: Array, clusters_high: Sequence[str], clusters_low: Sequence[str], *, alpha: float = ALPHA,
    draws: int = DRAWS, seed: int = 0,
) -> Interval:  # fmt: skip
    """:func:`auc` with one-sided limits from resampled clusters.

    Clusters named on both sides are drawn together (the same items on two models), else each side by itself.  Costs
    one (draws x clusters) x (clusters x clusters) product.
    """
    if len(high) == 0 or len(low) == 0:
        return Interval(math.nan, 0.0, 1.0, math.inf, len(high) + len(low), 0)
    sides = _sides(clusters_high, clusters_low)
    rows, row, upper = np.unique(sides.high, return_inverse=True, return_counts=True)
    columns, lower = np.unique(sides.low, return_counts=True)
    wins = np.empty((len(rows), len(columns)))
    for place, cluster in enumerate(columns):
        others = np.sort(low[sides.low == cluster])
        won = np.searchsorted(others, high, "left") + np.searchsorted(others, high, "right")
        wins[:, place] = np.bincount(row, won / 2)

    def evaluate(weights: Array) -> Array:
        above, below = weights[:, rows], weights[:, columns]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(((above @ wins) * below).sum(axis=1) / ((above @ upper) * (below @ lower)))

    return _interval(auc(high, low), evaluate, sides, alpha, draws, seed)


def too_few_for_fpr(n_low: int, fpr: float) -> str | None:
    """Why a rate of false positives cannot be read off ``n_low`` negatives, or None: one of them must be below it."""
    if n_low * fpr >= 1.0 - 1e-9:
        return None
    return f"a false positive rate of {fpr:.2%} needs at least {math.ceil(1 / fpr - 1e-9)} negatives, not {n_low}"


def tpr_at_fpr(high: Array, low: Array, fpr: float = 0.01) -> float:
    """Largest share of ``high`` at or above a threshold that at most a share ``fpr`` of ``low`` reaches.

    NaN where :func:`too_few_for_fpr` gives a reason, or where ``high`` is empty.
    """
    if len(high) == 0 or too_few_for_fpr(len(low), fpr):
        return math.nan
    return float(_tpr(high, low, fpr)(np.ones((1, len(high))), np.ones((1, len(low))))[0])


def tpr_interval(
    high: Array, low: Array, clusters_high: Sequence[str], clusters_low: Sequence[str], *, fpr: float = 0.01,
    alpha: float = ALPHA, draws: int = DRAWS, seed: int = 0,
) -> Interval:  # fmt: skip
    """:func:`tpr_at_fpr` with one-sided limits from resampled clusters, drawn as in :func:`auc_interval`."""
    point = tpr_at_fpr(high, low, fpr)
    if math.isnan(point):
        return Interval(math.nan, 0.0, 1.0, math.inf, len(high) + len(low), 0)
    sides, per_item = _sides(clusters_high, clusters_low), _tpr(high, low, fpr)

    def evaluate(weights: Array) -> Array:
        rows = max(1, _BLOCK // (len(high) + len(low)))
        parts = (weights[i : i + rows] for i in range(0, len(weights), rows))
        return np.concatenate([per_item(part[:, sides.high], part[:, sides.low]) for part in parts])

    return _interval(point, evaluate, sides, alpha, draws, seed)


def _tpr(high: Array, low: Array, fpr: float) -> Callable[[Array, Array], Array]:
    """True positive rate for weights of the items of both sides: [b, n high], [b, n low] -> [b]."""
    thresholds = np.unique(np.concatenate([high, low]))[::-1]
    order = np.argsort(-high, kind="stable"), np.argsort(-low, kind="stable")
    reached = [np.searchsorted(-values[o], -thresholds, "right") for values, o in zip((high, low), order, strict=True)]

    def evaluate(upper: Array, lower: Array) -> Array:
        rates = []
        for weights, o, count in zip((upper, lower), order, reached, strict=True):
            passed = np.cumsum(weights[:, o], axis=1)
            passed = np.concatenate([np.zeros((len(weights), 1)), passed], axis=1)
            with np.errstate(invalid="ignore", divide="ignore"):
                rates.append(passed[:, count] / passed[:, -1:])
        allowed = (rates[1] <= fpr + 1e-12).sum(axis=1)
        best = np.take_along_axis(rates[0], np.maximum(allowed - 1, 0)[:, None], axis=1)[:, 0]
        best = np.where(allowed > 0, best, 0.0)
        return np.where(np.isnan(rates[0][:, 0]) | np.isnan(rates[1][:, 0]), np.nan, best)

    return evaluate


def _sides(clusters_high: Sequence[str], clusters_low: Sequence[str]) -> _Sides:
    shared = not set(clusters_high).isdisjoint(clusters_low)
    upper, lower = ("", "") if shared else ("h", "l")
    named = [upper + c for c in clusters_high] + [lower + c for c in clusters_low]
    names, index = np.unique(np.asarray(named), return_inverse=True)
    return _Sides(index[: len(clusters_high)], index[len(clusters_high) :], len(names), shared)


def _interval(point: float, evaluate: Evaluate, sides: _Sides, alpha: float, draws: int, seed: int) -> Interval:
    """Student's t limits on the logit scale, where such a share has little skew; its error from resampled clusters."""
    n, total = len(sides.high) + len(sides.low), sides.total
    groups = [np.arange(total)] if sides.shared else [np.unique(sides.high), np.unique(sides.low)]
    fewest = min(map(len, groups))
    if fewest < 2:
        return Interval(point, 0.0, 1.0, math.inf, n, total)
    if point in (0.0, 1.0):
        # At the edge hardly a draw moves: the limit is that of zero events among the fewer clusters.
        room = zero_event_limit(fewest, alpha)
        return Interval(point, max(point - room, 0.0), min(point + room, 1.0), 0.0, n, total)
    generator, weights = np.random.default_rng([seed, total, draws]), np.zeros((draws, total))
    for group in groups:
        weights[:, group] = generator.multinomial(len(group), np.full(len(group), 1 / len(group)), size=draws)
    values = evaluate(weights)
    lost = np.isnan(values)
    if lost.mean() > alpha:
        return Interval(point, 0.0, 1.0, math.inf, n, total)
    se = float(values[~lost].std(ddof=1)) * math.sqrt(fewest / (fewest - 1))
    freedom = total - len(groups) if fewest >= FEW_CLUSTERS else fewest - 1
    reach = float(stats.t.isf(alpha, freedom)) * se / (point * (1.0 - point))
    low, high = special.expit(special.logit(point) + np.array([-reach, reach]))
    return Interval(point, float(low), float(high), se, n, total)
