"""Knowledge neurons: MLP neurons to which integrated gradients give an answer's probability, in all its prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from repforget import attribution
from repforget.attribution import item_of
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control
from repforget.locate._gradients import Facts, Shown, weight_localization
from repforget.locate._pairs import choose_facts, plain_runs
from repforget.locate._units import Layers, expand_nodes
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def knowledge_neurons(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, layers: Layers = "all", steps: int = 20, threshold: float = 0.2,
    share: float = 0.7, aggregate: Literal["fact", "texts"] = "fact", items: int = 32, prompts: int = 10,
    top: int | Literal["auto"] = 20, draws: int = 100, control: Control = "joint",
) -> Localization:  # fmt: skip
    """Rank MLP neurons by the answer's probability that integrated gradients give them, in most prompts of a fact.

    ``A_i = w_i * mean over alpha of dP(alpha w) / dw_i`` at the positions that predict the answer, alpha at ``steps``
    midpoints, all neurons of a layer scaled together, so that a layer's sum is P(w) - P(0) (but not before a norm
    behind the MLP, which undoes the scaling); P is the probability of the whole answer.  A neuron belongs to a fact
    where it has at least ``threshold`` of the largest attribution in at least ``share`` of the fact's prompts (at most
    ``prompts`` of each); its score is the mean over facts of its relative attribution where it belongs, 0 elsewhere.
    ``aggregate="texts"`` takes all prompts as one group, as for private texts (published with threshold 0.1 and share
    0.5).  The published search moves ``share`` until two to five neurons are left; here it is fixed.  Of four planted
    layers one holds its best neuron, which is always in the first (chance is one); yet patching its top neurons brings
    back more than patching random ones.

    Cost: ``steps`` forwards and backwards per prompt and layer, and the band's exact patches.
    What it does not show: that the fact is in these neurons. There is no contrast with retain facts, so that neurons
    of a relation or of grammar rank as high.
    Source: Dai et al. 2022, arXiv 2104.08696; for texts Wu et al. 2023, arXiv 2310.20138.
    """
    if items < 1 or prompts < 1:
        raise UsageError(f"knowledge_neurons was given items={items} and prompts={prompts}: give one or more of both.")
    components = expand_nodes(model, ("neurons",), layers)
    depths = sorted({c.site.layer for c in components})
    data = knowledge.for_editor()
    chosen = {item_of(fact.id) for fact in choose_facts(data.forget, items, seed)}
    taken: dict[str, int] = dict.fromkeys(chosen, 0)
    own = []
    for fact in data.forget:
        item = item_of(fact.id)
        if item in taken and taken[item] < prompts:
            taken[item] += 1
            own.append(fact)
    found = plain_runs(model.tokenizer, own, "all")
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def score(facts: Facts) -> Array:
        new = [run for run in facts.forget if run.base not in kept]
        if new:
            values = attribution.integrated_gradients(model, new, depths, steps=steps, progress=progress)
            kept.update(zip((run.base for run in new), values, strict=True))
        groups = [item_of(run.id) if aggregate == "fact" else "" for run in facts.forget]
        stacked = torch.stack([kept[run.base] for run in facts.forget])
        members = attribution.knowledge_neurons(stacked, groups, threshold, share)
        return np.asarray(members.scores.flatten().numpy(), dtype=np.float64)

    notes = (*found.notes, *attribution.completeness(model))
    settings: dict[str, Any] = {"layers": layers, "steps": steps, "threshold": threshold, "share": share,
                                "aggregate": aggregate, "items": items, "prompts": prompts, "top": top, "draws": draws,
                                "control": control, "seed": seed}  # fmt: skip
    shown = Shown("knowledge_neurons", settings, "relative attribution", float(steps * len(depths) * len(found.runs)),
                  forwards=float(len(found.runs)))  # fmt: skip
    return weight_localization(model, knowledge, components, score, Facts(found.runs, (), notes),
                               BandPlan(top, draws, control, seed), shown, progress)  # fmt: skip
