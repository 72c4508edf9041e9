"""Attribution patching: one gradient estimates every patch, and the best are re-checked exactly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from repforget.causal import (
    TOKEN_BUDGET,
    Metric,
    Positions,
    Prepared,
    Run,
    answer_metric,
    columns_of,
    prepare,
)
from repforget.errors import NumericalError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, Moves, Task, exact_band, forwards, measure, pearson, ranked
from repforget.locate._tasks import corrupted_task
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site


def attribution_patching(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("attn_out", "mlp_out"), layers: Layers = "all",
    mode: Literal["denoise", "noise"] = "denoise", positions: Positions = "all", metric: Metric = "logprob",
    items: int = 64, contrast: float = 0.0, recheck: int = 10, top: int | Literal["auto"] = "auto",
    draws: int = 100,
) -> Localization:  # fmt: skip
    """Rank components by gradient times difference, then measure the best ones again by exact patching.

    Per node: sum over positions and width of (a_donor - a_base) * dM/da at the base, which is the first-order
    estimate of the exact patch; base and donor are the corrupted and the clean prompt for ``denoise`` and the
    reverse for ``noise``, normalised as in activation_patching.  Nodes may be whole sites, ``heads`` (slices
    of attn_z) or ``neurons`` (of mlp_post).  The first ``recheck`` components carry their exact score, the
    rest the estimate; the correlation of the two is in the notes.  Tables also hold mean |estimate|, where
    signs do not cancel.

    Cost: two forward passes and one backward pass per fact for all nodes together, plus exact patches of the
    best. What it does not show: effects through saturated attention or logits (their gradient is zero); exact
    patches and the band cover only the components that the estimate put first.
    Source: Syed, Rager & Conmy 2023, arXiv 2310.10348.
    """
    components = expand_nodes(model, nodes, layers)
    task, notes = corrupted_task(model, knowledge, items, seed, mode, positions, metric, contrast)
    sign = 1.0 if mode == "denoise" else -1.0
    moves = estimate(task, components, progress, sign)
    scores = moves.scores(contrast)
    order, _ = ranked(components, scores)
    best = order[: min(recheck, len(order))]
    spent = forwards(task, 0) + float(len(task.forget) + len(task.retain))
    if best:
        exact = measure(task, [(c,) for c in best], progress, sign).scores(contrast)
        index = {c: k for k, c in enumerate(components)}
        guessed = [float(scores[index[c]]) for c in best]
        scores = scores.copy()
        for component, value in zip(best, exact, strict=True):
            scores[index[component]] = value
        spent += forwards(task, len(best))
        notes = (*notes, f"The first {len(best)} of {len(components)} components carry exact patching "
                         f"effects, the rest first-order estimates; Pearson correlation of the two on those: "
                         f"{pearson(guessed, exact):.2f}.")  # fmt: skip
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    band, band_notes, band_cost = exact_band(task, components, half_order, top=top, draws=draws, seed=seed, sign=sign,
                                             progress=progress)  # fmt: skip
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "mode": mode, "positions": positions,
                                "metric": metric, "items": items, "contrast": contrast, "recheck": recheck,
                                "top": top, "draws": draws, "seed": seed}  # fmt: skip
    backwards = float(len(task.forget) + len(task.retain))
    cost = {"forwards": spent + band_cost, "backwards": backwards, "facts": float(len(task.forget))}
    absolute = np.abs(moves.forget).mean(axis=1) / float(moves.gap.mean())
    tables = {**heat_maps(components, moves.scores(contrast), f"{mode} estimate"),
              **heat_maps(components, absolute, f"mean |{mode} estimate|")}  # fmt: skip
    return Localization("attribution_patching", order, values, band, cost, settings, tables, (*notes, *band_notes))


def estimate(task: Task, components: Sequence[Component], progress: Progress | None = None,
             sign: float = 1.0) -> Moves:  # fmt: skip
    """First-order moves of every single-component patch, in the form that exact patching gives."""
    forget = node_attributions(task.model, task.forget, components, task.metric, progress)
    retain = (node_attributions(task.model, task.retain, components, task.metric, progress) if task.retain
              else np.zeros((len(components), 0)))  # fmt: skip
    gap = measure(task, [], progress, sign).gap
    return Moves(sign * forget, gap, sign * retain, tuple(r.cluster for r in task.forget),
                 tuple(r.cluster for r in task.retain))  # fmt: skip


def node_attributions(
    model: LoadedModel, runs: Sequence[Run], components: Sequence[Component], metric: Metric = "logprob",
    progress: Progress | None = None, *, token_budget: int = TOKEN_BUDGET,
) -> Array:  # fmt: skip
    """(a_donor - a_base) * dM/da summed over patched positions and each component's columns [p, n],
    float64."""
    located = [columns_of(model, c) for c in components]
    sites = sorted({site for site, _ in located})
    result = np.zeros((len(components), len(runs)), dtype=np.float64)
    batches = list(prepare(model, runs, token_budget=max(1, token_budget // 4)))
    for item in track(progress, batches, "attributing"):
        products = _products(model, item, sites, metric)
        sums = {site: value.sum(-1).cpu().numpy() for site, value in products.items()}
        tables = {site: products[site].cpu().numpy() for site, columns in located if columns is not None}
        for k, (site, columns) in enumerate(located):
            rows = list(item.rows)
            result[k, rows] = sums[site] if columns is None else tables[site][:, columns.start : columns.stop].sum(-1)
    if not np.isfinite(result).all():
        raise NumericalError(f"Gradients of model '{model.name}' are not finite: load it in float32 and try "
                             "again.")
    return result


def _products(model: LoadedModel, item: Prepared, sites: Sequence[Site], metric: Metric) -> dict[Site, Tensor]:
    """Site -> difference times gradient at the base, summed over patched positions [b, d], float64."""
    donor = capture(model, sites, item.donor, gather="all")
    base: dict[Site, Tensor] = {}
    shift: dict[Site, Tensor] = {}

    def probe(site: Site) -> Any:
        def add_zero(x: Tensor) -> Tensor:  # a leaf of its own, so that frozen parameters do not matter
            base[site] = x.detach().clone()
            shift[site] = torch.zeros_like(x, requires_grad=True)
            return x + shift[site]

        return add_zero

    with torch.enable_grad(), hooks(model, {site: probe(site) for site in sites}):
        total = answer_metric(model, item.base, item, metric).sum()
        gradients = torch.autograd.grad(total, [shift[site] for site in sites], allow_unused=True)
    found: dict[Site, Tensor] = {}
    for site, gradient in zip(sites, gradients, strict=True):
        slope = torch.zeros_like(base[site]) if gradient is None else gradient
        change = donor[site].to(base[site].device) - base[site]
        where = item.where.to(change.device)
        found[site] = (change.double() * slope.double() * where).sum(dim=1)
    return found
