"""What an attack proves about a training: the epsilon that it cannot have, from one training alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from repforget.errors import UsageError

CEILING = 50.0  # the search ends here


@dataclass(frozen=True)
class Audit:
    """``correct`` of ``guesses`` about who was in; no (``epsilon``, delta)-private training would allow it.

    ``ceiling`` is the epsilon that guesses without a fault would have refuted: a promise above it was not tested.
    """

    guesses: int
    correct: int
    epsilon: float
    ceiling: float


def audit(scores: ArrayLike, was_in: ArrayLike, delta: float, *, share: float = 0.1, alpha: float = 0.05) -> Audit:
    """The audit of one training, in which a fair coin decided for each unit on its own whether it was in.

    ``scores`` [m], higher for those rather in; the highest ``share / 2`` are called in, the lowest out.  The score and
    the share must not depend on the coins.  With chance at most ``alpha`` the epsilon lies above the true one.  Source:
    Steinke, Nasr and Jagielski 2023, arXiv 2305.08846, appendix D.  A low epsilon shows that this attack is weak, not
    that the training is private.
    """
    values, truth = np.asarray(scores, dtype=np.float64), np.asarray(was_in, dtype=bool)
    side = round(len(values) * share / 2)
    if values.shape != truth.shape or not np.isfinite(values).all() or not 1 <= side <= len(values) // 2:
        raise UsageError(f"An audit of {values.size} scores against {truth.size} coins at a share of {share:g} guesses "
                         "nothing: give one finite score per unit, and a share of at most 1 that holds two "
                         "units.")  # fmt: skip
    order = np.argsort(values, kind="stable")
    correct = int((~truth[order[:side]]).sum() + truth[order[-side:]].sum())
    found = [refuted(len(values), 2 * side, v, delta, alpha) for v in (correct, 2 * side)]
    return Audit(2 * side, correct, *found)


def refuted(units: int, guesses: int, correct: int, delta: float, alpha: float = 0.05) -> float:
    """The largest epsilon (0 if none) at which so many correct guesses have a chance of at most ``alpha``."""
    low, high = 0.0, CEILING
    if chance(units, guesses, correct, low, delta) > alpha:
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if chance(units, guesses, correct, middle, delta) <= alpha else (low, middle)
    return low


def chance(units: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Upper bound of the chance of ``correct`` or more right ``guesses`` about ``units`` if the promise holds.

    ``P(B >= v) + 2 m delta max_i P(v > B >= v - i) / i`` with B binomial of rate ``1 / (1 + exp(-epsilon))``.
    """
    from scipy import stats

    rate = 1 / (1 + math.exp(-epsilon))
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, rate))
    worst = float((below / np.arange(1, correct + 1)).max()) if correct else 0.0
    return min(1.0, float(stats.binom.sf(correct - 1, guesses, rate)) + 2 * units * delta * worst)
