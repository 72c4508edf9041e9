"""Does one vector bring the knowledge back? Then it was suppressed, and the weights still hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.inside.representation_similarity import states

MEASURES = {
    "own": MeasureInfo("knowledge", "white-box", teaches="which direction helps on the other half of the subjects"),
    "original": MeasureInfo("knowledge", "white-box", votes=False,
                            teaches="the mean state of the original on the other half of the subjects"),
}  # fmt: skip
JOINS = "thorough"
HELD_OUT = True
BUDGETS: Budgets = {
    "quick": {"strengths": [1.0], "max_layers": 4, "random": 2, "max_items": 64},
    "standard": {},
    "thorough": {"strengths": [0.5, 1.0, 2.0, 4.0, 8.0], "max_layers": 32, "random": 20, "max_items": 1000},
}
Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Move:
    """One thing to do to the states of a layer: add ``strength`` times a vector, or project it out."""

    layer: int
    vector: Tensor
    strength: float  # NaN: project out

    def __call__(self, x: Tensor) -> Tensor:
        v = self.vector.to(x.device, torch.float32)
        if np.isnan(self.strength):
            unit = v / v.norm().clamp(min=1e-12)
            moved: Tensor = x.float() - (x.float() @ unit)[..., None] * unit
        else:
            moved = x.float() + self.strength * v
        return moved.to(x.dtype)


def restoring_direction(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    strengths: list[float] = [1.0, 2.0, 4.0],  # noqa: B006 (never changed; the signature is the configuration)
    max_layers: int = 8, random: int = 4, alternatives: int = 31, max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Add or project out one mean-difference vector at one layer, chosen on half of the subjects, asked on the others.

    ``own``: the vector is the arm's mean state on retained questions minus its mean state on forget questions, at the
    position before the answer; it needs nothing but the arm.  ``original``: the original's mean on the forget questions
    minus the arm's, for whoever holds the original too (zero on the original itself).  Layer, strength, and adding
    against projecting out are those with the highest mean on one half of the forget subjects; the value is the
    probability of the truth, decoding confined to the candidates, on the other half; halves are swapped.  "Nothing
    changed" is among the choices.  Every arm is searched the same way.  Fact: how much ``random`` vectors of the same
    length gain, chosen likewise.  Source of the idea: Łucki et al. 2024, arXiv 2409.18025.  Cost: per half, layers x
    (strengths + 1) passes over the items for each of the two kinds and again for each of the ``random`` vectors.

    No gain does not show that nothing is stored: one direction at one layer is a weak attack.
    """
    if not strengths:
        raise UsageError("Verifier 'restoring_direction' was given no strengths: give at least one, such as 1.0.")
    halves = view.halves(seed)
    if not all(halves):
        raise UsageError(f"Verifier 'restoring_direction' needs two forget clusters on split '{view.split}'.")
    parts = [ask.limited(half, max_items // 2, seed) for half in halves]
    kept = ask.limited([*view.support, *view.retain], max(8, max_items), seed)
    layers = sorted({round(x) for x in np.linspace(0, model.n_layers - 1, min(max_layers, model.n_layers))})
    out: dict[str, list[Array]] = {"own": [], "original": []}
    gains: list[float] = []
    steps = track(progress, [(a, b) for a, b in (parts, parts[::-1])], "searching directions", 2)
    for learned, asked in steps:
        known = _vectors(model, references.original, learned, kept, layers)
        attack = _Attack(model, references, view, learned, asked, alternatives)
        plain = attack.value(None, on_asked=True)
        for name, vectors in known.items():
            out[name].append(attack.best(_moves(vectors, strengths)))
        drawn = _random(known["own"], random, seed)
        gains.append(float(np.nanmean(attack.best(_moves(drawn, strengths)) - plain)) if drawn else 0.0)
    items = [*parts[1], *parts[0]]
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    values = {name: ask.scores(items, np.concatenate(found)) for name, found in out.items()}
    priors = {f"{name}_prior": before for name in values}
    return Measurement({**values, **priors}, {}, {"gain by random vectors": float(np.mean(gains))})


class _Attack:
    """Values of one arm under a move, on the half where it is chosen and on the half where it counts."""

    def __init__(
        self, model: LoadedModel, references: References, view: View, learned: Sequence[Item], asked: Sequence[Item],
        alternatives: int,
    ) -> None:  # fmt: skip
        self.model = model
        self.sets = [
            (len(group), path.kept_paths(references, model, group, view.knowledge, forms=1, limit=alternatives))
            for group in (learned, asked)
        ]

    def value(self, move: _Move | None, *, on_asked: bool) -> Array:
        """Probability of the truth per item under ``move``."""
        count, chosen = self.sets[on_asked]
        with _moved(self.model, move):
            return path.probability(self.model, count, chosen)

    def best(self, moves: Sequence[_Move]) -> Array:
        """Values on the asked half under the move with the highest mean on the other; the first of equals."""
        options: list[_Move | None] = [None, *moves]
        means = [float(np.nanmean(self.value(move, on_asked=False))) for move in options]
        return self.value(options[int(np.argmax(means))], on_asked=True)


@contextmanager
def _moved(model: LoadedModel, move: _Move | None) -> Iterator[None]:
    if move is None:
        yield
        return
    function: Callable[[Tensor], Tensor] = move
    with hooks(model, {Site("resid_post", move.layer): function}):
        yield


def _moves(vectors: Sequence[tuple[int, Tensor]], strengths: Sequence[float]) -> list[_Move]:
    moves = [_Move(layer, vector, s) for layer, vector in vectors for s in (*strengths, float("nan"))]
    return [move for move in moves if float(move.vector.norm()) > 0.0]


def _vectors(
    model: LoadedModel, original: LoadedModel, learned: Sequence[Item], kept: Sequence[Item], layers: Sequence[int]
) -> dict[str, list[tuple[int, Tensor]]]:
    """Per kind the mean differences by layer, in float64; "original" is empty for a model of another shape."""
    own = _means(model, learned, layers)
    retained = _means(model, kept, layers)
    found = {"own": [(layer, retained[layer] - own[layer]) for layer in layers], "original": []}
    if (model.width, model.n_layers) == (original.width, original.n_layers):
        theirs = _means(original, learned, layers)
        found["original"] = [(layer, theirs[layer] - own[layer]) for layer in layers]
    return found


def _means(model: LoadedModel, items: Sequence[Item], layers: Sequence[int]) -> dict[int, Tensor]:
    """Mean state before the answer over the items' first questions, per layer [d] in float64 on the CPU."""
    found = states(model, [item.questions[0] for item in items])
    return {layer: found[layer].mean(0) for layer in layers}


def _random(vectors: Sequence[tuple[int, Tensor]], count: int, seed: int) -> list[tuple[int, Tensor]]:
    """``count`` random vectors per layer with the length of that layer's own."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(layer, torch.randn(len(v), generator=generator, dtype=torch.float64), v.norm())
             for layer, v in vectors for _ in range(count)]  # fmt: skip
    return [(layer, noise * (length / noise.norm())) for layer, noise, length in drawn]
