"""How small a push on the residual stream makes the answer come out? Projected gradient ascent inside the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.capture import EditSite, capture
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import ItemScores, Measurement, Site
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.inside import _optimise as opt

_CURVE = ("latent perturbation", "size of the perturbation (norm / rms of the state)", "probability of the truth")
MEASURES = {
    "universal": MeasureInfo("knowledge", "white-box", teaches="the other half of the forget clusters", curve=_CURVE),
    "individual": MeasureInfo("knowledge", "white-box", votes=False, teaches="the true answer itself", curve=_CURVE),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"steps": 2, "points": 1, "alternatives": 7, "max_taught": 16, "max_items": 32},
    "standard": {},
    "thorough": {"steps": 32, "points": 6, "alternatives": 63, "max_taught": 128, "max_items": 200},
}
Array = NDArray[np.float64]


def latent_perturbation(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    scope: Literal["universal", "individual", "both"] = "both", epsilon: float = 4.0, points: int = 4,
    steps: int = 16, layers: list[int] | Literal["all"] = "all", company: float = 1.0, max_taught: int = 64,
    alternatives: int = 31, max_items: int = 100,
) -> Measurement:  # fmt: skip
    """Add a bounded vector to the residual stream at every prompt position of every layer, and ascend the gradient.

    At layer l and position t the state h that enters the block gets ``u * rms(h)`` with ||u||_2 <= eps; rms(h) =
    ||h||_2 / sqrt(width), of the arm's own unperturbed state there, so that eps = sqrt(width) is as long as h.
    Position 0 and the answer stay as they are; all ``layers`` are perturbed at once.  ``points`` sizes up to
    ``epsilon``, each twice the one before, are tried in rising order, with ``steps`` normalised steps of 2.5 eps /
    ``steps`` from the best u of the size before.
    ``universal``: one u per layer, towards the true answers of one half of the forget clusters and of ``company``
    retain items for each (at most ``max_taught``), asked on the other half, halves swapped; the size with the highest
    mean, the same maximum on every arm.  ``individual``: each item gets a u per layer and position towards its own
    true answer against the alternatives, best so far, so that its curve never falls; the attack names the answer, and
    only the same size on an arm that never knew says what that is worth: it does not vote.  Value: the truth's
    probability under decoding confined to the candidates.  Source: projected gradient, Madry et al. 2018, arXiv
    1706.06083; in latent space, Casper et al. 2024, arXiv 2403.05030.
    Cost: ``points`` x ``steps`` forward and backward passes over the items, and 2 x that over ``max_taught`` texts; a
    half-precision model is copied to float32.

    The value at one size does not show how small a perturbation would do; where every arm reaches the truth nothing
    is shown about knowledge.
    """
    if not (epsilon > 0 and points >= 1 and steps >= 1):
        raise UsageError(f"Verifier 'latent_perturbation' has epsilon {epsilon}, {points} points and {steps} steps: "
                         "each must be positive.")  # fmt: skip
    sizes = [epsilon / 2**k for k in reversed(range(points))]
    where = [Site("resid_pre", n) for n in (range(model.n_layers) if layers == "all" else sorted(layers))]
    parts: dict[str, list[tuple[Sequence[Item], Array]]] = {}
    with opt.frozen(model) as exact:
        if scope != "individual":
            halves = opt.crossed("latent_perturbation", view, seed=seed, teach="halves", company=company,
                                 max_taught=max_taught, max_items=max_items)  # fmt: skip
            for part in track(progress, halves, "perturbing all prompts alike"):
                chosen = path.kept_paths(references, exact, part.items, view.knowledge, forms=1, limit=alternatives)
                rows = _universal(exact, part, chosen, where, sizes, steps)
                parts.setdefault("universal", []).append((part.items, rows))
        if scope != "universal":
            items = ask.limited(view.forget, max_items, seed)
            chosen = path.kept_paths(references, exact, items, view.knowledge, forms=1, limit=alternatives)
            parts["individual"] = [(items, _individual(exact, len(items), chosen, where, sizes, steps, progress))]
    x = (0.0, *sizes)
    scores: dict[str, ItemScores] = {}
    series, facts = {"x": x}, {}
    for name, found in parts.items():
        given, series[name], best = opt.best_of(name, found, view, alternatives)
        scores |= given
        facts[f"best size of {name}"] = x[best]
    return Measurement(scores, series, facts)


def _scaled(model: LoadedModel, paths: Sequence[path.Path], where: Sequence[Site]) -> list[opt.Lot]:
    """Batches with rms(h) [layers, b, s] of the unperturbed states, 0 outside the prompt and at position 0."""
    out = []
    for lot in opt.lots(model, opt.behind(model, paths, 0)):
        column = torch.arange(lot.rows.batch.ids.shape[1])
        prompt = (column > 0) & (column <= lot.rows.places[:, :1])
        states = capture(model, where, lot.rows.batch, gather="all")
        scale = torch.stack([states[site].float().square().mean(-1).sqrt().to(model.device) for site in where])
        out.append(lot._replace(scale=torch.where(prompt.to(scale.device), scale, 0.0)))
    return out


def _pushes(where: Sequence[Site]) -> opt.Edits:
    """Hooks that add u * rms(h); u is [layers, d], or [layers, b, s, d] with each position's own."""

    def edits(u: Tensor, lot: opt.Lot) -> Mapping[Site, EditSite]:
        def push(n: int) -> EditSite:
            def add(x: Tensor) -> Tensor:
                return x + (lot.scale[n][..., None] * u[n]).to(x.device, x.dtype)

            return add

        return {site: push(n) for n, site in enumerate(where)}

    return edits


