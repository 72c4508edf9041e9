"""A few steps uphill on the forget facts, in the metric of what must stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from repforget.artifact import DenseDelta, Edit
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.edit._collect import subsample
from repforget.edit.surgery._rows import checked
from repforget.edit.train._data import Row, fact_rows, text_rows
from repforget.edit.train._head import head_of
from repforget.influence.factors import Factors, Moments, watched
from repforget.edit.train._pass import LABELS, STATES, Request, read
from repforget.errors import KnowledgeError, SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Localization
from repforget.training import only
from repforget.training.optimizers import drawn_loss

LOGITS = 1 << 26  # made at a time: 256 MiB in float32
TRIES = 8  # lengths tried per step
CLOSE = 0.7  # share of the allowed divergence that is close enough


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
    rows = _rows(model, data, max_facts, seed)
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
        _put(trained, originals, None)
    operations = [DenseDelta(name, delta.cpu()) for name, delta in deltas.items()]
    settings = {"layers": layers, "top_layers": top_layers, "steps": steps, "max_divergence": max_divergence,
                "damping": damping, "temperature": temperature, "floor": floor, "max_facts": max_facts}  # fmt: skip
    return Edit.build("k_fade", settings, model, data.digest, operations, notes=notes)


@dataclass(frozen=True)
class _Rows:
    forget: tuple[Row, ...]
    kept: tuple[Row, ...]  # of which the factors are made
    aside: tuple[tuple[Row, ...], ...]  # on which the divergence is measured, group by group


def _check(steps: int, budget: float, damping: float, temperature: float) -> None:
    if steps < 1 or min(budget, damping, temperature) <= 0:
        raise UsageError(f"k_fade was given {steps} steps, a divergence of {budget}, a damping of {damping} and a "
                         f"temperature of {temperature}: give at least one step and positive numbers.")  # fmt: skip


def _rows(model: LoadedModel, data: EditData, max_facts: int, seed: int) -> _Rows:
    if not data.forget or not data.retain:
        missing = "retain" if data.forget else "forget"
        raise KnowledgeError(f"k_fade needs facts to forget and facts to keep: the knowledge has no {missing} facts.")
    forget, _ = fact_rows(model, subsample(data.forget, max_facts, seed), "forget")
    found, facts = fact_rows(model, subsample(data.retain, max_facts, seed), "retain")
    apart = checked(facts)
    held = tuple(row for row, fact in zip(found, facts, strict=True) if fact.cluster in apart)
    kept = tuple(row for row, fact in zip(found, facts, strict=True) if fact.cluster not in apart) or held
    texts = text_rows(model, data.general, "general") if data.general else ()
    return _Rows(forget, kept + (texts[1::2] or texts), tuple(group for group in (held, texts[::2]) if group))


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
    parts = _parts(model, rows)
    with watched(model, names) as seen:
        for part in track(progress, parts, "reading curvature", len(parts)):
            (reading,) = read(model, [Request(tuple(part), frozenset({STATES}))])
            logits = head_of(model.module).logits(_states(reading.states))
            loss = drawn_loss(logits / temperature, generator) * len(logits)
            gradients = torch.autograd.grad(loss, [output for _, output in seen.values()])
            for (name, (inputs, _)), gradient in zip(seen.items(), gradients, strict=True):
                moments[name].add(inputs.flatten(0, -2), gradient.flatten(0, -2), len(logits))
    return {name: moments[name].factors(name) for name in names}


def _climb(
    model: LoadedModel, rows: _Rows, trained: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor],
    deltas: dict[str, Tensor], factors: Mapping[str, Factors], steps: int, budget: float, damping: float,
    floor: float, progress: Progress | None,
) -> list[str]:  # fmt: skip
    """Take the steps, adding to ``deltas``; returns what was seen."""
    divergence = _measure(model, rows.aside)
    notes, spent, trust = [], 0.0, 1.0
    turned = {name: is_conv1d(owner_of(model.module, name)[0]) for name in trained}
    for number in track(progress, range(1, steps + 1), "stepping uphill", steps):
        gradients, chance, left = _uphill(model, rows.forget, trained, floor)
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
            _put(trained, originals, deltas)
            return divergence()

        allowed = budget * (number / steps) ** 2
        first = trust * math.sqrt(budget / predicted) / steps
        size, spent = _longest(at, allowed, first)
        trust *= size / first
        if size == 0:
            notes.append(f"step {number} found no length within {allowed:.3g} nats")
            break
    _, chance, _ = _uphill(model, rows.forget, trained, floor)
    return [*notes, f"in the end: mean answer probability of forget facts {chance:.3g}, divergence {spent:.3g} nats"]


def _longest(at: Callable[[float], float], allowed: float, first: float) -> tuple[float, float]:
    """The longest of some lengths whose divergence is ``allowed``, and that divergence; leaves the weights there."""
    low, spent, high, size = 0.0, math.inf, math.inf, first
    for _ in range(TRIES):
        found = at(size)
        if found <= allowed:
            low, spent = size, found
            if found >= CLOSE * allowed:
                return low, spent
        else:  # not a number counts as too far
            high = size
        size = 4 * low if high == math.inf else math.sqrt(low * high) if low else high / 8
    return low, at(low)


def _uphill(
    model: LoadedModel, rows: Sequence[Row], trained: Mapping[str, nn.Parameter], floor: float
) -> tuple[dict[str, Tensor], float, int]:
    """Gradient of the mean negative log-probability of answers above ``floor``; mean probability; how many are it."""
    chosen = list(trained.values())
    total = {name: torch.zeros(p.shape, device=p.device) for name, p in trained.items()}
    chances: list[Tensor] = []
    for part in _parts(model, rows):
        (reading,) = read(model, [Request(tuple(part), frozenset({LABELS}))])
        if reading.scores is None:
            raise RuntimeError("the answers were not scored")
        sums = reading.scores.sums
        chances.append(sums.detach().exp())
        known = chances[-1] > floor
        if bool(known.any()):
            loss = -sums[known].sum() / len(rows)
            for kept, gradient in zip(total.values(), torch.autograd.grad(loss, chosen), strict=True):
                kept += gradient
    joined = torch.cat(chances)
    return total, float(joined.mean()), int((joined > floor).sum())


@torch.no_grad()
def _put(
    trained: Mapping[str, nn.Parameter], originals: Mapping[str, Tensor], deltas: Mapping[str, Tensor] | None
) -> None:
    for name, parameter in trained.items():
        start = originals[name]
        parameter.copy_(start if deltas is None else start.float() + deltas[name])


def _measure(model: LoadedModel, groups: Sequence[Sequence[Row]]) -> Callable[[], float]:
    """A function that says how far the model has moved: mean divergence (nats per token), that of the worst group."""
    parts = [_parts(model, _few(model, rows)) for rows in groups]

    @torch.no_grad()
    def told(part: Sequence[Row]) -> Tensor:
        (reading,) = read(model, [Request(tuple(part), frozenset({STATES}))])
        return head_of(model.module).logits(_states(reading.states)).log_softmax(-1)

    before = [[told(part).cpu() for part in group] for group in parts]

    def divergence() -> float:
        found = []
        for group, known in zip(parts, before, strict=True):
            pairs = ((b.to(model.device), told(part)) for b, part in zip(known, group, strict=True))
            found.append(float(torch.cat([(b.exp() * (b - now)).sum(-1) for b, now in pairs]).double().mean()))
        return max(found)

    return divergence


def _few(model: LoadedModel, rows: Sequence[Row]) -> list[Row]:
    """As many rows, at equal distances, as make that number of logits, all of which are remembered."""
    labels = sum(row.labels for row in rows)
    return list(rows[:: -(-labels * model.vocab_size // LOGITS)])


def _parts(model: LoadedModel, rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in parts of like length that make a bounded number of logits at a time."""
    most = max(1, LOGITS // model.vocab_size)
    parts: list[list[Row]] = []
    size = 0
    for row in sorted(rows, key=lambda row: (len(row.ids), row.ids)):
        if not parts or size + row.labels > most:
            parts.append([])
            size = 0
        parts[-1].append(row)
        size += row.labels
    return parts


def _states(states: Tensor | None) -> Tensor:
    if states is None:
        raise RuntimeError("the states were not read")
    return states
