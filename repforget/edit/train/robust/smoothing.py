"""Forgetting that holds on average under noise in the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from repforget.edit.train.combine._flat import Flat, mix
from repforget.edit.train.robust._shift import on, shift_
from repforget.errors import UsageError

if TYPE_CHECKING:
    from repforget.edit.train._engine import Gradients, StepContext


def smoothing(step: StepContext, *, sigma: float = 0.01, samples: int = 3) -> Gradients:
    """Average the forget gradient over Gaussian noise in the trained weights; the retain gradient is the plain one.

    ``E g_F(θ + sigma r ε)`` over ``samples`` draws of ε ~ N(0, I) that follow from the step; r is the root mean square
    of each tensor, so that ``sigma`` is a share of the weights (a tensor of zeros stays as it is).  Source: randomised
    smoothing, Cohen et al. 2019, arXiv 1902.02918; for forgetting Fan et al. 2025, arXiv 2502.05374.  Cost: ``samples``
    more forwards and backwards.  An attack moves weights along few directions that noise hardly hits.
    """
    if sigma < 0 or samples < 1:
        raise UsageError(f"smoothing was given {samples} samples of noise {sigma}: give at least one, of 0 or more.")
    total: Flat = []
    for _ in range(samples):
        with step.restored():
            shift_(step.parameters, _noise(step, sigma), step.generator)
            drawn = step.gradients(("forget",))["forget"]
        total = mix(1.0, total, 1.0, drawn) if total else drawn
    return {**step.gradients(("retain",)), "forget": [t / samples for t in total]}


def _noise(step: StepContext, sigma: float) -> Flat:
    out = []
    for p in step.parameters:
        draw = torch.randn(p.shape, generator=on(p.device, step.generator), device=p.device)
        size = p.detach().float().square().mean().sqrt()
        out.append(sigma * size * draw)
    return out
