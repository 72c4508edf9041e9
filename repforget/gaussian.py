"""What Gaussian noise hides, in closed form: how far apart two means may lie that nobody can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable

DOUBT = 4e-15  # share by which a probability may be off in float64, per square of the deviations it lies out at


def hockey_stick(epsilon: float, distance: float) -> float:
    """The least delta at ``epsilon`` between N(0, 1) and N(distance, 1), from above.

    ``Phi(r/2 - e/r) - exp(e) Phi(-r/2 - e/r)``, the second term in log space.  Source: Balle and Wang 2018, arXiv
    1805.06530, Theorem 8; it holds in any dimension, r being the distance of the means in standard deviations.
    """
    from scipy.special import log_ndtr, ndtr

    if distance <= 0.0:
        return 0.0
    r = distance
    out = r / 2 + epsilon / r
    larger = (1 + DOUBT * (3 + out**2)) * float(ndtr(r / 2 - epsilon / r))
    return max(0.0, larger - math.exp(epsilon + float(log_ndtr(-out))))


def gaussian_epsilon(distance: float, delta: float) -> float:
    """The least epsilon at ``delta`` of a Gaussian mechanism whose outputs lie ``distance`` deviations apart.

    For T full-batch steps of noise multiplier s the distance is ``sqrt(T) / s``: exact, no accountant can say less.
    """
    if hockey_stick(0.0, distance) <= delta:
        return 0.0
    high = 1.0
    while hockey_stick(high, distance) > delta:
        high *= 2
    return _bisected(lambda e: hockey_stick(e, distance) > delta, high)[1]


def gaussian_distance(epsilon: float, delta: float) -> float:
    """The largest distance in deviations at which a Gaussian mechanism is (epsilon, delta)-private."""
    high = 1.0
    while hockey_stick(epsilon, high) <= delta:
        high *= 2
    return _bisected(lambda r: hockey_stick(epsilon, r) <= delta, high)[0]


def _bisected(below: Callable[[float], bool], high: float) -> tuple[float, float]:
    """Neighbouring floats between which ``below`` ceases to hold, at 0 true and at ``high`` false."""
    low = 0.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if below(middle) else (low, middle)
    return low, high
