"""Publishing a head with fresh noise each time, so that what is published cannot be told from retrained heads."""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from repforget.errors import ResourceError, UsageError
from repforget.gaussian import gaussian_distance
from repforget.guarantee import at_least, at_most
from repforget.linear._arrays import Array, blocks
from repforget.linear.budget import draw_noise

if TYPE_CHECKING:
    from repforget.linear.head import Head
    from repforget.linear.rows import Table

GRID = 2.0**-10  # of the noise: what publications are rounded to, so that bits below do not tell
DRAWS = 10  # of noise, to tell what it costs


@dataclass(frozen=True)
class Release:
    """(epsilon, delta) for all publications of a head together, each ``w + N(0, tau^2 I)`` with fresh noise.

    Publication t shows the secret weights w_t, whose distance from the one minimiser w*_t on the rows left then is at
    most d_t, by strong convexity.  While ``sum d_t^2 <= limit^2``, which is enforced, whatever is seen is
    (epsilon, delta)-indistinguishable, both ways, from publications ``w*_t + N(0, tau^2 I)``.  Requests may depend on
    what was published before: given the past, w_t and w*_t are fixed and the noise is new, so that, padded by noise
    shifted by what is left of the sum, the log-likelihood ratio is exactly N(m^2/2, m^2), m = limit / tau: that of one
    Gaussian moved by m deviations (a filter: Smith and Thakurta 2022, arXiv 2210.17520), whose delta is Theorem 8 of
    Balle and Wang (2018, arXiv 1805.06530).  The state is not published, as in Neel et al. 2021 (arXiv 2007.02923).
    """

    epsilon: float
    delta: float
    tau: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.epsilon) and self.epsilon > 0):
            raise UsageError(f"Epsilon is {self.epsilon}: give a finite number above 0.")
        if not 0 < self.delta < 1:
            raise UsageError(f"Delta is {self.delta}: give a number between 0 and 1.")
        if not (math.isfinite(self.tau) and self.tau > 1e-300):
            raise UsageError(f"The output noise is {self.tau}: give a positive standard deviation.")

    @property
    def limit(self) -> float:
        """The distance that the noise covers, of all publications together (root of the sum of squares)."""
        return self.tau * gaussian_distance(self.epsilon, self.delta)


def spent(head: Head) -> float:
    """Root of the sum of squared distances of the publications so far."""
    return math.hypot(*(float(entry["distance"]) for entry in head.published))


def left(head: Head, release: Release) -> float:
    """The distance at which one more publication would use up the budget."""
    return math.sqrt(max(0.0, release.limit**2 - spent(head) ** 2))


def covered(head: Head) -> Head:
    """``head`` if one more publication of it is covered by its output noise, else ResourceError."""
    release = head.release
    if release is not None and math.hypot(spent(head), head.distance) > release.limit:
        raise ResourceError(f"The weights can lie {at_most(head.distance)} from retrained ones, {len(head.published)} "
                            f"publications have used {at_most(spent(head))}, and output noise {release.tau:g} covers "
                            f"{at_least(release.limit)} for all: retrain on the remaining rows (--retrain), or take "
                            "out fewer rows.")  # fmt: skip
    return head


def publish(head: Head, seed: int | None = None) -> tuple[Head, Array]:
    """The head with this publication counted, and what is to be published [d, k]: weights and fresh noise.

    Save the head first: a publication that is not counted is not covered.  Without output noise the weights are as
    they are.  ResourceError where the budget ends.  A ``seed`` is for experiments alone.
    """
    if head.release is None:
        return head, head.weights
    covered(head)
    grid = GRID * 2.0 ** math.floor(math.log2(head.release.tau))
    noisy = head.weights + draw_noise(head.release.tau, head.weights.shape, seed)
    entry = {"at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "rows": head.n,
             "distance": head.distance}  # fmt: skip
    return replace(head, published=(*head.published, entry)), np.round(noisy / grid) * grid


def publications_left(head: Head, release: Release) -> int:
    """How many more publications of the head as it is are covered."""
    return int(min((left(head, release) / head.distance) ** 2, 1e9)) if head.distance else 10**9


def utility(head: Head, table: Table) -> dict[str, float | str]:
    """What the output noise costs on ``table``: the measure without it, and its mean over ten draws.

    The share of rows whose class is right, or where ridge predicts numbers the root mean square error.  Such numbers
    depend on the rows and are not covered by the statement.  Cost: eleven passes over the rows.
    """
    from repforget.linear.head import encoded, named
    from repforget.linear.rows import prepared

    tau = 0.0 if head.release is None else head.release.tau
    x, rng = prepared(table.x, head.radius, head.intercept), np.random.default_rng(0)
    y: NDArray[Any] = table.y.astype(np.str_) if head.classes else encoded(table.y, ())

    def measured(weights: Array) -> float:
        total = 0.0
        for block in blocks(len(x)):
            scores = x[block] @ weights
            if head.classes:
                total += float((named(scores, head.classes) == y[block]).sum())
            else:
                total += float(((scores - y[block]) ** 2).sum())
        return total / len(x) if head.classes else math.sqrt(total / y.size)

    noisy = [measured(head.weights + rng.normal(0.0, tau, head.weights.shape)) for _ in range(DRAWS)]
    return {"measure": "accuracy on the rows" if head.classes else "root mean square error on the rows",
            "without noise": measured(head.weights), "published": float(np.mean(noisy))}  # fmt: skip
