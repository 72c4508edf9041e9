"""Classifiers with a closed form: nearest class mean, plain or in the metric of the within-class covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from repforget.probing.logistic import Problem

SHRINKAGE = 0.1  # share of the within-class covariance replaced by its mean variance


def nearest_mean(x: Tensor, problem: Problem) -> Tensor:
    """Logits [l, j, c, n] of the nearest class mean in standardised space (two classes: the mean difference).

    ``x`` [l, n, d].  A class without training rows is never predicted.  Cost: two products of [j c, d] with [d, n].
    """
    means, share = _means(x, problem)
    return _scores(x, means, means, share)


def discriminant(x: Tensor, problem: Problem) -> Tensor:
    """Logits [l, j, c, n] of linear discriminant analysis with a shrunken within-class covariance.

    Cost: one factorisation of [d, d] per layer and fit.  Source: Friedman, 1989, JASA 84 (regularised
    discriminant analysis, linear case).
    """
    means, share = _means(x, problem)
    depth, j, c, d = means.shape
    out = []
    for fit in range(j):
        weight = problem.weights[fit].to(x)
        within = (x * weight[:, None]).mT @ x - (means[:, fit] * share[fit][:, None]).mT @ means[:, fit]
        level = within.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)[:, None, None]
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        factor = torch.linalg.cholesky((1 - SHRINKAGE) * within + SHRINKAGE * level * eye)
        slope = torch.cholesky_solve(means[:, fit].mT, factor).mT
        out.append(_scores(x, slope[:, None], means[:, fit : fit + 1], share[fit : fit + 1]))
    return torch.cat(out, 1)


def _means(x: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Class means [l, j, c, d] and class shares [j, c] of the training rows."""
    onehot = torch.nn.functional.one_hot(problem.labels, problem.n_classes).to(x)
    member = (onehot * problem.weights[..., None].to(x)).mT  # [j, c, n]
    share = member.sum(-1)
    j, c, n = member.shape
    sums = (member.reshape(j * c, n) @ x).reshape(x.shape[0], j, c, -1)
    return sums / share.clamp(min=1e-12)[..., None], share


def _scores(x: Tensor, slope: Tensor, means: Tensor, share: Tensor) -> Tensor:
    depth, j, c, d = slope.shape
    linear = (slope.reshape(depth, j * c, d) @ x.mT).reshape(depth, j, c, -1)
    offset = 0.5 * (slope * means).sum(-1)
    logits = linear - offset[..., None]
    return logits.masked_fill((share <= 0)[None, :, :, None], -torch.inf)
