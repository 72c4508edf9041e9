"""Scrubbing: read a concept at sites, in the order of the depth, and put a fitted eraser at each.

What is read is an argument of the editors; how an eraser follows from the moments is theirs to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from repforget.artifact import Affine, Edit
from repforget.edit._collect import (
    Points,
    Positions,
    choose_sites,
    collect,
    collect_text,
    new_statistics,
    read_points,
    site_groups,
    subsample,
    text_sequences,
)
from repforget.edit._concept import Concept, Target, answer_concept, membership_concept
from repforget.edit.erase._leace_math import Eraser
from repforget.errors import NoEffectError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Localization, Site
from repforget.stats import Statistics

Metric = Literal["text", "retain", "concept"]
Fit = Callable[[Site, Concept, Statistics, Statistics], Eraser]  # site, concept, its points, rows of the metric
Notes = Callable[[Points, Concept, Mapping[Site, Eraser]], list[str]]


@dataclass(frozen=True)
class Reading:
    """Which concept is read, where and on how many facts (settings of the editors of this room)."""

    target: Target
    positions: Positions
    sites: Literal["auto"] | list[str]
    top_layers: int
    sequential: bool
    max_facts: int
    metric: Metric = "concept"


def scrub(
    method: str, model: LoadedModel, data: EditData, where: Localization | None, seed: int, progress: Progress | None,
    how: Reading, fit: Fit, notes: Notes, settings: Mapping[str, Any],
) -> Edit:  # fmt: skip
    """The edit that puts ``fit``'s eraser at every chosen site; ``sequential``: each fitted behind the earlier ones."""
    chosen = choose_sites(model, how.sites, where, kinds=("attn_in", "mlp_in"), top_layers=how.top_layers)
    forget, retain = subsample(data.forget, how.max_facts, seed), subsample(data.retain, how.max_facts, seed)
    if how.target == "membership":
        points = read_points(model, (*forget, *retain), how.positions)
        concept = membership_concept(points, frozenset(fact.id for fact in forget))
    else:
        points = read_points(model, forget, how.positions)
        concept = answer_concept(points)
    background: Points | list[tuple[int, ...]] | None = None
    if how.metric == "text":
        background = text_sequences(model, data, retain)
    elif how.metric == "retain":
        background = read_points(model, retain, how.positions)
    erasers: dict[Site, Eraser] = {}
    groups = [[site] for site in chosen] if how.sequential else site_groups(model, chosen)
    for group in track(progress, groups, "erasing site by site"):
        upstream = erasers if how.sequential else {}
        seen, space = moments(model, group, points, concept, background, upstream)
        for site in group:
            erasers[site] = fit(site, concept, seen[site], space[site])
    full = {**vars(how), "sites": [str(s) for s in chosen], **settings}
    return as_edit(method, model, data, erasers, how.sites != "auto", full, notes(points, concept, erasers))


def moments(
    model: LoadedModel, group: Sequence[Site], points: Points, concept: Concept,
    background: Points | list[tuple[int, ...]] | None, erasers: Mapping[Site, Eraser],
) -> tuple[dict[Site, Statistics], dict[Site, Statistics]]:  # fmt: skip
    """Statistics of the concept's points, and of the rows on which the change is to be small."""
    seen = new_statistics(model, group, concept.k, covariance=background is None)

    def note(values: dict[Site, Tensor], numbers: list[int]) -> None:
        for site, x in values.items():
            seen[site].update(x, concept.labels[numbers])

    collect(model, points, group, note, edits=erasers)
    if background is None:
        return seen, seen
    space = new_statistics(model, group)

    def watch(values: dict[Site, Tensor], _: object = None) -> None:
        for site, x in values.items():
            space[site].update(x)

    if isinstance(background, Points):
        collect(model, background, group, watch, edits=erasers)
    else:
        collect_text(model, background, group, watch, edits=erasers)
    return seen, space


def as_edit(
    method: str, model: LoadedModel, data: EditData, erasers: Mapping[Site, Eraser], explicit: bool,
    settings: Mapping[str, Any], notes: list[str],
) -> Edit:  # fmt: skip
    empty = [str(site) for site, eraser in erasers.items() if eraser.rank == 0]
    if empty and (explicit or len(empty) == len(erasers)):
        raise NoEffectError(f"Nothing of the concept is linearly present at {', '.join(empty)}, so there is nothing to "
                            "erase: choose later layers, or positions='both'.")  # fmt: skip
    operations = [Affine(site, e.left, e.right, e.center) for site, e in erasers.items() if e.rank]
    if empty:
        notes.append(f"nothing of the concept at {', '.join(empty)}: left alone")
    return Edit.build(method, settings, model, data.digest, operations,
                      sites=[op.site for op in operations], notes=notes)  # fmt: skip


def count(points: Points) -> int:
    """How many points were read."""
    return sum(len(row) for row in points.positions) - points.skipped


def said(points: Points, concept: Concept) -> str:
    """What concept was read from how many points, for the notes of an edit."""
    frames = int(concept.frames.max()) + 1
    return f"concept of {concept.k} classes in {frames} frames, fitted on {count(points)} points"


def limit(rank: int | Literal["auto", "full"], d: int) -> int | None:
    """The most directions that the setting ``rank`` allows at a site of width ``d``."""
    return max(1, d // 8) if rank == "auto" else None if rank == "full" else rank


def cut(erasers: Mapping[Site, Eraser]) -> str:
    """The sites whose erasers leave directions of the concept, with how many of how many they take; "" if none."""
    return ", ".join(f"{site} {e.rank} of {e.total}" for site, e in erasers.items() if e.rank < e.total)
