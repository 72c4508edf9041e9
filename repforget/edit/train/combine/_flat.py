"""Gradients spread over many tensors as one vector: global dot products, in float64 and in a metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from repforget.errors import UsageError

Flat = list[Tensor]
Space = Literal["raw", "preconditioned"]
Probe = Callable[[Flat, float], float]  # retain loss of the step's rows so many steps along minus a direction
CHUNK = 1 << 22  # entries that are widened to float64 at a time
MOST = 12  # objectives whose supports are tried one by one


def metric_of(space: Space, metric: Flat | None) -> Flat | None:
    """The metric in which conflicts are judged: the optimiser's own in its space, none in the raw one.

    An optimiser that steps by ``-P⁻¹ d`` changes a loss of gradient g by ``-gᵀ P⁻¹ d`` to first order, so that
    ``<a, b> = aᵀ P⁻¹ b`` is what must not be negative; ``metric`` is the diagonal of P⁻¹.  None is the optimiser that
    scales all entries alike.
    """
    return metric if space == "preconditioned" else None


def dot(a: Flat, b: Flat, metric: Flat | None = None) -> float:
    """``sum_i metric_i a_i b_i`` over all tensors together, accumulated in float64."""
    parts = (a, b) if metric is None else (a, b, metric)
    return sum(_dot(tensors) for tensors in zip(*parts, strict=True))


def _dot(tensors: Sequence[Tensor]) -> float:
    device = torch.device("cpu") if tensors[0].device.type == "mps" else tensors[0].device  # mps has no float64
    total = torch.zeros((), dtype=torch.float64, device=device)
    flat = [t.detach().reshape(-1) for t in tensors]
    for start in range(0, len(flat[0]), CHUNK):
        wide = [t[start : start + CHUNK].to(device).double() for t in flat]
        total += (wide[0] * wide[1]).sum() if len(wide) == 2 else (wide[0] * wide[1] * wide[2]).sum()
    return float(total)


def norm(a: Flat, metric: Flat | None = None) -> float:
    return math.sqrt(dot(a, a, metric))


def ratio(a: float, b: float) -> float:
    """``a / b``, and 0 where b is: a gradient that vanishes has no direction to keep clear of."""
    return a / b if b > 0 else 0.0


def mix(p: float, a: Flat, q: float, b: Flat) -> Flat:
    """``p a + q b``."""
    return [p * x + q * y for x, y in zip(a, b, strict=True)]


def min_norm(gram: Tensor) -> Tensor:
    """Weights w [k] on the simplex that minimise ``wᵀ gram w``: the smallest vector in the hull of k gradients.

    ``gram`` [k, k] holds their dot products, in float64 on the CPU.  Inside one face of the simplex the minimum is a
    linear system (gram w constant, sum w = 1); every face is tried, hence at most twelve gradients.
    Source: Désidéri 2012 (MGDA).
    """
    k = len(gram)
    if k > MOST:
        raise UsageError(f"The smallest combination of {k} gradients was asked for: give at most {MOST}.")
    gram = gram / gram.diagonal().max().clamp(min=torch.finfo(gram.dtype).tiny)
    best, least = gram.new_zeros(k), math.inf
    for support in (list(s) for size in range(1, k + 1) for s in combinations(range(k), size)):
        n = len(support)
        system = gram.new_ones(n + 1, n + 1)
        system[:n, :n], system[n, n] = gram[support][:, support], 0.0
        target = gram.new_zeros(n + 1, 1)
        target[n] = 1.0
        inner = torch.linalg.lstsq(system, target, driver="gelsd").solution[:n, 0]
        if float(inner.min()) < 0:
            continue
        weights = gram.new_zeros(k).index_copy(0, torch.tensor(support), inner / inner.sum())
        value = float(weights @ gram @ weights)
        if value < least:
            best, least = weights, value
    return best
