"""Dominant components of gradients and activations, and gradients without them.

A weight gradient is ``sum_t g_t a_t^T``: its large components are what many texts share.  Edits there disrupt most
and are the first that relearning restores; collapsing them leaves what is particular to the texts at hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from repforget.errors import UsageError

Form = Literal["soft", "hard"]
Side = Literal["both", "inputs", "outputs"]
EXACT = 1024  # smaller side up to which the decomposition is complete
OVERSAMPLED = 16
POWERS = 3


@dataclass(frozen=True, eq=False)
class Components:
    """The ``k`` largest singular triples of a matrix [.., m, n]: ``left`` [.., m, k], ``sizes`` [.., k], falling, and
    ``right`` [.., n, k]."""

    left: Tensor
    sizes: Tensor
    right: Tensor


def components(matrix: Tensor, k: int, seed: int = 0) -> Components:
    """The ``k`` largest singular triples of [.., m, n]; fewer where the matrix has fewer rows or columns.

    Complete below ``EXACT`` on the smaller side, beyond it a randomised decomposition with power iterations (Halko,
    Martinsson and Tropp 2011, arXiv 0909.4061), from a generator of its own.
    """
    if k < 0:
        raise UsageError(f"{k} components were asked for: give 0 or more.")
    rows, columns = matrix.shape[-2:]
    k = min(k, rows, columns)
    if min(rows, columns) > EXACT and k + OVERSAMPLED < min(rows, columns):
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(*matrix.shape[:-2], columns, k + OVERSAMPLED, generator=generator)
        basis = torch.linalg.qr(matrix @ draw.to(matrix)).Q
        for _ in range(POWERS):
            basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.mT @ basis).Q).Q
        left, sizes, right = torch.linalg.svd(basis.mT @ matrix, full_matrices=False)
        left = basis @ left
    else:
        left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    return Components(left[..., :k], sizes[..., :k], right[..., :k, :].mT)


def collapse(gradient: Tensor, of: Components, form: Form = "soft", side: Side = "both") -> Tensor:
    """``gradient`` [.., m, n] with the dominant components ``of`` it, or of another gradient, shrunk or dropped.

    Each side is multiplied by ``I - Q (I - D) Q^T``, where Q are the left ("outputs") or right ("inputs") vectors and
    D = diag(sigma_k / sigma_i), or 0 when "hard".  With components of its own and both sides this is
    ``(G - U_k S_k V_k^T) + U_k diag(sigma_k^2 / sigma_i) V_k^T``: the order of the largest k is inverted.  The spectral
    norm never grows.  Source: RepSelect, 2026, arXiv 2606.17168.
    """
    if not of.sizes.shape[-1]:
        return gradient
    keep = torch.zeros_like(of.sizes)
    if form == "soft":
        last = of.sizes[..., -1:]
        keep = torch.where(of.sizes > 0, last / of.sizes.clamp(min=torch.finfo(of.sizes.dtype).tiny), keep)
    drop = (1 - keep)[..., None, :]
    if side != "inputs":
        gradient = gradient - (of.left * drop) @ (of.left.mT @ gradient)
    if side != "outputs":
        gradient = gradient - (gradient @ of.right) @ (of.right * drop).mT
    return gradient


def principal(rows: Tensor, k: int, seed: int = 0) -> Tensor:
    """Orthonormal directions [d, <= k] that rows [n, d] share: their mean, then the principal components around it.

    At most a quarter of the d directions, so that something is left to change.
    """
    k = min(k, rows.shape[1] // 4)
    if k < 1:
        return rows.new_zeros(rows.shape[1], 0)
    mean = rows.mean(0)
    around = components(rows - mean, k - 1, seed).right
    both = torch.cat([mean[:, None] / mean.norm().clamp(min=1e-30), around], 1)
    basis, sizes, _ = torch.linalg.svd(both, full_matrices=False)
    return basis[:, sizes > 1e-6]  # type: ignore[no-any-return]


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """``rows`` [n, d] without their part along the orthonormal ``basis`` [d, k]."""
    return rows - (rows @ basis) @ basis.mT
