"""A few steps uphill on the forget facts, in the metric of what must stay."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from repforget.artifact import DenseDelta, Edit
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit.train._climb import Split, longest, measure, portions, put, split_rows, states_of, uphill
from repforget.edit.train._data import Row
from repforget.edit.train._head import head_of
from repforget.edit.train._pass import STATES, Request, read
from repforget.errors import SiteError, UsageError
from repforget.influence.factors import Factors, Moments, watched
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization
from repforget.training import only
from repforget.training.optimizers import drawn_loss


def k_fade(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, layers: Literal["auto"] | list[int] = "auto", top_layers: int = 4,
    steps: int = 8, max_divergence: float = 0.02, damping: float = 0.1, temperature: float = 3.0, floor: float = 0.1,
    max_facts: int = 2000,
) -> Edit:  # fmt: skip
    """Step uphill on the forget loss by the inverse Gauss-Newton matrix of what must stay, as far as a budget allows.

    ``W += s (A ⊗ G + λ)⁻¹ ∇_W L_F`` on the MLP projections: the most forgetting, to first order, per divergence of the
    outputs on retained text, to second.  A holds the inputs of a projection and G the gradients of its outputs on
    retained facts and general text, for labels that the model itself draws (K-FAC, one pass); L_F is the
    negative log-probability of the forget answers.  Source: 2026, arXiv 2602.10568 (K-FADE).  This project's are the
    temperature and the length s: after step i of ``steps`` the measured divergence from the unedited model may be
    ``max_divergence (i / steps)²`` nats per token, on every fifth retained cluster (no part of the factors) and on
    general text, whichever is more.

    Args:
        layers: layers to change; "auto" is the ``top_layers`` best of ``where``, or all of them.
        steps: steps uphill; each costs a pass over the forget facts and up to eight lengths to try.
        max_divergence: divergence in nats per token that may be spent in the end.
        damping: λ as a share of the mean eigenvalue of each layer; large values are plain gradient ascent.
        temperature: of the drawn labels; 1 gives the true Fisher, in which what the model is sure of hardly occurs.
        floor: a fact at or below this answer probability does not push any further.
        max_facts: facts read per set, chosen by seed.

    Raises SiteError where an MLP has no two-dimensional projections (batched experts), KnowledgeError without usable
    facts on both sides.  Cost: one forward and backward over the retained rows, then ``steps`` over the forget rows
    and some forwards over those set aside; two float64 matrices of each projection's sizes squared, and their
    eigenvectors.  The factors take tokens for independent and layers for separate, so the divergence is measured, not
    trusted; that it is small on average does not show that no single fact was lost.
    """
    _check(steps, max_divergence, damping, temperature)
    rows = split_rows(model, data, max_facts, seed, "k_fade")
    names = _names(model, layers, where, top_layers)
    trained = {name: model.module.get_parameter(name) for name in names}
    originals = {name: p.detach().clone() for name, p in trained.items()}
    deltas = {name: torch.zeros(p.shape, device=p.device) for name, p in trained.items()}
    try:
        with only(model.module, list(trained.values())):
            factors = _factors(model, names, rows.kept, temperature, seed, progress)
            notes = _climb(model, rows, trained, originals, deltas, factors, steps, max_divergence, damping, floor,
                           progress)
    finally:
        put(trained, originals, None)
    operations = [DenseDelta(name, delta.cpu()) for name, delta in deltas.items()]
    settings = {"layers": layers, "top_layers": top_layers, "steps": steps, "max_divergence": max_divergence,
                "damping": damping, "temperature": temperature, "floor": floor, "max_facts": max_facts}  # fmt: skip
    return Edit.build("k_fade", settings, model, data.digest, operations, notes=notes)


def _check(steps: int, budget: float, damping: float, temperature: float) -> None:
    if steps < 1 or min(budget, damping, temperature) <= 0:
        raise UsageError(f"k_fade was given {steps} steps, a divergence of {budget}, a damping of {damping} and a "
                         f"temperature of {temperature}: give at least one step and positive numbers.")  # fmt: skip


def _names(
    model: LoadedModel, layers: Literal["auto"] | Sequence[int], where: Localization | None, top_layers: int
) -> list[str]:
    depth = model.n_layers
    best = where.layers()[:top_layers] if where is not None else ()
    wanted = sorted(best or range(depth)) if layers == "auto" else list(layers)
    if not wanted or not all(0 <= layer < depth for layer in wanted):
        raise SiteError(f"Layers {wanted} were asked for: give some of 0 to {depth - 1}.")
    names: list[str] = []
    for layer in wanted:
        paths = site_map(model.module).anatomy.layers[layer]
        if paths.down is None:
            raise SiteError(f"Layer {layer} of '{model.name}' has batched experts and no two-dimensional MLP "
                            "projections, which k_fade changes: choose another editor.")  # fmt: skip
        parts = (paths.gate, paths.up, paths.gate_up, paths.down)
        names += dict.fromkeys(f"{part}.weight" for part in parts if part is not None)
    return names


def _factors(
    model: LoadedModel, names: Sequence[str], rows: Sequence[Row], temperature: float, seed: int,
    progress: Progress | None,
) -> dict[str, Factors]:  # fmt: skip
    """Factors of each projection, in the orientation [out, in], from labels that the model draws."""
    generator = torch.Generator().manual_seed(seed)
    moments = {name: Moments() for name in names}
    parts = portions(model, rows)
    with watched(model, names) as seen:
        for part in track(progress, parts, "reading curvature", len(parts)):
            (reading,) = read(model, [Request(tuple(part), frozenset({STATES}))])
            logits = head_of(model.module).logits(states_of(reading.states))
            loss = drawn_loss(logits / temperature, generator) * len(logits)
            gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
            for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
                moments[name].add(inputs.flatten(0, -2), gradient.flatten(0, -2), len(logits))
    return {name: moments[name].factors(name) for name in names}


def _climb(
    model: LoadedModel, rows: Split, trained: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor],
    deltas: dict[str, Tensor], factors: Mapping[str, Factors], steps: int, budget: float, damping: float,
    floor: float, progress: Progress | None,
) -> list[str]:  # fmt: skip
    """Take the steps, adding to ``deltas``; returns what was seen."""
    divergence = measure(model, rows.aside)
    notes, spent, trust = [], 0.0, 1.0
    turned = {name: is_conv1d(owner_of(model.module, name)[0]) for name in trained}
    for number in track(progress, range(1, steps + 1), "stepping uphill", steps):
        gradients, chance, left = uphill(model, rows.forget, trained, floor)
        notes.append(f"after {number - 1} steps: mean answer probability of forget facts {chance:.3g}, divergence "
                     f"{spent:.3g} nats")  # fmt: skip
        if not left:
            break
        moves, predicted = {}, 0.0
        for name, gradient in gradients.items():
            move = factors[name].natural(gradient.T if turned[name] else gradient, damping)
            predicted += factors[name].divergence(move)
            moves[name] = (move.T if turned[name] else move).to(deltas[name])
        start = {name: delta.clone() for name, delta in deltas.items()}

        def at(size: float, start: dict[str, Tensor] = start, moves: dict[str, Tensor] = moves) -> float:
            deltas.update({name: start[name] + size * moves[name] for name in start})
            put(trained, originals, deltas)
            return divergence()

        allowed = budget * (number / steps) ** 2
        first = trust * math.sqrt(budget / predicted) / steps
        size, spent = longest(at, allowed, first)
        trust *= size / first
        if size == 0:
            notes.append(f"step {number} found no length within {allowed:.3g} nats")
            break
    _, chance, _ = uphill(model, rows.forget, trained, floor)
    return [*notes, f"in the end: mean answer probability of forget facts {chance:.3g}, divergence {spent:.3g} nats"]
