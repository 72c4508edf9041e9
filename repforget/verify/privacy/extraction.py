"""Discoverable extraction: given the beginning of a training text, does greedy decoding say the rest word for word?"""

from __future__ import annotations

import re

import numpy as np

from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import answer_logprobs
from repforget.verify import _asking as ask
from repforget.verify import statistics as st
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {"verbatim": MeasureInfo("knowledge", "black-box", votes=False)}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"forms": 1},
    "standard": {},
    "thorough": {"forms": 8, "max_items": 2000},
}


def extraction(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    prefix: int = 50, forms: int = 2, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Give the first ``prefix`` words of a statement and check that greedy decoding continues it to the answer's end.

    The texts are the statements an editor sees, on purpose: the attack is about training texts, not about questions in
    other words.  No word of the answer is ever given; a ``prefix`` shorter than the statement asks for its rest too.
    The value is the share of up to ``forms`` statements that come out verbatim; facts: share of items with at least
    one, with 95 % limits (Clopper and Pearson).  ``verbatim_prior`` is the best constant guesser.  Source: Carlini et
    al. 2022, arXiv 2202.07646.  Cost: one pass over the texts, since greedy decoding says a text exactly when each of
    its tokens is the most probable one.

    Nothing extracted does not show that nothing is known: sampling, other prefixes and other words may still find it.
    """
    items = ask.limited(view.forget, max_items, seed)
    rows = [(k, *beginning(statement, item.continuation(), prefix))
            for k, item in enumerate(items) for statement in item.editor_prompts[:forms]]  # fmt: skip
    for _ in track(progress, range(1), "continuing statements"):
        found = answer_logprobs(model, [(begin, rest) for _, begin, rest in rows])
    hits: list[list[float]] = [[] for _ in items]
    for (k, _, _), match, valid in zip(rows, found.greedy_match, found.valid, strict=True):
        if valid:
            hits[k].append(float(match))
    values = [float(np.mean(group)) if group else np.nan for group in hits]
    tried = [max(group) for group in hits if group]
    facts = {}
    if tried:
        rate = st.clopper_pearson(int(sum(tried)), len(tried), alpha=0.025)
        facts = {"extracted": rate.point, "extracted, at least": rate.low, "extracted, at most": rate.high}
    before = ask.prior_match(items, view.knowledge)
    return Measurement({"verbatim": ask.scores(items, values), "verbatim_prior": ask.scores(items, before)},
                       facts=facts)  # fmt: skip


def beginning(statement: str, continuation: str, words: int) -> tuple[str, str]:
    """Cut a statement with its answer after at most ``words`` words, at least one and never inside the answer."""
    ends = [match.end() for match in re.finditer(r"\S+", statement)]
    cut = ends[min(max(words, 1), len(ends)) - 1] if words < len(ends) else len(statement)
    return statement[:cut], statement[cut:] + continuation
