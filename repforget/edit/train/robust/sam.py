"""Forgetting that also holds where the forget loss is worst nearby."""

from __future__ import annotations

from typing import TYPE_CHECKING

from repforget.edit.train.combine._flat import norm, ratio
from repforget.edit.train.robust._shift import shift_
from repforget.errors import UsageError

if TYPE_CHECKING:
    from repforget.edit.train._engine import Gradients, StepContext


def sam(step: StepContext, *, rho: float = 0.01) -> Gradients:
    """Take the forget gradient at the worst point within ``rho`` of the weights, the retain gradient at the weights.

    ``g_F(θ + rho g_F / |g_F|)``, the norm over all trained parameters together.  Source: Foret et al. 2021,
    arXiv 2010.01412 (SAM); for forgetting Fan et al. 2025, arXiv 2502.05374.  Cost: one more forward and backward, and
    one more copy of the trained parameters.  A flat neighbourhood of that radius does not bound longer relearning.
    """
    if rho < 0:
        raise UsageError(f"sam was given a radius of {rho}: give 0 or more.")
    forget = step.gradients(("forget",))["forget"]
    scale = ratio(rho, norm(forget))
    if scale > 0:
        with step.restored():
            shift_(step.parameters, (scale * g for g in forget), step.generator)
            forget = step.gradients(("forget",))["forget"]
    return {**step.gradients(("retain",)), "forget": forget}  # last: the losses kept for combiners are those here
