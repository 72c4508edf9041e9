"""How far a head that was trained with secret noise may be from retraining before (epsilon, delta) no longer holds."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri

from repforget.errors import ResourceError, UsageError
from repforget.linear._arrays import Array
from repforget.linear.logistic import LIPSCHITZ, Logistic

LARGEST = 2 * math.log(3)  # of epsilon: up to here 1.5 exp(-c^2/2) bounds the Gaussian's delta


@dataclass(frozen=True)
class Budget:
    """(epsilon, delta) with noise of standard deviation ``sigma`` in every coordinate of the objective's linear term.

    A head whose gradient has at most the norm ``limit = sigma epsilon / c``, with ``delta = 1.5 exp(-c^2/2)``, is
    (epsilon, delta)-indistinguishable from one trained without the rows (Guo et al. 2020, arXiv 1911.03030, theorem
    3).  There it is stated for any epsilon; the tail of the Gaussian supports its constant up to 2 ln 3, and larger
    values are refused here.
    """

    epsilon: float
    delta: float
    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= LARGEST:
            raise UsageError(f"Epsilon is {self.epsilon}: give a number above 0 and at most {LARGEST:.3f} (2 ln 3), "
                             "up to which the theorem's delta holds.")  # fmt: skip
        if not 0 < self.delta < 1:
            raise UsageError(f"Delta is {self.delta}: give a number between 0 and 1.")
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise UsageError(f"The private noise is {self.sigma}: give a positive standard deviation.")

    @property
    def c(self) -> float:
        return math.sqrt(2 * math.log(1.5 / self.delta))

    @property
    def limit(self) -> float:
        return self.sigma * self.epsilon / self.c

    def spent_epsilon(self, residual: float) -> float:
        """The epsilon that holds at this residual, for the same delta."""
        return self.c * residual / self.sigma


def for_rows(delta: float, n: int) -> None:
    """UsageError where delta exceeds 1 / n: publishing one whole row would satisfy such a promise."""
    if delta > 1 / n:
        raise UsageError(f"Delta {delta:g} exceeds 1/n = {1 / n:.3g} for {n} rows, which allows a head to show "
                         f"a whole row: give at most {1 / n:.3g}.")  # fmt: skip


def draw_noise(sigma: float, shape: tuple[int, int], seed: int | None = None) -> Array:
    """Noise [d, k] from N(0, sigma^2), every number from twice 52 bits of the system's own randomness.

    Each is the sum of two, since one has few values beyond seven deviations, which would tell what they were added to.
    A ``seed`` is for experiments alone: whoever guesses it can subtract the noise.
    """
    if seed is not None:
        drawn: Array = np.random.default_rng(seed).normal(0.0, sigma, shape)
        return drawn
    bits = np.frombuffer(secrets.token_bytes(16 * shape[0] * shape[1]), dtype=np.uint64) >> np.uint64(12)
    noise: Array = sigma * math.sqrt(0.5) * ndtri((bits + 0.5) / 2.0**52).reshape(2, *shape).sum(0)
    return noise


def within(budget: Budget, head: Logistic, rows: int) -> Logistic:
    """``head`` if its residual is covered, else ResourceError: the rows are still in the head that was there before."""
    if head.residual > budget.limit:
        raise ResourceError(f"Taking out {rows} rows would need a residual of {head.residual:.3g} and the budget of "
                            f"epsilon {budget.epsilon:g} at delta {budget.delta:g} ends at {budget.limit:.3g}: retrain "
                            "on the remaining rows (--retrain), or take out fewer.")  # fmt: skip
    return head


def steps_left(limit: float, head: Logistic) -> int:
    """About how many more single rows a limit on the residual covers; an estimate from typical rows, no promise.

    Steps of typical length are taken to point in random directions, so that the distance from the reference grows with
    the root of their number; rows that pull the same way spend the budget sooner.
    """
    length, seen = head.typical
    left = limit - head.residual
    top = float(np.sqrt(np.linalg.norm(head.gram, 2)))
    if left <= 0:
        return 0
    if length * seen * top == 0:
        return head.n
    behind = float(np.linalg.norm(head.weights - head.reference))
    share = LIPSCHITZ * top * seen
    # the integral of share * sqrt(behind^2 + u length^2) over u from 0 to k is what is left
    k = ((behind**3 + 1.5 * length**2 * left / share) ** (2 / 3) - behind**2) / length**2
    return min(head.n, int(k))
