"""Direct logit attribution: what each component adds to the answer's logit over a rival's by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from repforget.causal import Positions, Prepared, Run, prepare
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control, Moves, exact_band, ranked
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import Layers, expand_nodes, heat_maps
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.readout import head_writes, logit_direction, neuron_writes
from repforget.models.sites import site_map
from repforget.progress import Progress, track
from repforget.records import Component, Localization, Site

Written = Literal["embed", "heads", "attn_out", "mlp_out", "neurons"]
EMBED, FIRST = Site("embed"), Site("resid_pre", 0)  # with positions, scale and norm of the embedding
NUMBERS_AT_ONCE = 2**24  # of neurons' writes held at once (float64: 128 MiB)


@dataclass(frozen=True)
class Direct:
    """Parts of the difference of two logits, before any soft cap, for n runs (float64).

    ``embed``, ``attention`` and ``mlp`` [layers, n] and ``constant`` [n] (biases of the final norm and unembedding) add
    up to ``total``; ``parts`` [c, n] are those of the components asked for. The heads of a layer and the bias of its
    output projection add up to its attention.
    """

    parts: Array
    embed: Array
    attention: Array
    mlp: Array
    constant: Array

    @property
    def total(self) -> Array:
        return np.asarray(self.embed + self.attention.sum(0) + self.mlp.sum(0) + self.constant)


def direct_logit_attribution(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Written, ...] = ("embed", "heads", "mlp_out"),
    layers: Layers = "all", positions: Positions = "all", items: int = 64, partners: int = 2, contrast: float = 1.0,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank components by their own part of the logit of the answer minus that of a rival.

    At the token before answer and rival differ, a write c to the residual stream adds (gain * c * scale) . (U_answer -
    U_rival), with c centred where the final norm is a LayerNorm and ``scale`` held at the value of the last state;
    behind sandwich norms c is what leaves them. Embedding, heads, MLPs and biases add up to the difference of the
    logits exactly (before a soft cap). The rival is the answer of a retain fact of the same relation. Scores are shares
    of the mean difference, less ``contrast`` times those of matched retain facts. Nodes: ``embed``, ``heads``,
    ``attn_out``, ``mlp_out``, ``neurons``. The band is that of activation_patching, without the embedding;
    ``positions`` are those it patches.

    Cost: one forward pass per fact and partner, and the band's exact patches.
    What it does not show: what later layers make of a write. Where a fact is looked up at the subject and carried to
    the last token by attention, the carriers get the credit, and the place it is kept little: of four planted
    layers it puts all four first among the MLPs, one of them narrowly, and without the contrast one (chance is one).
    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".
    """
    components = expand_nodes(model, nodes, layers)
    inside = [c for c in components if c.site != EMBED]
    if len(inside) < 2:
        raise UsageError("Direct logit attribution compares components: name nodes besides 'embed', for "
                         "example heads or mlp_out.")  # fmt: skip
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, partners=partners, mode="both",
                                   positions=positions, contrast=contrast)  # fmt: skip
    forget, told = _with_rival(tasks[1].forget)
    tasks = tuple(replace(task, forget=tuple(run for run in task.forget if run.rival)) for task in tasks)
    found = direct_effects(model, forget, components, progress)
    retain = [run for run in tasks[1].retain if run.rival]
    if contrast and not retain:
        raise KnowledgeError("No retain fact has a rival answer, so that nothing can be subtracted: add retain items "
                             "of the same relation with other answers, or set contrast to 0.")  # fmt: skip
    beside = direct_effects(model, retain, components, progress).parts if retain else np.zeros((len(components), 0))
    moves = Moves(found.parts, found.total, beside, tuple(r.cluster for r in forget), tuple(r.cluster for r in retain))
    scores = moves.scores(contrast)
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    plan = BandPlan(top, draws, control, seed)
    band, band_notes, spent = exact_band(tasks, inside, [c for c in half_order if c.site != EMBED], plan, progress)
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {
        "nodes": list(nodes), "layers": layers, "positions": positions, "items": items, "partners": partners,
        "contrast": contrast, "top": top, "draws": draws, "control": control, "seed": seed,
    }  # fmt: skip
    cost = {"forwards": float(len(forget) + len(retain)) + spent, "backwards": 0.0,
            "facts": float(len({run.id for run in forget}))}  # fmt: skip
    mean = found.total.mean()
    told = (*told, f"The logit difference is {mean:.3g} on average: {found.embed.mean():.2g} of it written by the "
                   f"embedding, {found.constant.mean():.2g} by biases of the final norm and unembedding.")  # fmt: skip
    return Localization("direct_logit_attribution", order, values, band, cost, settings,
                        _tables(components, scores, found), (*notes, *told, *band_notes))  # fmt: skip


