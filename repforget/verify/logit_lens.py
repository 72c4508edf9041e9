"""What every layer already says: residual states at the place that predicts the answer, read out as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repforget.knowledge import View
from repforget.models.capture import capture
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.scoring import token_batches
from repforget.scoring.encode import pad_id
from repforget.verify import _asking as ask
from repforget.verify.arms import MeasureInfo, References

_CURVE = ("logit lens", "layer", "probability of the truth among alternatives")
MEASURES = {
    "best_layer": MeasureInfo("knowledge", "white-box", curve=_CURVE),
    "own_decoder": MeasureInfo("knowledge", "white-box", votes=False,
                               curve=("logit lens, own decoder", *_CURVE[1:])),
}  # fmt: skip
READOUT_ELEMENTS = 2**26  # logits held at once


def logit_lens(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 2, alternatives: int = 31, layers: list[int] | Literal["all"] = "all", max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Read every layer's residual state at the last question token through the original's final norm and unembedding.

    Per item and layer: p(first token of the truth) among the distinct first tokens of the alternatives, in log space,
    mean over ``forms``.  ``best_layer`` takes the layer with the highest mean over items, the same maximum on every
    arm, twins included; ``own_decoder`` does it with the arm's own norm and unembedding.  Source: nostalgebraist 2020;
    as an audit of unlearning: Hong et al. 2025 and the depth score, arXiv 2605.24614.  Cost: one pass over the
    questions and one unembedding per layer.  An arm of another width or vocabulary is read with its own decoder only.

    A low value does not show absence: a change of basis hides knowledge from a fixed decoder.
    """
    items = ask.limited(view.forget, max_items, seed)
    asked = ask.first_tokens(model, items, view.knowledge, forms=forms, limit=alternatives)
    chosen = list(range(model.n_layers)) if layers == "all" else sorted(layers)
    original = references.original
    readable = (model.width, model.vocab_size) == (original.width, original.vocab_size)
    decoder = original if readable else model
    fixed, own = _read(model, (decoder, model), asked, chosen, progress)
    values: dict[str, NDArray[np.float64]] = {}
    series: dict[str, tuple[float, ...]] = {"x": tuple(float(layer) for layer in chosen)}
    for name, rows in (("best_layer", fixed), ("own_decoder", own)):
        table = np.stack([ask.by_item(len(items), asked.item, row) for row in rows])
        means = np.nanmean(table, axis=1) if asked.item else np.zeros(len(chosen))
        values[name] = table[int(means.argmax())]
        series[name] = tuple(float(m) for m in means)
    before = ask.by_item(len(items), asked.item, asked.prior)
    best = {name: float(chosen[int(np.argmax(series[name]))]) for name in values}
    scores = {name: ask.scores(items, column) for name, column in values.items()}
    return Measurement(scores | {f"{name}_prior": ask.scores(items, before) for name in values}, series,
                       {f"layer of {name}": layer for name, layer in best.items()})  # fmt: skip


def _read(
    model: LoadedModel, decoders: Sequence[LoadedModel], asked: ask.FirstTokens, layers: Sequence[int],
    progress: Progress | None,
) -> list[NDArray[np.float64]]:  # fmt: skip
    """Probability of the truth's first token per decoder: each [layers, rows]."""
    sites = [Site("resid_post", layer) for layer in layers]
    out = [np.zeros((len(layers), len(asked.ids))) for _ in decoders]
    batches = list(token_batches(asked.ids, pad_id=pad_id(model.tokenizer)))
    for rows, batch in track(progress, batches, "reading every layer"):
        values = capture(model, sites, batch, gather="last")
        for decoder, table in zip(decoders, out, strict=True):
            same = decoder is decoders[0] and table is not out[0]
            for k, site in enumerate(sites):
                table[k, rows] = out[0][k, rows] if same else _share(decoder, values[site], asked, rows)
    return out


def _share(decoder: LoadedModel, resid: Tensor, asked: ask.FirstTokens, rows: Sequence[int]) -> NDArray[np.float64]:
    step = max(1, READOUT_ELEMENTS // decoder.vocab_size)
    result = np.zeros(len(rows))
    with torch.no_grad():
        for at in range(0, len(rows), step):
            logits = lens(decoder, resid[at : at + step]).double().cpu()
            for k, row in enumerate(rows[at : at + step]):
                truth, others = logits[k, asked.truth[row]], logits[k, list(asked.others[row])]
                result[at + k] = float(torch.exp(truth - torch.logaddexp(truth, others.logsumexp(0))))
    return result
