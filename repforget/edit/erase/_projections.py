"""Orthogonal projections that erase a concept, from moments alone: baselines that LEACE improves on."""

from __future__ import annotations

import torch
from torch import Tensor

from repforget.edit.erase._leace_math import RANK_TOLERANCE, Eraser, column_space
from repforget.errors import NumericalError, UsageError
from repforget.stats import Statistics


def fit_orthogonal(stats: Statistics, cross: Tensor, *, rank: int | None = None, affine: bool = True) -> Eraser:
    """Project on the orthogonal complement of the columns of ``cross`` [d, k], strongest directions first.

    With all of them no class mean differs from another any more.  ``strengths``: their singular values.
    """
    _check(rank)
    basis, mixing = column_space(_measured(stats, cross)[0], RANK_TOLERANCE)
    turn, strengths, _ = torch.linalg.svd(mixing, full_matrices=False)
    chosen = (basis @ turn)[:, :rank]
    return _eraser(stats, chosen, strengths[:rank], basis.shape[1], affine)


def fit_nullspace(
    stats: Statistics, cross: Tensor, *, rank: int | None = None, step: int = 1, ridge: float = 1e-3,
    affine: bool = True,
) -> Eraser:  # fmt: skip
    """Project ``step`` directions of a ridge classifier away, fit the next on what is left, until ``rank`` are gone.

    The classifiers ``W = (PΣP + λ I)⁻¹ P cross`` on the complement of what was projected away follow from one solve by
    a Schur complement: no data is read again.  λ is ``ridge`` times the mean variance.  Of many classes the directions
    of a classifier are those of the contrasts of classes that it predicts best.  ``strengths``: standard deviations of
    the concept that each of them explains.
    """
    _check(rank)
    if step < 1 or not ridge > 0:
        raise UsageError(f"A null-space projection was given step {step} and ridge {ridge}: give a positive number of "
                         "directions per classifier and a positive ridge.")  # fmt: skip
    target, unit = _measured(stats, cross)
    d = len(target)
    basis, _ = column_space(target, RANK_TOLERANCE)
    total = d if basis.shape[1] else 0
    lower, failed = torch.linalg.cholesky_ex(stats.cov / unit**2 + ridge * torch.eye(d).to(target))
    if bool(failed):
        raise NumericalError(f"The ridge classifier over {stats.n} points and {d} features is not finite: check the "
                             "activations for extreme values.")  # fmt: skip
    weights = torch.cholesky_solve(target, lower)
    whole = float((weights * target).sum())
    taken, solved = target[:, :0], target[:, :0]
    strengths = target[0, :0]
    most = total if rank is None else min(total, rank)
    while taken.shape[1] < most:
        left = weights - solved @ torch.linalg.solve(taken.mT @ solved, taken.mT @ weights)
        left = left - taken @ (taken.mT @ left)
        told = left.mT @ target  # what classes' linear predictions have in common with them
        values, contrasts = torch.linalg.eigh((told + told.mT) / 2)
        live = int((values > RANK_TOLERANCE * whole).sum())  # below, classifiers read rounding
        live = min(live, step, most - taken.shape[1])
        s = values.flip(0)[:live].sqrt()
        u = left @ contrasts.flip(1)[:, :live]
        u = u / u.norm(dim=0)
        if not len(s):
            total = taken.shape[1]
            break
        taken = torch.linalg.qr(torch.cat([taken, u], 1))[0]
        solved = torch.cholesky_solve(taken, lower)
        strengths = torch.cat([strengths, s])
    return _eraser(stats, taken, strengths, total, affine)


def explained(stats: Statistics, cross: Tensor, spread: float, removed: Tensor, ridge: float = 1e-3) -> float:
    """Share of the concept's variance that a ridge classifier explains on the complement of ``removed`` [d, r]."""
    target, unit = _measured(stats, cross)
    keep = torch.linalg.svd(removed.mT, full_matrices=True)[2][removed.shape[1] :]
    target = keep @ target
    if not len(keep):
        return 0.0
    space = keep @ stats.cov @ keep.mT / unit**2 + ridge * torch.eye(len(keep)).to(cross)
    return float((target * torch.linalg.solve(space, target)).sum()) / max(spread, 1e-300)


def _measured(stats: Statistics, cross: Tensor) -> tuple[Tensor, float]:
    """``cross`` in units of the root mean variance of the features, without constant ones, and that unit."""
    variances = stats.variances
    unit = float(variances.mean().sqrt()) or 1.0
    return torch.where(variances[:, None] > 0, cross, torch.zeros_like(cross)) / unit, unit


def _check(rank: int | None) -> None:
    if rank is not None and rank < 1:
        raise UsageError(f"A projection was asked for rank {rank}: give a positive rank, 'auto' or 'full'.")


def _eraser(stats: Statistics, basis: Tensor, strengths: Tensor, total: int, affine: bool) -> Eraser:
    return Eraser(basis, basis.mT, stats.mean_x if affine else None, strengths, total, False)
