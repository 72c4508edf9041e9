"""A second module tree over the same tensors, for libraries that rewrite the tree they are given."""

from __future__ import annotations

import copy
from collections.abc import Hashable

from torch import Tensor, nn


def shadow(module: nn.Module) -> nn.Module:
    """Return a copy of the module tree whose parameters and buffers *are* those of ``module``.

    Costs no memory for weights. An in-place edit of a weight is seen on both sides; what is done to the
    copy's modules, configuration or ``forward`` methods never reaches the original. Hooks attached now are
    copied.
    """
    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in tensors})


def state_key(module: nn.Module, checksummed: frozenset[int] = frozenset()) -> Hashable:
    """Return a cheap key that changes when weights, module tree or attached hooks change.

    Weights are compared by object, address and PyTorch's in-place version counter, which writes through
    ``.data`` do not advance; parameters whose id is in ``checksummed`` are also compared by their sum and sum
    of squares.
    Cost: one pass over the names, and one read of the checksummed tensors.
    """
    tensors = tuple((name, id(t), t.data_ptr(), t._version, t.dtype, str(t.device))
                    for name, t in (*module.named_parameters(), *module.named_buffers()))  # fmt: skip
    sums = tuple(_sums(p) for p in module.parameters() if id(p) in checksummed)
    hooked = tuple((name, type(part).__name__, *part._forward_hooks, *part._forward_pre_hooks)
                   for name, part in module.named_modules())  # fmt: skip
    return tensors, sums, hooked


def _sums(tensor: Tensor) -> tuple[float, float]:
    values = tensor.detach().double()
    return float(values.sum()), float(values.square().sum())
