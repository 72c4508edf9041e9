"""Influence of training examples on queries: what leaving one out would do to an answer, to first order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.influence.ekfac import Curvature
from repforget.influence.factors import per_record, slices
from repforget.influence.passes import Pass, passes, predictions
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
    return scores_and_lengths(model, queries, train, names, curvature, damping=damping, groups=groups, memory=memory,
                              progress=progress)[0]  # fmt: skip


def scores_and_lengths(
    model: LoadedModel, queries: Sequence[Example], train: Sequence[Example], names: Sequence[str],
    curvature: Curvature | None = None, *, damping: float = 0.1, groups: Sequence[Sequence[int]] | None = None,
    memory: int = MEMORY, progress: Progress | None = None,
) -> tuple[Array, Array]:  # fmt: skip
    """The :func:`scores` and per row √(∇L(q)ᵀ (H + λ)⁻¹ ∇L(q)): over it, scores of queries that the model answers
    well and badly compare, since a bad answer has a large gradient and with it large scores on everything."""
    check(damping)
    sets = [[k] for k in range(len(queries))] if groups is None else [list(group) for group in groups]
    if not all(sets) or not sets:
        raise UsageError("A group of queries is empty: give every group at least one.")
    size = sum(model.module.get_parameter(name).numel() for name in names) * (8 if model.dtype == torch.float64 else 4)
    most = max(1, memory // size)
    total = sum(map(predictions, train))
    found, lengths = np.empty((len(sets), len(train))), np.empty(len(sets))
    for start in range(0, len(sets), most):
        held, lengths[start : start + most] = _preconditioned(model, queries, sets[start : start + most], names,
                                                              curvature, damping, progress)  # fmt: skip
        for part in passes(model, train, names, progress=progress, description="reading training gradients"):
            found[start : start + most, part.rows] = _against(part, held, curvature).cpu().numpy() / total
    return found, lengths


def self_scores(
    model: LoadedModel, train: Sequence[Example], names: Sequence[str], curvature: Curvature, *, damping: float = 0.1,
    progress: Progress | None = None,
) -> Array:  # fmt: skip
    """Influence [n] of each training example on itself, in nats; never negative.  Large for what little else supports.

    Cost: one forward and backward over ``train``.
    """
    check(damping)
    scales = {name: curvature.factors[name].damped(damping) for name in names}
    total = sum(map(predictions, train))
    found = np.zeros(len(train))
    for part in passes(model, train, names, progress=progress, description="reading training gradients"):
        for name, (inputs, gradients) in part.seen.items():
            for rows in slices(inputs, gradients):
                rotated = per_record(inputs[rows], gradients[rows], curvature.factors[name])
                value = (rotated.double().square() / scales[name]).sum((1, 2))
                found[part.rows[rows]] += value.cpu().numpy() / total
    return found


def check(damping: float) -> None:
    """UsageError unless ``damping`` is a positive number: a Fisher matrix of few examples has eigenvalues of 0."""
    if not damping > 0 or not np.isfinite(damping):
        raise UsageError(f"A damping of {damping} was given: give a positive share of the mean eigenvalue.")


def _preconditioned(
    model: LoadedModel, queries: Sequence[Example], sets: Sequence[Sequence[int]], names: Sequence[str],
    curvature: Curvature | None, damping: float, progress: Progress | None,
) -> tuple[dict[str, Tensor], Array]:  # fmt: skip
    """Per map the mean gradients [sets, out * in] of sets of queries over the damped eigenvalues, in the eigenbasis;
    and the length [sets] of each before that, in the metric of the inverse."""
    used = sorted({k for group in sets for k in group})
    index = {k: place for place, k in enumerate(used)}
    weights = torch.zeros(len(sets), len(used), dtype=torch.float64)
    for row, group in enumerate(sets):
        for k in group:
            weights[row, index[k]] += 1 / len(group)
    held: dict[str, Tensor] = {}
    own = [queries[k] for k in used]
    for part in passes(model, own, names, progress=progress, description="reading query gradients"):
        for name, (inputs, gradients) in part.seen.items():
            factors = curvature.factors[name] if curvature else None
            for rows in slices(inputs, gradients):
                rotated = per_record(inputs[rows], gradients[rows], factors).flatten(1)
                share = weights[:, part.rows[rows]].to(rotated)
                if name not in held:
                    held[name] = rotated.new_zeros(len(sets), rotated.shape[1])
                held[name].addmm_(share, rotated)
    squares = np.zeros(len(sets))
    for name, sums in held.items():
        damped = curvature.factors[name].damped(damping).flatten() if curvature else None
        for row, mean in enumerate(sums):
            over = mean if damped is None else mean / damped
            squares[row] += float(mean.double() @ over.double())
            mean.copy_(over)
    return held, np.sqrt(squares)


def _against(part: Pass, held: dict[str, Tensor], curvature: Curvature | None) -> Tensor:
    """Sums over maps [sets, b] of products with the gradients of one batch, added up in float64."""
    total = torch.zeros(len(next(iter(held.values()))), len(part.rows), dtype=torch.float64)
    for name, (inputs, gradients) in part.seen.items():
        factors = curvature.factors[name] if curvature else None
        for rows in slices(inputs, gradients):
            rotated = per_record(inputs[rows], gradients[rows], factors).flatten(1)
            total[:, rows] += (held[name] @ rotated.T).double().to(total.device)
    return total
