"""Run one editor by name: settings checked against its signature, context given, the result checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from repforget import discover
from repforget.artifact import Edit
from repforget.artifact.edit import plain
from repforget.errors import RepforgetError, UsageError
from repforget.knowledge import EditData, Knowledge
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def edit(
    model: LoadedModel, knowledge: Knowledge | EditData, method: str, *, where: Localization | None = None,
    seed: int = 0, progress: Progress | None = None, checkpoint: str | Path | None = None, **settings: Any,
) -> Edit:  # fmt: skip
    """Make an Edit of ``model`` with the editor ``method``; the model itself is left as it is.

    Args:
        model: the model to edit; its fingerprint becomes the base of the edit.
        knowledge: a knowledge probe (the editor then sees ``knowledge.for_editor()`` only) or that EditData.
        method: name of an editor, for example "null_space_surgery".
        where: a Localization that tells layers and sites; editors that need one choose for themselves
        without. seed: everything random follows from it.
        checkpoint: folder in which a trained editor keeps its state, and from which the same call continues to the
        same bits after an interruption; the caller removes it when the edit is saved.
        settings: hyperparameters of the editor, validated against its signature.

    Raises UnknownNameError, RecipeError (settings), NoEffectError, and what the editor documents.  The
    manifest holds the full settings, with the values that were chosen where the setting said "auto".
    """
    found = discover.method("edit", method)
    checked = found.settings(settings)
    data = knowledge.for_editor() if isinstance(knowledge, Knowledge) else knowledge
    if checkpoint is not None and "checkpoint" not in found.context:
        raise UsageError(f"Editor '{method}' keeps no state from which it could be resumed: leave the folder out.")
    kept = None if checkpoint is None else Path(checkpoint)
    context = {"where": where, "seed": seed, "progress": progress, "checkpoint": kept}
    given = {name: value for name, value in context.items() if name in found.context}
    result = found.function(model, data, **checked, **given)
    if not isinstance(result, Edit):
        raise RepforgetError(f"Editor '{method}' returned {type(result).__name__} and must return an Edit: "
                             "build it with Edit.build(...).")  # fmt: skip
    place = {"where": where.method} if where is not None and "where" in found.context else {}
    full = {**checked, **result.manifest.settings, **place, "seed": seed}
    manifest = dataclasses.replace(result.manifest, method=method, settings=plain(full))
    return dataclasses.replace(result, manifest=manifest)
