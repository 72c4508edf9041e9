"""Step only where forgetting and retaining agree."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from repforget.edit.train._engine import Gradients, StepContext


def disruption_mask(step: StepContext, *, norm: float = 1.0) -> Gradients:
    """Keep the entries of the forget gradient whose sign is that of the retain gradient, at a fixed norm.

    Along every entry that is left, the step lowers both losses to first order, so that retention is not traded entry
    by entry; ``norm`` is that of what is left over all parameters (0: as it falls out).  Source: MUDMAN, 2025, arXiv
    2506.12484, with the retain gradient of the step in the place of its running mean.  Cost: none beyond the two
    gradients.  A retain term at its minimum (kl at the start) has a gradient of rounding alone, whose signs mean
    nothing: use nll.  Agreement on this batch does not show agreement on other retained text, and curvature is not
    looked at.
    """
    found = step.gradients()
    agree = [torch.where(f.sign() == r.sign(), f, 0.0) for f, r in zip(found["forget"], found["retain"], strict=True)]
    if norm > 0:
        total = float(torch.stack([g.double().pow(2).sum() for g in agree]).sum().sqrt())
        agree = [g * (norm / total) for g in agree] if total > 0 else agree
    return {**found, "forget": agree}
