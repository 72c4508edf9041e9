"""What ROME, MEMIT and AlphaEdit share: values for the forget facts, a walk over layers, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repforget.artifact import LowRankDelta
from repforget.edit.surgery._closed_form import Delta
from repforget.edit.surgery._requests import Requests
from repforget.edit.surgery._values import Values, Wish, batches, losses, mean_at_keys, optimise, written
from repforget.models.load import LoadedModel
from repforget.models.norms import freeze
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Site

SOFT = 1e-6  # share of the mean squared gain below which a norm's coordinate is not divided by
Solve = Callable[[int, Tensor, Tensor], Delta]  # layer, keys [n, m], residuals [n, d] -> delta


@dataclass(frozen=True)
class Walk:
    """Deltas per layer, the values that were aimed at, and the objective [g] with the deltas in place."""

    deltas: dict[int, Delta]
    values: Values
    reached: Tensor
    outside: Tensor  # [g] the same without a margin (for lens: 0 where every rank is as asked)

    def operations(self, model: LoadedModel) -> list[LowRankDelta]:
        layers = site_map(model.module).anatomy.layers
        return [delta.operation(f"{layers[layer].down}.weight") for layer, delta in self.deltas.items()]

    def notes(self, asked: Requests, wish: Wish) -> tuple[str, ...]:
        """What was asked, and how far values and weights came, in nats."""
        numbers = ", ".join(f"{name} {float(x.mean()):.3f}" for name, x in (
            ("before", self.values.before), ("with the values", self.values.after),
            ("with the weights", self.reached)))  # fmt: skip
        notes = [f"{len(asked.names)} values for {sum(not row.kept for row in asked.rows)} prompts",
                 f"objective {wish.aim}, mean in nats: {numbers}"]  # fmt: skip
        if wish.aim == "lens":
            notes.append(f"the answer stays off the {wish.k} best and worst of the lens at every listed layer for "
                         f"{float((self.outside == 0).double().mean()):.3f} of the values")  # fmt: skip
        if asked.skipped:
            notes.append(f"{asked.skipped} prompts have their key at the first token and were left out")
        return tuple(notes)


def walk(
    model: LoadedModel, asked: Requests, layers: Sequence[int], wish: Wish, solve: Solve,
    progress: Progress | None = None,
) -> Walk:  # fmt: skip
    """Find values at the last of ``layers``, and write them from all of them, the lowest first.

    Each layer writes an equal share of what is still missing at the output of the last layer's block, with keys read
    again after every layer (MEMIT's spreading). A norm between a projection and the residual stream is undone at its
    present scale, to first order; with a single layer nothing has to pass it and the value is exact.
    """
    last = layers[-1]
    block, down = Site("resid_post", last), _outputs(model, asked, layers)
    values = optimise(model, asked, last, wish, down[last], progress)
    goal = mean_at_keys(model, asked, [block], (last, values.added))[block]
    deltas: dict[int, Delta] = {}
    for number, layer in enumerate(track(progress, layers, "solving layers", len(layers))):
        key = Site("mlp_post", layer)
        with written(model, deltas):
            now = mean_at_keys(model, asked, [key, block])
            if len(layers) == 1:
                missing = values.added
            else:
                share = (goal - now[block]) / (len(layers) - number)
                missing = _before_norm(model, layer, _projected(model, layer, now[key]), share)
        device = torch.device("cpu") if model.device.type == "mps" else model.device
        deltas[layer] = solve(layer, now[key].to(device), missing.to(device))
    with written(model, deltas):
        reached, outside = (_measured(model, asked, w) for w in (wish, replace(wish, margin=0.0)))
    return Walk(deltas, values, reached, outside)


def _measured(model: LoadedModel, asked: Requests, wish: Wish) -> Tensor:
    found = [losses(model, part, batch, wish)[0].detach() for _, part, batch in batches(model, asked)]
    return torch.cat(found).double().cpu()


def _outputs(model: LoadedModel, asked: Requests, layers: Sequence[int]) -> dict[int, Tensor]:
    """What the last layer's projection writes at the keys [g, d] float64."""
    last = layers[-1]
    keys = mean_at_keys(model, asked, [Site("mlp_post", last)])
    return {last: _projected(model, last, keys[Site("mlp_post", last)])}


@torch.no_grad()
def _projected(model: LoadedModel, layer: int, keys: Tensor) -> Tensor:
    down = model.module.get_submodule(site_map(model.module).anatomy.layers[layer].down)
    weight: Tensor = down.weight
    return down(keys.to(weight.device, weight.dtype)).double().cpu()  # type: ignore[no-any-return]


def _before_norm(model: LoadedModel, layer: int, state: Tensor, change: Tensor) -> Tensor:
    """What has to be added to ``state`` [g, d] so that the norm behind it (if any) writes ``change`` more."""
    path = site_map(model.module).anatomy.layers[layer].mlp_post_norm
    if path is None:
        return change
    norm = model.module.get_submodule(path)
    weight: Tensor = norm.weight  # type: ignore[assignment]
    frozen = freeze(norm, state.to(weight.device, weight.dtype))
    slope = (frozen.gain * frozen.scale).cpu()
    return change * slope / (slope.square() + SOFT * slope.square().mean(1, keepdim=True))
