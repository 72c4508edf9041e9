"""Iterative null-space projection: project away what a linear classifier reads, and fit the next one on the rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from repforget.artifact import Edit
from repforget.edit._collect import Points, Positions
from repforget.edit._concept import Concept, Target
from repforget.edit.erase._leace_math import Eraser
from repforget.edit.erase._projections import explained, fit_nullspace
from repforget.edit.erase._scrub import Reading, count, cut, limit, said, scrub
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization, Site
from repforget.stats import Statistics


def inlp(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, target: Target = "answer", positions: Positions = "last",
    sites: Literal["auto"] | list[str] = "auto", top_layers: int = 4, rank: int | Literal["auto", "full"] = "auto",
    step: int = 1, ridge: float = 1e-3, affine: bool = True, sequential: bool = True, max_facts: int = 4096,
) -> Edit:  # fmt: skip
    """Project away the directions that one linear classifier after another reads the concept from (INLP).

    Ravfogel et al. 2020, arXiv 2004.07667: ``x -> x - (x - μ) Q Qᵀ`` with orthonormal Q grown from the weights of
    classifiers, each fitted on what the earlier ones left.  Here they are ridge regressions on the classes, in closed
    form from the moments (float64).  A baseline for ``leace``: orthogonal, hence not the least change, and with fewer
    than all directions nothing is guaranteed: the notes say what a classifier still explains on the fitted points.
    It says nothing about nonlinear readers, other sites or unseen prompts.

    Args:
        target: "answer" erases the answer of the forget facts within each relation; "membership" what tells forget
            from retain facts, within each relation.
        positions: points that are read: the last prompt token, the last token of the subject, or both.
        sites: site names; "auto" is every norm output (attn_in, mlp_in: exactly foldable) of the ``top_layers`` best
            layers of ``where``, or of all layers.
        rank: directions projected away per site; "auto" is an eighth of the width, "full" all that are read.
        step: directions taken from each classifier, strongest first. ridge: in units of the mean variance.
        affine: keep the mean of the points (an offset that folds into biases); otherwise linear.
        sequential: read every site behind the projections upstream.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where a requested site holds nothing of the concept, KnowledgeError for a concept that does
    not vary.  Cost: one pass over the facts, or one per site (``sequential``); ``rank / step`` singular value
    decompositions of width times classes per site.
    """

    ends: dict[Site, tuple[float, float]] = {}

    def fit(site: Site, concept: Concept, seen: Statistics, _: Statistics) -> Eraser:
        cross = concept.cross(seen)
        eraser = fit_nullspace(seen, cross, rank=limit(rank, seen.d), step=step, ridge=ridge, affine=affine)
        before, after = (explained(seen, cross, concept.spread(seen), q, ridge)
                         for q in (eraser.left[:, :0], eraser.left))  # fmt: skip
        ends[site] = before, after
        return eraser

    def notes(points: Points, concept: Concept, erasers: Mapping[Site, Eraser]) -> list[str]:
        shares = ", ".join(f"{site} {a:.3g} -> {b:.3g}" for site, (a, b) in ends.items())
        chance = min(1.0, model.width / max(1, count(points)))
        found = [said(points, concept), "share of the concept's variance that a linear classifier explains on these "
                 f"points: {shares} (about {chance:.2g} by chance)"]  # fmt: skip
        left = cut(erasers)
        return [*found, f"stopped at rank={rank} before classifiers read nothing: {left}"] if left else found

    how = Reading(target, positions, sites, top_layers, sequential, max_facts)
    settings = {"rank": rank, "step": step, "ridge": ridge, "affine": affine}
    return scrub("inlp", model, data, where, seed, progress, how, fit, notes, settings)
