"""Black-box and logit measures of what the model says when it is asked in forms the editor never saw."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from repforget.knowledge import Item, Knowledge, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import answer_logprobs
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {
    "contrastive": MeasureInfo("knowledge", "logits"),
    "exact_match": MeasureInfo("knowledge", "black-box"),
    "sampled": MeasureInfo("knowledge", "black-box"),
    "rank": MeasureInfo("knowledge", "logits", votes=False),
    "truth_ratio": MeasureInfo("knowledge", "logits", votes=False),
    "log_probability": MeasureInfo("knowledge", "logits", votes=False),
}
JOINS = "quick"
BUDGETS: Budgets = {
    "quick": {"forms": 1},
    "standard": {},
    "thorough": {"forms": 8, "samples": 8, "alternatives": 63, "max_items": 2000},
}
RATIO_ALTERNATIVES = 5


def behaviour(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 2, alternatives: int = 31, samples: int = 0, temperature: float = 1.0, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Ask the forget items in unseen question forms: contrastive probability, greedy and sampled answers, rank.

    ``contrastive`` is p(truth) among up to ``alternatives`` answers of the same relation, mean over ``forms``
    (value 1/(1+alternatives) at chance); ``exact_match`` the share of forms whose greedy answer begins with the truth
    or an alias; ``sampled`` the share of ``samples`` draws that do.  ``log_probability`` (nats per answer token) is
    descriptive only: a model that answers by the prior looks half-remembering by it.  ``truth_ratio`` is
    P/(P + mean P of five alternatives), length-normalised (2401.06121, "knowledge" form).  Cost: one pass over the
    prompts, one short row per alternative, one generation per form (times 1 + samples).

    Low values do not show that the knowledge is gone: behaviour is what a refusal or a hook changes first.
    """
    items, knowledge = ask.limited(view.forget, max_items, seed), view.knowledge
    steps = iter(track(progress, range(3 if samples else 2), "asking questions"))
    next(steps)
    found = ask.contrast(model, items, knowledge, forms=forms, limit=alternatives)
    ratio, nats = _truth_ratio(model, items, knowledge)
    next(steps)
    values = {
        "contrastive": found.probability, "contrastive_prior": ask.prior(items, knowledge, alternatives),
        "exact_match": ask.said(model, items, forms=forms), "exact_match_prior": ask.prior_match(items, knowledge),
        "rank": found.reciprocal_rank, "truth_ratio": ratio, "log_probability": nats,
    }  # fmt: skip
    if samples:
        next(steps)
        values["sampled"] = ask.said(model, items, forms=forms, samples=samples, temperature=temperature, seed=seed)
        values["sampled_prior"] = ask.prior_said(items, knowledge)
    list(steps)
    return Measurement({name: ask.scores(items, column) for name, column in values.items()})


def _truth_ratio(
    model: LoadedModel, items: Sequence[Item], knowledge: Knowledge
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """P/(P + mean P_alternative) with length-normalised P, and the log-probability per answer token, first form."""
    sets = [ask.options(item, knowledge, RATIO_ALTERNATIVES) for item in items]
    pairs = [(item.questions[0], text) for item, group in zip(items, sets, strict=True) for text in group]
    mean = answer_logprobs(model, pairs).mean_logprob
    ends = np.cumsum([len(group) for group in sets])
    ratio, nats = np.full(len(items), np.nan), np.full(len(items), np.nan)
    for k, (end, group) in enumerate(zip(ends, sets, strict=True)):
        own = mean[end - len(group) : end]
        nats[k] = own[0]
        if len(own) > 1:
            rest = np.logaddexp.reduce(own[1:]) - np.log(len(own) - 1)
            ratio[k] = np.exp(own[0] - np.logaddexp(own[0], rest))
    return ratio, nats
