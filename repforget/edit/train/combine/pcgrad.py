"""Each gradient without what it does against the other."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Space, dot, metric_of, mix, ratio


def pcgrad(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, space: Space = "raw", metric: Flat | None = None
) -> Flat:
    """Where the gradients conflict, project each off the other and add what is left; else add them as they are.

    ``d = (g_F - (g_F·g_R / |g_R|²) g_R) + (g_R - (g_F·g_R / |g_F|²) g_F)`` if ``g_F·g_R < 0``.  Source: Yu et al. 2020,
    arXiv 2001.06782 (PCGrad); with two gradients its random order has no effect.  Gradients that are nearly opposite
    nearly cancel, and then hardly anything is forgotten.
    """
    inner = metric_of(space, metric)
    clash = min(0.0, dot(forget, retain, inner))
    off = (ratio(clash, dot(forget, forget, inner)), ratio(clash, dot(retain, retain, inner)))
    return mix(1.0 - off[0], forget, 1.0 - off[1], retain)
