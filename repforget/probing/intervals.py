"""Intervals of an accuracy whose rows come in clusters."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FEW = 10  # with fewer clusters the bootstrap is too narrow
Floats = NDArray[np.float64]


def cluster_interval(
    values: NDArray[Any], groups: NDArray[np.int64], *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[Floats, Floats]:
    """Two-sided interval of the mean of ``values`` [l, n] per layer, resampling whole clusters.

    Percentile bootstrap with the same resamples for every layer; with fewer than ten clusters a t interval on the
    cluster means.  It covers the choice of clusters, not the choice of folds or seed.
    """
    data = np.asarray(values, dtype=np.float64)
    size = np.bincount(groups).astype(np.float64)
    sums = np.stack([np.bincount(groups, weights=row, minlength=len(size)) for row in data])
    tail = (1 - level) / 2
    if len(size) < FEW:
        from scipy.stats import t

        means = sums / size
        half = t.ppf(1 - tail, len(size) - 1) * means.std(1, ddof=1) / np.sqrt(len(size))
        return np.clip(means.mean(1) - half, 0, 1), np.clip(means.mean(1) + half, 0, 1)
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(len(size), np.full(len(size), 1 / len(size)), size=draws).astype(np.float64)
    means = (sums @ counts.T) / (counts @ size)
    low, high = np.quantile(means, [tail, 1 - tail], axis=1)
    return low, high
