"""Influence of training examples on queries: what leaving one out would do to an answer, to first order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.influence.ekfac import Curvature
from repforget.influence.factors import Factors, per_record, slices
from repforget.influence.passes import passes, predictions
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.training import Example

MEMORY = 1 << 30  # bytes of query gradients held at once

Array = NDArray[np.float64]


def scores(
    model: LoadedModel, queries: Sequence[Example], train: Sequence[Example], names: Sequence[str],
    curvature: Curvature | None = None, *, damping: float = 0.1, groups: Sequence[Sequence[int]] | None = None,
    memory: int = MEMORY, progress: Progress | None = None,
) -> Array:  # fmt: skip
    """Influence [q, n] of each training example on each query, in nats of its answer's log-probability.

    ``I(q, z) = ∇L(q)ᵀ (H + λ)⁻¹ ∇L(z) / N``: to first order, what ``log p(answer of q)`` loses if z is left out of a
    training on N predictions (those of ``train``); L is the negative log-probability of the labelled tokens of one
    example.  Positive: the example speaks for that answer.  Source: Koh and Liang 2017 (ICML); with EK-FAC
    Grosse et al. 2023, arXiv 2308.03296.

    Args:
        curvature: H; None is the gradient dot product, the limit of a large damping (in other units).
        damping: λ of each map as a share of its mean eigenvalue.
        groups: indices of queries whose mean counts as one query, for each row of the result.
        memory: bytes of query gradients held at once; beyond it the training examples are read again.

    Cost: a forward and backward over the queries, then one over ``train`` for every ``memory`` full of query gradients
    (float32, one per entry of the maps).  It is local: the model is taken to be at an optimum, of an objective that is
    quadratic there, with maps that do not interact; no retraining was done, and scores of small size mean nothing.
    """
    check(damping)
    sets = [[k] for k in range(len(queries))] if groups is None else groups
    weights = _means(sets, len(queries))
    found, _ = _products(model, queries, weights, train, names, curvature, damping, memory, False, progress)
    return found / sum(map(predictions, train))


def scores_and_likeness(
    model: LoadedModel, queries: Sequence[Example], train: Sequence[Example], names: Sequence[str],
    curvature: Curvature | None, groups: Sequence[Sequence[int]], *, damping: float = 0.1, memory: int = MEMORY,
    progress: Progress | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """The :func:`scores` of groups of queries, and beside them [groups, n] the mean cosines of gradients, in the metric
    of (H + λ)⁻¹: what a fact says counts, not how badly the model answers it, by which gradients differ a hundredfold.

    Cost: beyond that of ``scores`` one more reading of the queries, and twice the memory of query gradients.
    """
    check(damping)
    mean = _means(groups, len(queries))
    own = np.sqrt(_squares(model, queries, names, curvature, damping, progress))
    unit = mean / torch.from_numpy(np.where(own > 0, own, np.inf))
    found, squares = _products(model, queries, torch.cat([mean, unit]), train, names, curvature, damping, memory, True,
                               progress)  # fmt: skip
    lengths = np.sqrt(np.where(squares > 0, squares, np.inf))
    return found[: len(groups)] / sum(map(predictions, train)), found[len(groups) :] / lengths


def self_scores(
    model: LoadedModel, train: Sequence[Example], names: Sequence[str], curvature: Curvature, *, damping: float = 0.1,
    progress: Progress | None = None,
) -> Array:  # fmt: skip
    """Influence [n] of each training example on itself, in nats; never negative.  Large for what little else supports.

    Cost: one forward and backward over ``train``.
    """
    check(damping)
    return _squares(model, train, names, curvature, damping, progress) / sum(map(predictions, train))


def check(damping: float) -> None:
    """UsageError unless ``damping`` is a positive number: a Fisher matrix of few examples has eigenvalues of 0."""
    if not damping > 0 or not np.isfinite(damping):
        raise UsageError(f"A damping of {damping} was given: give a positive share of the mean eigenvalue.")


def _means(groups: Sequence[Sequence[int]], queries: int) -> Tensor:
    """Weights [groups, queries] of the mean of each group."""
    if not groups or not all(len(group) for group in groups):
        raise UsageError("A group of queries is empty: give every group at least one.")
    weights = torch.zeros(len(groups), queries, dtype=torch.float64)
    for row, group in enumerate(groups):
        for k in group:
            weights[row, k] += 1 / len(group)
    return weights


def _squares(
    model: LoadedModel, examples: Sequence[Example], names: Sequence[str], curvature: Curvature | None, damping: float,
    progress: Progress | None,
) -> Array:  # fmt: skip
    """∇Lᵀ (H + λ)⁻¹ ∇L [n] of each example."""
    found = np.zeros(len(examples))
    for part in passes(model, examples, names, progress=progress, description="reading lengths of gradients"):
        for name, (inputs, gradients) in part.seen.items():
            factors = curvature.factors[name] if curvature else None
            for rows in slices(inputs, gradients):
                rotated = per_record(inputs[rows], gradients[rows], factors)
                found[part.rows[rows]] += _square(rotated, factors, damping).cpu().numpy()
    return found


def _square(rotated: Tensor, factors: Factors | None, damping: float) -> Tensor:
    squares = rotated.double().square()
    return (squares if factors is None else squares / factors.damped(damping)).sum((1, 2))


def _products(
    model: LoadedModel, queries: Sequence[Example], weights: Tensor, train: Sequence[Example], names: Sequence[str],
    curvature: Curvature | None, damping: float, memory: int, lengths: bool, progress: Progress | None,
) -> tuple[Array, Array]:  # fmt: skip
    """Products [sets, n] of weighted sums of query gradients with those of ``train`` in the metric of the inverse, and
    with ``lengths`` the squares [n] of the latter."""
    size = sum(model.module.get_parameter(name).numel() for name in names) * (8 if model.dtype == torch.float64 else 4)
    most = max(1, memory // size)
    found, squares = np.empty((len(weights), len(train))), np.zeros(len(train))
    for start in range(0, len(weights), most):
        held = _preconditioned(model, queries, weights[start : start + most], names, curvature, damping, progress)
        for part in passes(model, train, names, progress=progress, description="reading training gradients"):
            total = np.zeros((len(weights[start : start + most]), len(part.rows)))
            for name, (inputs, gradients) in part.seen.items():
                factors = curvature.factors[name] if curvature else None
                for rows in slices(inputs, gradients):
                    rotated = per_record(inputs[rows], gradients[rows], factors)
                    total[:, rows] += (held[name] @ rotated.flatten(1).T).double().cpu().numpy()
                    if lengths and start == 0:
                        squares[part.rows[rows]] += _square(rotated, factors, damping).cpu().numpy()
            found[start : start + most, part.rows] = total
    return found, squares


def _preconditioned(
    model: LoadedModel, queries: Sequence[Example], weights: Tensor, names: Sequence[str], curvature: Curvature | None,
    damping: float, progress: Progress | None,
) -> dict[str, Tensor]:  # fmt: skip
    """Per map the weighted sums [sets, out * in] of query gradients over the damped eigenvalues, in the eigenbasis."""
    used = [k for k in range(len(queries)) if bool(weights[:, k].any())]
    own, weights = [queries[k] for k in used], weights[:, used]
    held: dict[str, Tensor] = {}
    for part in passes(model, own, names, progress=progress, description="reading query gradients"):
        for name, (inputs, gradients) in part.seen.items():
            factors = curvature.factors[name] if curvature else None
            for rows in slices(inputs, gradients):
                rotated = per_record(inputs[rows], gradients[rows], factors).flatten(1)
                if name not in held:
                    held[name] = rotated.new_zeros(len(weights), rotated.shape[1])
                held[name].addmm_(weights[:, part.rows[rows]].to(rotated), rotated)
    if curvature:
        for name, sums in held.items():
            sums /= curvature.factors[name].damped(damping).flatten()
    return held
