"""Elastic weight consolidation: distance of the weights from their start, weighted by what they matter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repforget.edit.train._objective import objective


@objective("whole", role="retain")
def ewc(drift: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    """Pull the trained parameters back to their start, those that retained data depends on the hardest.

    ``sum F (theta - theta0)^2 / 2`` over all trained parameters [1], F the diagonal Fisher information on retained
    data.  Source: Kirkpatrick et al. 2016, arXiv 1612.00796, eq. 3.
    Cost: F once (a backward for each of at most 64 retained rows), then one pass over the parameters per step.

    Weakness: second order and diagonal: blind to directions between parameters, and F of a row that is known perfectly
    is nearly zero, so that what is best known is held least.
    """
    parts = [(f * part.square()).sum() for part, f in zip(drift, importance, strict=True)]
    return torch.stack(parts).sum().reshape(1) / 2
