"""What every layer says through a translator of its own, fitted where the model still answers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.models.translator import fit_translator
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References

_Y = "probability of the truth among alternatives"
MEASURES = {"best_layer": MeasureInfo("knowledge", "white-box", curve=("tuned lens", "layer", _Y))}
JOINS = "standard"
HELD_OUT = True
BUDGETS: Budgets = {
    "quick": {"steps": 20, "max_support": 200, "max_items": 100},
    "standard": {},
    "thorough": {"forms": 4, "steps": 200, "max_support": 2000, "alternatives": 63, "max_items": 2000},
}
Array = NDArray[np.float64]


def tuned_lens(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 1, alternatives: int = 31, steps: int = 60, lr: float = 1e-3, max_support: int = 600,
    max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Read every layer through an affine translator trained on retained facts to give the model's own last logits.

    Per layer h -> h + W h + b starts at the identity and minimises KL(last logits || readout) on states that predict
    the answers of ``max_support`` retained items, for ``steps`` Adam steps of 256 states; the arm's own final norm and
    unembedding decode.  What is silenced late on the forget subjects alone is then read earlier, in the basis the layer
    uses.  ``best_layer``: probability of the truth when decoding is confined to the candidates, at the layer with the
    highest mean over items, the same maximum on every arm.  Source: Belrose et al. 2023, arXiv 2303.08112.  Cost: one
    pass over support and questions, layers x steps unembeddings of 256 states forward and backward; the states of all
    layers at the answers of support and questions are kept, and d^2 numbers.

    A low value does not show absence: the translator is affine and knows retained relations only.
    """
    if steps < 1:
        raise UsageError(f"Verifier 'tuned_lens' was given {steps} steps: give at least one.")
    items, kept = ask.limited(view.forget, max_items, seed), ask.limited(view.support, max_support, seed)
    asked = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
    lessons = path.kept_paths(references, model, kept, view.knowledge, forms=1, limit=1)
    table = np.full((model.n_layers, len(asked)), np.nan)
    if asked and lessons:
        table = _table(model, asked, lessons, steps, lr, seed, progress)
    per_item = path.by_item(len(items), asked, table)
    means = np.nanmean(per_item, axis=1) if asked and lessons else np.zeros(model.n_layers)
    best = int(means.argmax())
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    return Measurement(
        {"best_layer": ask.scores(items, per_item[best]), "best_layer_prior": before},
        {"x": tuple(map(float, range(model.n_layers))), "best_layer": tuple(map(float, means))},
        {"layer of best_layer": float(best)},
    )


def _table(
    model: LoadedModel, asked: Sequence[path.Path], lessons: Sequence[path.Path], steps: int, lr: float, seed: int,
    progress: Progress | None,
) -> Array:  # fmt: skip
    """Constrained probability of the truth [layers, paths], one translator per layer."""
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    taught = list(path.batches(model, lessons))
    states = [capture(model, sites, rows.batch, gather=rows.places) for rows in taught]
    rows_of = list(path.batches(model, asked))
    seen = [capture(model, sites, rows.batch, gather=rows.places) for rows in rows_of]

    def flat(site: Site) -> Tensor:
        return torch.cat([s[site][rows.real.to(s[site].device)] for s, rows in zip(states, taught, strict=True)])

    last = flat(sites[-1])
    out = np.zeros((len(sites), len(asked)))
    for k, site in enumerate(track(progress, sites, "tuning the lens", len(sites))):
        translate = fit_translator(model, flat(site), last, steps, lr, seed)
        for rows, values in zip(rows_of, seen, strict=True):
            with torch.no_grad():
                out[k, rows.which] = path.read(lens(model, translate(values[site])), rows)[0]
    return out
