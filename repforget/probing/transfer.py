"""Classifiers fitted on one set of activations and judged on another, all layers at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from repforget.errors import KnowledgeError, UsageError
from repforget.probing.fitting import (
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
from repforget.probing.folds import grouped_folds
from repforget.probing.inputs import as_features, as_groups, as_labels, standardise
from repforget.probing.intervals import Floats
from repforget.probing.sweep import Penalty, penalty_grid


@dataclass(frozen=True)
class TransferResult:
    """What classifiers of l layers say about m test rows.

    ``valid`` [m] is False where the true label is no class of the training set: such rows count as wrong with
    probability 0 and belong out of an average that is meant as knowledge.
    """

    classes: tuple[Any, ...]
    predicted: Ints  # [l, m] index into classes
    correct: NDArray[np.bool_]  # [l, m]
    probability: Floats  # [l, m] of the true class
    valid: NDArray[np.bool_]  # [m]
    penalty: Floats  # [l], NaN for classifiers without one

    @property
    def accuracy(self) -> Floats:
        """Share of correct among valid rows, per layer."""
        return self.correct[:, self.valid].mean(1) if self.valid.any() else np.full(len(self.correct), np.nan)


def fit_transfer(
    train_x: Tensor | NDArray[Any],
    train_y: ArrayLike,
    test_x: Tensor | NDArray[Any],
    test_y: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    kind: Kind = "logistic",
    l2: Penalty = "auto",
    folds: int = 4,
    seed: int = 0,
    hidden: int = 64,
    steps: int = 400,
) -> TransferResult:
    """Fit one classifier per layer on ``train_x`` [l, n, d] and predict ``test_x`` [l, m, d].

    Features are standardised by the training rows.  A grid of penalties is searched by ``folds`` grouped folds of
    the training rows (``groups`` [n], default: every row its own).  Fitting on the original model and testing on an
    edited one asks whether the *direction* survived; fitting on the edited model asks whether the *information*
    did.
    """
    check_kind(kind)
    known = as_labels(train_y)
    answers = as_labels(test_y, known.classes).numbers
    train, test = (
        as_features(train_x, len(known.numbers), "training features"),
        as_features(test_x, len(answers), "test features"),
    )
    if (train.shape[0], train.shape[2]) != (test.shape[0], test.shape[2]):
        raise UsageError(f"Probing got training features of shape {tuple(train.shape)} and test features of shape "
                         f"{tuple(test.shape)}: layers and width must agree.")  # fmt: skip
    valid = answers >= 0
    if not valid.any():
        raise KnowledgeError("No test label occurs among the training labels, so nothing can be predicted: fit on "
                             "items that share their answers with the test items.")  # fmt: skip
    depth, n, d = train.shape
    fold = grouped_folds(known.numbers, as_groups(groups, n), folds, np.random.default_rng([seed, 0]))
    splits = _splits(fold, len(answers))
    rows = np.concatenate([known.numbers, np.maximum(answers, 0)])
    plan = Plan(rows[None], _rows(np.ones(n, dtype=np.bool_), len(answers))[None],
                _rows(fold == 0, len(answers))[None], len(known.classes))  # fmt: skip
    predicted, probability = np.zeros((depth, len(answers)), dtype=np.int64), np.zeros((depth, len(answers)))
    penalties = np.full(depth, np.nan)
    columns = (1 if len(known.classes) == 2 else len(known.classes)) * (hidden if kind == "mlp" else 1)
    grid = penalty_grid(l2, len(known.classes))
    for layers in layer_chunks(depth, 1, columns, len(rows), d, train.device):
        both = torch.cat([train[layers], test[layers].to(train)], 1)
        ready = prepare(standardise(both, train[layers]), kind, len(known.classes))
        penalty = choose_penalty(ready, rows, len(known.classes), splits, 1, grid)
        penalties[layers] = penalty[:, 0].double().cpu().numpy()
        found, likely = predict(ready, plan, kind, penalty, seed=seed, hidden=hidden, steps=steps)
        predicted[layers], probability[layers] = found[:, 0, n:].cpu().numpy(), likely[:, 0, n:].double().cpu().numpy()
    probability[:, ~valid] = 0.0
    return TransferResult(known.classes, predicted, predicted == answers, probability, valid, penalties)


def _rows(train: NDArray[np.bool_], tests: int) -> NDArray[np.bool_]:
    return np.concatenate([train, np.zeros(tests, dtype=np.bool_)])


def _splits(fold: Ints, tests: int) -> list[Split]:
    return [Split(_rows(fold != f, tests), {0: _rows(fold == f, tests)}) for f in range(int(fold.max()) + 1)]