def _with_rival(runs: Sequence[Run]) -> tuple[list[Run], tuple[str, ...]]:
    kept = [run for run in runs if run.rival]
    if not kept:
        raise KnowledgeError(f"None of the {len(runs)} prompts has a rival answer whose tokens differ from the true "
                             "one's: add retain items of the same relation with other answers.")  # fmt: skip
    lost = len(runs) - len(kept)
    return kept, (f"{lost} of {len(runs)} prompts have no rival answer and are left out.",) if lost else ()


def _tables(
    components: Sequence[Component], scores: Array, found: Direct
) -> dict[str, Sequence[Sequence[float]]]:
    """Contrasted scores, and what attention and MLP of each layer add to the logit difference of forget facts."""
    shares = np.stack([found.attention.mean(1), found.mlp.mean(1)], axis=1) / found.total.mean()
    return {**heat_maps(components, scores, "contrasted direct effect"),
            "share of the logit difference by layer: attention, MLP": shares.tolist()}  # fmt: skip


def direct_effects(
    model: LoadedModel, runs: Sequence[Run], components: Sequence[Component], progress: Progress | None = None
) -> Direct:
    """Parts of truth minus rival of every run (its base ids), at the first token where the two answers differ.

    Raises KnowledgeError for a run without a rival. Cost: one forward pass per run.
    """
    depth = range(model.n_layers)
    sizes = (len(components), 1, len(depth), len(depth), 1)
    parts, embed, attention, mlp, constant = (np.zeros((size, len(runs))) for size in sizes)
    wanted = [FIRST, *(Site(kind, k) for k in depth for kind in ("attn_out", "mlp_out")), Site("resid_post", depth[-1])]
    inner = sorted({Site("mlp_post" if c.neuron is not None else "attn_z", c.site.layer) for c in components
                    if c.neuron is not None or c.site.head is not None})  # fmt: skip
    for item in track(progress, list(prepare(model, runs)), "attributing logits"):
        at, truth, rival = _forks(item)
        values = capture(model, [*wanted, *inner], item.base, gather=at)
        direction, rest = logit_direction(model, values[wanted[-1]], truth, rival)
        rows = list(item.rows)

        def against(write: Tensor, direction: Tensor = direction) -> Array:
            return np.asarray((write.to(direction) * direction).sum(-1).cpu().numpy())

        embed[0, rows], constant[0, rows] = against(values[FIRST]), rest.cpu().numpy()
        for k in depth:
            attention[k, rows] = against(values[Site("attn_out", k)])
            mlp[k, rows] = against(values[Site("mlp_out", k)])
        inside = {site: _inside(model, site, values[site], direction) for site in inner}
        for c, component in enumerate(components):
            site, layer = component.site, component.site.layer
            if component.neuron is not None:
                parts[c, rows] = inside[Site("mlp_post", layer)][:, component.neuron]
            elif site.head is not None:
                parts[c, rows] = inside[Site("attn_z", layer)][:, site.head]
            else:
                whole = embed[0] if site == EMBED else {"attn_out": attention, "mlp_out": mlp}[site.kind][layer]
                parts[c, rows] = whole[rows]
    return Direct(parts, embed[0], attention, mlp, constant[0])


def _forks(item: Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """Position before truth and rival part [b], and their tokens there [b]."""
    column, truth, rival = item.fork.unbind(1)
    if bool((column < 0).any()):
        raise KnowledgeError("Direct logit attribution needs a rival answer that differs from the true one for every "
                             "run: give the items wrong answers.")  # fmt: skip
    return item.base.ids.shape[1] - item.target.shape[1] + column, truth, rival


def _inside(model: LoadedModel, site: Site, value: Tensor, direction: Tensor) -> Array:
    """Parts of all heads [b, heads] or all neurons [b, m] of one layer."""
    if site.kind == "attn_z":
        return np.asarray(torch.einsum("bhd,bd->bh", head_writes(model, site.layer, value).to(direction),
                                       direction).cpu().numpy())  # fmt: skip
    count = site_map(model.module).mlp_width
    step = max(1, NUMBERS_AT_ONCE // direction.numel())
    found = [torch.einsum("bnd,bd->bn", neuron_writes(model, site.layer, value, range(k, min(k + step, count)))
                          .to(direction), direction) for k in range(0, count, step)]  # fmt: skip
    return np.asarray(torch.cat(found, dim=1).cpu().numpy())
