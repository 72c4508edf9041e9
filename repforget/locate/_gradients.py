"""Scores of single weights, from gradients of one fact at a time, added up over the weights of every unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Any

import numpy as np
from torch import Tensor

from repforget.attribution import item_of
from repforget.causal import Run
from repforget.errors import KnowledgeError, NumericalError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Task, exact_band, in_second_half, may_rank, ranked
from repforget.locate._pairs import Pairs, forget_and_retain, plain_runs
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import heat_maps
from repforget.masks import BY_COLUMNS, weights_of
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.models.weights import WeightRef, readers, writers
from repforget.progress import Progress
from repforget.records import Component, Localization


@dataclass(frozen=True)
class Facts:
    """The facts whose gradients are taken; for the band, only some of them."""

    forget: tuple[Run, ...]
    retain: tuple[Run, ...]
    notes: tuple[str, ...]

    def beside(self, tasks: Sequence[Task], seed: int) -> Facts:
        """Those on which the band of ``tasks`` is not measured, and half of the retain facts."""
        forget, retain = ([run.cluster for run in runs] for runs in (self.forget, self.retain))
        return Facts(tuple(compress(self.forget, may_rank(tasks, forget, seed))),
                     tuple(compress(self.retain, ~in_second_half(retain, seed))), self.notes)  # fmt: skip


def facts_of(model: LoadedModel, knowledge: Knowledge, items: int, seed: int) -> Facts:
    """At most ``items`` forget facts and as many retain facts of the same relations."""
    data = knowledge.for_editor()

    def build(facts: Sequence[Any]) -> Pairs:
        return plain_runs(model.tokenizer, facts, "all")

    forget, retain = forget_and_retain(data, items, seed, build, True)
    if not retain.runs:
        raise KnowledgeError("Weights are compared between forget and retain facts, and there are no retain facts: add "
                             "some, or use attribution_patching.")  # fmt: skip
    return Facts(forget.runs, retain.runs, (*forget.notes, *retain.notes))


def weights(model: LoadedModel, components: Sequence[Component]) -> dict[Component, list[WeightRef]]:
    """The parts of weights that belong to each component."""
    module, places = model.module, site_map(model.module)
    refs = (*writers(module), *readers(module))
    return {c: weights_of(module, places, refs, c) for c in components}


def unit_sums(units: Mapping[Component, Sequence[WeightRef]], of: Callable[[str], Tensor]) -> tuple[Array, Array]:
    """Sum of the entries of ``of(parameter name)`` over the weights of each unit, and their number; one in memory."""
    sums = np.zeros(len(units))
    sizes = np.zeros(len(units))
    lines: dict[tuple[str, bool], tuple[Array, int]] = {}
    for k, own in enumerate(units.values()):
        for ref in own:
            along = ref.role in BY_COLUMNS
            if (ref.name, along) not in lines:
                lines[ref.name, along] = _line(of(ref.name), along != ref.conv1d)
            line, width = lines[ref.name, along]
            for start, stop in (ref.cols if along else ref.rows) or ((0, len(line) - 1),):
                sums[k] += line[stop] - line[start]
                sizes[k] += (stop - start) * width
    if not np.isfinite(sums).all():
        raise NumericalError("Gradients are not finite: load the model in float32 and try again.")
    return sums, sizes


def _line(values: Tensor, last: bool) -> tuple[Array, int]:
    """Cumulative sums of ``values`` along its last axis (or the one before), all others added up; their size."""
    axis = values.ndim - (1 if last else 2)
    summed = values.double().sum(dim=[k for k in range(values.ndim) if k != axis])
    line = np.concatenate([[0.0], summed.cumsum(0).cpu().numpy()])
    return line, values.numel() // values.shape[axis]


@dataclass(frozen=True)
class Shown:
    """What a locator of weights says of itself: its name, settings, and what its heat map shows."""

    method: str
    settings: Mapping[str, Any]
    label: str
    backwards: float
    forwards: float = 0.0  # without a backward


def weight_localization(
    model: LoadedModel, knowledge: Knowledge, components: Sequence[Component],
    score: Callable[[Facts], Array], facts: Facts, plan: BandPlan, shown: Shown, progress: Progress | None,
) -> Localization:  # fmt: skip
    """Rank by ``score`` of all facts; its ranking on half of them meets exact patches on the other half."""
    items = len({item_of(run.id) for run in facts.forget})
    tasks, notes = corrupted_tasks(model, knowledge, plan.seed, items=items, mode="both")
    half, _ = ranked(components, score(facts.beside(tasks, plan.seed)))
    band, band_notes, spent = exact_band(tasks, components, half, plan, progress)
    scores = score(facts)
    order, values = ranked(components, scores)
    cost = {"forwards": shown.backwards + shown.forwards + spent, "backwards": shown.backwards, "facts": float(items)}
    return Localization(shown.method, order, values, band, cost, dict(shown.settings),
                        heat_maps(components, scores, shown.label), (*facts.notes, *notes, *band_notes))  # fmt: skip
