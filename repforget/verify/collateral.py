"""What the edit cost: retain items, near misses and general text, each beside the untouched original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import ItemScores, Measurement
from repforget.scoring import answer_logprobs, encode_many, token_batches
from repforget.scoring.encode import context_limit, pad_id
from repforget.scoring.forward import forward
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {
    "retain": MeasureInfo("collateral", "logits"),
    "retain_exact": MeasureInfo("collateral", "black-box"),
    "neighbours": MeasureInfo("collateral", "logits"),
    "neighbours_exact": MeasureInfo("collateral", "black-box"),
    "general": MeasureInfo("collateral", "logits"),
    "agreement": MeasureInfo("collateral", "logits", votes=False),
}
JOINS = "quick"
BUDGETS: Budgets = {
    "quick": {},
    "standard": {},
    "thorough": {"forms": 4, "alternatives": 63, "max_items": 2000, "max_texts": 1000},
}
Array = NDArray[np.float64]


def collateral(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 1, alternatives: int = 31, max_items: int = 300, max_texts: int = 100,
) -> Measurement:  # fmt: skip
    """Measure what must stay: constrained and greedy answers to retain and neighbour items, likelihood of general text.

    ``general`` is exp(mean log-probability per token) of each text, so that 2 % lost is 0.02 nats per token;
    ``agreement`` is exp(-KL(original || arm)) at the retain answers' positions, descriptive (a twin disagrees too).
    Up to ``max_items`` per set.  Cost: like ``behaviour`` on as many items, one pass over the texts.

    Kept quality on these sets does not show that nothing else was lost: it shows it for what was asked.
    """
    out: dict[str, ItemScores] = {}
    facts: dict[str, float] = {}
    sets = {"retain": view.retain, "neighbours": view.neighbours}
    for name, everything in track(progress, list(sets.items()), "asking what must stay"):
        items = ask.limited(everything, max_items, seed)
        if items:
            asked = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
            out[name] = ask.scores(items, path.probability(model, len(items), asked))
            out[f"{name}_prior"] = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
            out[f"{name}_exact"] = ask.scores(items, ask.said(model, items, forms=forms))
            out[f"{name}_exact_prior"] = ask.scores(items, ask.prior_match(items, view.knowledge))
    retain = ask.limited(view.retain, max_items, seed)
    if retain and model.vocab_size == references.original.vocab_size:
        drift = _divergence(model, references, retain)
        out["agreement"] = ask.scores(retain, np.exp(-drift))
        facts["KL(original || arm) at retain answers, nats"] = float(np.nanmean(drift))
    if view.general:
        out.update(_general(model, view.general[:max_texts], references.original.vocab_size))
    return Measurement(out, {}, facts)


def _general(model: LoadedModel, texts: Sequence[str], vocabulary: int) -> Mapping[str, ItemScores]:
    """Per-token probability of each text after its first word (position 0 is never predicted), and that of noise."""
    parts = [text.strip().partition(" ") for text in texts]
    usable = [k for k, (_, _, rest) in enumerate(parts) if rest.strip()]
    found = answer_logprobs(model, [(parts[k][0], " " + parts[k][2]) for k in usable])
    values = np.full(len(texts), np.nan)
    values[usable] = np.exp(found.mean_logprob)
    names = [f"text-{k}" for k in range(len(texts))]
    noise = ItemScores.of(names, names, [1.0 / vocabulary] * len(texts))
    return {"general": ItemScores.of(names, names, list(values)), "general_prior": noise}


def _divergence(model: LoadedModel, references: References, items: Sequence[Item]) -> Array:
    """Mean KL(original || model) in nats over each item's answer positions, teacher-forced [n]; NaN if too long."""
    original = references.original
    if model is original:
        return np.zeros(len(items))
    pairs = [(item.questions[0], item.continuation()) for item in items]
    encoded = encode_many(model.tokenizer, pairs, limit=context_limit(model))
    kept = [k for k, e in enumerate(encoded) if e.valid]
    result = np.full(len(items), np.nan)
    sequences = [encoded[k].ids[:-1] for k in kept]
    for rows, batch in token_batches(sequences, token_budget=2048, pad_id=pad_id(model.tokenizer)):
        group = [encoded[kept[r]] for r in rows]
        first = min(e.start for e in group) - 1
        places = torch.arange(first, batch.ids.shape[1])
        pair = [forward(m, batch.ids, batch.mask, batch.position_ids, places)[0] for m in (original, model)]
        ours, theirs = (logits.float().log_softmax(-1).cpu() for logits in pair)
        # Where the original's probability underflows, its term is zero and not NaN.
        terms = torch.where(ours.exp() > 0, ours.exp() * (ours - theirs), torch.zeros(()))
        divergence = terms.sum(-1).double().numpy()
        for k, (row, e) in enumerate(zip(rows, group, strict=True)):
            result[kept[row]] = divergence[k, e.start - 1 - first : len(e.ids) - 1 - first].mean()
    kept_above_zero: Array = np.maximum(result, 0.0)  # rounding may leave a tiny negative divergence
    return kept_above_zero
