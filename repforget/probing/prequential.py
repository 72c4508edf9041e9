"""How many bits the labels cost a receiver who has the features and learns while the labels arrive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.probing.fitting import Ints, Plan, layer_chunks, predict, prepare
from repforget.probing.inputs import as_features, as_groups, as_labels, standardise
from repforget.probing.sweep import penalty_grid

FRACTIONS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
MIN_PERMUTATIONS = 3
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Codes:
    """Bits that each label costs at each of l layers [l, n], averaged over the permutations; ``spread`` [l] is the
    standard deviation of the total over them."""

    bits: Floats
    n_classes: int
    spread: Floats

    @property
    def uniform(self) -> float:
        """Bits of all labels for a receiver who learns nothing: n log2 K."""
        return float(self.bits.shape[1] * np.log2(self.n_classes))

    @property
    def compression(self) -> Floats:
        """Uniform bits over bits [l]: about 1 for labels that the features do not tell."""
        return np.asarray(self.uniform / self.bits.sum(1))


def smoothed_bits(probability: ArrayLike, seen: int | Floats, n_classes: int) -> Floats:
    """-log2 of (seen * p + 1) / (seen + K): a classifier taught by ``seen`` labels mixed with K uniform ones.

    It is 1/K before the first label, and no label costs infinitely much because it was not seen before.
    """
    p = np.asarray(probability, dtype=np.float64)
    return np.asarray(np.log2(seen + n_classes) - np.log2(seen * p + 1.0))


def code_lengths(
    features: Tensor | NDArray[Any], labels: ArrayLike, groups: ArrayLike | None = None, *, l2: float = 0.01,
    permutations: int = MIN_PERMUTATIONS, fractions: Sequence[float] = FRACTIONS, seed: int = 0,
) -> Codes:  # fmt: skip
    """Send labels [n] block by block to a receiver who has the features [l, n, d], each layer by itself.

    The rows come in random order, groups as a whole; the first block is coded uniformly, every later one by a logistic
    classifier (penalty ``l2``, fixed beforehand) taught by all blocks before it, its probabilities mixed with the
    uniform one by :func:`smoothed_bits`. ``fractions`` of the rows end the blocks (the last is 1); the order is drawn
    ``permutations`` times. Features are standardised over all rows, which the receiver has. Cost: one classifier per
    layer, block and permutation.  Source: Voita & Titov 2020, arXiv 2003.12298, the online code.
    """
    if permutations < MIN_PERMUTATIONS:
        raise UsageError(f"A code length from {permutations} orders depends on them: draw at least {MIN_PERMUTATIONS}.")
    known = as_labels(labels)
    n, count = len(known.numbers), len(known.classes)
    x = as_features(features, n)
    parts = [_blocks(as_groups(groups, n), fractions, np.random.default_rng([seed, k])) for k in range(permutations)]
    fits = [(k, rows[:start], rows[start:stop]) for k, (rows, ends) in enumerate(parts)
            for start, stop in zip(ends, ends[1:], strict=False)]  # fmt: skip
    bits = np.full((permutations, len(x), n), np.log2(count))
    if fits:
        train = np.zeros((len(fits), n), dtype=np.bool_)
        for j, (_, before, _) in enumerate(fits):
            train[j, before] = True
        probability = _probabilities(x, known.numbers, train, count, l2)
        for j, (k, before, rows) in enumerate(fits):
            bits[k][:, rows] = smoothed_bits(probability[:, j, rows], len(before), count)
    return Codes(bits.mean(0), count, bits.sum(2).std(0))


def _blocks(groups: Ints, fractions: Sequence[float], rng: np.random.Generator) -> tuple[Ints, list[int]]:
    """Rows in random order, groups together, and where the blocks end, each at the end of a group."""
    place = rng.permutation(int(groups.max()) + 1)[groups]
    rows = np.lexsort((rng.permutation(len(groups)), place))
    ends = np.flatnonzero(np.append(np.diff(place[rows]) != 0, True)) + 1
    wanted = [max(1, round(f * len(groups))) for f in sorted(fractions)]
    return rows, sorted({int(ends[np.searchsorted(ends, w)]) for w in wanted} | {len(groups)})


def _probabilities(x: Tensor, labels: Ints, train: NDArray[np.bool_], n_classes: int, l2: float) -> Floats:
    """Probability of every row's label under each fit [l, fits, n]."""
    plan = Plan(np.broadcast_to(labels, train.shape).copy(), train, np.zeros_like(train), n_classes)
    (penalty,) = penalty_grid(l2, n_classes)
    columns = 1 if n_classes == 2 else n_classes
    found = []
    for layers in layer_chunks(len(x), len(train), columns, x.shape[1], x.shape[2], x.device):
        ready = prepare(standardise(x[layers]), "logistic", n_classes)
        given = torch.full((len(ready.x), len(train)), penalty, dtype=ready.x.dtype, device=ready.x.device)
        found.append(predict(ready, plan, "logistic", given, seed=0, hidden=0, steps=0)[1].double().cpu().numpy())
    return np.concatenate(found)
