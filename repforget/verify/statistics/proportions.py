"""Shares of independent trials: Wilson for reporting, Clopper and Pearson for guarantees, a test against chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from repforget.errors import UsageError
from repforget.verify.statistics.intervals import ALPHA, Interval


def wilson(successes: int, n: int, *, alpha: float = ALPHA) -> Interval:
    """A share with Wilson's (1927) score limits; for reporting, since the level holds only on average."""
    _check(successes, n)
    if n == 0:
        return _nothing()
    share, z = successes / n, float(stats.norm.isf(alpha))
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    reach = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low = 0.0 if successes == 0 else max(0.0, centre - reach)
    high = 1.0 if successes == n else min(1.0, centre + reach)
    return Interval(share, low, high, math.sqrt(share * (1 - share) / n), n, n)


def clopper_pearson(successes: int, n: int, *, alpha: float = ALPHA) -> Interval:
    """A share with exact limits (Clopper and Pearson 1934): each side errs with probability at most ``alpha``."""
    _check(successes, n)
    if n == 0:
        return _nothing()
    share = successes / n
    low = 0.0 if successes == 0 else float(stats.beta.ppf(alpha, successes, n - successes + 1))
    high = 1.0 if successes == n else float(stats.beta.isf(alpha, successes + 1, n - successes))
    return Interval(share, low, high, math.sqrt(share * (1 - share) / n), n, n)


def zero_event_limit(n: int, alpha: float = ALPHA) -> float:
    """Upper limit of a proportion after no event in ``n`` trials (Clopper and Pearson 1934): 1 - alpha^(1/n)."""
    return 1.0 if n == 0 else -math.expm1(math.log(alpha) / n)


@dataclass(frozen=True)
class ChanceTest:
    """A share against chance: the two-sided p-value, and the side on which it lies if that is below ``alpha``.

    "below" is an alarm and no success: the right answer is avoided, which takes knowing it.
    """

    share: float
    chance: float
    p: float
    side: Literal["above", "below", "not told apart"]


def binomial_test_chance(successes: int, n: int, chance: float, *, alpha: float = ALPHA) -> ChanceTest:
    """Exact two-sided binomial test of ``successes`` in ``n`` independent questions against ``chance``.

    Questions of one author are not independent: with clusters use :func:`mean_interval` around ``chance``.
    """
    _check(successes, n)
    if not 0.0 < chance < 1.0:
        raise UsageError(f"Chance is {chance}: give the share of right answers of a guesser, between 0 and 1.")
    if n == 0:
        return ChanceTest(math.nan, chance, 1.0, "not told apart")
    p, share = float(stats.binomtest(successes, n, chance).pvalue), successes / n
    if p > alpha:
        return ChanceTest(share, chance, p, "not told apart")
    return ChanceTest(share, chance, p, "above" if share > chance else "below")


def _check(successes: int, n: int) -> None:
    if not 0 <= successes <= n:
        raise UsageError(f"{successes} successes of {n} trials is no count: give 0 <= successes <= trials.")


def _nothing() -> Interval:
    return Interval(math.nan, 0.0, 1.0, math.inf, 0, 0)
