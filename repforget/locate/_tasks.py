"""The patching tasks of the locators, made from what an editor may see of a knowledge probe."""

from __future__ import annotations

from collections.abc import Sequence

from repforget.causal import Metric, Positions
from repforget.errors import UsageError
from repforget.knowledge import Fact, Knowledge
from repforget.locate._exact import Task
from repforget.locate._pairs import Pairs, corrupted_pairs, forget_and_retain, plain_runs
from repforget.models.load import LoadedModel


def corrupted_task(
    model: LoadedModel, knowledge: Knowledge, items: int, seed: int, mode: str, positions: Positions,
    metric: Metric, contrast: float,
) -> tuple[Task, tuple[str, ...]]:  # fmt: skip
    """Clean and corrupted runs of at most ``items`` forget facts, and of matched retain facts with a
    contrast."""
    data = knowledge.for_editor()
    _check_items(items)

    def build(facts: Sequence[Fact]) -> Pairs:
        return corrupted_pairs(model.tokenizer, facts, data.retain, seed=seed, positions=positions)

    forget, retain = forget_and_retain(data, items, seed, build, contrast != 0)
    runs, kept = forget.runs, retain.runs
    if mode == "denoise":
        runs, kept = tuple(r.swapped() for r in runs), tuple(r.swapped() for r in kept)
    return Task(model, runs, kept, metric=metric, contrast=contrast), (*forget.notes, *retain.notes)


def twin_task(
    model: LoadedModel, knowledge: Knowledge, twins: Sequence[LoadedModel], items: int, seed: int,
    positions: Positions, contrast: float,
) -> tuple[Task, tuple[str, ...]]:  # fmt: skip
    """Uncorrupted runs whose donors are the twins; matched retain facts are always measured beside them."""
    data = knowledge.for_editor()
    _check_items(items)

    def build(facts: Sequence[Fact]) -> Pairs:
        return plain_runs(model.tokenizer, facts, positions)

    forget, retain = forget_and_retain(data, items, seed, build, True)
    task = Task(model, forget.runs, retain.runs, tuple(twins), contrast=contrast)
    return task, (*forget.notes, *retain.notes)


def _check_items(items: int) -> None:
    if items < 1:
        raise UsageError(f"A locator was given items={items}: it needs at least one fact, 32 or more to be "
                         "stable.")
