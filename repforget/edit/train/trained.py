"""Any number of weighted objectives on any data sets, trained together: multi-set recipes without code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repforget.artifact import Edit
from repforget.edit.train._nested import faults
from repforget.edit.train._objective import find, shared_signature
from repforget.edit.train._settings import Settings
from repforget.edit.train._trainer import Wanted, train
from repforget.errors import RepforgetError, UsageError, nearest
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

KEYS = ("objective", "data", "weight", "side", "answers", "settings")
LEFT_OUT = ("retain", "retain_on", "retain_weight", "forget_weight", "answers")


@shared_signature(left_out=LEFT_OUT)
def trained(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, checkpoint: Path | None = None, terms: list[dict[str, Any]], **shared: Any,
) -> Edit:  # fmt: skip
    """Minimise a weighted sum of objectives, each on a data set of its own.

    ``terms`` is a list of ``{objective, data, weight, side, answers, settings}``: the name of an objective or retain
    term; "forget", "retain", "general" or a JSON-lines file of prompts and answers (or texts); a weight (1); the side
    whose gradient it joins ("forget" where the objective forgets and reads the forget set, else "retain").  LLM
    Surgery (2024, arXiv 2409.13054) is ascent on what is outdated, ``nll`` on a file of updates and ``kl`` on what
    stays.  A generality of this project.

    Cost: one forward over the rows of all terms and one backward per step (one per side where gradients are joined
    otherwise than by their sum).
    """
    wanted = [_wanted(entry, number) for number, entry in enumerate(terms)]
    if not wanted:
        raise UsageError("A trained edit needs at least one term: give terms: [{objective: npo, data: forget}].")
    return train(model, data, "trained", wanted, Settings(**shared), where=where, seed=seed, progress=progress,
                 checkpoint=checkpoint, settings={"terms": terms}, left_out=LEFT_OUT)  # fmt: skip


def _faults(full: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], RepforgetError]]:
    """What is wrong inside the settings, and where."""
    yield from faults(full)
    for number, entry in enumerate(full["terms"]):
        try:
            _wanted(entry, number)
        except RepforgetError as error:
            yield ("terms", number), error


trained.faults = _faults  # type: ignore[attr-defined]


def _wanted(entry: Mapping[str, Any], number: int) -> Wanted:
    unknown = sorted(set(entry) - set(KEYS))
    if unknown:
        raise UsageError(f"Term {number + 1} has an unknown key '{unknown[0]}': {nearest(unknown[0], KEYS)}")
    if "objective" not in entry:
        raise UsageError(f"Term {number + 1} names no objective: give one, for example 'npo', 'nll' or 'kl'.")
    data = str(entry.get("data", "forget"))
    objective = find(str(entry["objective"]), "forget" if data == "forget" else "retain")
    forgets = objective.role == "forget" and data == "forget"
    side = entry.get("side", "forget" if forgets else "retain")
    if side not in ("forget", "retain"):
        raise UsageError(f"Term {number + 1} is on side '{side}': write forget or retain.")
    weight = entry.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not math.isfinite(weight):
        raise UsageError(f"Term {number + 1} has the weight {weight!r}: give a number.")
    given = entry.get("settings") or {}
    if not isinstance(given, Mapping):
        raise UsageError(f"Term {number + 1} has the settings {given!r}: write them as 'name: value' pairs.")
    settings = objective.bound(given)
    return Wanted(objective, settings, data, side, float(weight), str(entry.get("answers", "auto")))
