"""LEACE: erase a concept from activations so that no linear reader finds it there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from repforget.artifact import Edit
from repforget.edit._collect import Points, Positions
from repforget.edit._concept import Concept, Target
from repforget.edit.erase._leace_math import Eraser, fit_eraser
from repforget.edit.erase._scrub import Metric, Reading, count, cut, limit, said, scrub
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization, Site
from repforget.stats import Shrinkage, Statistics

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

    def fit(_: Site, concept: Concept, seen: Statistics, space: Statistics) -> Eraser:
        cross = concept.cross(seen)
        return fit_eraser(space, cross=cross, shrinkage=shrinkage, rank=limit(rank, seen.d), affine=affine)

    def notes(points: Points, concept: Concept, erasers: Mapping[Site, Eraser]) -> list[str]:
        return _notes(model, points, concept, rank, erasers)

    how = Reading(target, positions, sites, top_layers, sequential, max_facts, metric)
    settings = {"rank": rank, "affine": affine, "shrinkage": shrinkage}
    return scrub("leace", model, data, where, seed, progress, how, fit, notes, settings)


def _notes(
    model: LoadedModel, points: Points, concept: Concept, rank: object, erasers: Mapping[Site, Eraser]
) -> list[str]:
    notes = [said(points, concept)]
    if (n := count(points)) < ROWS_PER_FEATURE * model.width:
        notes.append(f"{n} points for {model.width} features, fewer than {ROWS_PER_FEATURE} per feature: what is "
                     "erased partly follows sampling noise, and may not reach unseen prompts")  # fmt: skip
    if left := cut(erasers):
        notes.append(f"only the strongest directions were erased (rank={rank}: {left}): the concept is "
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
