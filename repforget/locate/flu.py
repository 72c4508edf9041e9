"""Fact lookup: the MLPs that look a fact up, found from the heads that say it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import compress
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from repforget.causal import Metric
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control, Task, exact_band, ranked
from repforget.locate._labelled import Rows, early_subjects, features, relations
from repforget.locate._paths import Receiver, measure_paths, path_passes, receiver_of
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.probing import cluster_interval, fit_sweep
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site

ITEMS_PER_RELATION = {"mode": "categories"}
Found = tuple[Array, Array, Mapping[str, Sequence[Sequence[float]]], tuple[str, ...], float]


def flu(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, mode: Literal["facts", "categories"] = "facts",
    heads: int | Literal["auto"] = "auto", reads: Literal["residual", "heads"] = "residual",
    metric: Metric = "logprob", items: int = 64, partners: int = 2, statements: int = 2, contrast: float = 1.0,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank MLPs by how much they enrich the subject with the fact that later heads carry to the answer.

    ``facts``: first the extraction heads, by |effect| of path patching each clean head into the corrupted run's final
    state with later MLPs on the path (``heads`` of them; auto: a tenth, at most 10), chosen on one half of the facts
    and never in the first layer, before which nothing is looked up. Then each MLP is path-patched into what they read,
    with all heads and other MLPs held: the residual state before the earliest of these heads, or the queries, keys and
    values of the ``heads`` themselves, both ways averaged as in activation_patching (pairs, ``metric`` and scale are
    its own too). ``contrast`` subtracts the effect on matched retain facts, without which the first MLP leads wherever
    it puts names together; set it to 0 where forget and retain facts were learned together. MLPs that the receiver does
    not read score 0.

    ``categories``: how far the accuracy of a probing classifier for the answer, on the state at the last subject token,
    climbs over each layer, on held-out forget subjects (see probe_sweep); no contrast.

    The chosen layers are the first k of the ranking, k being the band's: the scores before the largest drop between
    neighbours, among positive ones on the half of the facts that ranks (or ``top``). The band compares them with as
    many random MLPs by exact patching on the other half.

    Cost: one forward pass per fact and head, one or two per fact and MLP, and the band; for categories one per
    statement and the fits, twice.
    What it does not show: facts that are looked up after the extraction heads, at the last token, where the MLP of the
    last layer always scores 0; the difference between enriching and being read for another reason; that an edit there
    lasts. Climbs also come from attention.
    Source: Guo et al. 2024, arXiv 2410.12949 (there the receiver's layer and a threshold are set by hand per model).
    """
    if model.n_layers < 2:
        raise UsageError(f"Model '{model.name}' has one layer, so that no head reads what an MLP wrote: use "
                         "activation_patching.")  # fmt: skip
    mlps = expand_nodes(model, ("mlp_out",))
    weight = contrast if mode == "facts" else 0.0
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, partners=partners, mode="both", metric=metric,
                                   contrast=weight)  # fmt: skip
    if mode == "facts":
        found = _facts(model, tasks, mlps, heads, reads, contrast, seed, progress)
    else:
        found = _categories(model, knowledge, tasks, mlps, statements, items, seed, progress)
    scores, half, tables, told, passes = found
    half_order, half_scores = ranked(mlps, half)
    plan = BandPlan(before_largest_drop(half_scores) if top == "auto" else top, draws, control, seed)
    band, band_notes, spent = exact_band(tasks, mlps, half_order, plan, progress)
    order, values = ranked(mlps, scores)
    settings: dict[str, Any] = {
        "mode": mode, "heads": heads, "reads": reads, "metric": metric, "items": items, "partners": partners,
        "statements": statements, "contrast": contrast, "top": top, "draws": draws, "control": control, "seed": seed,
    }  # fmt: skip
    cost = {"forwards": passes + spent, "backwards": 0.0, "facts": float(len({r.id for r in tasks[0].forget}))}
    return Localization("flu", order, values, band, cost, settings, tables, (*notes, *told, *band_notes))


def before_largest_drop(scores: Sequence[float]) -> int:
    """How many scores, best first, come before the largest drop from a positive score to the next; 1 where none is
    positive."""
    drops = [a - b if a > 0 else -np.inf for a, b in zip(scores, scores[1:], strict=False)]
    return int(np.argmax(drops)) + 1


