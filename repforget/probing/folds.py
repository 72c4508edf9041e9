"""Grouped folds, control labels and shuffled labels: what keeps a probing classifier honest."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def grouped_folds(labels: Ints, groups: Ints, folds: int, rng: np.random.Generator) -> Ints:
    """Fold number [n] of each row; no group is split, classes and sizes are spread evenly.

    Groups are dealt in random order within their most common class, each to the fold that has fewest rows of that
    class (then fewest rows at all).
    """
    n_groups, n_classes = int(groups.max()) + 1, int(labels.max()) + 1
    table = np.zeros((n_groups, n_classes), dtype=np.int64)
    np.add.at(table, (groups, labels), 1)
    folds = min(folds, n_groups)
    load = np.zeros((folds, n_classes), dtype=np.int64)
    place = np.zeros(n_groups, dtype=np.int64)
    shuffled = rng.permutation(n_groups)
    common = table.argmax(1)
    for group in shuffled[np.argsort(common[shuffled], kind="stable")]:
        fold = np.lexsort((load.sum(1), load[:, common[group]]))[0]
        place[group] = fold
        load[fold] += table[group]
    return place[groups]


def row_folds(types: Ints, folds: int, rng: np.random.Generator) -> Ints:
    """Fold number [n] such that the rows of each type are dealt to different folds."""
    out = np.empty(len(types), dtype=np.int64)
    order = rng.permutation(len(types))
    order = order[np.argsort(types[order], kind="stable")]
    start = 0
    for kind in range(int(types.max()) + 1):
        rows = order[types[order] == kind]
        out[rows] = (start + np.arange(len(rows))) % folds
        start += len(rows)
    return out


def control_labels(labels: Ints, types: Ints, rng: np.random.Generator) -> Ints:
    """One random class per type, drawn with the class frequencies of the rows (Hewitt and Liang, 2019)."""
    shares = np.bincount(labels) / len(labels)
    drawn = rng.choice(len(shares), size=int(types.max()) + 1, p=shares)
    if len(set(drawn.tolist())) == 1:  # a control with one class would be trivially learnt
        drawn[rng.integers(len(drawn))] = (drawn[0] + 1) % len(shares)
    return drawn.astype(np.int64)[types]


def shuffled_labels(labels: Ints, groups: Ints, rng: np.random.Generator) -> Ints:
    """Labels permuted between groups where every group has one label, otherwise between rows.

    Keeping whole groups together keeps the floor honest: rows of a group stay as dependent as they were.
    """
    first = np.zeros(int(groups.max()) + 1, dtype=np.int64)
    first[groups] = labels
    if bool((first[groups] == labels).all()):
        return rng.permutation(first)[groups]
    return rng.permutation(labels)
