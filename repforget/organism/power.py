"""How many people must be forgotten so that a pass can be told from a failure: the size of the forget set.

A pass means that the edited model lies within ``margin`` of the twins, in units of the gap between the full
model and the twins.  With paired item differences of standard deviation sigma_d, an equivalence test at
one-sided 5 % reaches power 0.8 with n = (1.645 + 0.84)^2 * sigma_d^2 * deff / delta^2 items (normal
approximation).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError

Z_ALPHA = 1.645  # one-sided 5 %
Z_POWER = 0.84  # power 0.8


@dataclass(frozen=True)
class Spread:
    """What two twins say about the noise of an item difference: ``sigma`` per item, ``deff`` by cluster."""

    sigma: float
    deff: float
    floor: float


def items_needed(sigma: float, delta: float, deff: float = 1.0) -> float:
    """Return the number of items for power 0.8 at margin ``delta`` (unit of ``sigma``), unrounded."""
    if delta <= 0:
        raise UsageError(f"The margin is {delta} and must be positive: give it in units of the item value.")
    return (Z_ALPHA + Z_POWER) ** 2 * sigma**2 * deff / delta**2


def people_needed(
    sigma: float, *, gap: float, relations: int, margin: float = 0.05, deff: float = 1.0, sealed: float = 0.5
) -> int:
    """Return how many forget people give power 0.8 on the smallest test set, half of the sealed split.

    ``gap`` is full minus twin in item values, ``sealed`` the share of people in the sealed split, each
    person carries ``relations`` items.
    """
    per_person = sealed * 0.5 * relations
    return math.ceil(items_needed(sigma, margin * gap, deff) / per_person)


def spread(first: NDArray[np.float64], second: NDArray[np.float64], clusters: Sequence[str]) -> Spread:
    """Estimate the noise of (edited - mean of two twins) from two twins' item values on the forget items.

    An edit that forgets perfectly behaves as a third twin.  Its difference to the mean of two has variance
    1.5 * sigma^2 where two twins differ by 2 * sigma^2, hence sigma_d = sqrt(0.75 * mean((a - b)^2)).
    ``deff`` is the ratio of the clustered to the independent variance of the mean difference, and at least
    1.
    """
    difference = np.asarray(first, dtype=np.float64) - np.asarray(second, dtype=np.float64)
    sigma = math.sqrt(0.75 * float(np.mean(difference**2)))
    names = sorted(set(clusters))
    index = np.searchsorted(names, clusters)
    centred = difference - difference.mean()
    sums = np.bincount(index, weights=centred, minlength=len(names))
    independent = float(np.sum(centred**2))
    deff = max(1.0, float(np.sum(sums**2)) / independent) if independent > 0 else 1.0
    return Spread(sigma, deff, float((np.mean(first) + np.mean(second)) / 2))
