"""Membership inference from token probabilities: does the model prefer what it was trained on to its like?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring.metrics import min_k, min_k_plus_plus, zlib_score
from repforget.scoring.tokens import token_scores
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.privacy import _matched as matched

MEASURES = {
    "loss": MeasureInfo("knowledge", "logits", votes=False),
    "min_k": MeasureInfo("knowledge", "logits", votes=False),
    "min_k_plus_plus": MeasureInfo("knowledge", "logits", votes=False),
    "zlib": MeasureInfo("knowledge", "logits", votes=False),
    "lowercase": MeasureInfo("knowledge", "logits", votes=False),
    "recall": MeasureInfo("knowledge", "logits", votes=False),
    "reference": MeasureInfo("knowledge", "logits", votes=False),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"alternatives": 15, "max_items": 100},
    "standard": {},
    "thorough": {"forms": 2, "alternatives": 63, "max_items": 1000},
}
UNTOLD = ("recall", "reference")  # the frequency of an answer cancels in them: nothing is told by the prior
Array = NDArray[np.float64]


def membership(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 1, alternatives: int = 31, k: float = 0.4, shots: int = 3, asked: matched.Asked = "questions",
    holdout: str = "", max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Rank each forget item's answer among matched non-members by seven membership scores.

    The value is the share of non-members (the same text with other answers of its relation, or ``holdout``) that score
    lower, ties half: 0.5 is chance, the mean over items is the AUC.  Scores, with l the loss in nats per answer token,
    higher = member: ``loss`` -l; ``zlib`` -l / compressed bytes of the answer; ``lowercase`` -l / l(lower-cased text);
    ``min_k`` mean of the ``k`` least likely tokens' log-probabilities (Shi et al. 2023, arXiv 2310.16789);
    ``min_k_plus_plus`` the same on standardised ones (Zhang et al. 2024, arXiv 2404.02936); ``recall``
    l(after ``shots`` false facts) / l (Xie et al. 2024, arXiv 2406.15968); ``reference`` l(twins) - l, only where
    there are twins (a twin is compared with the other twins; a single one with itself, which is chance).  Facts: true
    positives at 1 % and 0.1 % false positives.  Cost: three passes over items x ``forms`` prompts with a short row per
    alternative, and one such pass per twin once for all arms.

    Chance does not show that nothing is left: an average hides the worst items, and a value far below chance gives a
    forgotten item away as surely as one above it.
    """
    items = ask.limited(view.forget, max_items, seed)
    found = matched.texts(items, view.knowledge, forms=forms, limit=alternatives, asked=asked, holdout=holdout)
    steps = iter(track(progress, range(3), "scoring members and non-members"))
    next(steps)
    raw = _shared(model, found, k)
    next(steps)
    loss = matched.log_loss(raw["loss"])
    lowered = [(p.lower(), c.lower()) for p, c in found.pairs]
    raw["lowercase"] = matched.log_loss(matched.confidence(model, lowered)) - loss
    next(steps)
    fronts = false_facts(view, shots, seed)
    after = [(fronts[kind] + p, c) for (p, c), kind in zip(found.pairs, found.kinds, strict=True)]
    raw["recall"] = matched.log_loss(matched.confidence(model, after)) - loss
    if references.twins:
        raw["reference"] = raw["loss"] - _untrained(model, references, found, raw["loss"])
    list(steps)
    before = matched.prior_standing(items, view.knowledge, alternatives, holdout)
    scores, facts = {}, dict[str, float]()
    for name, values in raw.items():
        scores[name] = ask.scores(items, matched.standing(values, found))
        scores[f"{name}_prior"] = ask.scores(items, np.full(len(items), 0.5) if name in UNTOLD else before)
        facts |= matched.rates(name, values, found)
    return Measurement(scores, facts=facts)


def _shared(model: LoadedModel, found: matched.Texts, k: float) -> dict[str, Array]:
    """The four scores that one pass over the texts gives [rows]."""
    seen = token_scores(model, found.pairs, moments=True)
    loss = np.where(seen.valid, seen.mean_logprob, np.nan)
    worst = min_k(seen.logprobs, k=k)
    standard = min_k_plus_plus(seen.logprobs, seen.mu or (), seen.sigma2 or (), k=k)
    squeezed = zlib_score(loss, [c for _, c in found.pairs])
    return {"loss": loss, "min_k": worst, "min_k_plus_plus": standard, "zlib": squeezed}


def _untrained(model: LoadedModel, references: References, found: matched.Texts, own: Array) -> Array:
    """Mean log-probability per answer token of the twins [rows], mean over twins; ``own`` is that of the model."""
    # A model is compared with itself by the same numbers: another pass would differ in the last bit and break ties.
    rows = [own if twin is model else matched.kept_confidence(references, twin, found)
            for twin in matched.outsiders(model, references)]  # fmt: skip
    return np.mean(rows, axis=0)  # type: ignore[no-any-return]


def false_facts(view: View, shots: int, seed: int) -> dict[str, str]:
    """Per relation a text of ``shots`` questions of kept items, of other relations where there are any, each with a
    wrong answer: of the members' form, never trained on."""
    order = list(view.support or view.retain)
    Random(f"false-facts-{seed}").shuffle(order)
    fronts = {"": _lines(order[:shots], view)}
    for relation in {item.relation for item in view.forget}:
        others = [item for item in order if item.relation != relation] or order
        fronts[relation] = _lines(others[:shots], view)
    return fronts


def _lines(items: Sequence[Item], view: View) -> str:
    wrong = [(item, view.knowledge.alternatives(item, 1)) for item in items]
    return "".join(f"{item.questions[0]}{item.continuation(w[0])}\n" for item, w in wrong if w)
