"""The trajectory of the answer through the layers, as the logit lens or a tuned lens reads it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from repforget.causal import Prepared, Run, prepare
from repforget.errors import UsageError
from repforget.knowledge import EditData, Knowledge
from repforget.locate._exact import Array, BandPlan, Control, exact_band, may_rank, ranked
from repforget.locate._pairs import choose_facts, forget_and_retain, plain_runs
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import Layers, expand_nodes, layer_writes
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.models.translator import fit_translator
from repforget.progress import Progress, track
from repforget.records import Localization, Site

Reading = Callable[[Tensor], Tensor]  # states [..., d] -> logits [..., V]
START = Site("resid_pre", 0)


@dataclass(frozen=True)
class Trajectory:
    """Per state (the embedding, then every layer) and run: log p of the answer in nats, and the mean rank of its
    tokens (0 is the first) [layers + 1, n]."""

    logprob: Array
    rank: Array

    @property
    def increments(self) -> Array:
        """What each layer adds to log p [layers, n]."""
        return np.diff(self.logprob, axis=0)


def lens_trajectory(
    model: LoadedModel, knowledge: Knowledge, *, twins: Sequence[LoadedModel] = (), seed: int = 0,
    progress: Progress | None = None, layers: Layers = "all", read: Literal["logit", "tuned"] = "logit",
    items: int = 64, contrast: float = 1.0, support: int = 256, steps: int = 100, lr: float = 1e-3,
    top: int | Literal["auto"] = "auto", draws: int = 100, control: Control = "mean",
) -> Localization:  # fmt: skip
    """Rank layers by how much they raise the answer in a readout of the residual stream.

    Final norm and unembedding read the embedding and the output of every layer (``logit``), or each through an affine
    translator of its own (``tuned``), which starts at the identity and is trained for ``steps`` steps on up to
    ``support`` retain facts to give the model's last distribution. A layer's score is the rise of log p(answer),
    teacher-forced and in nats, from the layer before it to it, less ``contrast`` times that on matched retain facts.
    Tables hold log p and the mean rank of the answer's tokens by layer. The band patches what a layer writes (attention
    and MLP), for its whole state carries everything.

    Cost: one forward pass per fact and an unembedding of its answer tokens per layer; with ``tuned`` as many more as
    there are layers times ``steps`` times 256 states, forward and backward; and the band.
    What it does not show: what is computed in another basis or at the subject, and that a layer which makes the answer
    readable holds it: on four models with a planted layer either lens puts the last layer first on each and so finds
    one (chance is one). It is a picture of the readout more than a locator.
    Source: nostalgebraist 2020, "interpreting GPT: the logit lens"; Belrose et al. 2023, arXiv 2303.08112.
    """
    if steps < 1 or support < 1:
        raise UsageError(f"lens_trajectory was given steps={steps} and support={support}: give at least one of each.")
    components = expand_nodes(model, ("resid_post",), layers)
    data = knowledge.for_editor()
    tasks, notes = corrupted_tasks(model, knowledge, seed, items=items, mode="both")
    forget, retain = forget_and_retain(data, items, seed, lambda facts: plain_runs(model.tokenizer, facts, "all"),
                                       contrast != 0)  # fmt: skip
    readings = logit_readings(model)
    if read == "tuned":
        readings = tuned_readings(model, _support(model, data, support, seed), steps, lr, seed, progress)
    known = trajectory(model, forget.runs, readings, progress)
    beside = trajectory(model, retain.runs, readings, progress) if retain.runs else None
    places = [c.site.layer for c in components]
    scores = _scores(known, beside, contrast)[places]
    early = may_rank(tasks, [run.cluster for run in forget.runs], seed)
    half_order, _ = ranked(components, _scores(known, beside, contrast, early)[places])
    plan = BandPlan(top, draws, control, seed)
    band, band_notes, spent = exact_band(tasks, components, half_order, plan, progress, written=layer_writes)
    order, values = ranked(components, scores)
    settings: dict[str, Any] = {"layers": layers, "read": read, "items": items, "contrast": contrast,
                                "support": support, "steps": steps, "lr": lr, "top": top, "draws": draws,
                                "control": control, "seed": seed}  # fmt: skip
    trained = float(model.n_layers * steps) if read == "tuned" else 0.0
    cost = {"forwards": float(len(forget.runs) + len(retain.runs)) + spent, "backwards": 0.0,
            "readouts trained": trained, "facts": float(len(forget.runs))}  # fmt: skip
    tables = _tables(scores, known, beside)
    return Localization("lens_trajectory", order, values, band, cost, settings, tables,
                        (*forget.notes, *retain.notes, *notes, *band_notes))  # fmt: skip


def _scores(known: Trajectory, beside: Trajectory | None, contrast: float, chosen: Any = None) -> Array:
    """Mean increment on (chosen) forget facts less ``contrast`` times that on retain facts [layers]."""
    mean = (known.increments if chosen is None else known.increments[:, chosen]).mean(axis=1)
    return np.asarray(mean if beside is None else mean - contrast * beside.increments.mean(axis=1))


def _tables(scores: Array, known: Trajectory, beside: Trajectory | None) -> dict[str, Sequence[Sequence[float]]]:
    both = [("forget", known)] + ([("retain", beside)] if beside is not None else [])
    names = ", ".join(name for name, _ in both)
    return {
        "contrasted rise of log p by layer": [[float(score)] for score in scores],
        f"log p of the answer by layer: {names}": np.stack([t.logprob[1:].mean(1) for _, t in both], 1).tolist(),
        f"mean rank of the answer's tokens by layer: {names}":
            np.stack([t.rank[1:].mean(1) for _, t in both], 1).tolist(),
    }  # fmt: skip


def logit_readings(model: LoadedModel) -> list[Reading]:
    """The logit lens for the embedding and every layer."""
    return [lambda state: lens(model, state)] * (model.n_layers + 1)


def tuned_readings(
    model: LoadedModel, runs: Sequence[Run], steps: int, lr: float, seed: int, progress: Progress | None = None
) -> list[Reading]:
    """A lens for the embedding and every layer, through translators trained on all tokens of ``runs``; the last layer
    needs none."""
    sites = _states(model)
    states: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for item in prepare(model, runs):
        values = capture(model, sites, item.base, gather="tokens")
        for site in sites:
            states[site].append(values[site])
    flat = {site: torch.cat(parts) for site, parts in states.items()}
    fitted = [fit_translator(model, flat[site], flat[sites[-1]], steps, lr, seed)
              for site in track(progress, sites[:-1], "tuning the lens")]  # fmt: skip

    def through(translate: Reading) -> Reading:
        return lambda state: lens(model, translate(state))

    return [*map(through, fitted), *logit_readings(model)[:1]]


def _states(model: LoadedModel) -> list[Site]:
    return [START, *(Site("resid_post", k) for k in range(model.n_layers))]


def _support(model: LoadedModel, data: EditData, support: int, seed: int) -> tuple[Run, ...]:
    """Retain statements on which translators are trained."""
    if not data.retain:
        raise UsageError("A tuned lens is trained on retain facts, and there are none: add some, or use read='logit'.")
    return plain_runs(model.tokenizer, choose_facts(data.retain, support, seed), "all").runs


@torch.no_grad()
def trajectory(
    model: LoadedModel, runs: Sequence[Run], readings: Sequence[Reading], progress: Progress | None = None
) -> Trajectory:
    """Read every run's answer from the embedding and every layer; float64."""
    sites = _states(model)
    logprob, rank = (np.zeros((len(sites), len(runs))) for _ in range(2))
    for item in track(progress, list(prepare(model, runs)), "reading layers"):
        values = capture(model, sites, item.base, gather=_answer_places(item))
        weight = item.weight.double()
        for k, (site, reading) in enumerate(zip(sites, readings, strict=True)):
            logits = reading(values[site]).to(weight.device).double()
            target = item.target.unsqueeze(-1)
            found = logits.log_softmax(-1).gather(-1, target)[..., 0]
            above = (logits > logits.gather(-1, target)).sum(-1).double()
            logprob[k, list(item.rows)] = (found * weight).sum(1).cpu().numpy()
            rank[k, list(item.rows)] = ((above * weight).sum(1) / weight.sum(1)).cpu().numpy()
    return Trajectory(logprob, rank)


def _answer_places(item: Prepared) -> Tensor:
    """Positions that predict the answers [b, a], aligned right; what lies before a short answer is weighted 0."""
    length, width = item.base.ids.shape[1], item.target.shape[1]
    row = torch.arange(length - width, length, device=item.base.ids.device)
    return row.expand(len(item.rows), width)
