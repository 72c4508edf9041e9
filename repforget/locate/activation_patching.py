"""Exact activation patching between a clean and a corrupted prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from repforget.causal import Metric, Positions
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import BandPlan, Control, exact_band, forwards, measure, ranked
from repforget.locate._tasks import Mode, corrupted_tasks
from repforget.locate._units import Layers, Node, expand_nodes, heat_maps
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Localization

MAX_PATCHES = 4096


def activation_patching(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[Node, ...] = ("attn_out", "mlp_out"), layers: Layers = "all",
    mode: Mode = "both", positions: Positions = "all", metric: Metric = "logprob",
    items: int = 64, partners: int = 2, contrast: float = 0.0, top: int | Literal["auto"] = "auto",
    draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank components by how much of the answer one exact patch brings back (or, with noise, takes away).

    A corrupted prompt asks the same about a retain subject of equal token length with another answer; each fact gets
    ``partners`` of them.
    ``denoise`` writes clean activations into the corrupted run, s = (M_patch - M_corr) / (M_clean - M_corr);
    ``noise`` writes corrupted ones into the clean run, s = (M_clean - M_patch) / (M_clean - M_corr): higher
    is more important in both; the default ``both`` averages the two, because denoising shows what suffices and
    noising what is needed.  M is the log-probability of the answer (or the logit difference to the
    partner's answer). ``contrast`` subtracts that share of the score on matched retain facts, which removes
    generic parts such as the first MLP that assembles names; keep 0 where forget and retain facts were
    learned together.  The band compares the top components, ranked on one half of the facts, with random
    selections of equal size on the other half: by the ``mean`` of their single effects, or by the ``joint``
    effect of patching them together (which says little once a few components bring back everything).

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
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, partners=partners, mode=mode,
                                   positions=positions, metric=metric, contrast=contrast)  # fmt: skip
    moves = measure(tasks, [(c,) for c in components], progress)
    scores = moves.scores(contrast)
    half_order, _ = ranked(components, moves.scores(contrast, seed))
    band, band_notes, spent = exact_band(tasks, components, half_order, BandPlan(top, draws, control, seed), progress)
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {"nodes": list(nodes), "layers": layers, "mode": mode, "positions": positions,
                                "metric": metric, "items": items, "partners": partners, "contrast": contrast,
                                "top": top, "draws": draws, "control": control,
                                "seed": seed}  # fmt: skip
    facts = float(len({run.id for run in tasks[0].forget}))
    cost = {"forwards": forwards(tasks, len(components)) + spent, "backwards": 0.0, "facts": facts}
    tables = heat_maps(components, scores, f"{mode} effect")
    return Localization("activation_patching", order, values, band, cost, settings, tables, (*notes, *band_notes))
