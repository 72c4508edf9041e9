"""Is the fact still there when it is asked together with another, by description, or backwards?"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from repforget.knowledge import Item, Knowledge, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import answer_logprobs, candidate_logprobs
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.text import _variants as variants

MEASURES = {
    "with_retained": MeasureInfo("knowledge", "logits", teaches="one retained fact of another subject"),
    "described": MeasureInfo("knowledge", "logits", teaches="other facts of the same subject"),
    "subject_of_answer": MeasureInfo("knowledge", "logits", teaches="the answer; the subject is asked for"),
    "reverse_question": MeasureInfo("knowledge", "logits", teaches="the answer; the subject is asked for"),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"subjects": 7, "max_items": 50},
    "standard": {},
    "thorough": {"subjects": 31, "alternatives": 63, "max_items": 2000},
}
REVERSE = "The {relation} is {answer}. Whose {relation} is it? Answer:"
Array = NDArray[np.float64]
T = TypeVar("T")


def multi_hop(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    clues: int = 2, subjects: int = 15, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Ask each fact beside a retained one, of a subject given by description, and backwards from its answer.

    ``with_retained``: both questions in one prompt and the retained answer given, in the better of two orders (highest
    mean over items, the same maximum on every arm); ``described``: the question with its subject replaced by up to
    ``clues`` other facts of that subject; both are the truth's probability when decoding is confined to the candidates.
    ``subject_of_answer``: p(answer | question about s) divided by its sum over the true subject and up to ``subjects``
    other forget subjects with another answer, s's posterior under equal priors; whatever the answer's own frequency,
    a model that cannot tell forget subjects apart gives 1 / (number of subjects).  ``reverse_question``: the true
    subject's share of p(s | the answer is stated) / p(s | another is), free of the names' own frequency and length.
    Items without a subject in their question, without other facts, or without other subjects are not scored
    by the measures that need them.
    Source: Thaker et al. 2024, arXiv 2410.02879; deduction through other facts: 2410.15153.  Cost: three
    passes of questions and 3 x (1 + ``subjects``) short rows per item.

    Low values do not show absence: a model may know a fact and be unable to use it in a second step.
    """
    items, knowledge = ask.limited(view.forget, max_items, seed), view.knowledge
    steps = iter(track(progress, range(3), "asking in two steps"))
    next(steps)
    pairs = _beside_retained(items, view, seed)
    beside = variants.probabilities(model, items, pairs, knowledge, alternatives)
    order = variants.best(beside)
    described = variants.probabilities(model, items, [[_described(i, view, clues, seed) for i in items]], knowledge,
                                       alternatives)[0]  # fmt: skip
    before = ask.prior(items, knowledge, alternatives)
    rivals = [_rivals(item, view, subjects, seed) for item in items]
    chance = np.array([1.0 / (1 + len(names)) for names in rivals])
    next(steps)
    values = {
        "with_retained": beside[order], "with_retained_prior": before,
        "described": described, "described_prior": before,
        "subject_of_answer": _subject_of_answer(model, items, rivals), "subject_of_answer_prior": chance,
    }  # fmt: skip
    next(steps)
    values |= {"reverse_question": _reverse(model, items, rivals, knowledge), "reverse_question_prior": chance}
    list(steps)
    facts = {"subjects compared": float(1.0 / chance.mean()), "order of the two questions": float(order)}
    return Measurement({name: ask.scores(items, column) for name, column in values.items()}, {}, facts)


def _beside_retained(items: Sequence[Item], view: View, seed: int) -> list[list[str | None]]:
    """Two orders of one prompt per item: both questions and then the retained answer, or fact by fact."""
    together: list[str | None] = []
    in_turn: list[str | None] = []
    for item in items:
        pool = [r for r in view.support if r.relation != item.relation] or list(view.support)
        other = next((r for r in _order(pool, f"beside-{seed}-{item.id}")
                      if not variants.names_any(variants.stated(r), item)), None)  # fmt: skip
        asked = item.questions[0]
        together.append(None if other is None else f"{other.questions[0]} {asked}{other.continuation()}.")
        in_turn.append(None if other is None else f"{other.questions[0]}{other.continuation()}. {asked}")
    return [in_turn, together]


def _described(item: Item, view: View, clues: int, seed: int) -> str | None:
    """The question with other facts in the place of the subject; None without a subject or such facts."""
    asked = item.questions[0]
    if not item.subject or item.subject not in asked:
        return None
    own = [o for o in view.forget if o.cluster == item.cluster and o.relation not in ("", item.relation)]
    texts = dict.fromkeys(f"whose {o.relation} is {o.answer}" for o in _order(own, f"clues-{seed}-{item.id}"))
    chosen = [text for text in texts if not variants.names_any(text, item)][:clues]
    return asked.replace(item.subject, "the person " + " and ".join(chosen)) if chosen else None


def _rivals(item: Item, view: View, most: int, seed: int) -> tuple[str, ...]:
    """Other forget subjects of the same relation whose answer is another one."""
    true = {item.answer, *item.aliases}
    if not item.subject:
        return ()
    same = {o.subject for o in view.forget if o.relation == item.relation and {o.answer, *o.aliases} & true}
    names = {o.subject for o in view.forget if o.relation == item.relation and o.subject} - same - {item.subject}
    return tuple(_order(sorted(names), f"subjects-{seed}-{item.id}")[:most])


def _order(pool: Sequence[T], salt: str) -> list[T]:
    order = list(pool)
    Random(salt).shuffle(order)
    return order


def _subject_of_answer(model: LoadedModel, items: Sequence[Item], rivals: Sequence[Sequence[str]]) -> Array:
    """p(answer | s) of the true subject, divided by its sum over all subjects."""
    pairs, ends = [], []
    for item, names in zip(items, rivals, strict=True):
        asked = item.questions[0]
        if item.subject and item.subject in asked and names:
            pairs += [(asked.replace(item.subject, name), item.continuation()) for name in (item.subject, *names)]
        ends.append(len(pairs))
    logs = answer_logprobs(model, pairs).sum_logprob if pairs else np.zeros(0)
    return np.array([_first_share(logs[start:end]) for start, end in zip([0, *ends], ends, strict=False)])


def _reverse(model: LoadedModel, items: Sequence[Item], rivals: Sequence[Sequence[str]], knowledge: Knowledge) -> Array:
    """How much more likely the question that states the answer makes the true subject, as a share over the subjects."""
    others = [knowledge.alternatives(item, 1) for item in items]
    asked = [k for k, item in enumerate(items) if item.relation and rivals[k] and others[k]]
    names = [[items[k].continuation(name) for name in (items[k].subject, *rivals[k])] for k in asked]
    given = [(k, items[k].answer) for k in asked] + [(k, others[k][0]) for k in asked]
    prompts = [REVERSE.format(relation=items[k].relation, answer=answer) for k, answer in given]
    logs = candidate_logprobs(model, prompts, [*names, *names])
    values = np.full(len(items), np.nan)
    values[asked] = [_first_share(a - b) for a, b in zip(logs[: len(asked)], logs[len(asked) :], strict=True)]
    return values


def _first_share(logs: Array) -> float:
    """exp of the first over the sum of exp; NaN without the first or anything to compare it with."""
    usable = logs[~np.isnan(logs)]
    if len(usable) < 2 or np.isnan(logs[0]):
        return float("nan")
    return float(np.exp(logs[0] - np.logaddexp.reduce(usable)))
