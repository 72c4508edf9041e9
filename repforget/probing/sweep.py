"""Probing classifiers of every layer under grouped cross-validation, beside their floor and their control task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.probing.fitting import (
    GRID,
    Ints,
    Kind,
    Plan,
    Split,
    check_kind,
    choose_penalty,
    layer_chunks,
    predict,
    prepare,
)
from repforget.probing.folds import control_labels, grouped_folds, row_folds, shuffled_labels
from repforget.probing.inputs import as_features, as_groups, as_labels, standardise
from repforget.probing.intervals import Floats, cluster_interval

Penalty = str | float | Sequence[float]


@dataclass(frozen=True)
class SweepResult:
    """Held-out evidence of one property in l layers, n rows; every row is predicted by a classifier that never saw
    its group.

    ``seen`` and ``control`` are accuracies on rows whose type was in training, for the property and for a random
    label per type; their difference is the selectivity.  NaN where no type has two rows.
    """

    kind: str
    classes: tuple[Any, ...]
    predicted: Ints  # [l, n] index into classes
    correct: NDArray[np.bool_]  # [l, n]
    probability: Floats  # [l, n] of the true class
    accuracy: Floats  # [l]
    low: Floats  # [l] 95 % interval over clusters
    high: Floats  # [l]
    shuffled: Floats  # [l] accuracy with labels shuffled between groups: the floor
    seen: Floats  # [l]
    control: Floats  # [l]
    majority: float  # accuracy of always answering the commonest training class
    folds: Ints  # [n]
    penalty: Floats  # [l, folds], NaN for classifiers without one
    notes: tuple[str, ...] = ()

    @property
    def selectivity(self) -> Floats:
        return self.seen - self.control


@dataclass(frozen=True)
class _Task:
    """One labelling with its folds; all tasks of a sweep share the number of folds."""

    labels: Ints
    fold: Ints


def fit_sweep(
    features: Tensor | NDArray[Any],
    labels: ArrayLike,
    groups: ArrayLike | None = None,
    *,
    kind: Kind = "logistic",
    folds: int = 5,
    seed: int = 0,
    l2: Penalty = "auto",
    types: ArrayLike | None = None,
    control: bool = True,
    hidden: int = 64,
    steps: int = 400,
) -> SweepResult:
    """Fit a probing classifier per layer on features [l, n, d] and report what it predicts for unseen groups.

    ``labels`` [n] are the property, ``groups`` [n] (subject, document) are never split; default: every row its own
    group.  ``kind``: logistic (linear, L2), mean_difference or lda (linear, closed form), mlp (two layers,
    ``hidden`` units, ``steps`` batches).  ``l2`` is a penalty beside the mean loss (scikit-learn's 1 / (C n) with n
    training rows), a grid, or "auto"; a grid is searched per layer and fold by inner grouped validation.  Features
    are standardised per layer without labels.  ``types`` [n] (default: groups) get the control labels; set
    ``control=False`` to skip shuffled floor and control.

    High accuracy shows that the property can be decoded, not that the model uses it; low accuracy of a linear kind
    does not show absence.  Compare with the same sweep on a model that never knew.  Source: Hewitt and Liang, 2019,
    arXiv 1909.03368 (control tasks, selectivity).
    """
    check_kind(kind)
    known = as_labels(labels)
    x = as_features(features, len(known.numbers))
    clusters = as_groups(groups, len(known.numbers))
    if folds < 2:
        raise UsageError(f"Probing needs at least 2 folds and got {folds}: use 5.")
    fold = grouped_folds(known.numbers, clusters, folds, np.random.default_rng([seed, 0]))
    n_folds = int(fold.max()) + 1
    tasks, notes = _tasks(known.numbers, clusters, fold, types, control, seed)
    if n_folds < folds:
        notes = (*notes, f"{n_folds} groups allow {n_folds} folds instead of {folds}")
    predicted, probability, penalty = _run(x, tasks, len(known.classes), kind, l2, seed, hidden, steps)
    right = predicted == np.stack([task.labels for task in tasks])
    accuracy = right.mean(2)
    low, high = cluster_interval(right[:, 0], clusters, seed=seed)
    nan = np.full(len(x), np.nan)
    return SweepResult(
        kind, known.classes, predicted[:, 0], right[:, 0], probability[:, 0], accuracy[:, 0], low, high,
        accuracy[:, 1] if len(tasks) > 1 else nan, accuracy[:, 2] if len(tasks) > 2 else nan,
        accuracy[:, 3] if len(tasks) > 3 else nan, _majority(known.numbers, fold), fold, penalty, notes,
    )  # fmt: skip


def _tasks(
    labels: Ints, groups: Ints, fold: Ints, types: ArrayLike | None, control: bool, seed: int
) -> tuple[list[_Task], tuple[str, ...]]:
    """The property; shuffled between groups; with its types seen in training; and the control on those folds."""
    tasks = [_Task(labels, fold)]
    if not control:
        return tasks, ()
    tasks.append(_Task(shuffled_labels(labels, groups, np.random.default_rng([seed, 1])), fold))
    kinds = groups if types is None else as_groups(types, len(labels))
    if np.bincount(kinds).max() < 2:
        return tasks, ("no type has two rows, so that a control task cannot be learnt: selectivity is not defined",)
    within = row_folds(kinds, int(fold.max()) + 1, np.random.default_rng([seed, 2]))
    drawn = control_labels(labels, kinds, np.random.default_rng([seed, 3]))
    return [*tasks, _Task(labels, within), _Task(drawn, within)], ()


def _run(
    x: Tensor, tasks: Sequence[_Task], n_classes: int, kind: Kind, l2: Penalty, seed: int, hidden: int, steps: int
) -> tuple[Ints, Floats, Floats]:
    """Held-out class [l, t, n], probability of the label [l, t, n], and the penalty [l, folds] of every task."""
    depth, n, d = x.shape
    n_folds = int(tasks[0].fold.max()) + 1
    plan = _plan(tasks, n_folds, n_classes)
    columns = (1 if n_classes == 2 else n_classes) * (hidden if kind == "mlp" else 1)
    predicted = np.zeros((depth, len(tasks), n), dtype=np.int64)
    probability = np.zeros((depth, len(tasks), n))
    penalties = np.full((depth, n_folds), np.nan)
    grid = penalty_grid(l2, n_classes)
    splits = _inner_splits(tasks[0].fold, n_folds) if n_folds > 2 else []
    for layers in layer_chunks(depth, len(plan.labels), columns, n, d, x.device):
        ready = prepare(standardise(x[layers]), kind, n_classes)
        penalty = choose_penalty(ready, tasks[0].labels, n_classes, splits, n_folds, grid)
        penalties[layers] = penalty.double().cpu().numpy()
        every = penalty.repeat(1, len(tasks))
        found, likely = predict(ready, plan, kind, every, seed=seed, hidden=hidden, steps=steps)
        for t, task in enumerate(tasks):
            place = torch.from_numpy(t * n_folds + task.fold).to(found.device)[None, None].expand(len(found), 1, n)
            predicted[layers, t] = found.gather(1, place)[:, 0].cpu().numpy()
            probability[layers, t] = likely.gather(1, place)[:, 0].double().cpu().numpy()
    return predicted, probability, penalties


def _plan(tasks: Sequence[_Task], n_folds: int, n_classes: int) -> Plan:
    """One fit per task and fold; where there is a third fold, the next one decides when a network stops."""
    labels = np.repeat(np.stack([task.labels for task in tasks]), n_folds, 0)
    train = np.concatenate([[task.fold != f for f in range(n_folds)] for task in tasks])
    nothing = np.zeros(len(labels[0]), dtype=np.bool_)
    stopping = [task.fold == (f + 1) % n_folds if n_folds > 2 else nothing for task in tasks for f in range(n_folds)]
    return Plan(labels, train, np.stack(stopping), n_classes)


def _inner_splits(fold: Ints, n_folds: int) -> list[Split]:
    """Fits without two neighbouring folds: each judges one of them for the final fit that holds out the other, so
    that every final fit chooses its penalty on two folds, from fits that saw neither these nor its own."""
    pairs = [(a, (a + 1) % n_folds) for a in range(n_folds)]
    return [Split((fold != a) & (fold != b), {a: fold == b, b: fold == a}) for a, b in pairs]


def penalty_grid(l2: Penalty, n_classes: int) -> tuple[float, ...]:
    """The penalties to try, from "auto", one number or several; all must be positive."""
    if l2 == "auto":
        return tuple(value * 2 / n_classes for value in GRID)
    grid = (l2,) if isinstance(l2, (int, float)) else l2
    if isinstance(grid, str) or not grid or min(grid) <= 0:
        raise UsageError(f"The probing penalty l2 must be 'auto', a positive number or a list of them, not {l2!r}.")
    return tuple(float(v) for v in grid)


def _majority(labels: Ints, fold: Ints) -> float:
    best = [np.bincount(labels[fold != f], minlength=1).argmax() for f in range(int(fold.max()) + 1)]
    return float((labels == np.array(best)[fold]).mean())
