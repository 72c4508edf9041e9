"""Forget and retain gradients at equal length."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Space, metric_of, mix, norm, ratio


def ngdiff(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, space: Space = "raw", metric: Flat | None = None
) -> Flat:
    """Add the two gradients after scaling each to length 1, so that neither side outweighs the other.

    ``d = g_R / |g_R| + g_F / |g_F|``; ``d·g_F >= 0`` and ``d·g_R >= 0`` whatever the angle, so to first order a step
    raises neither loss.  Source: Bu et al. 2024, arXiv 2410.22086 (NGDiff), without its automatic learning rate.
    A retain term that is at its minimum at the start (kl, js) then has a direction made of rounding: use nll.
    The length is at most 2 and does not shrink as the losses do: with a plain descent the schedule has to.
    """
    inner = metric_of(space, metric)
    return mix(ratio(1.0, norm(forget, inner)), forget, ratio(1.0, norm(retain, inner)), retain)
