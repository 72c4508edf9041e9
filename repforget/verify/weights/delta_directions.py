"""In how few directions does the edit lie: what returns when the strongest of them are taken out again?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Measurement
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import alike, at_best, exam, pairs, sweep

_CURVE = ("taking out the edit's strongest directions", "directions per matrix", "probability of the truth")
MEASURES = {"best_rank": MeasureInfo("knowledge", "weights", votes=False, curve=_CURVE)}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"ranks": [1]},
    "standard": {},
    "thorough": {"ranks": [1, 2, 3, 4, 5, 6, 7, 8], "alternatives": 63, "max_items": 1000},
}


def delta_directions(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    ranks: Sequence[int] = (1, 2, 4, 8), forms: int = 1, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Take the k strongest singular directions of every weight change (arm - original) out of it, and ask again.

    Who can compute the change holds the original and needs no attack: this describes in how little of the edit the
    forgetting lies, and does not vote.  ``best_rank`` is the truth's probability under decoding confined to the
    candidates at the k (0 among them) with the highest mean over items.  All parameters count, a vector as one
    direction, stacked experts each.  The same is done to every arm: the original has no change and stays, a twin gets
    k directions of the original, which is the floor; an arm of another shape stays as it is.  Cost: one float32 copy
    and, per k, an eigendecomposition on the smaller side of every changed matrix and a pass of questions.

    A slow return does not show that the knowledge is gone: a dense edit can hide as much as a narrow one.
    """
    if any(rank < 0 for rank in ranks):
        raise UsageError(f"Verifier 'delta_directions' has ranks {ranks}: give numbers of directions from 0 on.")
    points = sorted({0.0, *map(float, ranks)})
    questions = exam(model, view, references, forms=forms, alternatives=alternatives, max_items=max_items, seed=seed)
    original = references.original if alike(model.module, references.original.module) else model
    table = sweep(model, questions, points, lambda copied, rank: take_out(copied, int(rank), original),
                  progress=progress, text="taking directions out")  # fmt: skip
    return at_best(questions, {"best_rank": table}, points, "rank")


def take_out(model: LoadedModel, rank: int, original: LoadedModel) -> None:
    """Remove the ``rank`` strongest directions of each parameter's difference to ``original`` in place."""
    for parameter, before in pairs(model.module, original.module):
        if not rank or torch.equal(parameter, before):
            continue
        # Apple GPUs have no float64.
        place = "cpu" if parameter.device.type == "mps" else parameter.device
        now = parameter.to(place, torch.float64)
        parameter.copy_(now - strongest(now - before.to(place, torch.float64), rank))


def strongest(change: Tensor, rank: int) -> Tensor:
    """The best approximation of rank ``rank`` of a matrix [.., m, n] (a vector is its own), from the smaller Gram."""
    if change.ndim < 2 or rank >= min(change.shape[-2:]):
        return change
    wide = change.shape[-2] <= change.shape[-1]
    gram = change @ change.mT if wide else change.mT @ change
    basis = torch.linalg.eigh(gram).eigenvectors[..., -rank:]
    projector = basis @ basis.mT
    nearest: Tensor = projector @ change if wide else change @ projector
    return nearest
