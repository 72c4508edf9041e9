"""Forget against retain at sites: the mean difference and its principal directions, from streamed moments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from repforget.edit._collect import Points, Positions, collect, new_statistics, read_points, site_groups
from repforget.edit._concept import Concept, contrast, membership_concept
from repforget.errors import NoEffectError
from repforget.knowledge import Fact
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Site

NOTHING = 1e-9  # a difference below this share of the means is rounding


@dataclass(frozen=True)
class Contrast:
    """At one site: ``difference`` [d] = mean(forget) - mean(retain) within relations, ``retain_mean`` [d], and
    orthonormal ``directions`` [r, d], strongest first. Float64."""

    difference: Tensor
    retain_mean: Tensor
    directions: Tensor


def contrasts(
    model: LoadedModel, sites: Sequence[Site], forget: Sequence[Fact], retain: Sequence[Fact], *,
    positions: Positions = "last", rank: int = 1, principal: bool = False, required: bool = True,
    progress: Progress | None = None,
) -> dict[Site, Contrast]:  # fmt: skip
    """Contrast forget and retain points at each site.

    ``directions`` is the normalised mean difference, or (``principal``) the ``rank`` leading directions of the
    *uncentred* second moment of (forget point - retain mean of its relation): centring would remove the very
    signal. Sites where the means agree are left out, or (``required``) refused with NoEffectError.
    Cost: one pass over all facts, a second over the forget facts with ``principal``.
    """
    points = read_points(model, (*forget, *retain), positions)
    concept = membership_concept(points, frozenset(fact.id for fact in forget))
    own = read_points(model, forget, positions)
    out: dict[Site, Contrast] = {}
    for group in site_groups(model, sites):
        seen = new_statistics(model, group, concept.k, covariance=False)

        def note(values: dict[Site, Tensor], numbers: list[int]) -> None:
            for site, x in values.items():
                seen[site].update(x, concept.labels[numbers])  # noqa: B023 (called within this turn)

        collect(model, points, group, note, progress=progress)
        means = {site: concept.means(seen[site]) for site in group}
        moved = _principal(model, group, own, concept, means, rank) if principal else {}
        for site in group:
            difference = contrast(concept, seen[site])
            length = float(difference.norm())
            if length <= NOTHING * float(means[site].norm(dim=1).max()):
                continue
            directions = moved[site] if principal else (difference / length)[None]
            out[site] = Contrast(difference, _retain_mean(concept, seen[site].mean_z, means[site]), directions)
    absent = [str(site) for site in sites if site not in out]
    if absent and (required or not out):
        raise NoEffectError(f"Forget and retain facts have the same mean at {', '.join(absent)}, so there is no "
                            "direction to edit along: choose later layers, or positions='subject'.")  # fmt: skip
    return out


def _retain_mean(concept: Concept, share: Tensor, means: Tensor) -> Tensor:
    weight = share * torch.tensor([name.endswith("=retain") for name in concept.names], device=share.device)
    return (weight @ means) / weight.sum()


def _principal(
    model: LoadedModel, group: Sequence[Site], own: Points, concept: Concept, means: dict[Site, Tensor], rank: int,
) -> dict[Site, Tensor]:  # fmt: skip
    """Leading directions of (forget point - retain mean of its frame); ``own`` are the concept's first points."""
    origin = _origins(concept)
    spread = new_statistics(model, group)

    def note(values: dict[Site, Tensor], numbers: list[int]) -> None:
        labels = concept.labels[numbers]
        known = origin[labels] >= 0
        for site, x in values.items():
            centre = means[site][origin[labels][known].to(x.device)]
            spread[site].update(x[known.to(x.device)].double() - centre)

    collect(model, own, group, note)
    return {site: spread[site].principal(rank)[0] for site in group}


def _origins(concept: Concept) -> Tensor:
    """For every class the number of the retain class of its frame, -1 where there is none, [k]."""
    number = {name: i for i, name in enumerate(concept.names)}
    return torch.tensor([number.get(f"{name.rpartition('=')[0]}=retain", -1) for name in concept.names])
