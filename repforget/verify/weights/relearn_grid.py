"""Does any of many ways to fine-tune bring the knowledge back, of which the attacker may take the best?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np

from repforget.errors import NumericalError, UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.training import Example, Optimizer
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import Exam, exam
from repforget.verify.weights._taught import RATE_TIMES_WIDTH, Array, curve, halfway, mean_over, reading, teaching

Mix = Literal["facts", "benign", "both"]
Parameters = Literal["all", "lora"]
_TAUGHT = "the other half of the forget clusters, or unrelated text"
_Y = "probability of the truth on what is not taught"
MEASURES = {
    "best_point": MeasureInfo("knowledge", "weights", teaches=_TAUGHT,
                              curve=("relearning, the best way", "training steps", _Y)),
    "mean_point": MeasureInfo("knowledge", "weights", votes=False, teaches=_TAUGHT,
                              curve=("relearning, mean over the ways", "training steps", _Y)),
    "area": MeasureInfo("knowledge", "weights", votes=False, teaches=_TAUGHT),
}  # fmt: skip
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"mixes": ["facts"], "parameters": ["all"], "rates": [1.0], "seeds": 1, "steps": 2, "checks": 1},
    "standard": {},
    "thorough": {"optimizers": ["adamw", "sgd"]},
}
# Usual learning rates for all parameters and for adapters.  Where every weight moves by about the rate (ADAPTIVE), it
# is divided by the width; clipped gradients and Adadelta's own scale do without.
USUAL: dict[Optimizer, tuple[float, float]] = {
    "adamw": (RATE_TIMES_WIDTH, 5 * RATE_TIMES_WIDTH), "adam": (RATE_TIMES_WIDTH, 5 * RATE_TIMES_WIDTH),
    "adagrad": (0.12, 0.6), "sgd": (0.03, 0.05), "nesterov": (0.03, 0.05), "adadelta": (0.3, 1.0),
}  # fmt: skip
ADAPTIVE = ("adamw", "adam", "adagrad")


@dataclass(frozen=True)
class Way:
    """One point of the grid; ``rate`` counts in its optimiser's usual learning rate."""

    mix: Mix
    parameters: Parameters
    optimizer: Optimizer
    rate: float

    def lr(self, width: int) -> float:
        """The learning rate for a model of this width."""
        usual = USUAL[self.optimizer][self.parameters == "lora"]
        return self.rate * usual / (width if self.optimizer in ADAPTIVE else 1)


class Lesson(NamedTuple):
    """What is taught, which items (by number) are asked meanwhile, and how."""

    examples: list[Example]
    asked: list[int]
    examine: Callable[[LoadedModel], Array]


