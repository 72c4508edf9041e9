"""What editors that distil share: how far a model is from given teachers, and notes on how they were made."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from repforget.artifact import Edit
from repforget.edit.train._data import Row
from repforget.edit.train._head import head_of, reduced
from repforget.edit.train._pass import STATES, Request, read
from repforget.edit.train.objectives._math import FLOOR, kl_divergence
from repforget.models.load import LoadedModel

ROWS = 64  # per forward
Teachers = Sequence[tuple[Tensor, Tensor]]  # per row: outcomes [labels, k], log-probabilities [labels, k + 1]


@torch.no_grad()
def apart(model: LoadedModel, rows: Sequence[Row], teachers: Teachers) -> tuple[float, float]:
    """``KL(teacher || model)`` over the teacher's outcomes, and the teacher's entropy: means per token, in nats."""
    head = head_of(model.module)
    divergence = entropy = 0.0
    for at in range(0, len(rows), ROWS):
        (found,) = read(model, [Request(tuple(rows[at : at + ROWS]), frozenset({STATES}))])
        if found.states is None:
            raise RuntimeError("the rows were not read")
        best, told = (torch.cat([t[i] for t in teachers[at : at + ROWS]]).to(model.device) for i in (0, 1))
        own, told = reduced(head.logits(found.states), best).double(), told.double()
        divergence += float(kl_divergence(told, own).sum())
        entropy -= float((told.exp() * told.clamp_min(FLOOR)).sum())
    count = sum(row.labels for row in rows)
    return divergence / count, entropy / count


def noted(edit: Edit, *notes: str) -> Edit:
    """The edit with notes in front of its own."""
    return dataclasses.replace(edit, manifest=dataclasses.replace(edit.manifest, notes=(*notes, *edit.manifest.notes)))
