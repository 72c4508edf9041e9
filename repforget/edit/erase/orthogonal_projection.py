"""Project on the orthogonal complement of the differences between class means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from repforget.artifact import Edit
from repforget.edit._collect import Points, Positions
from repforget.edit._concept import Concept, Target
from repforget.edit.erase._leace_math import Eraser
from repforget.edit.erase._projections import fit_orthogonal
from repforget.edit.erase._scrub import Reading, cut, limit, said, scrub
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization, Site
from repforget.stats import Statistics


def orthogonal_projection(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, target: Target = "answer", positions: Positions = "last",
    sites: Literal["auto"] | list[str] = "auto", top_layers: int = 4, rank: int | Literal["auto", "full"] = "auto",
    affine: bool = True, sequential: bool = True, max_facts: int = 4096,
) -> Edit:  # fmt: skip
    """Project activations on the orthogonal complement of the differences between the class means of a concept.

    ``x -> x - (x - μ) Q Qᵀ`` with orthonormal Q that spans the cross-covariance of features and classes within
    relations; the baseline of Belrose et al. 2023, arXiv 2306.03819 (LEACE without the metric).  With all directions
    the class means of the fitted points agree afterwards, so that no linear classifier beats a constant there, as with
    ``leace``, and more than needed is changed.  It says nothing about nonlinear readers, other sites, unseen prompts.
    ``mean_direction`` is the case of one difference, forget less retain.

    Args:
        target: "answer" erases the answer of the forget facts within each relation; "membership" what tells forget
            from retain facts, within each relation.
        positions: points that are read: the last prompt token, the last token of the subject, or both.
        sites: site names; "auto" is every norm output (attn_in, mlp_in: exactly foldable) of the ``top_layers`` best
            layers of ``where``, or of all layers.
        rank: directions per site, those with the largest differences first; "auto" all up to an eighth of the width.
        affine: keep the mean of the points (an offset that folds into biases); otherwise linear.
        sequential: read every site behind the projections upstream.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where a requested site holds nothing of the concept, KnowledgeError for a concept that does
    not vary.  Cost: one pass over the facts, or one per site (``sequential``); no solve.
    """

    def fit(_: Site, concept: Concept, seen: Statistics, __: Statistics) -> Eraser:
        return fit_orthogonal(seen, concept.cross(seen), rank=limit(rank, seen.d), affine=affine)

    def notes(points: Points, concept: Concept, erasers: Mapping[Site, Eraser]) -> list[str]:
        left = cut(erasers)
        partial = [f"only the largest differences were taken (rank={rank}: {left}): class means still differ there"]
        return [said(points, concept), *(partial if left else [])]

    how = Reading(target, positions, sites, top_layers, sequential, max_facts)
    return scrub("orthogonal_projection", model, data, where, seed, progress, how, fit, notes,
                 {"rank": rank, "affine": affine})  # fmt: skip
