"""LEACE: erase a concept from activations so that no linear reader finds it there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

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
from repforget.edit.erase._leace_math import Eraser, fit_eraser
from repforget.errors import NoEffectError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Localization, Site
from repforget.stats import Shrinkage, Statistics

Metric = Literal["text", "retain", "concept"]
ROWS_PER_FEATURE = 100  # below this the erased directions partly follow sampling noise


def leace(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, target: Target = "answer", positions: Positions = "last",
    sites: Literal["auto"] | list[str] = "auto", top_layers: int = 4, rank: int | Literal["auto", "full"] = "auto",
    affine: bool = True, sequential: bool = True, metric: Metric = "text", shrinkage: Shrinkage = "diagonal",
    max_facts: int = 4096,
) -> Edit:  # fmt: skip
    """Erase which answer belongs to the forget subjects from activations, by the least change that does (LEACE).

    Belrose et al. 2023, arXiv 2306.03819. At each site ``x -> x - (x - μ) Rᵀ Lᵀ`` makes the class means equal, so
    that no linear classifier on that site beats a constant guess *on the fitted points*. It says nothing about
    nonlinear readers, other sites, or prompts unlike the fitted ones, and it touches everyone's activations.

    Args:
        target: "answer" erases the answer of the forget facts within each relation; "membership" erases what
            tells forget from retain facts, within each relation.
        positions: points that are read: the last prompt token, the last token of the subject, or both.
        sites: site names; "auto" is every norm output (attn_in, mlp_in: exactly foldable) of the
            ``top_layers`` best layers of ``where``, or of all layers.
        rank: directions erased per site; "full" erases the whole concept; "auto" the whole concept up to an
            eighth of the width, and says in the notes where it stopped.
        affine: keep the mean of the metric's rows (an offset that folds into biases); otherwise linear.
        sequential: fit every eraser on activations already erased upstream (concept scrubbing).
        metric: rows on which the change is made smallest: all tokens of retained statements and general text,
            the retain facts at the same points, or the concept's own points (LEACE as published).
        shrinkage: of the metric's covariance; "diagonal" is insensitive to massive features.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where a requested site holds nothing of the concept, KnowledgeError for a concept that
    does not vary. Cost: one pass over facts and metric rows, or one per site (``sequential``), each up to that
    site; d×d float64 per site at a time.
    """
    if isinstance(rank, int) and rank < 1:
        raise UsageError(f"LEACE was asked for rank {rank}: give a positive rank, 'auto' or 'full'.")
    chosen = choose_sites(model, sites, where, kinds=("attn_in", "mlp_in"), top_layers=top_layers)
    forget, retain = subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed)
    if target == "membership":
        points = read_points(model, (*forget, *retain), positions)
        concept = membership_concept(points, frozenset(fact.id for fact in forget))
    else:
        points = read_points(model, forget, positions)
        concept = answer_concept(points)
    background: Points | list[tuple[int, ...]] | None = None
    if metric == "text":
        background = text_sequences(model, data, retain)
    elif metric == "retain":
        background = read_points(model, retain, positions)
    erasers: dict[Site, Eraser] = {}
    groups = [[site] for site in chosen] if sequential else site_groups(model, chosen)
    for group in track(progress, groups, "erasing site by site"):
        upstream = erasers if sequential else {}
        seen, space = _moments(model, group, points, concept, background, upstream)
        for site in group:
            erasers[site] = _fit(seen[site], space[site], concept, rank, affine, shrinkage)
    return _edit(model, data, erasers, explicit=sites != "auto", rank=rank, settings={
        "target": target, "positions": positions, "sites": [str(s) for s in chosen], "top_layers": top_layers,
        "rank": rank, "affine": affine, "sequential": sequential, "metric": metric, "shrinkage": shrinkage,
        "max_facts": max_facts,
    }, notes=_notes(model, points, concept, rank, erasers))  # fmt: skip


def _moments(
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


def _fit(
    seen: Statistics, space: Statistics, concept: Concept, rank: int | Literal["auto", "full"], affine: bool,
    shrinkage: Shrinkage,
) -> Eraser:  # fmt: skip
    limit = max(1, seen.d // 8) if rank == "auto" else None if rank == "full" else rank
    return fit_eraser(space, cross=concept.cross(seen), shrinkage=shrinkage, rank=limit, affine=affine)


def _edit(
    model: LoadedModel, data: EditData, erasers: Mapping[Site, Eraser], *, explicit: bool, rank: object,
    settings: dict[str, object], notes: list[str],
) -> Edit:  # fmt: skip
    empty = [str(site) for site, eraser in erasers.items() if eraser.rank == 0]
    if empty and (explicit or len(empty) == len(erasers)):
        raise NoEffectError(f"Nothing of the concept is linearly present at {', '.join(empty)}, so there is nothing to "
                            "erase: choose later layers, or positions='both'.")  # fmt: skip
    operations = [Affine(site, e.left, e.right, e.center) for site, e in erasers.items() if e.rank]
    if empty:
        notes.append(f"nothing of the concept at {', '.join(empty)}: left alone")
    return Edit.build("leace", settings, model, data.digest, operations,
                      sites=[op.site for op in operations], notes=notes)  # fmt: skip


def _notes(
    model: LoadedModel, points: Points, concept: Concept, rank: object, erasers: Mapping[Site, Eraser]
) -> list[str]:
    n = sum(len(row) for row in points.positions) - points.skipped
    notes = [f"concept of {concept.k} classes in {int(concept.frames.max()) + 1} frames, fitted on {n} points"]
    if n < ROWS_PER_FEATURE * model.width:
        notes.append(f"{n} points for {model.width} features, fewer than {ROWS_PER_FEATURE} per feature: what is "
                     "erased partly follows sampling noise, and may not reach unseen prompts")  # fmt: skip
    cut = [f"{site} {e.rank} of {e.total}" for site, e in erasers.items() if e.rank < e.total]
    if cut:
        notes.append(f"only the strongest directions were erased (rank={rank}: {', '.join(cut)}): the concept is "
                     "weakened there, not linearly erased")  # fmt: skip
    whole = [str(site) for site, e in erasers.items() if e.rank == e.left.shape[0]]
    if whole:
        notes.append(f"the concept spans every direction at {', '.join(whole)}: the site is constant afterwards, so "
                     "give a rank")  # fmt: skip
    singular = [str(site) for site, e in erasers.items() if e.fallback]
    if singular:
        notes.append(f"singular covariance at {', '.join(singular)}: solved by eigendecomposition")
    if points.skipped:
        notes.append(f"{points.skipped} points lay at position 0 and were not read")
    return notes
