"""Add a constant vector to the residual stream, always or only where a gate sees the forget subjects."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import AddVector, Edit, Gate
from repforget.edit._collect import (
    Positions,
    choose_sites,
    collect,
    collect_text,
    new_statistics,
    read_points,
    subsample,
    text_sequences,
)
from repforget.edit._concept import contrast, membership_concept
from repforget.edit._contrast import contrasts
from repforget.edit.erase._leace_math import fit_eraser
from repforget.errors import NoEffectError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization, Site
from repforget.scoring.encode import pad_id, token_batches


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
    chosen = _sites(model, sites, where, top_layers)
    found = contrasts(model, chosen, forget, retain, positions=positions, progress=progress)
    gates: dict[Site, Gate] = {}
    notes: list[str] = []
    if gate != "none":
        texts = text_sequences(model, data, retain)
        for site in chosen:
            gates[site], share = _gate(model, site, forget, retain, texts, gate, gate_positions, false_open)
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


def _sites(
    model: LoadedModel, sites: Literal["auto"] | list[str], where: Localization | None, top_layers: int
) -> tuple[Site, ...]:
    if sites == "auto" and (where is None or not where.layers()):
        return (Site("resid_post", model.n_layers // 2),)
    return choose_sites(model, sites, where, kinds=("resid_post",), top_layers=top_layers)


def _gate(
    model: LoadedModel, site: Site, forget: Sequence[Fact], retain: Sequence[Fact], texts: Sequence[Sequence[int]],
    scope: Literal["token", "prefix"], positions: Positions, false_open: float,
) -> tuple[Gate, float]:  # fmt: skip
    """The gate at one site, and the share of forget facts that open it."""
    points = read_points(model, (*forget, *retain), positions)
    concept = membership_concept(points, frozenset(fact.id for fact in forget))
    seen, space = new_statistics(model, [site], concept.k, covariance=False), new_statistics(model, [site])
    collect(model, points, [site], lambda values, numbers: seen[site].update(values[site], concept.labels[numbers]))
    collect_text(model, texts, [site], lambda values: space[site].update(values[site]))
    difference = contrast(concept, seen[site])
    reader = fit_eraser(space[site], cross=difference[:, None]).right  # Σ⁻¹ difference, up to scale and sign
    if len(reader) == 0:
        raise NoEffectError(f"Forget and retain facts have the same mean at {site}, so no gate can tell them apart: "
                            "use gate='none', or a later site.")  # fmt: skip
    direction = reader[0] / reader[0].norm()
    direction = direction * torch.sign(direction @ difference)
    scores: list[Tensor] = []
    own = read_points(model, forget, positions)
    collect(model, own, [site], lambda values, _: scores.append(_project(values[site], direction)))
    kept = _highest(model, site, texts, direction)
    # a little above the last retained text that stays closed, so that float32 decides as float64 did
    threshold = float(torch.quantile(kept, 1.0 - false_open, interpolation="higher")) + 1e-4 * float(kept.std())
    share = float((torch.cat(scores) > threshold).double().mean())
    if share == 0.0:
        raise NoEffectError(f"No forget fact reaches the gate at {site} that at most {false_open:.1%} of retained "
                            "texts open: choose a later site, gate='none', or a larger false_open.")  # fmt: skip
    return Gate(direction, threshold, scope=scope), share


def _project(x: Tensor, direction: Tensor) -> Tensor:
    return (x.double() @ direction.to(x.device)).cpu()


def _highest(model: LoadedModel, site: Site, texts: Sequence[Sequence[int]], direction: Tensor) -> Tensor:
    """Highest score of each text over its tokens without the first, [n]."""
    out: list[Tensor] = []
    for _, batch in token_batches(texts, pad_id=pad_id(model.tokenizer)):
        scores = _project(capture(model, [site], batch, gather="all")[site], direction)
        out.append(scores.masked_fill(~batch.counted.cpu(), -torch.inf).amax(1))
    return torch.cat(out)
