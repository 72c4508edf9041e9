"""Prune the neurons, or attention value dimensions, that forget facts use more than retain facts, step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np

from repforget.artifact import Edit, SparseDelta
from repforget.attribution import Statistic, activity, importance
from repforget.edit._collect import subsample, text_sequences
from repforget.edit.surgery._units import channel_removal, located, removal
from repforget.errors import NoEffectError, UsageError
from repforget.features.activity import told
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site
from repforget.scoring import answer_logprobs

Unit = tuple[Site, int]  # a column of mlp_post or attn_z
KINDS: Mapping[str, tuple[str, ...]] = {
    "neurons": ("mlp_post",), "attention": ("attn_z",), "both": ("mlp_post", "attn_z"),
}  # fmt: skip


def selective_pruning(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    progress: Progress | None = None, units: Literal["neurons", "attention", "both"] = "neurons",
    statistic: Statistic = "mean", ratio: float = 0.02, damping: float = 1e-5, target: float = 0.5,
    max_steps: int = 20, max_facts: int = 512,
) -> Edit:  # fmt: skip
    """Remove the MLP neurons, or attention value dimensions, that forget text uses most relative to retained text.

    ``E|z|_forget / (E|z|_retain + damping)`` per unit over all tokens but first ones; the best ``ratio`` of all units
    of a kind go, activity is measured again on what is left, and so on until the answers to forget facts have at most
    ``target`` of their first mean probability.  A neuron goes with its rows of the gate and up projections and its
    column of the down projection, a value dimension with its column of the attention output projection, so that both
    contribute exactly 0.  Units that forget text leaves idle are never taken.
    Source: Pochinkov & Schoots 2024, arXiv 2403.01267.

    Args:
        units: neurons, attention value dimensions, or both. statistic: see the locator activation_statistics.
        ratio: share of all units of each kind per step. damping: as a share of a site's mean on retained text.
        target: share of the forget answers' probability at which pruning stops. max_steps: at most so many steps.
        max_facts: facts read per set, chosen by seed.
        where: where it ranks neurons, or heads with attention units, they go in its order and nothing is measured.

    Raises SiteError for neurons of batched experts, NoEffectError where no unit is active on forget text.  Cost: a
    forward per fact and step, and one per retained text; no gradient.

    Weakness: a ratio of activities, not of uses; what forget and retain facts share takes both along. That the answers
    lose probability on the statements that were pruned for does not show that nothing is left.
    """
    if not (0 < ratio < 1 and 0 <= target < 1 and damping > 0) or max_steps < 1:
        raise UsageError(f"selective_pruning was given ratio {ratio}, target {target}, damping {damping} and "
                         f"max_steps {max_steps}: give shares below 1, damping above 0 and a step.")  # fmt: skip
    places = site_map(model.module)
    sites = [site for kind in KINDS[units] for site in places.expand(kind)]
    forget = subsample(data.forget, max_facts, seed)
    texts = told(model, forget), text_sequences(model, data, subsample(data.retain, max_facts, seed))
    fixed = _ordered(model, where, units)
    chosen: list[Unit] = []
    first = _probability(model, forget)
    left = first
    for step in track(progress, range(max_steps), "pruning", max_steps):
        with _pruned(model, chosen):
            if step:
                left = _probability(model, forget)
            if left <= target * first:
                break
            ranked = fixed or _ranked(model, texts, sites, statistic, damping)
        new = _best(ranked, sites, set(chosen), ratio, places.size)
        if not new:
            break
        chosen += new
    if not chosen:
        raise NoEffectError("No unit is active on the forget facts, so that none can be pruned: check the facts.")
    with _pruned(model, chosen):
        left = _probability(model, forget)
    share = {kind: sum(site.kind == kind for site, _ in chosen) / sum(places.size(s) for s in sites if s.kind == kind)
             for kind in KINDS[units]}  # fmt: skip
    notes = [f"{100 * part:.1f} % of all units at {kind} removed" for kind, part in share.items()]
    notes.append(f"mean probability of the forget answers {first:.3f} -> {left:.3f}, aim {target * first:.3f}")
    return Edit.build("selective_pruning", {}, model, data.digest, _operations(model, chosen), notes=notes)


def _ordered(model: LoadedModel, where: Localization | None, units: str) -> list[tuple[float, Unit]]:
    """The units of ``where`` in its order, with falling scores; [] where it ranks none of this kind."""
    width = site_map(model.module).head_dim
    found = [(c.site, c.neuron) for c in located(where, "neurons") if c.neuron is not None and units != "attention"]
    if units != "neurons":
        for c in located(where, "heads"):
            start = (c.site.head or 0) * width
            found += [(Site("attn_z", c.site.layer), k) for k in range(start, start + width)]
    return [(1.0 / (1 + k), unit) for k, unit in enumerate(found)]


def _ranked(
    model: LoadedModel, texts: Sequence[Sequence[Sequence[int]]], sites: Sequence[Site], statistic: Statistic,
    damping: float,
) -> list[tuple[float, Unit]]:  # fmt: skip
    """Every unit with its score."""
    forget, retain = (activity(model, part, sites, statistic) for part in texts)
    return [(score, (site, k)) for site in sites
            for k, score in enumerate(importance(forget[site], retain[site], damping).tolist())]  # fmt: skip


def _best(
    ranked: Sequence[tuple[float, Unit]], sites: Sequence[Site], gone: set[Unit], ratio: float,
    size: Callable[[Site], int],
) -> list[Unit]:  # fmt: skip
    """The best ``ratio`` of all units of each kind that are left and active (at least one of each)."""
    found: list[Unit] = []
    for kind in dict.fromkeys(site.kind for site in sites):
        count = max(1, round(ratio * sum(size(site) for site in sites if site.kind == kind)))
        open_ = [(score, unit) for score, unit in ranked if unit[0].kind == kind and unit not in gone and score > 0]
        found += [unit for _, unit in sorted(open_, key=lambda entry: -entry[0])[:count]]
    return found


def _operations(model: LoadedModel, chosen: Sequence[Unit]) -> list[SparseDelta]:
    neurons = [Component(site, k) for site, k in sorted(chosen) if site.kind == "mlp_post"]
    found = removal(model, neurons, "all")
    for layer in sorted({site.layer for site, _ in chosen if site.kind == "attn_z"}):
        found.append(channel_removal(model, layer, [k for s, k in chosen if s.kind == "attn_z" and s.layer == layer]))
    return found


@contextmanager
def _pruned(model: LoadedModel, chosen: Sequence[Unit]) -> Iterator[None]:
    if not chosen:
        yield
        return
    with Edit.build("selective_pruning", {}, model, "", _operations(model, chosen)).attach(model):
        yield


def _probability(model: LoadedModel, facts: Sequence[Fact]) -> float:
    """Mean probability of the facts' answers."""
    return float(np.exp(answer_logprobs(model, [(f.prompt, f.answer) for f in facts]).sum_logprob).mean())
