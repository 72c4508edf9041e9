"""The LEACE projector from moments alone: arrays in, thin factors out; no model is known here.

Belrose, Schneider-Joseph, Ravfogel, Cotterell, Raff and Biderman (2023), "LEACE: Perfect linear concept
erasure in closed form", arXiv 2306.03819. Their whitened form is rewritten without an eigendecomposition:
``P = I - A (Aᵀ Σ⁻¹ A)⁺ Aᵀ Σ⁻¹`` with ``A = Σxz``, from one Cholesky factor and rank(A) triangular solves.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.errors import NumericalError, UsageError
from repforget.stats import Shrinkage, Statistics

RANK_TOLERANCE = 1e-9  # relative: directions of Σxz weaker than this are rounding, however rare the concept
NOTHING = 1e-13  # a correlation of this size with every concept is rounding: there is nothing to erase


@dataclass(frozen=True)
class Eraser:
    """``x -> x - (x - center) rightᵀ leftᵀ``: left [d, r], right [r, d], center [d] or None, all float64.

    ``strengths`` [r]: singular values of the whitened cross-covariance that were erased, largest first
    (canonical correlation times the standard deviation of the concept); ``total`` counts those there were;
    ``fallback`` is True when a singular covariance made the eigendecomposition necessary.
    """

    left: Tensor
    right: Tensor
    center: Tensor | None
    strengths: Tensor
    total: int
    fallback: bool

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    @property
    def projector(self) -> Tensor:
        """P [d, d] = I - left right (for tests and small d)."""
        return torch.eye(self.left.shape[0]).to(self.left) - self.left @ self.right

    def __call__(self, x: Tensor) -> Tensor:
        """Erase the concept from ``x`` [..., d]; computed in float32 at least, returned in x's dtype."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        left, right = self.left.to(x.device, dtype), self.right.to(x.device, dtype)
        flat = x.reshape(-1, x.shape[-1]).to(dtype)
        codes = flat @ right.mT
        if self.center is not None:
            codes -= (self.right @ self.center).to(x.device, dtype)  # in float64: the mean may be large
        return torch.addmm(flat, codes, left.mT, alpha=-1).reshape(x.shape).to(x.dtype)


@torch.no_grad()
def fit_eraser(
    stats: Statistics, *, cross: Tensor | None = None, shrinkage: Shrinkage = "diagonal",
    rank: int | None = None, affine: bool = True, tolerance: float = RANK_TOLERANCE,
) -> Eraser:  # fmt: skip
    """Return the least-squares-minimal affine map after which no linear classifier beats a constant guess.

    ``stats`` gives the metric Σ and the centre; ``cross`` [d, k] replaces its own cross-covariance, so that
    the concept may be measured on one set of rows and the change minimised on another. Any Σ ≻ 0 erases
    exactly: shrinkage and singular covariances cost optimality, never the erasure. ``rank`` erases only the
    strongest whitened directions: then the concept is *not* linearly erased. The guarantee holds for linear
    readers and the fitted distribution; it says nothing about other layers, nonlinear readers, unseen rows.
    Cost d³/3 multiplications (9d³ where Σ is singular) and two d×d float64 matrices.
    """
    if rank is not None and rank < 1:
        raise UsageError(f"LEACE was asked for rank {rank}: give a positive rank or None for all of it.")
    corr, scale = stats.correlation(shrinkage)
    target = (stats.cross if cross is None else cross.to(scale)) * scale[:, None]
    basis, mixing = column_space(target, tolerance)
    spread = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    center = stats.mean_x if affine else None
    total = basis.shape[1]
    if total == 0:
        return Eraser(basis, basis.mT, center, scale[:0], 0, False)
    solved = _solve_cholesky(corr, basis, stats.resolution)  # overwrites corr
    fallback = solved is None
    if solved is None:
        solved = _solve_singular(stats.correlation(shrinkage)[0], basis, stats.resolution)
    gram = basis.mT @ solved
    factor = torch.linalg.cholesky((gram + gram.mT) / 2).mT  # gram = factorᵀ factor: UᵀΣ⁻¹U
    turn, strengths, _ = torch.linalg.svd(factor @ mixing, full_matrices=False)
    turn, strengths = turn[:, :rank], strengths[:rank]
    left = basis @ torch.linalg.solve_triangular(factor, turn, upper=True)
    right = (solved @ torch.linalg.solve_triangular(factor, turn, upper=True)).mT
    left = torch.linalg.solve((right @ left).mT, left.mT).mT  # right·left = I to rounding: P is idempotent
    eraser = Eraser(left * spread[:, None], right * scale, center, strengths, total, fallback)
    if not bool(torch.isfinite(eraser.left).all() and torch.isfinite(eraser.right).all()):
        raise NumericalError(f"The LEACE solve over {stats.n} rows and {stats.d} features is not finite: "
                             "check the activations for extreme values.")  # fmt: skip
    return eraser


def column_space(target: Tensor, tolerance: float) -> tuple[Tensor, Tensor]:
    """Orthonormal basis [d, r] of the column space of ``target`` [d, k], and its coordinates [r, k].

    Columns are brought to unit length first, so that the rank does not depend on how frequent a class is.
    """
    lengths = target.norm(dim=0)
    live = lengths > max(NOTHING, tolerance * float(lengths.max()) if lengths.numel() else 0.0)
    unit = target[:, live] / lengths[live]
    u, s, vh = torch.linalg.svd(unit, full_matrices=False)
    keep = s > tolerance * s.max() if s.numel() else s > 0
    mixing = torch.zeros(int(keep.sum()), target.shape[1], dtype=target.dtype, device=target.device)
    mixing[:, live] = s[keep, None] * vh[keep] * lengths[live]
    return u[:, keep], mixing


def _solve_cholesky(corr: Tensor, basis: Tensor, resolution: float) -> Tensor | None:
    """Σ⁻¹ basis for Σ = ``corr`` (upper triangle valid; destroyed); None if Σ is singular."""
    lower, failed = _factor_lapack(corr) if corr.device.type == "cpu" else _factor_torch(corr)
    if failed or float(lower.diagonal().square().min()) <= resolution:
        return None
    half: Tensor = torch.linalg.solve_triangular(lower, basis, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)
    return solved


def _factor_lapack(corr: Tensor) -> tuple[Tensor, bool]:
    """Cholesky factor (only its lower triangle is valid) in the memory of ``corr``; about twice as fast as torch's
    where torch was built with another vendor's library."""
    from scipy.linalg.lapack import dpotrf

    factor, failed = dpotrf(corr.numpy().T, lower=1, clean=0, overwrite_a=1)
    return torch.from_numpy(factor), bool(failed)


def _factor_torch(corr: Tensor) -> tuple[Tensor, bool]:
    lower, failed = torch.linalg.cholesky_ex(corr.mT)
    return lower, bool(failed)


def _solve_singular(corr: Tensor, basis: Tensor, resolution: float) -> Tensor:
    """Σ⁻¹ basis for a singular Σ: the pseudo-inverse where something varied, the identity elsewhere.

    The unit (prior) variance of unseen directions keeps the erasure exact even where rounding leaks in.
    """
    values, vectors = torch.linalg.eigh(corr.mT)  # reads the lower triangle, that is the valid one
    weights = torch.where(values > resolution, 1 / values, torch.ones_like(values))
    solved: Tensor = vectors @ (weights[:, None] * (vectors.mT @ basis))
    return solved