def relearn_grid(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    mixes: Sequence[Mix] = ("facts", "benign", "both"), parameters: Sequence[Parameters] = ("all", "lora"),
    optimizers: Sequence[Optimizer] = ("adamw",), rates: Sequence[float] = (0.3, 1.0), seeds: int = 3, steps: int = 24,
    checks: int = 3, batch_size: int = 16, rank: int = 16, alpha: float = 32.0, company: float = 3.0, texts: int = 256,
    forms: int = 1, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Fine-tune copies in every way of a grid and keep the best: data mix x parameters x optimiser x learning rate.

    ``facts`` teaches half of the forget clusters among ``company`` retain items per item and asks the other half, then
    the other way round (as ``relearn``); ``benign`` teaches general texts and retain items; ``both`` both.  ``lora``
    trains additions of ``rank`` to all projections.  ``rates`` multiply the optimiser's usual rate, 0.04 / width for
    AdamW on all parameters.  Every way is taken with ``seeds`` orders; ``best_point`` is the truth's probability under
    decoding confined to the candidates, mean over seeds, at the way and check (0 = before training) with the highest
    mean over items, the same maximum on every arm.  ``mean_point``: mean over the ways, at its best check; ``area``:
    the same, mean over the steps, whose share between twin and original is the area between recovery curves.  Facts:
    the best way, steps to half of the original, and in how many ways the training loss fell: where none did, nothing
    was tried.  Source: Tamirisa et al. 2024, arXiv 2408.00761; Deeb and Roger 2024, arXiv 2410.08827; Hu et al. 2024,
    arXiv 2406.13356.  Cost: ways x ``seeds`` x ``steps`` training steps (twice that for facts and both), a float32 copy
    with optimiser moments at a time.

    No recovery does not show that other data, more steps or another optimiser would not bring the knowledge back.
    """
    ways = [Way(*point) for point in product(mixes, parameters, optimizers, rates)]
    if not ways or seeds < 1 or steps < checks or checks < 1:
        raise UsageError(f"Verifier 'relearn_grid' has {len(ways)} ways, {seeds} seeds, {steps} steps and {checks} "
                         "checks: give at least one of each, and a step per check.")  # fmt: skip
    marks = sorted({round(steps * k / checks) for k in range(checks + 1)})
    questions = exam(model, view, references, forms=forms, alternatives=alternatives, max_items=max_items, seed=seed)
    ask_half = partial(_half, model, view, references, questions, forms, alternatives)
    lessons = {mix: _lessons(model, view, mix, questions, ask_half, company, texts, seed) for mix in mixes}
    table = np.zeros((len(ways), len(marks), len(questions.items)))
    fell, diverged = np.zeros(len(ways)), 0
    runs = [(k, way, s) for k, way in enumerate(ways) for s in range(seeds)]
    for k, way, s in track(progress, runs, "relearning in many ways"):
        train = partial(curve, model, marks=marks, lr=way.lr(model.width), batch_size=batch_size, seed=seed + s,
                        optimizer=way.optimizer, rank=rank if way.parameters == "lora" else 0, alpha=alpha)  # fmt: skip
        for lesson in lessons[way.mix]:
            try:
                rows, gain = train(lesson.examples, lesson.examine)
            except NumericalError:  # the attacker goes on with the model that was there before
                rows, gain, diverged = np.stack([lesson.examine(model)] * len(marks)), -np.inf, diverged + 1
            table[k][:, lesson.asked] += rows / seeds
            fell[k] += gain
    half = halfway(references, questions.items, view, questions.prior, alternatives=alternatives, forms=forms)
    facts = {"ways": float(len(ways)), "ways in which the training loss fell": float((fell > 0).sum()),
             "runs that diverged": float(diverged)}  # fmt: skip
    return _summary(questions, ways, marks, table, half, facts, model.width)


def _lessons(
    model: LoadedModel, view: View, mix: Mix, questions: Exam, ask_half: Callable[[list[int]], Lesson], company: float,
    texts: int, seed: int,
) -> list[Lesson]:  # fmt: skip
    """The trainings of a mix: one where nothing of the forget set is taught, two that swap its halves otherwise."""
    plain = reading(model, view.general[:texts]) if mix != "facts" else []
    if mix == "benign":
        kept = teaching(model, ask.limited(view.support, texts, seed), 2)
        if not (plain or kept):
            raise UsageError("Verifier 'relearn_grid' has neither general texts nor retain items to teach: add some, "
                             "or ask for mixes: [facts].")  # fmt: skip
        return [Lesson([*plain, *kept], list(range(len(questions.items))), questions.probability)]
    halves = view.halves(seed)
    if not all(halves):
        raise UsageError(f"Verifier 'relearn_grid' needs at least two forget clusters on split '{view.split}' to teach "
                         "one half and ask the other.")  # fmt: skip
    made = []
    for taught, others in (halves, halves[::-1]):
        clusters = {item.cluster for item in others}
        company_items = ask.limited(view.support, round(company * len(taught)), seed)
        lesson = ask_half([k for k, item in enumerate(questions.items) if item.cluster in clusters])
        made.append(lesson._replace(examples=[*teaching(model, (*taught, *company_items), 2), *plain]))
    return made


def _half(
    model: LoadedModel, view: View, references: References, questions: Exam, forms: int, alternatives: int,
    asked: list[int],
) -> Lesson:  # fmt: skip
    items = [questions.items[k] for k in asked]
    paths = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
    return Lesson([], asked, partial(path.probability, count=len(items), chosen=paths))


def _summary(
    questions: Exam, ways: Sequence[Way], marks: list[int], table: Array, half: float, facts: dict[str, float],
    width: int,
) -> Measurement:  # fmt: skip
    """Pick the best way and check from the table [ways, checks, items]."""
    means = np.nanmean(table, axis=2)
    best, check = divmod(int(means.argmax()), means.shape[1])
    mean, way = table.mean(axis=0), ways[best]
    scores = {
        **questions.scores("best_point", table[best, check]),
        **questions.scores("mean_point", mean[int(means.mean(axis=0).argmax())]),
        **questions.scores("area", mean_over(marks, mean)),
    }
    facts[f"learning rate of the best way ({way.mix}, {way.parameters}, {way.optimizer})"] = way.lr(width)
    facts["best step"] = float(marks[check])
    reached = [mark for mark, value in zip(marks, means[best], strict=True) if value >= half]
    if reached:
        facts["steps to half of the original"] = float(reached[0])
    series = {"x": tuple(map(float, marks)), "best_point": tuple(map(float, means[best])),
              "mean_point": tuple(map(float, means.mean(axis=0)))}  # fmt: skip
    return Measurement(scores, series, facts)
