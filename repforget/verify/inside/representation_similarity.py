"""How much do the arm's states resemble the original's? A description of the edit, and never a verdict."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.knowledge import View
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Measurement, Site
from repforget.scoring import encode_prompts, token_batches
from repforget.scoring.encode import pad_id
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {
    "cosine": MeasureInfo("knowledge", "white-box", votes=False),
    "cka": MeasureInfo("knowledge", "white-box", votes=False,
                       curve=("similarity to the original", "layer", "linear CKA on forget questions, debiased")),
}  # fmt: skip
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"max_items": 64},
    "standard": {},
    "thorough": {"max_items": 2000},
}
Array = NDArray[np.float64]


def representation_similarity(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Compare the states before the answer, at every layer, with the original's on the same forget questions.

    ``cosine``: cosine of the two centred states, per item, mean over layers (0 between unrelated bases).  ``cka``:
    linear CKA of the whole set with the unbiased estimate of HSIC (no bias by n < 10 d), mean over layers, the same
    number for every item, which says nothing about single ones; per layer in the curve.  Facts: |cosine| of the first
    principal directions, mean over layers.  Sources: Kornblith et al. 2019, arXiv 1905.00414; as a diagnostic of
    unlearning arXiv 2505.16831.  Cost: one pass over the questions.

    Neither shows knowledge or its absence; in a published comparison of metrics CKA told the two apart worst.
    Models of another width or depth have no cosine (NaN); CKA compares layers in order.
    """
    items = ask.limited(view.forget, max_items, seed)
    prompts = [item.questions[0] for item in items]
    key = ("representation_similarity", tuple(prompts))
    theirs: Tensor = references.once(key, lambda: states(references.original, prompts))
    own = theirs if model is references.original else states(model, prompts)
    shared = min(len(own), len(theirs))
    alike = [cka(own[k], theirs[k]) for k in range(shared)]
    value = float(np.nanmean(alike)) if not np.isnan(alike).all() else np.nan
    scores = {"cka": ask.scores(items, [value] * len(items))}
    facts: dict[str, float] = {}
    if own.shape == theirs.shape:
        a, b = own - own.mean(1, keepdim=True), theirs - theirs.mean(1, keepdim=True)
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=-1).mean(0)
        scores["cosine"] = ask.scores(items, cosine.numpy())
        axes = [_first_axes(x, y) for x, y in zip(a, b, strict=True)]
        facts["|cosine| of first principal directions"] = float(np.mean(axes))
    else:
        scores["cosine"] = ask.scores(items, np.full(len(items), np.nan))
    series = {"x": tuple(map(float, range(shared))), "cka": tuple(map(float, alike))}
    return Measurement(scores, series, facts)


def states(model: LoadedModel, prompts: list[str]) -> Tensor:
    """States at the last token of each prompt, every layer: [layers, n, d] in float64 on the CPU."""
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    out = torch.zeros(len(sites), len(prompts), model.width, dtype=torch.float64)
    coded = encode_prompts(model.tokenizer, prompts)
    for rows, batch in token_batches(coded, pad_id=pad_id(model.tokenizer)):
        values = capture(model, sites, batch, gather="last")
        for k, site in enumerate(sites):
            out[k, rows] = values[site].double().cpu()
    return out


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of states [n, d] and [n, e] with the unbiased estimator of HSIC (Song et al. 2012); NaN below n = 4.

    1 for y = x Q with orthogonal Q and any scale; about 0 for independent noise, whatever d.
    """
    if len(x) < 4:
        return float("nan")
    a, b = (_without_diagonal(z) for z in (x, y))
    own = _hsic(a, a) * _hsic(b, b)
    return float(_hsic(a, b) / own.sqrt()) if own > 0 else float("nan")


def _without_diagonal(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    return (centred @ centred.T).fill_diagonal_(0.0)


def _hsic(a: Tensor, b: Tensor) -> Tensor:
    n = len(a)
    rows = (a.sum(0) * b.sum(0)).sum()
    return ((a * b).sum() + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2.0 * rows / (n - 2)) / (n * (n - 3))


def _first_axes(a: Tensor, b: Tensor) -> float:
    """|cosine| between the first principal directions of centred states; the sign of such a direction is free."""
    first = [torch.linalg.svd(z, full_matrices=False).Vh[0] for z in (a, b)]
    return float((first[0] @ first[1]).abs())
