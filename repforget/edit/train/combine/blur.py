"""Forget first: the retain gradient may only act where it leaves forgetting alone."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Space, dot, metric_of, mix, ratio


def blur(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, gamma: float = 1.0, space: Space = "raw",
    metric: Flat | None = None,
) -> Flat:  # fmt: skip
    """Forget at a fixed rate and let the retain gradient act only across the forget gradient.

    ``d = g_R + (gamma - g_R·g_F / |g_F|²) g_F``, so that ``d·g_F = gamma |g_F|²``.  Source: Reisizadeh et al. 2025,
    arXiv 2506.08164 (BLUR, bi-level).  Nothing keeps the retain loss from rising along the forget gradient.
    """
    inner = metric_of(space, metric)
    return mix(gamma - ratio(dot(retain, forget, inner), dot(forget, forget, inner)), forget, 1.0, retain)
