"""Likelihood-ratio tests of membership on arrays: LiRA and RMIA. No model is known here; everything in log space."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

Array = NDArray[np.float64]
FEW = 16  # shadows on one side below which their spread is pooled over items
SPREAD = 1e-6  # smallest standard deviation of phi


def logit(log_p: Array) -> Array:
    """phi = ln(P / (1 - P)) from ln P, exact near P = 0 and finite at P = 1."""
    safe = np.minimum(log_p, -np.finfo(np.float64).tiny)
    return safe - np.log(-np.expm1(safe))  # type: ignore[no-any-return]


def _side(phi: Array, member: NDArray[np.bool_]) -> tuple[Array, Array]:
    """Mean and standard deviation of phi [s, n] per item over the shadows where ``member`` [s, n] holds."""
    chosen = np.where(member, phi, np.nan)
    count = member.sum(0)
    mean = np.where(count > 0, np.nansum(chosen, axis=0) / np.maximum(count, 1), np.nan)
    square = np.nansum((chosen - mean) ** 2, axis=0)
    if count.min(initial=FEW) >= FEW:
        spread = np.sqrt(square / (count - 1))
    else:  # one spread for all items: a variance of a handful of values would decide the ratio
        freedom = max(float(np.maximum(count - 1, 0).sum()), 1.0)
        spread = np.full(phi.shape[1], np.sqrt(square.sum() / freedom))
    return mean, np.maximum(spread, SPREAD)


def lira(phi: Array, shadows: Array, member: NDArray[np.bool_]) -> Array:
    """Log-likelihood ratio "trained on it" : "not" per item [n], higher = member.

    ``phi`` [n] is the target's :func:`logit`, ``shadows`` [s, n] that of the shadow models, ``member`` [s, n] which of
    them were trained on which item.  Gaussians per item, with one spread for all items below 16 shadows a side.  U-LiRA
    is the same function with "in" shadows that were trained on the item and then unlearned it.  NaN for an item that
    lacks a side.  Sources: Carlini et al. 2022, arXiv 2112.03570; Hayes et al. 2024, arXiv 2403.01218.
    """
    inside, outside = _side(shadows, member), _side(shadows, ~member)
    ratio: Array = stats.norm.logpdf(phi, *inside) - stats.norm.logpdf(phi, *outside)
    return ratio


def offline_lira(phi: Array, outside: Array) -> Array:
    """-ln of the chance that a model without the item scores as high [n]; needs only "out" shadows [s, n], NaN where
    a shadow is none."""
    mean, spread = _side(outside, ~np.isnan(outside))
    tail: Array = -stats.norm.logsf(phi, mean, spread)
    return tail


def rmia_ratio(log_p: Array, log_out: Array, a: float = 0.3) -> Array:
    """ln(p(x) / p_mean(x)) [m] with p_mean = ((1 + a) p_out + (1 - a)) / 2; ``log_out`` [references, m].

    ``p`` must be a probability in (0, 1], such as the length-normalised one.  ``a`` turns the mean of models without x
    into one over models with and without.  Source: Zarifzadeh et al. 2023, arXiv 2312.03262, offline form.
    """
    out = special.logsumexp(log_out, axis=0) - np.log(len(log_out))
    # a = 1 leaves nothing to add, and ln 0 is what says so
    rest = np.log1p(-a) if a < 1 else -np.inf
    ratio: Array = log_p - (np.logaddexp(np.log1p(a) + out, rest) - np.log(2))
    return ratio


def rmia(ratio: Array, population: Array) -> Array:
    """Share of the population z that x dominates: mean over z of 1[ratio_x > ratio_z], ties half [n]."""
    ordered = np.sort(population[~np.isnan(population)])
    if len(ordered) == 0:
        return np.full(len(ratio), np.nan)
    below = np.searchsorted(ordered, ratio, side="left") + np.searchsorted(ordered, ratio, side="right")
    return np.where(np.isnan(ratio), np.nan, below / (2 * len(ordered)))
