"""What every layer already says: residual states at the places that predict the answer, read out as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.knowledge import View
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References

_Y = "probability of the truth among alternatives"
MEASURES = {
    "best_layer": MeasureInfo("knowledge", "white-box", curve=("logit lens", "layer", _Y)),
    "own_decoder": MeasureInfo("knowledge", "white-box", votes=False, curve=("logit lens, own decoder", "layer", _Y)),
}
JOINS = "quick"
BUDGETS: Budgets = {
    "quick": {"forms": 1},
    "standard": {},
    "thorough": {"forms": 8, "alternatives": 63, "max_items": 2000},
}


def logit_lens(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 1, alternatives: int = 31, layers: list[int] | Literal["all"] = "all", max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Read every layer's state at the answer's positions through the original's final norm and unembedding.

    Per item and layer: probability of the truth when decoding is confined to the candidates, teacher-forced, in log
    space, mean over ``forms``.  ``best_layer`` takes the layer with the highest mean over items, the same maximum on
    every arm, twins included; ``own_decoder`` does it with the arm's own norm and unembedding.  Source: nostalgebraist
    2020, the logit lens; its use in audits of unlearning: arXiv 2605.24614.  Cost: one pass over questions with
    answers and one unembedding per layer.  An arm of another width or vocabulary is read with its own decoder only.

    A low value does not show absence: a change of basis hides knowledge from a fixed decoder.
    """
    items = ask.limited(view.forget, max_items, seed)
    chosen = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
    layer_list = list(range(model.n_layers)) if layers == "all" else sorted(layers)
    original = references.original
    readable = (model.width, model.vocab_size) == (original.width, original.vocab_size)
    decoders = {"best_layer": original if readable else model, "own_decoder": model}
    tables = _read(model, decoders, chosen, layer_list, progress)
    before = ask.prior(items, view.knowledge, alternatives)
    scores, facts = {}, {}
    series: dict[str, tuple[float, ...]] = {"x": tuple(float(layer) for layer in layer_list)}
    for name, rows in tables.items():
        table = path.by_item(len(items), chosen, rows)
        means = np.nanmean(table, axis=1) if chosen else np.zeros(len(layer_list))
        best = int(means.argmax())
        scores[name], scores[f"{name}_prior"] = ask.scores(items, table[best]), ask.scores(items, before)
        series[name] = tuple(float(m) for m in means)
        facts[f"layer of {name}"] = float(layer_list[best])
    return Measurement(scores, series, facts)


def _read(
    model: LoadedModel, decoders: dict[str, LoadedModel], chosen: Sequence[path.Path], layers: Sequence[int],
    progress: Progress | None,
) -> dict[str, NDArray[np.float64]]:  # fmt: skip
    """Constrained probability of the truth per decoder: [layers, paths]."""
    sites = [Site("resid_post", layer) for layer in layers]
    tables = {name: np.zeros((len(layers), len(chosen))) for name in decoders}
    for rows in track(progress, list(path.batches(model, chosen)), "reading every layer"):
        values = capture(model, sites, rows.batch, gather=rows.places)
        for k, site in enumerate(sites):
            done: dict[int, NDArray[np.float64]] = {}
            for name, decoder in decoders.items():
                if id(decoder) not in done:
                    with torch.no_grad():
                        done[id(decoder)] = path.read(lens(decoder, values[site]), rows)[0]
                tables[name][k, rows.which] = done[id(decoder)]
    return tables
