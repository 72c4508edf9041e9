"""The arithmetic below :mod:`repforget.stats`: triangular products, optimal shrinkage, labels, checksums."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

from repforget.errors import UsageError

STRIPS = 8  # block rows of the upper triangle: (1 + 1/8)/2 of the products of a full matrix


def one_hot(labels: Tensor, k: int) -> Tensor:
    """Integer classes [n] as columns [n, k]; for k = 1 the indicator of class 1."""
    classes = max(k, 2)
    if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        low, high = int(labels.min()), int(labels.max())
        raise UsageError(f"Class labels run from {low} to {high}, but k={k} allows 0 to {classes - 1}: "
                         "give k = number of classes.")  # fmt: skip
    encoded = torch.nn.functional.one_hot(labels.long(), classes)
    return encoded[:, 1:] if k == 1 else encoded


def add_upper_gram(total: Tensor, x: Tensor) -> None:
    """Add the upper triangle of ``xᵀx`` to ``total`` [d, d] in strips (left of a strip stays unset)."""
    d = total.shape[0]
    width = max(-(-d // STRIPS), 64)
    for start in range(0, d, width):
        rows, target = x[:, start : start + width].mT, total[start : start + width, start:]
        if x.dtype == total.dtype:
            target.addmm_(rows, x[:, start:])
        else:
            target.add_(rows @ x[:, start:])


def upper_square_norm(upper: Tensor, weight: Tensor | None = None) -> float:
    """Squared Frobenius norm of a symmetric matrix given by its upper triangle, in strips.

    With ``weight`` w [d] each square is multiplied by w_i·w_j: w = 1/diagonal gives that of the correlations.
    """
    d = upper.shape[0]
    w = torch.ones(d, dtype=upper.dtype, device=upper.device) if weight is None else weight
    width = max(-(-d // STRIPS), 64)
    total = 0.0
    for start in range(0, d, width):
        strip = upper[start : start + width, start:].square()
        size = strip.shape[0]
        inner = torch.triu(strip[:, :size])
        rows = w[start : start + size]
        diagonal = (inner.diagonal() * rows.square()).sum()
        off = rows @ (strip[:, size:] @ w[start + size :])
        total += float(2 * (rows @ (inner @ rows) + off) - diagonal)
    return total


def bodnar(trace: float, square_norm: float, n: int, d: int) -> float:
    """Share of S kept by optimal linear shrinkage towards (trace/d)·I, in [0, 1]."""
    target = trace * trace / d
    excess = square_norm - target
    if excess <= 1e-15 * target or target == 0.0:
        return 0.0  # S is already the target
    return min(1.0, max(0.0, 1.0 - trace * trace / n / excess))


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and bytes of CPU tensors."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name}{tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