def _stepped(u: Tensor, direction: Tensor, size: float, steps: int) -> Tensor:
    """One normalised step and the projection onto ||u||_2 <= size, for each vector along the last dimension."""
    moved = u + (2.5 * size / steps) * torch.nn.functional.normalize(direction, dim=-1)
    projected: Tensor = moved * (size / moved.norm(dim=-1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
    return projected


def _universal(
    model: LoadedModel, part: opt.Asked, paths: Sequence[path.Path], where: Sequence[Site], sizes: Sequence[float],
    steps: int,
) -> Array:  # fmt: skip
    """The truth's probability [1 + sizes, items] with one u per layer, the best so far on what is taught."""
    taught, asked = _scaled(model, opt.told(model, part.taught), where), _scaled(model, paths, where)
    edits, best = _pushes(where), torch.zeros(len(where), model.width, device=model.device)
    lowest = float("inf")
    rows = [path.probability(model, len(part.items), paths)]
    for size in sizes:
        u = best
        for step in range(steps + 1):
            value, gradient = opt.loss(model, taught, u, edits)
            if value < lowest:
                lowest, best = value, u
            if gradient is None or step == steps:
                break
            u = _stepped(u, -gradient, size, steps)
        rows.append(opt.probability(model, len(part.items), paths, asked, partial(edits, best)))
    return np.stack(rows)


def _individual(
    model: LoadedModel, count: int, paths: Sequence[path.Path], where: Sequence[Site], sizes: Sequence[float],
    steps: int, progress: Progress | None,
) -> Array:  # fmt: skip
    """The truth's probability [1 + sizes, items] with each item's own u, the best so far."""
    edits = _pushes(where)
    table = np.zeros((1 + len(sizes), len(paths)))
    for lot in track(progress, _scaled(model, paths, where), "perturbing each prompt"):
        best = torch.zeros(len(where), *lot.rows.batch.ids.shape, model.width, device=model.device)
        highest = opt.slope(model, lot, best, edits, opt.odds)[0]
        table[0, lot.rows.which] = highest.double().exp().cpu()
        for k, size in enumerate(sizes, 1):
            u = best
            for step in range(steps + 1):
                value, gradient = opt.slope(model, lot, u, edits, opt.odds)
                better = value > highest
                highest = torch.where(better, value, highest)
                best = torch.where(better.to(best.device)[:, None, None], u, best)
                if gradient is None or step == steps:
                    break
                u = _stepped(u, gradient, size, steps)
            table[k, lot.rows.which] = highest.double().exp().cpu()
    return path.by_item(count, paths, table)
