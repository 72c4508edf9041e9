"""Of several fine-tunings on the forget facts, subtract what they agree on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import DenseDelta, Edit
from repforget.edit.arithmetic._vectors import Adapter, Tuning, dense, subtracted, tuned
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Localization

SPREAD = 2.0  # factor between the smallest and the largest learning rate, and the middle one


def neg_merge(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, tunings: int = 3, strength: float | Literal["auto"] = "auto",
    keep: float = 0.95, steps: int = 100, lr: float | Literal["auto"] = "auto", batch_size: int = 32,
    adapter: Adapter = "auto", rank: int = 16, max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Subtract the mean change of several fine-tunings where all of them move a weight the same way.

    ``W - strength mean(W_i - W)``, entries on whose sign the fine-tunings disagree left alone.  They differ in order
    of the texts and in learning rate, from half to twice ``lr``, so that none has to be chosen.  Source: Kim et al.
    2024, arXiv 2410.05583 (NegMerge).  One tuning alone is a task vector.

    Args:
        tunings: how many.
        strength: "auto" is the largest found for which answers of retained facts keep ``keep`` of their probability.
        steps, lr, batch_size: of each fine-tuning (AdamW, cosine); lr "auto" is 0.1 / width, ten times that with LoRA.
        adapter: "lora" of ``rank`` on all matrices, "none" for all parameters, "auto" by size (LoRA from 1 B on); of
            the layers of ``where`` alone, where it is given.
        max_facts: facts read, chosen by seed.

    Raises KnowledgeError without facts, UsageError for settings out of range, NumericalError where no strength keeps
    enough, NoEffectError where the fine-tunings agree on nothing.  Cost: ``tunings`` times ``steps`` steps, then 12
    evaluations of some hundred facts; memory: one copy of what is tuned per tuning.

    Weakness: that of task vectors; agreement on a sign does not show that the entry holds knowledge.
    """
    if tunings < 1:
        raise UsageError(f"neg_merge needs a fine-tuning or more: {tunings} were asked for.")
    how = Tuning(steps, lr, batch_size, adapter, rank, max_facts)
    scales = [SPREAD ** (2 * i / (tunings - 1) - 1) if tunings > 1 else 1.0 for i in range(tunings)]
    found: dict[str, list[Tensor]] = {}
    for i, scale in enumerate(track(progress, scales, "fine-tuning")):
        for name, delta in (dense(model, op) for op in tuned(model, data, how, where, seed + i, scale)):
            found.setdefault(name, []).append(delta)
    changes = [DenseDelta(name, unanimous(deltas)) for name, deltas in found.items()]
    chosen, operations, note = subtracted(model, data, changes, strength, keep, seed, progress)
    agreed = sum(int((op.delta != 0).sum()) for op in changes) / sum(op.delta.numel() for op in changes)
    notes = [note, f"{tunings} fine-tunings agree on the sign of {agreed:.1%} of the weights"]
    return Edit.build("neg_merge", {"strength": chosen}, model, data.digest, operations, notes=notes)


def unanimous(changes: Sequence[Tensor]) -> Tensor:
    """Mean of changes of one weight, zero wherever their signs are not all the same."""
    stacked = torch.stack(list(changes))
    agree = (stacked.sign() == stacked[0].sign()).all(0)
    return torch.where(agree, stacked.mean(0), 0.0)
