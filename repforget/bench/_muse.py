"""The formulas of MUSE: privacy leakage, scalability and sustainability (numbers in, numbers out)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError

Array = NDArray[np.float64]
PUBLISHED_AUC = {"news": 0.4772, "books": 0.5393}  # Min-40 % of the retrained models, as the MUSE code states them


def forget_auc(holdout: Array, forget: Array) -> float:
    """AUC by which unseen texts look more like members than the forget set: 0 = fully memorised, 0.5 = alike.

    ``holdout`` and ``forget`` are membership scores, higher = rather a member; ties count half.
    """
    from repforget.verify.statistics import auc

    return auc(holdout, forget) if len(holdout) and len(forget) else math.nan


def privleak(mine: float, reference: float) -> float:
    """(A - A_r) / A_r in per cent: 0 ideal, -100 fully leaked, positive over-unlearned; NaN where A_r is 0.

    At most (1 / A_r - 1) 100, so that it explodes where A_r is small: read the two AUCs.
    """
    return 100.0 * (mine - reference) / reference if reference > 0 else math.nan


def item_slopes(values: Array, at: Sequence[float]) -> Array:
    """Least-squares slope of each item over the models: ``values`` [models, n], ``at`` [models] -> [n].

    The mean of these is the slope of the mean, so that its interval comes from resampling items.
    """
    x = np.asarray(at, dtype=np.float64)
    spread = ((x - x.mean()) ** 2).sum()
    if len(x) != len(values) or spread == 0.0:
        raise UsageError(f"A slope needs at least two models at different places, got {len(values)} at {list(at)}.")
    weights = (x - x.mean()) / spread
    return np.asarray(weights @ values, dtype=np.float64)


@dataclass(frozen=True)
class Requests:
    """Forget scores over a sequence of requests: ``scores[i][j]`` [n_i] are those of request i after request j >= i."""

    scores: Mapping[tuple[int, int], Array]
    requests: int

    def matrix(self) -> Array:
        """Mean forget score F [k, k], NaN below the diagonal."""
        k = self.requests
        return np.array([[np.nanmean(self.scores[i, j]) if j >= i else np.nan for j in range(k)] for i in range(k)])

    def drift(self, request: int) -> Array:
        """Mean over later requests of F[i, j] - F[i, i] per item: above 0 = it comes back [n_i]."""
        later = range(request + 1, self.requests)
        changes = np.stack([self.scores[request, j] - self.scores[request, request] for j in later])
        return np.asarray(changes.mean(axis=0), dtype=np.float64)

    def worst(self) -> tuple[int, float]:
        """The request that comes back most, and by how much its mean score rises at most."""
        table = self.matrix()
        rise = [float(np.nanmax(table[i, i:]) - table[i, i]) for i in range(self.requests)]
        return int(np.argmax(rise)), max(rise)


def area(utility: Sequence[float]) -> float:
    """Mean height of a curve by the trapezoid rule; its only value where there is one."""
    y = np.asarray(utility, dtype=np.float64)
    return float(y[0]) if len(y) == 1 else float(((y[1:] + y[:-1]) / 2).mean())
