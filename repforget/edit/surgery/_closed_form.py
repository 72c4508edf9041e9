"""The algebra of fact-level surgery: keys and residuals in, factors ``left @ right`` of a weight delta out.

All in float64. Keys [n, m] are inputs of an MLP's output projection, residuals [n, d] what it should write besides
what it writes now, ``moment`` [m, m] the uncentred second moment of the keys of everything else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.artifact import LowRankDelta
from repforget.errors import NumericalError

NEGLIGIBLE = 1e-7  # share of the largest singular value below which a factor of a delta is rounding
INSIDE = 1e-9  # share of a squared key inside the null space below which it is rounding
SINGULAR = 1e-13  # reciprocal condition, read from a triangular factor's diagonal, below which a solve means nothing


@dataclass(frozen=True)
class Delta:
    """``left`` [d, r] ``@ right`` [r, m], added to a projection in Linear orientation."""

    left: Tensor
    right: Tensor

    def written(self, keys: Tensor) -> Tensor:
        """What the delta adds to the output for ``keys`` [..., m]."""
        return keys @ self.right.T @ self.left.T

    def operation(self, weight: str) -> LowRankDelta:
        """The delta with as few factors as it has rank, in float32."""
        q_left, t_left = torch.linalg.qr(self.left)
        q_right, t_right = torch.linalg.qr(self.right.T)
        u, sizes, v = torch.linalg.svd(t_left @ t_right.T)
        r = max(1, int((sizes > sizes[0] * NEGLIGIBLE).sum()))
        root = sizes[:r].sqrt()
        return LowRankDelta(weight, (q_left @ u[:, :r] * root).float(), (root[:, None] * (v[:r] @ q_right.T)).float())


def regular(moment: Tensor, ridge: float) -> Tensor:
    """``moment`` plus ``ridge`` of its mean diagonal entry on the diagonal."""
    return moment + ridge * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def rank_ones(keys: Tensor, residuals: Tensor, moment: Tensor) -> Delta:
    """One rank-one update per key, each applied to what those before it left.

    The i-th is ``r_i (C⁻¹k_i)ᵀ / (k_iᵀC⁻¹k_i)`` with ``r_i`` the residual of k_i less what the earlier ones wrote for
    it, which solves a triangular system. The last key is met exactly, earlier ones as far as later keys are
    C⁻¹-orthogonal to them; a single one leaves every k with ``kᵀC⁻¹k_1 = 0`` as it was.
    """
    right = torch.cholesky_solve(keys.T, _factor(moment, "The second moment of keys")).T  # [n, m], C⁻¹k
    gram = keys @ right.T
    right = right / gram.diagonal()[:, None]
    told = (gram / gram.diagonal()[:, None]).triu()  # [j, i]: what update j writes for key i, as a share of r_j
    left = torch.linalg.solve_triangular(told, residuals.T, upper=True, left=False)
    return _finite(Delta(left, right))


def normal_equation(keys: Tensor, residuals: Tensor, moment: Tensor, weight: float) -> Delta:
    """``Δ = R Kᵀ (weight·C + K Kᵀ)⁻¹``: least squares between the residuals and writing nothing for other keys.

    ``weight`` is the number of other keys that C stands for; 0 fits the residuals alone (through the smallest Δ).
    """
    if weight == 0:
        return _finite(Delta(residuals.T, torch.linalg.pinv(keys.T)))
    metric = weight * moment + keys.T @ keys
    factor = _factor(metric, f"The sum of {weight:g} protected second moments and those of the facts")
    return _finite(Delta(residuals.T, torch.cholesky_solve(keys.T, factor).T))


def null_space(moment: Tensor, threshold: float) -> Tensor:
    """Orthonormal directions [m, r] with a second moment below ``threshold`` of the mean one."""
    values, vectors = torch.linalg.eigh(moment)
    found: Tensor = vectors[:, values <= threshold * values.mean()]
    return found


def projected(keys: Tensor, residuals: Tensor, basis: Tensor, ridge: float) -> Delta:
    """Δ inside the span of ``basis`` [m, r] that meets the residuals: ``Δ = R K_Pᵀ (K_P K_Pᵀ + ridge)⁻¹ Pᵀ``, with
    ``ridge`` of the mean squared length of a key against large steps; the smallest that meets them without it.
    """
    inside = keys @ basis  # [n, r]
    size = keys.square().sum(1)
    share = float((inside.square().sum(1) / size).max())
    if share < INSIDE:
        raise NumericalError(f"No more than {share:.1g} of any fact's key lies inside the null space of kept keys, so "
                             "that nothing can be written there: choose another layer, or token.")  # fmt: skip
    gram = inside @ inside.T + ridge * size.mean() * torch.eye(len(keys)).to(keys)
    factor = _factor(gram, "The keys of the facts inside the null space")
    return _finite(Delta(residuals.T, torch.cholesky_solve(inside, factor) @ basis.T))


def _factor(matrix: Tensor, what: str) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(matrix)
    size = factor.diagonal()
    if int(failed) or not math.isfinite(float(size.sum())) or float(size.min()) < SINGULAR**0.5 * float(size.max()):
        raise NumericalError(f"{what} form a singular matrix of size {len(matrix)}, whose inverse means nothing: give "
                             "a larger ridge (for example 0.01), or more text to keep.")  # fmt: skip
    return factor


def _finite(delta: Delta) -> Delta:
    if not bool(torch.isfinite(delta.left).all() and torch.isfinite(delta.right).all()):
        raise NumericalError("The closed form gave numbers that are not finite: give a larger ridge, or fewer facts.")
    return delta
