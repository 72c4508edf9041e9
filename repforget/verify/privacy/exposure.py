"""Canary exposure: how far up the model puts the true answer among everything it could be."""

from __future__ import annotations

from collections import Counter
from functools import cache

import numpy as np
from numpy.typing import NDArray

from repforget.knowledge import Item, Knowledge, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import candidate_logprobs
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {"bits": MeasureInfo("knowledge", "logits", votes=False)}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"max_items": 50},
    "standard": {},
    "thorough": {"forms": 2, "max_items": 1000},
}
PART = 32  # items asked at once
Array = NDArray[np.float64]


def exposure(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 1, candidates: int = 100_000, max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Rank the true answer among all answers of its relation by probability: log2(candidates) - log2(rank), in bits.

    All candidates are scored, up to ``candidates``; a tie counts as every place it may stand for, and the value is the
    mean over ``forms`` questions.  An answer that was never inserted has a uniform rank: 1.44 bits (log2 e) on average
    for many candidates, less for few; the most is log2(candidates).  ``bits_prior`` is the exposure under the
    frequencies of the answers among the kept items.  Source: Carlini et al. 2019, arXiv 1802.08232.  Cost: items x
    ``forms`` prompts once and one short row per candidate.

    It does not show what a rank is worth in another pool: few candidates bound it, and common answers rank high in a
    model that never knew.
    """
    items = ask.limited(view.forget, max_items, seed)
    knowledge = view.knowledge
    sets = [ask.options(item, knowledge, candidates - 1) for item in items]
    asked = [(k, question) for k, item in enumerate(items) for question in item.questions[:forms]]
    rows: list[list[float]] = [[] for _ in items]
    for start in track(progress, range(0, len(asked), PART), "ranking all candidates"):
        part = asked[start : start + PART]
        found = candidate_logprobs(model, [q for _, q in part], [sets[k] for k, _ in part])
        for (k, _), logs in zip(part, found, strict=True):
            rows[k].append(bits(logs))
    values = [float(np.mean(r)) if not np.isnan(r).any() else np.nan for r in rows]
    before = [bits(_frequencies(item, knowledge, candidates)) for item in items]
    facts = {"candidates per item": float(np.mean([len(s) for s in sets]))} if sets else {}
    return Measurement({"bits": ask.scores(items, values), "bits_prior": ask.scores(items, before)}, facts=facts)


def _frequencies(item: Item, knowledge: Knowledge, candidates: int) -> Array:
    pool = Counter[str]() if item.wrong_answers else knowledge.pools.get(item.relation, Counter[str]())
    names = (item.answer, *knowledge.alternatives(item, candidates - 1))
    return np.array([pool[name] for name in names], dtype=np.float64)


def bits(scores: Array) -> float:
    """Exposure of candidate 0 among ``scores`` [c], expected over the order of ties; NaN where it was not scored."""
    usable = scores[~np.isnan(scores)]
    if np.isnan(scores[0]) or len(usable) < 2:
        return float("nan")
    above, level = int((usable > scores[0]).sum()), int((usable == scores[0]).sum())
    return float(np.log2(len(usable)) - (_logs(above + level) - _logs(above)) / level)


@cache
def _logs(n: int) -> float:
    """log2(n!), the sum of log2 of the first n ranks."""
    return float(np.log2(np.arange(1, n + 1)).sum())
