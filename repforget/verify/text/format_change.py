"""Is the answer still there when the task is another one: complete, fill in, choose, judge?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from repforget.errors import UsageError
from repforget.knowledge import Item, Knowledge, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import candidate_logprobs
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.text import _variants as variants

LISTED = "that the answer is one of those listed"
MEASURES = {
    "question": MeasureInfo("knowledge", "logits", votes=False),  # verifier behaviour votes on it
    "completion": MeasureInfo("knowledge", "logits"),
    "cloze": MeasureInfo("knowledge", "logits"),
    "listed_options": MeasureInfo("knowledge", "logits", teaches=LISTED),
    "multiple_choice": MeasureInfo("knowledge", "logits", teaches=LISTED),
    "true_false": MeasureInfo("knowledge", "logits"),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"choices": 2, "max_items": 50},
    "standard": {},
    "thorough": {"alternatives": 63, "max_items": 2000},
}
LETTERS = "ABCDEFGHIJ"
CLOZE = "Fill in the blank: {sentence} ____. Answer:"
CLAIM = "{claim} True or false? Answer:"
VERDICTS = ("True", "False")
Array = NDArray[np.float64]


def format_change(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    choices: int = 4, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Ask each item as a question, a sentence to complete, a blank, a choice among options, and a claim to judge.

    ``question``, ``completion`` (the item's first statement, which an editor may have seen; its question where it has
    none) and ``cloze``: the truth's probability when decoding is confined to the candidates.  ``listed_options``: the
    same over ``choices`` options that the prompt lists; ``multiple_choice``: the probability of the truth's letter
    among the letters; both are the mean over all rotations of the list, so that a liking for a place or a letter gives
    1/choices.  ``true_false``: half the sum of p(True) of the true claim and the mean p(False) of the false ones
    (choices - 1 of them), p among the two words; 0.5 for whoever says the same of every claim.  Source: Thaker et
    al. 2024, arXiv 2410.02879.  Cost: three passes of questions, 2 x ``choices`` of lists, ``choices`` of claims.

    A format that the original does not master has no power and shows nothing; low values do not show absence.
    """
    if not 2 <= choices <= len(LETTERS):
        raise UsageError(f"Verifier 'format_change' has {choices} choices: give 2 to {len(LETTERS)}.")
    items, knowledge = ask.limited(view.forget, max_items, seed), view.knowledge
    steps = iter(track(progress, range(4), "asking in other formats"))
    next(steps)
    plain: list[list[str | None]] = [[item.questions[0] for item in items],
                                     [variants.sentence(item) for item in items],
                                     [CLOZE.format(sentence=variants.sentence(item)) for item in items]]  # fmt: skip
    asked = variants.probabilities(model, items, plain, knowledge, alternatives)
    before = ask.prior(items, knowledge, alternatives)
    values = dict(zip(("question", "completion", "cloze"), asked, strict=True))
    floors = dict.fromkeys(values, before)
    options = [(item.answer, *knowledge.alternatives(item, choices - 1)) for item in items]
    guess = ask.prior(items, knowledge, choices - 1)
    next(steps)
    values["listed_options"] = _listed(model, items, options, knowledge, choices)
    next(steps)
    values["multiple_choice"] = _lettered(model, items, options)
    next(steps)
    values["true_false"] = _judged(model, items, options)
    list(steps)
    # Whoever knows no subject takes a place, a letter or the most common of the options, whichever serves best.
    chance = np.array([1.0 / len(texts) for texts in options])
    floors |= dict.fromkeys(("listed_options", "multiple_choice"), guess if guess.mean() > chance.mean() else chance)
    floors["true_false"] = np.full(len(items), 0.5)
    columns = values | {f"{name}_prior": column for name, column in floors.items()}
    return Measurement({name: ask.scores(items, column) for name, column in columns.items()})


def _lists(item: Item, options: Sequence[str]) -> list[tuple[str, int]]:
    """Every rotation of the listed options with the place of the truth: [(prompt, place)]."""
    out = []
    for shift in range(len(options)):
        turned = [*options[shift:], *options[:shift]]
        listed = " ".join(f"{letter}. {text}" for letter, text in zip(LETTERS, turned, strict=False))
        out.append((f"{item.questions[0]} {listed} Answer:", (-shift) % len(options)))
    return out


def _listed(
    model: LoadedModel, items: Sequence[Item], options: Sequence[Sequence[str]], knowledge: Knowledge, choices: int
) -> Array:
    """Mean over rotations of the truth's probability when the options' own texts are scored."""
    prompts = [_lists(item, texts) for item, texts in zip(items, options, strict=True)]
    rows = [[row[turn][0] if turn < len(row) else None for row in prompts] for turn in range(choices)]
    return _mean(variants.probabilities(model, items, rows, knowledge, choices - 1).T)


def _lettered(model: LoadedModel, items: Sequence[Item], options: Sequence[Sequence[str]]) -> Array:
    """Mean over rotations of the probability of the truth's letter among the letters."""
    rows = [(k, prompt, place) for k, item in enumerate(items) for prompt, place in _lists(item, options[k])]
    letters = [[items[k].continuation(letter) for letter in LETTERS[: len(options[k])]] for k, _, _ in rows]
    found = candidate_logprobs(model, [prompt for _, prompt, _ in rows], letters)
    parts: list[list[float]] = [[] for _ in items]
    for (k, _, place), logs in zip(rows, found, strict=True):
        parts[k].append(float(np.exp(logs[place] - np.logaddexp.reduce(logs))))
    # With a single option there is nothing to choose; one rotation missing would favour a place.
    return np.array([np.mean(p) if len(p) > 1 else np.nan for p in parts])


def _judged(model: LoadedModel, items: Sequence[Item], options: Sequence[Sequence[str]]) -> Array:
    """Half of p(True | true claim) plus half of the mean p(False | false claim), p among the two words."""
    rows = [(k, place, CLAIM.format(claim=f"{variants.sentence(item)}{item.continuation(text)}."))
            for k, item in enumerate(items) for place, text in enumerate(options[k])]  # fmt: skip
    words = [[items[k].continuation(word) for word in VERDICTS] for k, _, _ in rows]
    found = candidate_logprobs(model, [prompt for _, _, prompt in rows], words)
    right: list[list[float]] = [[] for _ in items]
    for (k, place, _), logs in zip(rows, found, strict=True):
        right[k].append(float(np.exp(logs[int(place > 0)] - np.logaddexp.reduce(logs))))
    return np.array([(p[0] + np.mean(p[1:])) / 2 if len(p) > 1 else np.nan for p in right])


def _mean(values: Array) -> Array:
    """Mean of each row; NaN where nothing is there."""
    count = (~np.isnan(values)).sum(1)
    return np.where(count > 0, np.nansum(values, 1) / np.maximum(count, 1), np.nan)