def _facts(
    model: LoadedModel, tasks: Sequence[Task], mlps: Sequence[Component], heads: int | Literal["auto"],
    reads: Literal["residual", "heads"], contrast: float, seed: int, progress: Progress | None,
) -> Found:  # fmt: skip
    """Scores of MLPs on all facts and on the first half, tables, notes, passes."""
    units = expand_nodes(model, ("heads",), list(range(1, model.n_layers)))
    if heads != "auto" and not 1 <= heads <= len(units):
        raise UsageError(f"flu cannot take {heads} extraction heads: this model has {len(units)} after its first "
                         "layer, so choose one of them or more, or 'auto'.")  # fmt: skip
    count = min(10, max(1, len(units) // 10)) if heads == "auto" else heads
    final = receiver_of(model, "final")
    denoise = [replace(tasks[0], retain=())]
    effects = measure_paths(denoise, units, final, "mlps", progress).scores(0.0, seed)
    chosen, _ = ranked(units, np.abs(effects))
    receiver = receiver_for(model, chosen[:count], reads)
    moves = measure_paths(tasks, mlps, receiver, "nothing", progress)
    scores = moves.scores(contrast)
    tables = {**heat_maps(units, effects, "effect on the final state"),
              **heat_maps(mlps, scores, "effect on what the extraction heads read")}  # fmt: skip
    told = [f"Extraction heads: {', '.join(map(str, chosen[:count]))}; what they read: "
            f"{', '.join(map(str, receiver))}."]  # fmt: skip
    if scores.max() <= 0:
        told.append("No MLP tells the extraction heads more about these facts than about retain facts: no lookup is "
                    "claimed.")  # fmt: skip
    return (scores, moves.scores(contrast, seed), tables, tuple(told),
            path_passes(denoise, units, final) + path_passes(tasks, mlps, receiver))  # fmt: skip


def receiver_for(model: LoadedModel, heads: Sequence[Component], reads: Literal["residual", "heads"]) -> Receiver:
    """What extraction heads read: the state before the earliest of them, or their own queries, keys and values."""
    if reads == "residual":
        return receiver_of(model, f"resid_pre.{min(c.site.layer for c in heads)}")
    places = site_map(model.module)
    found: list[Site] = []
    for component in heads:
        layer, head = component.site.layer, component.site.head or 0
        group = head * places.n_kv_heads // places.n_heads
        found += [Site("q", layer, head), Site("k", layer, group), Site("v", layer, group)]
    return receiver_of(model, [str(site) for site in found])


def _categories(
    model: LoadedModel, knowledge: Knowledge, tasks: Sequence[Task], mlps: Sequence[Component], statements: int,
    items: int, seed: int, progress: Progress | None,
) -> Found:  # fmt: skip
    """Climbs of held-out probe accuracy over each layer on all forget facts, and those of classifiers that know none
    of the facts of the band."""
    states = [Component(Site("resid_pre", 0)), *expand_nodes(model, ("resid_post",))]
    probed, notes = relations(knowledge.for_editor(), statements, items, seed)
    early = early_subjects(tasks, probed, seed)
    found: list[Array] = []
    ranking: list[Array] = []  # taught by none of the subjects on whom the band is measured
    clusters: list[str] = []
    for rows in track(progress, probed, "probing relations"):
        values = features(model, states, rows.facts, "subject")
        stacked = np.stack([values[c] for c in states])
        found.append(_climbs(stacked, rows, seed))
        clusters += compress(rows.clusters, rows.forget)
        part = rows.ranking(early)
        if part is not None:
            ranking.append(_climbs(stacked[:, part[1]], part[0], seed))
    climbs = np.concatenate(found, axis=1)
    _, numbers = np.unique(clusters, return_inverse=True)
    low, _ = cluster_interval(climbs, numbers, seed=seed)
    told = () if (low > 0).any() else ("No layer lifts the probe's accuracy on held-out forget subjects beyond chance: "
                                       "no enrichment is claimed.",)  # fmt: skip
    scores = climbs.mean(axis=1)
    return (scores, np.concatenate(ranking, axis=1).mean(axis=1),
            heat_maps(mlps, scores, "climb of accuracy at the last subject token"), (*notes, *told),
            float(sum(len(rows.facts) for rows in probed)))  # fmt: skip


def _climbs(states: NDArray[np.float32], rows: Rows, seed: int) -> Array:
    """Climb of correctness over each layer, by forget statement [layers, m]."""
    sweep = fit_sweep(states, rows.labels, rows.clusters, seed=seed, l2=0.01, control=False)
    return np.asarray(np.diff(sweep.correct[:, rows.forget].astype(np.float64), axis=0))
