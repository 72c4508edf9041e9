"""What noisy retain fine-tuning certifies: two starting points made indistinguishable by the same noisy steps.

Source: Koloskova et al. 2025, arXiv 2506.06985.  Steps read retained data alone, so that a start that saw the forget
set and one that did not go through the same maps; noise makes what is left of their difference unreadable.  All
distances are Euclidean over the trained coordinates together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from repforget.errors import UsageError
from repforget.gaussian import gaussian_distance, hockey_stick
from repforget.private.accounting import LARGEST


def concentrated(epsilon: float, delta: float) -> float:
    """The zero-concentrated rho that gives (epsilon, delta): ``rho + 2 sqrt(rho ln(1/delta)) = epsilon`` solved.

    Source: Bun and Steinke 2016, arXiv 1605.02065, Proposition 1.3.
    """
    budget(epsilon, delta)
    log = math.log(1 / delta)
    return (math.sqrt(log + epsilon) - math.sqrt(log)) ** 2


@dataclass(frozen=True)
class Descent:
    """``x <- x - lr (clip(g, gradient) + decay x) + N(0, deviation^2)``, ``steps`` times from ``clip(x, start)``."""

    start: float  # C0
    gradient: float  # C1
    lr: float
    steps: int
    decay: float = 0.0

    def __post_init__(self) -> None:
        if not (self.start > 0 and self.gradient >= 0 and self.lr > 0 and self.steps > 0 and self.decay >= 0):
            raise UsageError("Noisy steps need a radius, a rate and steps above 0 and no negative clipping or decay.")
        if self.decay * self.lr >= 1:
            raise UsageError(f"A decay of {self.decay:g} at rate {self.lr:g} oversteps the origin: their product must "
                             "stay below 1.")  # fmt: skip

    @property
    def distance(self) -> float:
        """How far apart two runs with the same noise can end: ``2 C0 a^T + 2 lr C1 (1 + a + ... + a^(T-1))``."""
        a, t = 1 - self.lr * self.decay, self.steps
        grown = t if self.decay == 0 else (1 - a**t) / (1 - a)
        return 2 * self.start * a**t + 2 * self.lr * self.gradient * grown

    @property
    def spread(self) -> float:
        """The standard deviation of the noise that reaches the end, in those of one step."""
        a = 1 - self.lr * self.decay
        return math.sqrt(self.steps if self.decay == 0 else (1 - a ** (2 * self.steps)) / (1 - a**2))

    def rho(self, deviation: float) -> float:
        """``D^2 / (2 sigma^2 (1 + a^2 + ... + a^(2T-2)))``: that of one Gaussian D away, noise of all steps in it.

        Shifting a run towards the other one a little in every step, in proportion to a^(T-t), spends exactly this
        (Feldman et al. 2018, arXiv 1808.06651, shifted divergences); nothing is assumed about the gradients beyond
        their clipping.
        """
        return (self.distance / (deviation * self.spread)) ** 2 / 2

    def deviation(self, epsilon: float, delta: float) -> float:
        """The least standard deviation of one step's noise for (epsilon, delta) by :meth:`rho`."""
        return self.distance / (self.spread * math.sqrt(2 * concentrated(epsilon, delta)))


def contraction(epsilon: float, radius: float, deviation: float) -> float:
    """By how much one step ``clip(x, radius) + N(0, deviation^2)`` shrinks delta at ``epsilon``.

    ``Phi(r/2 - e/r) - exp(e) Phi(-r/2 - e/r)`` at ``r = 2 radius / deviation``.
    """
    return hockey_stick(epsilon, 2 * radius / deviation)


def contracting_deviation(epsilon: float, delta: float, radius: float, steps: int) -> float:
    """The least noise for which ``steps`` contracting steps give (epsilon, delta)."""
    budget(epsilon, delta)
    return 2 * radius / gaussian_distance(epsilon, delta ** (1 / steps))


def output_deviation(epsilon: float, delta: float, radius: float) -> float:
    """The noise that, added once to ``clip(x, radius)``, gives (epsilon, delta): output perturbation.

    Exact (Balle and Wang 2018, arXiv 1805.06530); below epsilon 1 never more than ``sqrt(8 ln(1.25/delta))
    radius / epsilon``.
    """
    budget(epsilon, delta)
    return 2 * radius / gaussian_distance(epsilon, delta)


def budget(epsilon: float, delta: float) -> None:
    """UsageError for an epsilon or delta that says nothing."""
    if not (0 < epsilon <= LARGEST and 0 < delta < 1):
        raise UsageError(f"({epsilon:g}, {delta:g}) is no budget: give an epsilon above 0, at most {LARGEST:g}, and a "
                         "delta between 0 and 1.")  # fmt: skip
