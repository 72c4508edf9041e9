"""Fisher information of forget facts against that of retain facts, over the weights of every unit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor

from repforget.attribution import visit_gradients
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import Array, BandPlan, Control
from repforget.locate._gradients import Facts, Shown, facts_of, unit_sums, weight_localization, weights
from repforget.locate._units import Layers, Node, expand_nodes
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def fisher(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("attn_out", "mlp_out"), layers: Layers = "all",
    contrast: Literal["ratio", "none"] = "ratio", damping: float = 0.01, items: int = 64,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank units by the diagonal Fisher information that forget facts have in their weights.

    Of every fact alone the gradient of log p(answer) is squared (gradients of a batch would cancel before the square)
    and averaged over facts; a unit's score is the sum over its weights for forget facts, divided by that for matched
    retain facts (``ratio``) plus ``damping`` times the mean unit's, or its mean per weight (``none``). Nodes may be
    whole sites (all weights of the MLP or the attention), ``heads`` or ``neurons``.

    Cost: one forward and backward pass per forget and per retain fact, and the band's exact patches; one gradient of
    the chosen weights in memory.
    What it does not show: where a fact is kept. Sensitive weights are not storing weights: of four planted layers the
    ratio finds none (chance is one).  It is a weight for what must stay more than a locator.
    Source: empirical Fisher as in Kirkpatrick et al. 2017, arXiv 1612.00796; ratio of sets: Foster et al. 2023,
    arXiv 2308.07707.
    """
    if damping <= 0:
        raise UsageError(f"Fisher ratios were given damping {damping}: it keeps units that retain facts do not use "
                         "finite and must be positive, for example 0.01.")  # fmt: skip
    components = expand_nodes(model, nodes, layers)
    units = weights(model, components)
    names = sorted({ref.name for own in units.values() for ref in own})
    facts = facts_of(model, knowledge, items, seed)
    runs = (*facts.forget, *(facts.retain if contrast == "ratio" else ()))
    squares: list[tuple[Array, Array]] = []

    def add(gradients: Mapping[str, Tensor]) -> None:
        squares.append(unit_sums(units, lambda name: gradients[name].double().square()))

    visit_gradients(model, runs, names, add, progress)
    found = {run: sums for run, (sums, _) in zip(runs, squares, strict=True)}

    def score(chosen: Facts) -> Array:
        forget = np.mean([found[run] for run in chosen.forget], axis=0)
        if contrast == "none":
            return np.asarray(forget / squares[0][1], dtype=np.float64)
        retain = np.mean([found[run] for run in chosen.retain], axis=0)
        return np.asarray(forget / (retain + damping * retain.mean() + np.finfo(float).tiny), dtype=np.float64)

    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "contrast": contrast, "damping": damping,
                                "items": items, "top": top, "draws": draws, "control": control,
                                "seed": seed}  # fmt: skip
    label = "forget / retain Fisher" if contrast == "ratio" else "Fisher per weight"
    return weight_localization(model, knowledge, components, score, facts, BandPlan(top, draws, control, seed),
                               Shown("fisher", settings, label, float(len(runs))), progress)  # fmt: skip
