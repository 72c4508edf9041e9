"""Patching a model that never knew into the model that knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from repforget.causal import Positions
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import BandPlan, Control, exact_band, forwards, measure, ranked
from repforget.locate._tasks import twin_task
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization


def twin_patching(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("mlp_out", "attn_out"), layers: Layers = "all",
    positions: Positions = "all", items: int = 64, contrast: float = 1.0, top: int | Literal["auto"] = "auto",
    draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank components by how much knowledge is lost when a retain-only twin's output is written in.

    Score: mean of (log p_full - log p_patched) on forget facts, less ``contrast`` times the same on matched
    retain facts, divided by the mean of (log p_full - log p_twin) on forget facts; 1 = the twin's output
    there takes everything away.  Averaged over the twins given.  With outputs of a sub-layer (mlp_out) it
    finds the writer; with resid_post it says by which depth the knowledge is in the stream.
    The retain facts, which the twin knows as well, are the control: where writing the twin in hurts them as
    much, its coordinates differ from the model's (trained from another initialisation), and a note says so.

    Cost: one forward pass per fact, component and twin, twice (forget and retain facts).
    What it does not show: anything about weights; and nothing at all for twins that do not share the model's
    basis. Source: the first stage of the unlearning depth score, 2026, arXiv 2605.24614.
    """
    if not twins:
        raise UsageError("twin_patching needs a model that never knew: none was given; name one under "
                         "'twins', or use activation_patching.")  # fmt: skip
    components = expand_nodes(model, nodes, layers)
    task, notes = twin_task(model, knowledge, twins, items, seed, positions, contrast)
    moves = measure([task], [(c,) for c in components], progress)
    scores = moves.scores(contrast)
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    band, band_notes, spent = exact_band([task], components, half_order, BandPlan(top, draws, control, seed), progress)
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "positions": positions, "items": items,
                                "contrast": contrast, "top": top, "draws": draws, "control": control,
                                "seed": seed,
                                "twins": [t.name for t in twins]}  # fmt: skip
    forget_loss, retain_loss = moves.forget.mean(axis=1), moves.retain.mean(axis=1)
    best = int(forget_loss.argmax())
    if retain_loss[best] > 0.5 * forget_loss[best]:
        notes = (*notes, f"Writing the twin in at {components[best]} costs retain facts "
                         f"{retain_loss[best]:.2f} nats and forget facts {forget_loss[best]:.2f}: the twin "
                         "does not share this model's basis there, so the scores say little.")  # fmt: skip
    cost = {"forwards": forwards([task], len(components)) + spent, "backwards": 0.0, "facts": float(len(task.forget))}
    tables = {**heat_maps(components, scores, "effect"), **heat_maps(components, forget_loss, "nats lost, "
                                                                                              "forget"),
              **heat_maps(components, retain_loss, "nats lost, retain")}  # fmt: skip
    return Localization("twin_patching", order, values, band, cost, settings, tables, (*notes, *band_notes))
