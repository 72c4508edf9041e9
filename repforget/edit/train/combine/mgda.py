"""The shortest convex combination of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Space, dot, metric_of, min_norm


def mgda(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, space: Space = "raw", metric: Flat | None = None
) -> Flat:
    """Step along the shortest convex combination of the two gradients, which lowers both losses as long as any can.

    ``d = t g_F + (1 - t) g_R``, ``t = clip((g_R - g_F)·g_R / |g_F - g_R|², 0, 1)``; where 0 < t < 1,
    ``d·g_F = d·g_R = |d|²``.  Source: Désidéri 2012 (MGDA); Pan et al. 2024, arXiv 2412.20412 (MOLLM) forget with it.
    The shorter gradient decides: at the start, where the retain loss is at its minimum, little is forgotten.
    """
    return shortest([forget, retain], metric_of(space, metric))


def shortest(gradients: Sequence[Flat], metric: Flat | None = None) -> Flat:
    """The shortest convex combination of k gradients, k <= 12; costs k (k + 1) / 2 dot products."""
    gram = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for i, first in enumerate(gradients):
        for j, second in enumerate(gradients[: i + 1]):
            gram[i, j] = gram[j, i] = dot(first, second, metric)
    weights = min_norm(gram).tolist()
    return [sum((w * x for w, x in zip(weights, parts, strict=True)), torch.zeros_like(parts[0]))
            for parts in zip(*gradients, strict=True)]  # fmt: skip
