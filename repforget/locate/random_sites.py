"""The control: components drawn at random."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from repforget.causal import Metric, Positions
from repforget.knowledge import Knowledge
from repforget.locate._exact import BandPlan, Control, exact_band, ranked
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import Layers, Node, expand_nodes
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def random_sites(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("attn_out", "mlp_out"), layers: Layers = "all",
    positions: Positions = "all", metric: Metric = "logprob", items: int = 64,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank components at random: the control that every other locator must beat.

    The scores are the random numbers that made the order and say nothing about the model; the band holds the
    exact patching effect (both directions) of this random top beside that of other random selections.

    Cost: one forward pass per fact and component drawn (per selection with ``control='joint'``).
    What it does not show: where anything is.
    """
    components = expand_nodes(model, nodes, layers)
    generator = random.Random(f"random-sites-{seed}")
    numbers = np.array([generator.random() for _ in components])
    order, values = ranked(components, numbers)
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, mode="both", positions=positions,
                                   metric=metric)  # fmt: skip
    band, band_notes, spent = exact_band(tasks, components, order, BandPlan(top, draws, control, seed), progress)
    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "positions": positions, "metric": metric,
                                "items": items, "top": top, "draws": draws, "control": control,
                                "seed": seed}  # fmt: skip
    cost = {"forwards": spent, "backwards": 0.0, "facts": float(len(tasks[0].forget))}
    return Localization("random_sites", order, values, band, cost, settings, {}, (*notes, *band_notes))
