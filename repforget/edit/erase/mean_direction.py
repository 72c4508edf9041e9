"""Remove the directions along which forget and retain facts differ, at chosen sites."""

from __future__ import annotations

from typing import Literal

from repforget.artifact import Affine, Edit
from repforget.edit._collect import Positions, choose_sites, subsample
from repforget.edit._contrast import contrasts
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def mean_direction(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, sites: Literal["auto"] | list[str] = "auto", top_layers: int = 4,
    positions: Positions = "last", directions: Literal["mean", "principal"] = "mean", rank: int = 1,
    center: Literal["retain", "none"] = "retain", max_facts: int = 4096,
) -> Edit:  # fmt: skip
    """Project away the mean difference (or principal differences) of forget and retain facts at chosen sites.

    ``x -> x - (x - c) Vᵀ V`` with orthonormal V [r, d]. Difference of means as in Rimsky et al. 2023
    (arXiv 2312.06681, there used to steer); "principal" takes the leading directions of the *uncentred* second
    moment of (forget point - retain mean of its relation). Orthogonal, hence not the least change, and it erases
    only what lies along V: nothing is guaranteed about classifiers (see ``leace``).

    Args:
        sites: site names; "auto" is every norm output (attn_in, mlp_in: exactly foldable) of the
            ``top_layers`` best layers of ``where``, or of all layers.
        positions: points that are compared: last prompt token, last subject token, or both.
        rank: number of directions; more than one needs ``directions="principal"``.
        center: "retain" moves points to the retain mean along V, "none" to zero.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where the means agree (with "auto": at every site; some sites are noted and left alone).
    Cost: one pass over the facts, two with "principal".
    """
    if rank < 1 or (rank > 1 and directions == "mean"):
        raise UsageError(f"A difference of means is one direction and rank={rank} was asked for: give rank=1, or "
                         "directions='principal'.")  # fmt: skip
    chosen = choose_sites(model, sites, where, kinds=("attn_in", "mlp_in"), top_layers=top_layers)
    found = contrasts(
        model, chosen, subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed),
        positions=positions, rank=rank, principal=directions == "principal", required=sites != "auto",
        progress=progress,
    )  # fmt: skip
    operations = [
        Affine(site, c.directions.mT, c.directions, c.retain_mean if center == "retain" else None)
        for site, c in found.items()
    ]
    settings = {
        "sites": [str(site) for site in chosen], "top_layers": top_layers, "positions": positions,
        "directions": directions, "rank": rank, "center": center, "max_facts": max_facts,
    }  # fmt: skip
    absent = [str(site) for site in chosen if site not in found]
    notes = [f"no difference of means at {', '.join(absent)}: left alone"] if absent else []
    return Edit.build("mean_direction", settings, model, data.digest, operations, sites=list(found), notes=notes)
