"""Which layers of a model of a given depth an objective on hidden states reads by default."""

from __future__ import annotations

from collections.abc import Callable


def at_depth(*shares: float) -> Callable[[int], tuple[int, ...]]:
    """A function from the number of layers to the layers that lie at these shares of the depth."""
    return lambda depth: tuple(sorted({min(depth - 1, round(share * depth)) for share in shares}))
