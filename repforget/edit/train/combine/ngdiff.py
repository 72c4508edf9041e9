"""Forget and retain gradients at equal length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Probe, Space, metric_of, mix, norm, ratio
from repforget.errors import UsageError

CHANGE = 2.0  # by which factor the learning rate changes at most at a time


def ngdiff(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, rate: Literal["given", "auto"] = "given", every: int = 10,
    space: Space = "raw", metric: Flat | None = None, probe: Probe | None = None,
) -> Flat:  # fmt: skip
    """Add the two gradients after scaling each to length 1, so that neither side outweighs the other.

    ``d = g_R / |g_R| + g_F / |g_F|``; ``d·g_F >= 0`` and ``d·g_R >= 0`` whatever the angle, so to first order a step
    raises neither loss.  Source: Bu et al. 2024, arXiv 2410.22086 (NGDiff).  ``rate`` "auto" finds the learning rate as
    there, beginning with ``lr``: every ``every``-th step it becomes the lowest point of the parabola through the retain
    loss a step back, here, and a step ahead (along d as the optimiser scales it, without momentum and clipping), and at
    most doubles or halves; the schedule applies on top.  Cost of each time: three retain gradients.
    A retain term that is at its minimum at the start (kl, js) has a direction made of rounding: use nll.  The length is
    at most 2 and does not shrink as the losses do: with a plain descent the schedule, or ``rate``, has to.
    """
    if every < 1:
        raise UsageError(f"ngdiff looks for its learning rate every {every} steps: give 1 or more.")
    inner = metric_of(space, metric)
    found = mix(ratio(1.0, norm(forget, inner)), forget, ratio(1.0, norm(retain, inner)), retain)
    if rate == "auto" and probe is not None:
        done = int(state.get("steps", 0)) + 1
        state["steps"] = torch.tensor(done)
        if done % every == 0:  # not before the optimiser has a scale
            now = float(state.get("rate", 1.0))
            best = lowest(probe(found, -now), probe(found, 0.0), probe(found, now))
            state["rate"] = torch.tensor(now * best, dtype=torch.float64)
    return found


def lowest(behind: float, here: float, ahead: float) -> float:
    """Where the parabola through three values a step apart is lowest, in steps ahead: 1/2 to 2."""
    slope, bend = (ahead - behind) / 2, (ahead + behind) / 2 - here
    best = -slope / (2 * bend) if bend > 0 else (CHANGE if slope < 0 else 0.0)
    return min(CHANGE, max(1 / CHANGE, best))
