"""The trade-offs that a run passed through and that nothing else in it beats."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Point:
    """Where a run stood after ``step`` steps: what it minimises on the forget and on the retain side."""

    step: int
    forget: float
    retain: float


def front(points: Iterable[Point]) -> tuple[Point, ...]:
    """The points that no other one equals or beats on both sides, by falling retain value; each pair of values once.

    Values that are not numbers never count.  What is on the front was compared on the run's own batches alone.
    """
    found: list[Point] = []
    known = (p for p in points if not math.isnan(p.forget + p.retain))
    for point in sorted(known, key=lambda p: (p.forget, p.retain, p.step)):
        if not found or point.retain < found[-1].retain:
            found.append(point)
    return tuple(found)


def lines(found: Sequence[Point]) -> tuple[str, ...]:
    """One line per point, for notes and reports."""
    return tuple(f"step {p.step}: forget {p.forget:.4g}, retain {p.retain:.4g}" for p in found)
