"""Distance of the weights from where they started."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repforget.edit.train._objective import objective


@objective("whole", role="retain")
def l2(drift: Sequence[Tensor]) -> Tensor:
    """Pull the trained parameters back to their start, all alike.

    ``sum |theta - theta0|^2 / 2`` over all trained parameters [1].  No data and no forward pass; one pass over them.

    Weakness: knows nothing of what the parameters are for: a small step in a sensitive direction costs least.
    """
    return torch.stack([part.square().sum() for part in drift]).sum().reshape(1) / 2
