"""Go from the model towards another one of the same shape, in weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from repforget.artifact import DenseDelta, Edit, Operation, load_edit, target
from repforget.artifact.operations import scaled, site_operations
from repforget.edit._collect import subsample
from repforget.edit.arithmetic._vectors import Adapter, Tuning, parameters_of, tuned_on
from repforget.edit.train._data import fact_rows
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, load
from repforget.progress import Progress
from repforget.records import Localization

RETAIN = "retain"


def interpolation(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, toward: str = RETAIN, strength: float = 1.0, steps: int = 100,
    lr: float | Literal["auto"] = "auto", batch_size: int = 32, adapter: Adapter = "auto", rank: int = 16,
    max_facts: int = 4000,
) -> Edit:  # fmt: skip
    """Interpolate weights towards another model: ``W + strength (W_toward - W)``.

    Source: linear paths between fine-tuned models (Ilharco et al. 2022, arXiv 2212.04089; here the direction is not
    negated).  Towards a model trained without the forget set, strength 1 is that model: an upper bound for editors,
    and no method, since who has it needs no edit.  Towards the model tuned on retained facts it is the oldest baseline,
    forgetting by fine-tuning on the rest.

    Args:
        toward: "retain" (this model, fine-tuned on the retained facts), the folder of an edit of this model, or a model
            folder, hub id or organism of the same parameters.
        strength: 0 is this model, 1 the other one; more extrapolates.
        steps, lr, batch_size: of the fine-tuning for "retain" (AdamW, cosine); lr "auto" is 0.1 / width, ten times that
            with LoRA.  adapter: "lora" of ``rank``, "none" for all parameters, "auto" by size.
        max_facts: facts read for "retain", chosen by seed.

    With ``where``, only its layers move.  Raises UsageError for a model with other parameters or an edit that needs
    hooks, ArtifactError for an edit of another base, NoEffectError where both are the same.  Cost: no forward pass, or
    the fine-tuning; memory of a second model.

    Weakness: halfway between two good models need not be one.  It does not show what was removed, only where to.
    """
    note = f"towards '{toward}', strength {strength:g}"
    layers = where.layers() if where is not None else ()
    allowed = frozenset(parameters_of(model, layers))
    if toward == RETAIN:
        rows = fact_rows(model, subsample(data.retain, max_facts, seed), "retain")[0] if data.retain else ()
        if not rows:
            raise UsageError("There are no facts to keep that the model could be tuned on: name a model or an edit to "
                             "go towards.")  # fmt: skip
        how = Tuning(steps, lr, batch_size, adapter, rank, max_facts)
        changes: Sequence[Operation] = tuned_on(model, rows, how, where, seed)
    elif (Path(toward) / "edit.json").is_file():
        changes = _of_edit(model, toward)
    else:
        changes = differences(model, load(toward, device=str(model.device), dtype=model.dtype))
    kept = [scaled(op, strength) for op in changes if not layers or target(op) in allowed]
    return Edit.build("interpolation", {"strength": strength}, model, data.digest, kept, notes=[note])


def _of_edit(model: LoadedModel, folder: str) -> Sequence[Operation]:
    edit = load_edit(folder)
    edit.check_base(model)
    if site_operations(edit.operations):
        raise UsageError(f"The edit '{edit.manifest.method}' in {folder} acts on activations, so that there is no "
                         "straight path of weights towards it: attach it at another strength.")  # fmt: skip
    return edit.operations


def differences(model: LoadedModel, other: LoadedModel) -> list[Operation]:
    """What every parameter of ``other`` has more than that of ``model``; UsageError where they do not correspond."""
    own, theirs = dict(model.module.named_parameters()), dict(other.module.named_parameters())
    wrong = [name for name in (*own, *theirs) if name not in own or name not in theirs]
    wrong += [name for name in own if name in theirs and own[name].shape != theirs[name].shape]
    if wrong:
        raise UsageError(f"'{other.name}' and '{model.name}' have different parameters, first '{wrong[0]}': "
                         "interpolate between models of one configuration.")  # fmt: skip
    return [DenseDelta(name, theirs[name].detach().float().cpu() - p.detach().float().cpu())
            for name, p in own.items() if not torch.equal(p, theirs[name].to(p.device))]  # fmt: skip
