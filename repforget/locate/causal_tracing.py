"""Causal tracing: which clean states bring the answer back after the subject was corrupted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from repforget.causal import Run
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate._exact import BandPlan, Control, exact_band, ranked
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._tracing import (
    ROLES,
    Noise,
    Scale,
    embedding_scale,
    role_scores,
    token_roles,
    trace,
    windows,
)
from repforget.locate._units import Layers, expand_nodes
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Component, Localization

State = Literal["resid_post", "mlp_out", "attn_out"]


def causal_tracing(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, nodes: tuple[State, ...] = ("mlp_out", "attn_out"), layers: Layers = "all",
    corruption: Literal["noise", "replace"] = "noise", noise: float = 3.0, samples: int = 10,
    window: int | Literal["auto"] = "auto", metric: Scale = "logprob", items: int = 64, partners: int = 1,
    contrast: float = 0.0, top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank sites by how much of the answer their clean state brings back once the subject is corrupted.

    ``noise`` adds Gaussian noise to the subject's token embeddings, of ``noise`` times the standard deviation of the
    entries of the facts' subject embeddings, ``samples`` times; ``replace`` puts a retain subject of equal token length
    there (``partners`` of them). Then the clean value of one site is put back at one kind of token: IE = M_restored -
    M_corrupted, and AIE its mean over facts and draws, given as a share of the mean M_clean - M_corrupted. mlp_out and
    attn_out are put back in ``window`` layers at once, centred on the layer (auto: a fifth of the depth, at most 10);
    resid_post alone. Kinds of tokens: first, middle (together) and last of the subject, first later one, last of the
    prompt; a fact without such a token does not count there. The score of a site is its largest AIE over the kinds of
    tokens, less ``contrast`` times the AIE on matched retain facts at that kind; the tables hold layer by kind.
    ``metric`` may be the ``probability`` of the answer, as published, which hides what lowers an answer that is already
    unlikely. The band is that of activation_patching, and the facts are those with a partner for it.

    Cost: one forward pass per fact, draw (or partner), site and kind of token, and the band.
    What it does not show: that editing there removes the knowledge (Hase et al. 2023, arXiv 2301.04213). The size of
    the noise decides the answer, for noised embeddings are none that the model has seen; a window says less about its
    middle layer the wider it is; resid_post of the last layer at the last token always brings back everything. Without
    a contrast the last MLP may lead, which says the answer, or the first, which puts names together.
    Source: Meng et al. 2022, arXiv 2202.05262; token replacement: Zhang & Nanda 2023, arXiv 2309.16042.
    """
    if not np.isfinite(noise) or noise < 0 or samples < 1:
        raise UsageError(f"causal_tracing was given noise={noise} and samples={samples}: give a size of at least 0 "
                         "and one draw or more.")  # fmt: skip
    components = expand_nodes(model, nodes, layers)
    patches = windows(model, components, window)
    given: dict[str, Any] = {"items": items, "partners": partners, "contrast": contrast,
                             "metric": "logprob" if metric == "probability" else metric}  # fmt: skip
    tasks, notes = corrupted_tasks(model, knowledge, seed, mode="denoise", positions="subject", **given)
    forget, retain = tasks[0].forget, tasks[0].retain
    added = None
    if corruption == "noise":
        added = Noise(noise * embedding_scale(model, forget), samples, seed)
        forget, retain = _clean(forget), _clean(retain)
    traces = trace(model, forget, patches, metric, added, progress)
    beside = trace(model, retain, patches, metric, added, progress) if retain else None
    maps, scores = role_scores(traces, beside, contrast)
    order, values = ranked(components, scores)
    half_order, _ = ranked(components, role_scores(traces, beside, contrast, seed)[1])
    both, _ = corrupted_tasks(model, knowledge, seed, mode="both", **given)
    plan = BandPlan(top, draws, control, seed)
    band, band_notes, spent = exact_band(both, components, half_order, plan, progress)
    settings: dict[str, Any] = {
        "nodes": list(nodes), "layers": layers, "corruption": corruption, "noise": noise, "samples": samples,
        "window": window, "metric": metric, "items": items, "partners": partners, "contrast": contrast, "top": top,
        "draws": draws, "control": control, "seed": seed,
    }  # fmt: skip
    cost = {"forwards": _passes((*forget, *retain), len(patches), added) + spent, "backwards": 0.0,
            "facts": float(len({run.id for run in forget}))}  # fmt: skip
    told = f"The corruption costs the answer {float(traces.gap.mean()):.3g} ({metric}) on average: the unit of scores."
    return Localization("causal_tracing", order, values, band, cost, settings, _tables(components, maps),
                        (*notes, told, *band_notes))  # fmt: skip


def _clean(runs: Sequence[Run]) -> tuple[Run, ...]:
    """Each fact once, with the clean prompt on both sides: noise takes the place of the other subject."""
    return tuple({run.id: replace(run, base=run.donor) for run in runs}.values())


def _passes(runs: Sequence[Run], patches: int, noise: Noise | None) -> float:
    samples = 1 if noise is None else noise.samples
    return float(samples * sum(2 + len(token_roles(run)) * (patches + 3) for run in runs))


def _tables(components: Sequence[Component], maps: np.ndarray[Any, Any]) -> dict[str, list[list[float]]]:
    """Per kind of site, one row per layer and one column per role that occurs."""
    seen = [k for k in range(len(ROLES)) if np.isfinite(maps[k]).all()]
    names = ", ".join(ROLES[k] for k in seen)
    kinds = dict.fromkeys(c.site.kind for c in components)
    return {f"AIE of {kind} by layer: {names}": [[float(maps[r, k]) for r in seen]
                                                 for k, c in enumerate(components) if c.site.kind == kind]
            for kind in kinds}  # fmt: skip
