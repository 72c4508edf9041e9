"""Low-rank additions to weights while training, merged into them afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class _LowRank(nn.Module):
    """``W -> W + scale * left @ right`` on a parameter; zero at first, for the side of the outputs is."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator, transposed: bool) -> None:
        super().__init__()
        rows, columns = weight.shape[-2:]
        lead, size = weight.shape[:-2], min(rank, rows, columns)
        inputs = rows if transposed else columns
        draw = (torch.rand(*lead, inputs, size, generator=generator) * 2 - 1) / math.sqrt(inputs)
        zero = torch.zeros(*lead, size, columns if transposed else rows)
        left, right = (draw, zero) if transposed else (zero.mT, draw.mT)
        self.left = nn.Parameter(left.to(weight.device, torch.float32).contiguous())
        self.right = nn.Parameter(right.to(weight.device, torch.float32).contiguous())
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * (self.left @ self.right)).to(weight.dtype)


ADAPTER = "parametrizations."  # in the name of every trainable parameter that an adapter adds


@contextmanager
def low_rank_adapters(module: nn.Module, names: Sequence[str], *, rank: int, alpha: float, seed: int) -> Iterator[None]:
    """Give the named matrices [.., m, n] trainable low-rank additions; on leaving they are merged into the weights.

    Train them with ``trainable=lambda name: ADAPTER in name and not name.endswith("original")``.  They live on the
    parameters, so that hooks, transposed and stacked weights behave as ever.  Source: Hu et al. 2021, arXiv 2106.09685,
    without dropout.  Memory: one more copy of the matrices per forward pass.
    """
    from torch.nn.utils import parametrize
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(seed)
    places = [(module.get_submodule(path), attribute) for path, _, attribute in (n.rpartition(".") for n in names)]
    try:
        for owner, attribute in places:
            weight = getattr(owner, attribute)
            part = _LowRank(weight, rank, alpha, generator, isinstance(owner, Conv1D))
            parametrize.register_parametrization(owner, attribute, part)
        yield
    finally:
        for owner, attribute in places:
            if parametrize.is_parametrized(owner, attribute):
                parametrize.remove_parametrizations(owner, attribute, leave_parametrized=True)
