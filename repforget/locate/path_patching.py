"""Path patching: components ranked by what they say to one receiver directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from repforget.causal import Metric, Positions
from repforget.knowledge import Knowledge
from repforget.locate._exact import BandPlan, Control, exact_band, ranked
from repforget.locate._paths import Through, measure_paths, path_passes, receiver_of
from repforget.locate._tasks import Mode, corrupted_tasks
from repforget.locate._units import Layers, expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

Sender = Literal["heads", "mlp_out", "attn_out", "embed"]


def path_patching(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Sender, ...] = ("heads", "mlp_out"), layers: Layers = "all",
    receiver: str | list[str] = "final", through: Through = "nothing", mode: Mode = "both",
    positions: Positions = "all", metric: Metric = "logprob", items: int = 64, partners: int = 2,
    contrast: float = 0.0, top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank senders by how much of the answer they move on the path to one receiver alone.

    ``receiver`` is the ``final`` residual state, one residual state such as resid_pre.7, or queries, keys and values
    of heads such as [q.3.h1, k.3.h0], which receive together. The receiver is computed with the sender's donor value
    written in and all other heads held at the base run, and all MLPs too unless the path may go ``through`` later
    ``mlps``; then everything behind the receiver is computed again with its norms. ``everything`` holds nothing, which
    makes a residual receiver ordinary activation patching of what comes before it. A sender that is not before the
    receiver scores exactly 0. Pairs, ``mode``, ``contrast``, scale and band are those of activation_patching: the band
    measures whole effects, not those of the path.

    Cost: one forward pass per fact and sender (two where heads receive), and the band.
    What it does not show: what the sender does on other paths, which may undo this one; that a sender without a direct
    effect is unused. Of a head in front of a norm that follows attention, what it changes in that norm counts as its
    own.
    Source: Wang et al. 2022, arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969.
    """
    senders = expand_nodes(model, nodes, layers)
    to = receiver_of(model, receiver)
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, partners=partners, mode=mode,
                                   positions=positions, metric=metric, contrast=contrast)  # fmt: skip
    moves = measure_paths(tasks, senders, to, through, progress)
    scores = moves.scores(contrast)
    half_order, _ = ranked(senders, moves.scores(contrast, seed))
    band, band_notes, spent = exact_band(tasks, senders, half_order, BandPlan(top, draws, control, seed), progress)
    order, values = ranked(senders, scores)
    settings: dict[str, Any] = {
        "nodes": list(nodes), "layers": layers, "receiver": receiver, "through": through, "mode": mode,
        "positions": positions, "metric": metric, "items": items, "partners": partners, "contrast": contrast,
        "top": top, "draws": draws, "control": control, "seed": seed,
    }  # fmt: skip
    cost = {"forwards": path_passes(tasks, senders, to) + spent, "backwards": 0.0,
            "facts": float(len({run.id for run in tasks[0].forget}))}  # fmt: skip
    tables = heat_maps(senders, scores, f"{mode} effect on the path to {', '.join(map(str, to))}")
    return Localization("path_patching", order, values, band, cost, settings, tables, (*notes, *band_notes))
