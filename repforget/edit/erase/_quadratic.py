"""Erasure that sees the labels: oracle LEACE and quadratic LEACE, for analysis only.

Both map a point by its class, which nobody knows when a model is served: they are no editors.  Oracle LEACE is the
smallest change that any linear eraser could get away with; quadratic LEACE also hides from readers of second moments.
Belrose et al. 2023, arXiv 2306.03819.  Arrays in, arrays out; float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.errors import NumericalError, UsageError

RANK_TOLERANCE = 1e-9
STEPS = 500  # of the fixed point of a barycentre
SETTLED = 1e-13  # relative change at which it has arrived


@dataclass(frozen=True)
class OracleEraser:
    """``(x, z) -> x - (z - mean_z) coefficients``: what a linear prediction of x from z leaves, at the mean of x."""

    coefficients: Tensor  # [k, d]
    mean_z: Tensor  # [k]

    def __call__(self, x: Tensor, z: Tensor) -> Tensor:
        """``x`` [n, d] without what the concepts ``z`` ([n] classes, or [n, k]) linearly predict of it."""
        return x.double() - (_columns(z, len(self.mean_z)) - self.mean_z) @ self.coefficients


def fit_oracle(x: Tensor, z: Tensor) -> OracleEraser:
    """``Σzz⁺ Σzx`` of points ``x`` [n, d] and concepts ``z``, [n] classes from 0 or [n, k] numbers."""
    wide = x.double()
    k = int(z.max()) + 1 if z.ndim == 1 else z.shape[1]
    columns = _columns(z, k)
    mean = columns.mean(0)
    coefficients = torch.linalg.pinv(columns - mean, rtol=RANK_TOLERANCE) @ (wide - wide.mean(0))
    return OracleEraser(coefficients, mean)


@dataclass(frozen=True)
class QuadraticEraser:
    """``(x, c) -> (x - mean_c) T_c + mean`` with the optimal transport T_c of every class to their barycentre."""

    means: Tensor  # [k, d]
    maps: Tensor  # [k, d, d], symmetric
    center: Tensor  # [d]
    barycentre: Tensor  # [d, d]

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        """``x`` [n, d] with the mean and the covariance that all classes share afterwards."""
        moved = (x.double() - self.means[labels])[:, None, :] @ self.maps[labels]
        return moved[:, 0] + self.center


def fit_quadratic(x: Tensor, labels: Tensor) -> QuadraticEraser:
    """The least change (of Gaussian classes) after which ``labels`` [n] differ neither in mean nor in covariance.

    The barycentre weighs classes by their frequency and so does the mean, which therefore stays.  Raises UsageError for
    labels that are no classes, NumericalError for a class whose covariance is singular (fewer points than features
    among the reasons).  Cost: some dozen eigendecompositions per class; k d² memory.
    """
    if labels.ndim != 1 or labels.is_floating_point():
        raise UsageError("Quadratic erasure needs one class per point: give integer labels [n], counted from 0.")
    wide = x.double()
    weights = labels.bincount().double() / len(labels)
    parts = [wide[labels == c] for c in range(len(weights))]
    covariances = []
    for c, part in enumerate(parts):
        covariance = torch.cov(part.mT).reshape(wide.shape[1], wide.shape[1]) if len(part) > 1 else None
        values = None if covariance is None else torch.linalg.eigvalsh(covariance)
        if covariance is None or values is None or float(values[0]) <= RANK_TOLERANCE * float(values[-1]):
            raise NumericalError(f"Class {c} has {len(part)} points in {wide.shape[1]} dimensions and a singular "
                                 "covariance: give more points, or fewer dimensions (principal ones).")  # fmt: skip
        covariances.append(covariance)
    stacked = torch.stack(covariances)
    means = torch.stack([part.mean(0) for part in parts])
    shared = barycentre(stacked, weights)
    return QuadraticEraser(means, transport(stacked, shared), weights @ means, shared)


def transport(source: Tensor, target: Tensor) -> Tensor:
    """Symmetric positive maps T [.., d, d] with ``T source T = target`` (optimal transport of centred Gaussians)."""
    root, inverse = _roots(source)
    middle, _ = _roots(root @ target @ root)
    return inverse @ middle @ inverse


def barycentre(covariances: Tensor, weights: Tensor) -> Tensor:
    """The Gaussian covariance [d, d] nearest to ``covariances`` [k, d, d] in the weighted mean of squared Wasserstein
    distances; NumericalError where the fixed point is not reached."""
    shared: Tensor = torch.einsum("k,kij->ij", weights, covariances)
    for _ in range(STEPS):
        mean_map = torch.einsum("k,kij->ij", weights, transport(shared.expand_as(covariances), covariances))
        fresh = mean_map @ shared @ mean_map
        fresh = (fresh + fresh.mT) / 2
        change = float((fresh - shared).norm() / shared.norm())
        shared = fresh
        if change < SETTLED:
            return shared
    if change < SETTLED**0.5:
        return shared
    raise NumericalError(f"The common covariance of {len(covariances)} classes did not settle in {STEPS} steps: give "
                         "more points per class.")  # fmt: skip


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root and its inverse of positive matrices [.., d, d]."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    root = values.clamp_min(1e-300).sqrt()
    return (vectors * root[..., None, :]) @ vectors.mT, (vectors / root[..., None, :]) @ vectors.mT


def _columns(z: Tensor, k: int) -> Tensor:
    return torch.nn.functional.one_hot(z, k).double() if z.ndim == 1 else z.double()
