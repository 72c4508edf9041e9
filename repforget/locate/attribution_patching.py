"""Attribution patching: one gradient estimates every patch, and the best are re-checked exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    patch_effects,
    prepare,
)
from repforget.errors import NumericalError, UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import (
    Array,
    BandPlan,
    Control,
    Moves,
    Task,
    exact_band,
    forwards,
    join,
    measure,
    moves_of,
    pearson,
    ranked,
)
from repforget.locate._tasks import Mode, corrupted_tasks
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site

EMBED = Site("embed")


def attribution_patching(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("attn_out", "mlp_out"), layers: Layers = "all",
    mode: Mode = "both", positions: Positions = "all", metric: Metric = "logprob",
    items: int = 64, partners: int = 2, contrast: float = 0.0, steps: int = 8, recheck: int = 10,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank components by gradient times difference, then measure the best ones again by exact patching.

    Per node: sum over positions and width of (a_donor - a_base) * dM/da, which is the first-order estimate of the
    exact patch; pairs, ``mode``, ``contrast`` and the scale are those of activation_patching. ``steps=1`` takes the
    gradient at the base alone, where a model that is sure of its answer has almost none; more steps average it over
    the midpoints of the line between the token embeddings of base and donor. Nodes may be whole sites, ``heads``
    (slices of attn_z) or ``neurons`` (of mlp_post). The first ``recheck`` components carry their exact score, the rest
    the estimate, and the notes give the correlation of the two. Tables also hold mean |estimate|, where signs do not
    cancel.

    Cost: two forward passes and ``steps`` forward and backward passes per pair for all nodes together, plus exact
    patches of the best and of the band.
    What it does not show: effects through saturated attention or logits (their gradient is zero); exact patches and
    the band cover only the components that the estimate put first.
    Source: Syed, Rager & Conmy 2023, arXiv 2310.10348; gradients along a path: Hanna, Pezzelle & Belinkov 2024,
    arXiv 2403.17806 (with the midpoint rule).
    """
    components = expand_nodes(model, nodes, layers)
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, partners=partners, mode=mode,
                                   positions=positions, metric=metric, contrast=contrast)  # fmt: skip
    moves = estimate(tasks, components, steps, progress)
    scores = moves.scores(contrast)
    order, _ = ranked(components, scores)
    best = order[: min(recheck, len(order))]
    backwards = float(steps * sum(len(task.forget) + len(task.retain) for task in tasks))
    spent = forwards(tasks, len(best)) + backwards
    if best:
        scores, note = _rechecked(tasks, components, scores, best, progress)
        notes = (*notes, note)
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    plan = BandPlan(top, draws, control, seed)
    band, band_notes, band_cost = exact_band(tasks, components, half_order, plan, progress)
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "mode": mode, "positions": positions,
                                "metric": metric, "items": items, "partners": partners, "contrast": contrast,
                                "steps": steps, "recheck": recheck, "top": top, "draws": draws, "control": control,
                                "seed": seed}  # fmt: skip
    facts = float(len({run.id for run in tasks[0].forget}))
    cost = {"forwards": spent + band_cost, "backwards": backwards, "facts": facts}
    absolute = np.abs(moves.forget).mean(axis=1) / float(moves.gap.mean())
    tables = {**heat_maps(components, moves.scores(contrast), f"{mode} estimate"),
              **heat_maps(components, absolute, f"mean |{mode} estimate|")}  # fmt: skip
    return Localization("attribution_patching", order, values, band, cost, settings, tables, (*notes, *band_notes))


def _rechecked(
    tasks: Sequence[Task], components: Sequence[Component], scores: Array, best: Sequence[Component],
    progress: Progress | None,
) -> tuple[Array, str]:  # fmt: skip
    """Replace the estimates of ``best`` by exact effects, and say how well the two agree."""
    exact = measure(tasks, [(c,) for c in best], progress).scores(tasks[0].contrast)
    places = [components.index(c) for c in best]
    agreement = pearson(scores[places], exact)
    mixed = scores.copy()
    mixed[places] = exact
    told = "" if np.isnan(agreement) else f"; their Pearson correlation with the estimates is {agreement:.2f}"
    return mixed, (f"The first {len(best)} of {len(components)} components carry exact patching effects, the others "
                   f"first-order estimates{told}.")  # fmt: skip


