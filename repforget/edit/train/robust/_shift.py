"""Moving the trained parameters for a moment."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from repforget.training.rounding import stochastic_round_


def on(device: torch.device, generator: torch.Generator) -> torch.Generator:
    """A generator on ``device`` whose draws follow from ``generator``."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def shift_(parameters: Sequence[Tensor], moves: Iterable[Tensor], generator: torch.Generator) -> None:
    """Add ``moves`` in place; bfloat16 takes them rounded at random, since most are smaller than its grid."""
    for parameter, move in zip(parameters, moves, strict=True):
        if parameter.dtype == torch.bfloat16:
            stochastic_round_(parameter, parameter.float() + move.float(), on(parameter.device, generator))
        else:
            parameter.add_(move.to(parameter.dtype))
