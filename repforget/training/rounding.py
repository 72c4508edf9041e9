"""Rounding to bfloat16 that is right in the mean, so that steps below its grid still add up."""

from __future__ import annotations

import torch
from torch import Tensor

from repforget.errors import UsageError

LOW = 1 << 16  # float32 values between two neighbours in bfloat16


@torch.no_grad()
def stochastic_round_(target: Tensor, value: Tensor, generator: torch.Generator) -> Tensor:
    """Write ``value`` (float32) into ``target`` (bfloat16), up or down at random with the value itself as the mean.

    A value x between the neighbours a < x < b becomes b with probability (x - a) / (b - a); what bfloat16 can say, and
    anything not finite, is kept as it is.  Raises UsageError for other dtypes.  Memory: two 32-bit copies.
    """
    if target.dtype != torch.bfloat16 or value.dtype != torch.float32:
        raise UsageError(f"Stochastic rounding goes from float32 to bfloat16, not from {value.dtype} to "
                         f"{target.dtype}: train this model with masters.")  # fmt: skip
    noise = torch.randint(LOW, value.shape, generator=generator, dtype=torch.int32, device=generator.device)
    # Adding less than one bfloat16 step to the bits and cutting them off carries over with the right probability.
    rounded = ((value.view(torch.int32) + noise.to(value.device)) & -LOW).view(torch.float32)
    return target.copy_(torch.where(value.isfinite(), rounded, value))