def estimate(
    tasks: Sequence[Task], components: Sequence[Component], steps: int = 1, progress: Progress | None = None
) -> Moves:
    """First-order moves of every single-component patch, in the form that exact patching gives."""
    return join([_estimate(task, components, steps, progress) for task in tasks])


def _estimate(task: Task, components: Sequence[Component], steps: int, progress: Progress | None) -> Moves:
    gap = patch_effects(task.model, task.forget, [], metric=task.metric).gap
    forget = node_attributions(task.model, task.forget, components, task.metric, progress, steps=steps)
    retain = np.zeros((len(components), 0))
    if task.retain:
        retain = node_attributions(task.model, task.retain, components, task.metric, progress, steps=steps)
    return moves_of(task, forget, gap, retain)


def node_attributions(
    model: LoadedModel, runs: Sequence[Run], components: Sequence[Component], metric: Metric = "logprob",
    progress: Progress | None = None, *, steps: int = 1, token_budget: int = TOKEN_BUDGET,
) -> Array:  # fmt: skip
    """(a_donor - a_base) * dM/da summed over patched positions and each component's columns [p, n], float64.

    The gradient is taken at the base (``steps=1``), or averaged over the midpoints of ``steps`` equal parts of the
    straight line between the token embeddings of base and donor.
    """
    if steps < 1:
        raise UsageError(f"Attribution needs at least one gradient step, not {steps}: 1 is the plain estimate.")
    located = [columns_of(model, c) for c in components]
    sites = sorted({site for site, _ in located})
    result = np.zeros((len(components), len(runs)), dtype=np.float64)
    batches = list(prepare(model, runs, token_budget=max(1, token_budget // 4)))
    for item in track(progress, batches, "attributing"):
        products = _products(model, item, sites, metric, steps)
        for k, (site, columns) in enumerate(located):
            part = products[site] if columns is None else products[site][:, columns.start : columns.stop]
            result[k, list(item.rows)] = part.sum(-1)
    if not np.isfinite(result).all():
        raise NumericalError(f"Gradients of model '{model.name}' are not finite: load it in float32 and try again.")
    return result


def _products(
    model: LoadedModel, item: Prepared, sites: Sequence[Site], metric: Metric, steps: int
) -> dict[Site, Array]:
    """Site -> difference times mean gradient, summed over patched positions [b, d], float64."""
    both = sorted({*sites, EMBED})
    donor, base = (capture(model, both, batch, gather="all") for batch in (item.donor, item.base))
    points = [0.0] if steps == 1 else [(k + 0.5) / steps for k in range(steps)]
    found: dict[Site, Array] = {}
    for point in points:
        slopes = _slopes(model, item, sites, metric, point * (donor[EMBED] - base[EMBED]))
        for site in sites:
            change = (donor[site] - base[site]).double()
            product = (change * slopes[site].to(change) * item.where.to(change.device)).sum(dim=1)
            found[site] = found.get(site, 0.0) + product.cpu().numpy() / steps
    return found


def _slopes(
    model: LoadedModel, item: Prepared, sites: Sequence[Site], metric: Metric, moved: Tensor
) -> dict[Site, Tensor]:
    """dM/da at every site [b, s, d], with the token embeddings of the base moved by ``moved``."""
    shift: dict[Site, Tensor] = {}

    def probe(site: Site) -> Callable[[Tensor], Tensor]:
        def visit(x: Tensor) -> Tensor:  # a leaf of its own, so that frozen parameters do not matter
            shift[site] = torch.zeros_like(x, requires_grad=True)
            return x + shift[site] + (moved if site == EMBED else 0.0)

        return visit

    with torch.enable_grad(), hooks(model, {site: probe(site) for site in sorted({*sites, EMBED})}):
        total = answer_metric(model, item.base, item, metric).sum()
        gradients = torch.autograd.grad(total, [shift[site] for site in sites], allow_unused=True)
    return {site: torch.zeros_like(shift[site]) if gradient is None else gradient
            for site, gradient in zip(sites, gradients, strict=True)}  # fmt: skip
