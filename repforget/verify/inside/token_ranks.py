"""Is the answer conspicuous at some layer: among the most likely tokens, or among the least likely?"""

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
from repforget.progress import Progress, track
from repforget.records import Measurement, Site
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit, pad, pad_id
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {
    "top": MeasureInfo("knowledge", "white-box", votes=False),
    "top_or_bottom": MeasureInfo("knowledge", "white-box", votes=False),
    "change": MeasureInfo("knowledge", "white-box", votes=False),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"forms": 1, "max_items": 100},
    "standard": {},
    "thorough": {"forms": 4, "max_items": 2000},
}
ROWS = 64  # questions per batch
Array = NDArray[np.float64]


def token_ranks(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    k: int = 4, forms: int = 1, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Look for the answer's first token among the ``k`` most and the ``k`` least likely tokens of any layer.

    Each layer's state before the answer is read through the arm's own norm and unembedding.  ``top``: share of question
    forms where the token is among the top k of at least one layer; ``top_or_bottom`` also counts the bottom k, where a
    suppressed token stands out; ``change``: top or bottom k of the difference of log-probability from one layer to the
    next.  The maximum over layers is the same on every arm; ``_prior`` is the rate at which the alternatives' first
    tokens are found, which chance, 1 - (1 - 2k/V)^layers, puts in the facts.  Source: Patil, Hase and Bansal 2023,
    arXiv 2309.17410.  Cost: one pass over the questions and one unembedding per layer.

    A hit is no proof of knowledge (common answers rank high for anybody) and a miss does not show absence.
    """
    if k < 1:
        raise UsageError(f"Verifier 'token_ranks' was given k = {k}: give at least 1.")
    items = ask.limited(view.forget, max_items, seed)
    asked = [(n, q) for n, item in enumerate(items) for q in item.questions[:forms]]
    options = [ask.options(item, view.knowledge, alternatives) for item in items]
    pairs = [(q, text) for n, q in asked for text in options[n]]
    encoded = iter(encode_many(model.tokenizer, pairs, limit=context_limit(model)))
    groups = [[next(encoded) for _ in options[n]] for n, _ in asked]
    hits: dict[str, list[list[float]]] = {name: [[] for _ in items] for m in MEASURES for name in (m, f"{m}_prior")}
    usable = [j for j, group in enumerate(groups) if group[0].valid]
    for at in track(progress, range(0, len(usable), ROWS), "ranking tokens"):
        part = usable[at : at + ROWS]
        found = _conspicuous(model, [groups[j][0].ids[: groups[j][0].start] for j in part], k)
        for row, j in enumerate(part):
            first = groups[j][0]
            rivals = {e.answer[0] for e in groups[j][1:] if e.valid and e.ids[: e.start] == first.ids[: first.start]}
            others = sorted(rivals - {first.answer[0]})
            for name, table in found.items():
                hits[name][asked[j][0]].append(float(table[row, first.answer[0]]))
                if others:
                    hits[f"{name}_prior"][asked[j][0]].append(float(table[row, others].mean()))
    values = {name: ask.scores(items, [float(np.mean(g)) if g else np.nan for g in group])
              for name, group in hits.items()}  # fmt: skip
    chance = 1.0 - (1.0 - min(1.0, 2 * k / model.vocab_size)) ** model.n_layers
    return Measurement(values, {}, {"chance of a random token, top or bottom": chance})


def _conspicuous(model: LoadedModel, prompts: Sequence[Sequence[int]], k: int) -> dict[str, Array]:
    """Per measure, which tokens stand out at some layer: [rows, vocabulary] of 0 and 1."""
    sites = [Site("resid_post", layer) for layer in range(model.n_layers)]
    values = capture(model, sites, pad(prompts, pad_id(model.tokenizer)), gather="last")
    found = {name: torch.zeros(len(prompts), model.vocab_size) for name in MEASURES}
    before: Tensor | None = None
    for site in sites:
        with torch.no_grad():
            logs = lens(model, values[site]).float().log_softmax(-1).cpu()
        _mark(found["top"], logs, k, ends=False)
        _mark(found["top_or_bottom"], logs, k, ends=True)
        if before is not None:
            _mark(found["change"], logs - before, k, ends=True)
        before = logs
    return {name: table.double().numpy() for name, table in found.items()}


def _mark(table: Tensor, values: Tensor, k: int, *, ends: bool) -> None:
    """Mark the k highest of each row, and with ``ends`` the k lowest."""
    table.scatter_(1, values.topk(min(k, values.shape[1]), dim=1).indices, 1.0)
    if ends:
        table.scatter_(1, values.topk(min(k, values.shape[1]), dim=1, largest=False).indices, 1.0)
