"""Two one-sided tests: not "no difference was found" but "any difference is smaller than this"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from repforget.verify.statistics.intervals import Interval


@dataclass(frozen=True)
class Equivalence:
    """Where a share lies: within (-margin, margin), above it, below it, or not told; ``p`` is of "not within"."""

    side: Literal["within", "above", "below", "not told"]
    margin: float
    p: float


def equivalence(share: Interval, margin: float) -> Equivalence:
    """Two one-sided tests (Schuirmann 1987) at the level of the limits of ``share``.

    ``p`` is the larger of both tests' p-values (Student's t on clusters), while the side follows the limits.
    """
    p = max(share.p_above(-margin), share.p_below(margin))
    if share.low > margin:
        return Equivalence("above", margin, p)
    if share.high < -margin:
        return Equivalence("below", margin, p)
    return Equivalence("within" if -margin < share.low and share.high < margin else "not told", margin, p)


def noise_floor(levels: Sequence[float], quantile: float = 0.95) -> float:
    """How far two models that never knew lie apart: the 95 % quantile of |difference| over all pairs of ``levels``.

    The next larger pair is taken, never an average of two: with two models it is their one difference, and up to six
    (15 pairs) the largest. One pair of siblings underestimates the floor; 0 with fewer than two models.
    """
    pairs = [abs(a - b) for a, b in combinations(levels, 2)]
    return float(np.quantile(pairs, quantile, method="higher")) if pairs else 0.0


def margin_above_noise(margin: float, noise: float, gap: float) -> float:
    """The margin on the share of knowledge left: the wanted one, or the noise between twins where that is larger.

    ``noise`` is in units of the measure and ``gap`` the difference it has between the original and the floor.
    """
    return max(margin, noise / gap)
