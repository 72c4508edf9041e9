"""The patching tasks of the locators, made from what an editor may see of a knowledge probe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from repforget.causal import Metric, Positions
from repforget.errors import UsageError
from repforget.knowledge import Fact, Knowledge
from repforget.locate._exact import Task
from repforget.locate._pairs import Pairs, corrupted_pairs, forget_and_retain, plain_runs
from repforget.models.load import LoadedModel

Mode = Literal["denoise", "noise", "both"]


def corrupted_tasks(
    model: LoadedModel, knowledge: Knowledge, seed: int, *, items: int, partners: int = 1, mode: Mode = "denoise",
    positions: Positions = "all", metric: Metric = "logprob", contrast: float = 0.0,
) -> tuple[tuple[Task, ...], tuple[str, ...]]:  # fmt: skip
    """Clean and corrupted runs of at most ``items`` forget facts, each with ``partners`` corruptions, one task
    per direction; with a contrast also of matched retain facts."""
    data = knowledge.for_editor()
    _check_items(items, partners)

    def build(facts: Sequence[Fact]) -> Pairs:
        return corrupted_pairs(model.tokenizer, facts, data.retain, seed=seed, positions=positions, partners=partners)

    forget, retain = forget_and_retain(data, items, seed, build, contrast != 0)
    noise = Task(model, forget.runs, retain.runs, metric=metric, contrast=contrast, sign=-1.0)
    denoise = replace(noise, forget=tuple(r.swapped() for r in forget.runs), sign=1.0,
                      retain=tuple(r.swapped() for r in retain.runs))  # fmt: skip
    tasks = {"denoise": (denoise,), "noise": (noise,), "both": (denoise, noise)}[mode]
    return tasks, (*forget.notes, *retain.notes)


def twin_task(
    model: LoadedModel, knowledge: Knowledge, twins: Sequence[LoadedModel], items: int, seed: int,
    positions: Positions, contrast: float,
) -> tuple[Task, tuple[str, ...]]:  # fmt: skip
    """Uncorrupted runs whose donors are the twins; matched retain facts are always measured beside them."""
    data = knowledge.for_editor()
    _check_items(items, 1)

    def build(facts: Sequence[Fact]) -> Pairs:
        return plain_runs(model.tokenizer, facts, positions)

    forget, retain = forget_and_retain(data, items, seed, build, True)
    task = Task(model, forget.runs, retain.runs, tuple(twins), contrast=contrast, sign=-1.0)
    return task, (*forget.notes, *retain.notes)


def _check_items(items: int, partners: int) -> None:
    if items < 1 or partners < 1:
        raise UsageError(f"A locator was given items={items} and partners={partners}: it needs at least one fact (32 "
                         "or more to be stable) and one corruption of each.")  # fmt: skip
