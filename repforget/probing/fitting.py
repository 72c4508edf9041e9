"""From a plan of fits to the predictions of each fit, layer by layer, and the choice of the penalty."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError, nearest
from repforget.probing.closed import discriminant, nearest_mean
from repforget.probing.logistic import Axes, Problem, fit, principal_axes, with_constant
from repforget.probing.mlp import network

Kind = Literal["logistic", "mean_difference", "lda", "mlp"]
# Penalties for two classes; with k classes the curvature of the loss is 2 / k of that, and the penalties with it.
GRID = (1e-3, 1e-2, 1e-1, 1.0)
DEFAULT_PENALTY = 1e-2  # where there are too few groups to choose one
TOLERANCE, ITERATIONS = 1e-3, 200  # share of the objective still to gain
CHOICE_TOLERANCE, CHOICE_ITERATIONS = 1e-2, 20  # enough to rank penalties
RANK = {True: 64, False: 128}  # axes of the preconditioner, for two classes and for more: the cheaper the fewer
STATE_PER_WEIGHT, STATE_PER_LOGIT = 24, 6  # floats held per weight and per logit while fitting
Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """j fits: ``labels`` [j, n], ``train`` [j, n] rows to fit on, ``stopping`` [j, n] rows of these that choose when
    an iterative network stops."""

    labels: Ints
    train: Bools
    stopping: Bools
    n_classes: int


@dataclass(frozen=True)
class Split:
    """One fit that helps to choose penalties: training rows, and for each final fit the rows that judge it."""

    train: Bools
    judged: Mapping[int, Bools]


@dataclass(frozen=True)
class Prepared:
    """Standardised features of some layers [l, n, d] and what all their logistic fits share."""

    x: Tensor
    features: Tensor | None
    axes: Axes | None


def check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise UsageError(f"There is no probing classifier '{kind}': {nearest(kind, get_args(Kind))}")


def prepare(x: Tensor, kind: Kind, n_classes: int) -> Prepared:
    if kind != "logistic":
        return Prepared(x, None, None)
    return Prepared(x, with_constant(x), principal_axes(x, RANK[n_classes == 2]))


def layer_chunks(layers: int, fits: int, columns: int, rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of layers whose fitting state stays small: cache-sized on a CPU, some gigabytes on an accelerator."""
    budget = 2**22 if device.type == "cpu" else 2**28
    per_layer = fits * columns * (STATE_PER_WEIGHT * width + STATE_PER_LOGIT * rows)
    size = max(1, budget // per_layer)
    for start in range(0, layers, size):
        yield slice(start, min(layers, start + size))


def predict(
    ready: Prepared, plan: Plan, kind: Kind, penalty: Tensor, *, seed: int, hidden: int, steps: int,
    choosing: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Predicted class [l, j, n] and probability of the labelled class [l, j, n] of all rows under each fit."""
    columns = 1 if plan.n_classes == 2 else plan.n_classes
    depth, n, d = ready.x.shape
    most = max(1, 2**26 // (depth * columns * (STATE_PER_WEIGHT * d + STATE_PER_LOGIT * n)))
    parts = []
    for start in range(0, len(plan.labels), most):
        part = slice(start, start + most)
        problem = _problem(ready.x, plan, part, penalty)
        if kind == "mean_difference":
            logits = nearest_mean(ready.x, problem)
        elif kind == "lda":
            logits = discriminant(ready.x, problem)
        elif kind == "mlp":
            stopping = torch.from_numpy(plan.stopping[part]).to(ready.x.device)
            logits = network(ready.x, problem, stopping, hidden=hidden, steps=steps, seed=seed)
        elif ready.features is None or ready.axes is None:
            raise UsageError("Logistic probing needs features prepared for it: call prepare with kind 'logistic'.")
        else:
            tol, limit = (CHOICE_TOLERANCE, CHOICE_ITERATIONS) if choosing else (TOLERANCE, ITERATIONS)
            logits = fit(ready.features, ready.axes, problem, tol=tol, max_iter=limit).logits
        parts.append(_outcome(logits, problem.labels))
    return torch.cat([p for p, _ in parts], 1), torch.cat([q for _, q in parts], 1)


def _problem(x: Tensor, plan: Plan, part: slice, penalty: Tensor) -> Problem:
    train = torch.from_numpy(plan.train[part]).to(x)
    weights = train / train.sum(1, keepdim=True).clamp(min=1)
    return Problem(torch.from_numpy(plan.labels[part]).to(x.device), weights, penalty[:, part], plan.n_classes)


def _outcome(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape[2] == 1:
        z = logits[:, :, 0]
        return (z > 0).long(), torch.where(labels.bool(), z, -z).sigmoid()
    index = labels[None, :, None].expand(len(logits), -1, 1, -1)
    return logits.argmax(2), logits.log_softmax(2).gather(2, index)[:, :, 0].exp()


def choose_penalty(
    ready: Prepared, labels: Ints, n_classes: int, splits: Sequence[Split], finals: int, grid: Sequence[float]
) -> Tensor:
    """The penalty [l, finals] with the most correct judged rows; the stronger one on a tie.

    All splits and penalties of a layer are one optimisation; a split that judges two final fits is fitted once.
    One penalty is taken as it is, no split means the default, and classifiers without a penalty get NaN.
    """
    if ready.features is None or len(grid) == 1 or not splits:
        given = grid[0] if len(grid) == 1 else DEFAULT_PENALTY * 2 / n_classes
        value = torch.nan if ready.features is None else given
        return torch.full((len(ready.x), finals), value, dtype=ready.x.dtype, device=ready.x.device)
    plan_train = np.repeat(np.stack([s.train for s in splits]), len(grid), 0)
    fits = len(plan_train)
    plan = Plan(np.broadcast_to(labels, (fits, len(labels))).copy(), plan_train, np.zeros_like(plan_train), n_classes)
    values = torch.tensor(list(grid), dtype=ready.x.dtype, device=ready.x.device)
    penalty = values.repeat(len(splits))[None].expand(len(ready.x), -1)
    predicted, _ = predict(ready, plan, "logistic", penalty, seed=0, hidden=0, steps=0, choosing=True)
    right = (predicted == torch.from_numpy(labels).to(predicted.device)).reshape(
        len(ready.x), len(splits), len(grid), -1
    )
    count = torch.zeros(len(ready.x), finals, len(grid), dtype=torch.long, device=right.device)
    for k, split in enumerate(splits):
        for final, rows in split.judged.items():
            count[:, final] += right[:, k][..., torch.from_numpy(rows).to(right.device)].sum(-1)
    strongest = torch.argsort(values, descending=True)
    best = count[..., strongest].argmax(-1)  # the first maximum
    return values[strongest[best]]
