"""Edits that rounding does not undo: no change of a weight is smaller than half a rounding step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact.edit import Edit, check_operations, parameter_names
from repforget.artifact.operations import DenseDelta, Operation, SparseDelta, is_zero, target, weight_operations
from repforget.artifact.weights import canonical, changes_by_owner, is_conv1d, new_values
from repforget.errors import UsageError, nearest
from repforget.models.load import LoadedModel
from repforget.quantizers import FORMS, Form, levels, projections, round_trip, scales

Small = Literal["balance", "zero", "enlarge"]
SPARSE = 1 / 3  # share of changed entries below which index and value take less room than the matrix


def magnitude_floor(edit: Edit, model: LoadedModel, scheme: str, small: Small = "balance") -> Edit:
    """The edit with every change of a projection either taken back or large enough to survive rounding.

    A post-processor of this project, after the observation (arXiv 2605.15138) that edits are far smaller than a 4-bit
    step.  ``scheme`` is "int8", "nf4", "int4" or "int3".  Changes of less than half a step are taken back
    (``small="zero"``), moved to the next level in their direction ("enlarge"), or, with "balance", enlarged from the
    largest down until there are as many steps as were asked of all.  The largest weight of every group, which sets its
    scale, keeps its value, so that all other codes stay what they are.

    Raises UsageError for an unknown scheme or an edit without a projection to change, NoEffectError where nothing is
    left, ArtifactError for another base.  Cost: no forward pass.  That codes differ does not show that the knowledge
    stays away: measure the rounded model, and what was to be kept ("enlarge" moves nearly every weight by a step).
    Operations at sites, biases and embeddings are left as they are.
    """
    edit.check_base(model)
    operations, note = floored(edit.operations, model, scheme, small)
    check_operations(edit.manifest.method, operations, model)
    settings = {**edit.manifest.settings, "quantisation_floor": scheme}
    manifest = dataclasses.replace(edit.manifest, settings=settings, weights=parameter_names(operations),
                                   notes=(*edit.manifest.notes, note))  # fmt: skip
    return Edit(manifest, operations)


def floored(
    operations: Sequence[Operation], model: LoadedModel, scheme: str, small: Small = "balance"
) -> tuple[tuple[Operation, ...], str]:
    """Operations whose changes of projections are multiples of what ``scheme`` can tell, and a note of their share."""
    kind = next((form for form in FORMS if form == scheme), None)
    if kind is None:
        raise UsageError(f"There is no rounding '{scheme}': {nearest(scheme, FORMS)}")
    module, rounded = model.module, projections(model.module)
    found: dict[str, Operation] = {}
    counts = torch.zeros(3, dtype=torch.float64)
    for new in new_values(module, changes_by_owner(module, weight_operations(operations))):
        if new.name not in rounded or new.parameter is None:
            continue
        turned = is_conv1d(new.owner)
        weight = rounded[new.name]
        wish = new.exact - new.old
        wanted = (weight + (wish.mT if turned else wish).to(weight)).to(weight.dtype)
        value = floor(weight, (wish.mT if turned else wish).float(), kind, small)
        codes = round_trip(weight, kind)[0]
        flips = [int((round_trip(w, kind)[0] != codes).sum()) for w in (wanted, value)]
        counts += torch.tensor([*flips, codes.numel()], dtype=torch.float64)
        change = (value.double() - weight.double()).float()
        found[new.name] = _operation(new.name, change.mT if turned else change)
    if not found:
        raise UsageError("No projection is changed by this edit, so that there is nothing to make safe against "
                         "rounding: leave quantisation_floor at 'none'.")  # fmt: skip
    kept = [op for op in operations if not _replaced(op, model, found)]
    before, after, total = counts.tolist()
    note = (f"{scheme} floor ({small}): {after / total:.2%} of the codes of the changed projections differ from the "
            f"original's, {before / total:.2%} without it")  # fmt: skip
    return (*kept, *(op for op in found.values() if not is_zero(op))), note


def _replaced(operation: Operation, model: LoadedModel, found: dict[str, Operation]) -> bool:
    name = target(operation)
    return bool(weight_operations([operation])) and bool(name) and canonical(model.module, name) in found


def floor(weight: Tensor, change: Tensor, kind: Form, small: Small = "balance") -> Tensor:
    """``weight`` [.., out, in] after ``change``, of which every entry that stays gives another code of ``kind``."""
    start, scale, book = weight.detach().float(), scales(weight, kind), levels(kind).to(weight.device)
    middle = (book[1:] + book[:-1]) / 2
    code = torch.bucketize((start / scale).contiguous(), middle)
    goal = (start + change).clamp(-scale, scale)
    reached = torch.bucketize((goal / scale).contiguous(), middle)
    following = code + change.sign().long()
    inside = (following >= 0) & (following < len(book)) & (start.abs() < scale) & (change != 0)
    following = following.clamp(0, len(book) - 1)
    step = (book[following] - book[code]).abs() * scale
    share = torch.where(inside, change.abs() / step.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    large = inside & (share >= 0.5)
    value = torch.where(large & (reached != code), goal, start)
    raised = (large & (reached == code)) | (inside & ~large & _enlarged(share * ~large, small))
    value = torch.where(raised, book[following] * scale, value).to(weight.dtype)
    same = round_trip(value, kind)[0] == round_trip(weight, kind)[0]
    return torch.where(same, weight.detach(), value)


def _enlarged(share: Tensor, small: Small) -> Tensor:
    """Which entries, asked to move by ``share`` of a step, are moved by a whole one."""
    if small == "zero":
        return torch.zeros_like(share, dtype=torch.bool)
    if small == "enlarge":
        return share > 0
    count = round(float(share.double().sum()))
    chosen = torch.zeros(share.numel(), dtype=torch.bool, device=share.device)
    chosen[share.flatten().topk(count).indices] = True
    return chosen.view_as(share)


def _operation(name: str, change: Tensor) -> Operation:
    change = change.cpu()
    index = change.flatten().nonzero().flatten()
    if len(index) > SPARSE * change.numel():
        return DenseDelta(name, change)
    return SparseDelta(name, index, change.flatten()[index])
