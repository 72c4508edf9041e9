"""Add a constant vector to the residual stream, always or only where a gate sees the forget subjects."""

from __future__ import annotations

from typing import Literal

from repforget.artifact import AddVector, Edit, Gate
from repforget.edit._collect import Positions, choose_sites, subsample, text_sequences
from repforget.edit._contrast import contrasts
from repforget.edit.steer._gates import fit_gate
from repforget.errors import UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization, Site


def steering(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, sites: Literal["auto"] | list[str] = "auto", top_layers: int = 1,
    strength: float = 1.0, positions: Positions = "last",
    apply_to: Literal["all", "last", "prompt", "generated"] = "all",
    gate: Literal["none", "token", "prefix"] = "prefix", gate_positions: Positions = "subject",
    false_open: float = 0.01, max_facts: int = 1024,
) -> Edit:  # fmt: skip
    """Move activations from the forget mean towards the retain mean, always or where a gate is open.

    ``x -> x + strength·(mean retain - mean forget)`` within relations (contrastive activation addition, Rimsky et
    al. 2023, arXiv 2312.06681). The gate is a linear one (CAST, Lee et al. 2024, arXiv 2409.05907, opens by a
    condition direction): the least-squares direction between forget points and retained text, opened above the
    threshold that at most a share ``false_open`` of retained texts reach. A gated vector depends on the input, so it
    cannot be folded into weights: whoever holds them can drop the hook. Steering suppresses behaviour; it does
    not remove what is stored.

    Args:
        sites: site names; "auto" is resid_post of the ``top_layers`` best layers of ``where``, or of the middle
            layer.
        strength: multiple of the mean difference that is added.
        positions: points whose means are compared.
        apply_to: tokens at which the vector is added.
        gate: "none" (always), "token" (each token by itself), "prefix" (from the first token that opens it on).
        gate_positions: points of the forget facts at which the gate is to open.
        false_open: largest share of retained statements and general texts that may open the gate.
        max_facts: facts read per set, chosen by seed.

    Raises NoEffectError where the means agree or no forget fact would open the gate. Cost: one pass over the
    facts, three more for a gate.
    """
    if not 0.0 <= false_open < 1.0:
        raise UsageError(f"The share of retained texts that may open the gate is {false_open}: give 0 to 1.")
    forget, retain = subsample(data.forget, max_facts, seed), subsample(data.retain, max_facts, seed)
    chosen = steering_sites(model, sites, where, top_layers)
    found = contrasts(model, chosen, forget, retain, positions=positions, progress=progress)
    gates: dict[Site, Gate] = {}
    notes: list[str] = []
    if gate != "none":
        texts = text_sequences(model, data, retain)
        for site in chosen:
            gates[site], share = fit_gate(model, site, forget, retain, texts, gate, gate_positions, false_open)
            notes.append(f"gate at {site}: opens on {share:.1%} of the forget facts and at most {false_open:.1%} of "
                         "the retained texts it was fitted on")  # fmt: skip
    operations = [
        AddVector(site, -c.difference, strength, gates.get(site), positions=apply_to) for site, c in found.items()
    ]
    settings = {
        "sites": [str(site) for site in chosen], "top_layers": top_layers, "strength": strength,
        "positions": positions, "apply_to": apply_to, "gate": gate, "gate_positions": gate_positions,
        "false_open": false_open, "max_facts": max_facts,
    }  # fmt: skip
    return Edit.build("steering", settings, model, data.digest, operations, sites=chosen, notes=notes)


def steering_sites(
    model: LoadedModel, sites: Literal["auto"] | list[str], where: Localization | None, top_layers: int
) -> tuple[Site, ...]:
    """The sites asked for; "auto": resid_post of the best layers of ``where``, or of the middle layer."""
    if sites == "auto" and (where is None or not where.layers()):
        return (Site("resid_post", model.n_layers // 2),)
    return choose_sites(model, sites, where, kinds=("resid_post",), top_layers=top_layers)
