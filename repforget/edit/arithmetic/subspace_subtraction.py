"""Subtract what fine-tuning on the forget facts adds, outside of what fine-tuning on retained facts uses."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta, Operation
from repforget.edit._collect import subsample
from repforget.edit.arithmetic._vectors import Tuning, subtracted, tuned_on
from repforget.edit.train._data import fact_rows
from repforget.errors import KnowledgeError, NoEffectError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Localization

NOTHING = 1e-6  # singular values below this share of the largest are rounding


def subspace_subtraction(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, strength: float | Literal["auto"] = "auto", keep: float = 0.95,
    rank: int = 16, retain_rank: int | Literal["auto"] = "auto", steps: int = 50,
    lr: float | Literal["auto"] = "auto", batch_size: int = 32, max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Subtract low-rank forget matrices, layer by layer, without the subspaces that retained facts use (UNLEARN).

    Source: arXiv 2408.04140 (2024).  For each layer, others frozen, low-rank changes F and R of its
    matrices are learned on forget and on retained facts; the parts of F that read from or write to the subspaces of R
    are taken out (Gram-Schmidt, ``F' = (I - U Uᵀ) F (I - V Vᵀ)`` with U, V the singular vectors of R), and
    ``W - strength F'``.  The paper learns on data of whole tasks; here the facts stand for them.

    Args:
        strength: "auto" is the largest found for which answers of retained facts keep ``keep`` of their probability.
        rank: of the learned matrices.
        retain_rank: directions of R that are kept free, strongest first; "auto" all of them.
        steps, lr, batch_size: of every fine-tuning (AdamW, cosine); two per layer; lr "auto" is 1 / width.
        max_facts: facts read per set, chosen by seed.

    Layers are those of ``where``, or all.  Raises KnowledgeError without facts of both kinds, UsageError for settings
    out of range, NoEffectError where the retained subspaces leave nothing, NumericalError where no strength keeps
    enough.  Cost: twice ``steps`` training steps per layer, then 12 evaluations of some hundred facts.

    Weakness: that of task vectors; R holds what tuning still changes, not all that retained facts need.  What is left
    orthogonal to R does not show that only forget facts depend on it.
    """
    if not data.forget or not data.retain:
        raise KnowledgeError("Subspaces of forget and retained facts are compared, and one of the sets is empty: give "
                             "facts of both.")  # fmt: skip
    how = Tuning(steps, lr, batch_size, "lora", rank, max_facts)
    most = Tuning(steps, lr, batch_size, "lora", rank if retain_rank == "auto" else retain_rank, max_facts).rank
    forget, retain = (fact_rows(model, subsample(facts, max_facts, seed), name)[0]
                      for facts, name in ((data.forget, "forget"), (data.retain, "retain")))  # fmt: skip
    chosen = where.layers() if where is not None and where.layers() else range(model.n_layers)
    operations: list[Operation] = []
    shares: list[Tensor] = []
    for layer in track(progress, sorted(chosen), "learning matrices, layer by layer"):
        learned = [tuned_on(model, rows, how, where, seed, layers=(layer,)) for rows in (forget, retain)]
        other = {op.weight: op for op in learned[1] if isinstance(op, LowRankDelta)}
        for op in learned[0]:
            if isinstance(op, LowRankDelta) and op.weight in other:
                operations.append(apart := discriminated(op, other[op.weight], most))
                shares.append(torch.stack([_size(apart), _size(op)]))
    left = torch.stack(shares).square().sum(0).sqrt() if shares else torch.zeros(2)
    if not float(left[0]) > 0:
        raise NoEffectError("The subspaces of retained facts leave nothing of what was learned about the forget facts: "
                            "lower retain_rank, or raise rank or steps.")  # fmt: skip
    chosen_strength, changes, note = subtracted(model, data, operations, strength, keep, seed, progress)
    notes = [note, f"{float(left[0] / left[1]):.1%} of the norm of the forget matrices lies outside the subspaces of "
             "retained facts"]  # fmt: skip
    return Edit.build("subspace_subtraction", {"strength": chosen_strength}, model, data.digest, changes, notes=notes)


def discriminated(forget: LowRankDelta, retain: LowRankDelta, most: int) -> LowRankDelta:
    """``forget`` without what lies in the ``most`` strongest input and output directions of ``retain``."""
    out, into = subspaces(retain, most)
    u, v = forget.u.double(), forget.v.double()
    for _ in range(2):  # once more for the rounding of the first time
        u, v = u - out @ (out.mT @ u), v - (v @ into) @ into.mT
    return LowRankDelta(forget.weight, u.float(), v.float())


def subspaces(delta: LowRankDelta, most: int) -> tuple[Tensor, Tensor]:
    """Orthonormal output [out, r] and input [in, r] directions of a low-rank matrix, strongest first, float64."""
    left, right = torch.linalg.qr(delta.u.double()), torch.linalg.qr(delta.v.double().mT)
    a, s, b = torch.linalg.svd(left.R @ right.R.mT)
    live = min(most, int((s > NOTHING * s[0]).sum()))
    return left.Q @ a[:, :live], right.Q @ b.mT[:, :live]


def _size(delta: LowRankDelta) -> Tensor:
    left, right = torch.linalg.qr(delta.u.double()).R, torch.linalg.qr(delta.v.double().mT).R
    size: Tensor = torch.linalg.matrix_norm(left @ right.mT)
    return size
