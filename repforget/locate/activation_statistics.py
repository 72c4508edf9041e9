"""Neurons and heads that are more active on forget facts than on retain facts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from repforget.attribution import Statistic, activity, importance
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control
from repforget.locate._gradients import Facts, Shown, facts_of, weight_localization
from repforget.locate._units import Layers, expand_nodes
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress
from repforget.records import Component, Localization, Site


def activation_statistics(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Literal["neurons", "heads"], ...] = ("neurons",),
    layers: Layers = "all", statistic: Statistic = "mean", damping: float = 1e-5, items: int = 64,
    top: int | Literal["auto"] = 20, draws: int = 100, control: Control = "joint",
) -> Localization:  # fmt: skip
    """Rank neurons (or heads) by how much more active they are on forget facts than on matched retain facts.

    ``E|z|_forget / (E|z|_retain + damping)`` over all tokens but first ones, z a neuron's activation at the input of
    the down projection, or the mean over a head's columns at the input of the output projection; ``damping`` is a share
    of the site's mean on retain facts, so that the score does not change when all activations are scaled. ``statistic``
    may be the root mean square, the standard deviation or the frequency of z > 0 instead.  A neuron that forget facts
    leave idle scores 0.  Of four planted layers all hold its best neuron (chance is one), two by
    frequency; patching the top neurons together brings back no more than patching random ones.

    Cost: one forward pass per forget and per retain fact, half of them again for the band, and the band's exact
    patches; no gradient.
    What it does not show: that a unit takes part in the answer. It may tell the subject alone, or be active where it
    writes nothing that is read.
    Source: Pochinkov & Schoots 2024, arXiv 2403.01267.
    """
    if damping <= 0:
        raise UsageError(f"Ratios of activity were given damping {damping}: it keeps units that retain facts leave "
                         "idle finite and must be positive, for example 1e-5.")  # fmt: skip
    components = expand_nodes(model, nodes, layers)
    sites = sorted({Site(c.site.kind, c.site.layer) for c in components})
    width = site_map(model.module).head_dim
    facts = facts_of(model, knowledge, items, seed)

    def score(chosen: Facts) -> Array:
        forget, retain = (activity(model, [run.base for run in runs], sites, statistic, progress)
                          for runs in (chosen.forget, chosen.retain))  # fmt: skip
        by_site = {}
        for site in sites:
            values = forget[site], retain[site]
            if site.kind == "attn_z":
                values = values[0].reshape(-1, width).mean(1), values[1].reshape(-1, width).mean(1)
            by_site[site] = importance(*values, damping).tolist()
        return np.array([by_site[Site(c.site.kind, c.site.layer)][_index(c)] for c in components], dtype=np.float64)

    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "statistic": statistic, "damping": damping,
                                "items": items, "top": top, "draws": draws, "control": control,
                                "seed": seed}  # fmt: skip
    shown = Shown("activation_statistics", settings, f"forget / retain {statistic}", 0.0,
                  forwards=1.5 * (len(facts.forget) + len(facts.retain)))  # fmt: skip
    return weight_localization(model, knowledge, components, score, facts, BandPlan(top, draws, control, seed), shown,
                               progress)  # fmt: skip


def _index(component: Component) -> int:
    return component.neuron if component.neuron is not None else component.site.head or 0
