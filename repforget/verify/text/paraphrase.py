"""Does any of many wordings of the question still bring the answer?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.text import _variants as variants

MEASURES = {
    "best_form": MeasureInfo("knowledge", "logits"),
    "worst_of_n": MeasureInfo("knowledge", "logits", votes=False),  # a guesser that wavers gains by it
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"forms": 2, "frames": ["{question}"], "max_items": 100},
    "standard": {},
    "thorough": {"forms": 8, "max_items": 1000},
}
FRAMES = ("{question}", "Please tell me. {question}", "About {subject}: {question}")


def paraphrase(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 3, frames: Sequence[str] = FRAMES, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Ask each item in n unseen wordings and take the one that finds most, for all items and item by item.

    The wordings are up to ``forms`` questions of the item, each in every frame.  Both measures are probabilities of
    the truth when decoding is confined to the candidates: ``best_form`` at the wording with the highest mean over the
    items, ``worst_of_n`` at each item's own.  The same maxima are taken on every arm; n is a fact.  A model that never
    knew gains by the second maximum, up to n times the prior if it guesses anew at every wording and nothing if it does
    not, so that neither a prior nor a twin that guesses steadily is a floor of ``worst_of_n``, and it does not vote.  A
    translated question among the item's paraphrases is one of its wordings; the answer that is scored stays the item's.
    Source: Lynch et al. 2024, arXiv 2402.16835; Jin et al. 2024, 2406.10890.  Cost: one forward pass per item and
    wording.

    Low values do not show that no other wording would find the answer.
    """
    items = ask.limited(view.forget, max_items, seed)
    wordings = [_wording(items, form, frame) for form in range(forms) for frame in frames]
    tables = [variants.probabilities(model, items, [row], view.knowledge, alternatives)
              for row in track(progress, wordings, "asking in other words")]  # fmt: skip
    table = np.concatenate(tables)
    chosen, before = variants.best(table), ask.prior(items, view.knowledge, alternatives)
    asked = (~np.isnan(table)).sum(0)
    facts = {
        "wordings per item": float(asked.mean()), "number of the best wording": float(chosen),
        "worst of n of a model that never knew, at most": float(np.minimum(1.0, asked * before).mean()),
    }  # fmt: skip
    columns = {"best_form": table[chosen], "best_form_prior": before, "worst_of_n": variants.highest(table)}
    return Measurement({name: ask.scores(items, values) for name, values in columns.items()}, {}, facts)


def _wording(items: Sequence[Item], form: int, frame: str) -> list[str | None]:
    """The question form in a frame, per item; None where the item has no such form, or no subject to put in."""
    return [
        frame.replace("{subject}", item.subject).replace("{question}", item.questions[form])
        if form < len(item.questions) and (item.subject or "{subject}" not in frame) else None
        for item in items
    ]  # fmt: skip
