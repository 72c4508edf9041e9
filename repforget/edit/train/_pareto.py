"""The trade-offs that a run passed through and that nothing else in it beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeVar


class Point(Protocol):
    """Where a run stood after ``step`` steps: what is to be low on the forget and on the retain side."""

    @property
    def step(self) -> int: ...
    @property
    def forget(self) -> float: ...
    @property
    def retain(self) -> float: ...


P = TypeVar("P", bound=Point)


def front(points: Iterable[P]) -> tuple[P, ...]:
    """The points that no other one equals or beats on both sides, by falling retain value; each pair of values once.

    Values that are not numbers never count.  Points on the front were compared on the run's own rows alone.
    """
    found: list[P] = []
    known = (p for p in points if not math.isnan(p.forget + p.retain))
    for point in sorted(known, key=lambda p: (p.forget, p.retain, p.step)):
        if not found or point.retain < found[-1].retain:
            found.append(point)
    return tuple(found)


def lines(found: Sequence[Point]) -> tuple[str, ...]:
    """One line per point, for notes and reports."""
    return tuple(f"step {p.step}: forget {p.forget:.3g}, retain {p.retain:.3g}" for p in found)
