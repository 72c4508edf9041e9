"""Exact activation patching between a clean and a corrupted prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from repforget.causal import Metric, Positions
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import exact_band, forwards, measure, ranked
from repforget.locate._tasks import corrupted_task
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

MAX_PATCHES = 4096


def activation_patching(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("attn_out", "mlp_out"), layers: Layers = "all",
    mode: Literal["denoise", "noise"] = "denoise", positions: Positions = "all", metric: Metric = "logprob",
    items: int = 64, contrast: float = 0.0, top: int | Literal["auto"] = "auto", draws: int = 100,
) -> Localization:  # fmt: skip
    """Rank components by how much of the answer one exact patch brings back (or, with noise, takes away).

    The corrupted prompt asks the same about a retain subject of equal token length with another answer.
    ``denoise`` writes clean activations into the corrupted run, s = (M_patch - M_corr) / (M_clean - M_corr);
    ``noise`` writes corrupted ones into the clean run, s = (M_clean - M_patch) / (M_clean - M_corr): higher
    is more important in both.  M is the log-probability of the answer (or the logit difference to the
    partner's answer). ``contrast`` subtracts that share of the score on matched retain facts, which removes
    generic parts such as the first MLP that assembles names; keep 0 where forget and retain facts were
    learned together.  The band compares the joint effect of the top components, ranked on one half of the
    facts, with random selections on the other half.

    Cost: one forward pass per fact and component (batched), and per fact and random selection.
    What it does not show: that editing there removes the knowledge (Hase et al. 2023, arXiv 2301.04213), or
    that a low-scoring component is unused (others compensate, more so with ``noise``).
    Source: Meng et al. 2022, arXiv 2202.05262; Zhang & Nanda 2023, arXiv 2309.16042.
    """
    components = expand_nodes(model, nodes, layers)
    if len(components) > MAX_PATCHES:
        raise UsageError(f"Exact patching of {len(components)} components would take as many forward passes "
                         f"per fact: at most {MAX_PATCHES} are allowed; use attribution_patching, or fewer "
                         "layers.")  # fmt: skip
    task, notes = corrupted_task(model, knowledge, items, seed, mode, positions, metric, contrast)
    sign = 1.0 if mode == "denoise" else -1.0
    moves = measure(task, [(c,) for c in components], progress, sign)
    scores = moves.scores(contrast)
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    band, band_notes, spent = exact_band(task, components, half_order, top=top, draws=draws, seed=seed, sign=sign,
                                         progress=progress)  # fmt: skip
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "mode": mode, "positions": positions,
                                "metric": metric, "items": items, "contrast": contrast, "top": top,
                                "draws": draws, "seed": seed}  # fmt: skip
    cost = {"forwards": forwards(task, len(components)) + spent, "backwards": 0.0, "facts": float(len(task.forget))}
    tables = heat_maps(components, scores, f"{mode} effect")
    return Localization("activation_patching", order, values, band, cost, settings, tables, (*notes, *band_notes))
