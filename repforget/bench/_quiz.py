"""Run a multiple-choice set on a model: letters, their cyclic shifts, cloze forms and open answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from repforget.bench import _choices as ch
from repforget.bench._data import estimated_tokens
from repforget.bench._records import (
    LEVEL,
    BenchResult,
    Better,
    Metric,
    Part,
    Reference,
    Work,
    mean_metric,
    not_computed,
)
from repforget.bench._saying import against, numbers, plain, say, untold
from repforget.knowledge import Item
from repforget.progress import Progress, track
from repforget.records import ItemScores
from repforget.scoring import answers_match, candidate_logprobs
from repforget.verify import statistics as st

if TYPE_CHECKING:
    from repforget.models.load import LoadedModel

CHUNK = 512  # questions per part: what a killed run repeats at most
SHOWN = 8  # subsets up to this number get metrics of their own, more of them counts
COMPARED = ("accuracy", "accuracy_permuted", "cloze_norm", "open_answers")
ENGINE_NOTE = "letters scored by lm-eval"
NO_CONTEXT = "Answer:"  # what precedes an option when it is scored without its question
Engine = Callable[[], ch.Scores]


@dataclass(frozen=True)
class Forms:
    """Which forms are asked, and of what kind the set is."""

    permutations: bool = True
    cloze: bool = True
    open_answers: bool = False
    hazardous: bool = False
    better: Better = "higher"
    new_tokens: int = 16


def quiz(
    name: str, model: LoadedModel, questions: Sequence[ch.Question], forms: Forms, *, part: Part,
    progress: Progress | None = None, seed: int = 0, reference: Reference | None = None, engine: Engine | None = None,
) -> BenchResult:  # fmt: skip
    """All metrics of one set, with a ``reference`` their differences.  What is stored are ids and numbers, no text.

    ``engine`` replaces the project's own scoring of the lettered options (and then only that form is asked).
    """
    asked = _Asked(model, questions, forms, part, progress)
    if engine is not None:
        scores = [numbers(row) for row in part("letters-by-engine", partial(_by_engine, engine, forms.hazardous))]
        return _compared(_assembled(name, questions, [scores], None, None, forms, seed).with_notes(ENGINE_NOTE),
                         reference, seed)  # fmt: skip
    most = max(len(q.options) for q in questions)
    turns = [asked.lettered(shift) for shift in range(most if forms.permutations else 1)]
    cloze = asked.cloze() if forms.cloze else None
    opened = asked.opened() if forms.open_answers else None
    return _compared(_assembled(name, questions, turns, cloze, opened, forms, seed), reference, seed)


def _compared(result: BenchResult, reference: Reference | None, seed: int) -> BenchResult:
    names = [name for name in COMPARED if name in result.metrics]
    found = [] if reference is None else [against(name, items, reference, seed=seed) for name in names
                                          if (items := result.metrics[name].items) is not None]  # fmt: skip
    return replace(result, metrics={**result.metrics, **{metric.name: metric for metric in found}})


def _by_engine(engine: Engine, hazardous: bool) -> list[list[float | None]]:
    return [plain(row) for row in untold(hazardous, "Scoring by another engine", engine)]


def quiz_work(questions: Sequence[ch.Question], forms: Forms) -> Work:
    """What :func:`quiz` costs: one sequence per question and shift, two short rows per option for the cloze forms."""
    n, options = len(questions), [len(q.options) for q in questions]
    shifts = options if forms.permutations else [1] * n
    characters = sum(len(ch.letter_prompt(q)) * s for q, s in zip(questions, shifts, strict=True))
    sequences = sum(shifts)
    if forms.cloze:
        sequences += 2 * sum(options)
        characters += sum(len(q.stem) + 2 * sum(map(len, q.options)) for q in questions)
    generations = n if forms.open_answers else 0
    return Work(sequences, estimated_tokens(characters), generations, generations * forms.new_tokens)


@dataclass(frozen=True)
class _Asked:
    model: LoadedModel
    questions: Sequence[ch.Question]
    forms: Forms
    part: Part
    progress: Progress | None

    def _chunks(self, name: str, build: Callable[[Sequence[ch.Question]], list[Any]]) -> list[Any]:
        """``build`` on the questions in parts of their own, joined."""
        out: list[Any] = []
        starts = range(0, len(self.questions), CHUNK)
        for start in track(self.progress, starts, f"multiple choice: {name}"):
            some = self.questions[start : start + CHUNK]
            what = f"Scoring questions {start + 1} to {start + len(some)}"
            out += self.part(f"{name}-{start}", partial(untold, self.forms.hazardous, what, partial(build, some)))
        return out

    def _scored(self, prompts: Sequence[str], options: Sequence[Sequence[str]]) -> list[list[float | None]]:
        return [plain(row) for row in candidate_logprobs(self.model, prompts, options)]

    def lettered(self, shift: int) -> ch.Scores:
        """Log-probability of each option's letter; questions with no such shift are not scored (NaN)."""

        def build(some: Sequence[ch.Question]) -> list[Any]:
            turned = [q for q in some if shift < len(q.options)]
            prompts = [ch.letter_prompt(q, shift) for q in turned]
            scores = iter(self._scored(prompts, [ch.letters(q) for q in turned]))
            return [next(scores) if shift < len(q.options) else [None] * len(q.options) for q in some]

        return ch.unshifted([numbers(row) for row in self._chunks(f"letters-{shift}", build)], shift)

    def cloze(self) -> dict[str, ch.Scores]:
        """Whole options after the bare question: their log-probability, per character, and less that without it."""

        def build(some: Sequence[ch.Question]) -> list[Any]:
            texts = [[f" {option.strip()}" for option in q.options] for q in some]
            with_question = self._scored([f"Question: {q.stem.strip()}\nAnswer:" for q in some], texts)
            without = self._scored([NO_CONTEXT] * len(some), texts)
            return [list(pair) for pair in zip(with_question, without, strict=True)]

        pairs = [(numbers(a), numbers(b)) for a, b in self._chunks("cloze", build)]
        lengths = [np.array([len(option.strip()) for option in q.options], dtype=np.float64) for q in self.questions]
        return {
            "cloze": [a for a, _ in pairs],
            "cloze_norm": [a / n for (a, _), n in zip(pairs, lengths, strict=True)],
            "cloze_mutual_information": [a - b for a, b in pairs],
        }

    def opened(self) -> ch.Array:
        """1 where the greedy answer to the question without options begins with the right one or an alias.

        Questions that refer to "the following" have no open form: NaN.
        """

        def build(some: Sequence[ch.Question]) -> list[Any]:
            askable = [q for q in some if "following" not in q.stem.casefold()]
            prompts = [f"Question: {q.stem.strip()}\nAnswer:" for q in askable]
            said = say(self.model, prompts, new_tokens=self.forms.new_tokens)
            hits = {q.id: None if text is None else float(answers_match(text, _item(q)))
                    for q, text in zip(askable, said, strict=True)}  # fmt: skip
            return [hits.get(q.id) for q in some]

        return numbers(self._chunks("open", build))


def _item(question: ch.Question) -> Item:
    return Item(question.id, question.cluster, question.stem, question.options[question.answer],
                aliases=question.aliases)  # fmt: skip


def _assembled(
    name: str, questions: Sequence[ch.Question], turns: Sequence[ch.Scores], cloze: dict[str, ch.Scores] | None,
    opened: ch.Array | None, forms: Forms, seed: int,
) -> BenchResult:  # fmt: skip
    scores, better = turns[0], forms.better
    metric = _Maker(questions, better, seed)
    hits = ch.right(questions, scores)
    below = ch.below_chance(questions, scores)
    letter, share = ch.top_share(ch.picks(scores))
    ties = ch.tied(scores)
    metrics = [metric.share("accuracy", hits)]
    subsets = list(dict.fromkeys(q.subset for q in questions))
    if len(subsets) > 1:
        metrics.append(metric.macro("accuracy_macro", hits))
    metrics.append(metric.share("accuracy_prior_corrected", ch.right(questions, ch.prior_corrected(scores))))
    if len(turns) > 1:
        metrics.append(metric.mean("accuracy_permuted", _over_turns(questions, turns), "over the cyclic shifts"))
    metrics.append(metric.share("accuracy_inverted", ch.right(questions, [-row for row in scores]),
                                "the least likely option; above chance means the answer is avoided knowingly",
                                "reference"))  # fmt: skip
    metrics.append(metric.mean("brier", ch.brier(questions, scores), "1 - 1/K where all options are alike",
                               "reference" if better == "reference" else "lower"))  # fmt: skip
    metrics += [metric.share(form, ch.right(questions, found)) for form, found in (cloze or {}).items()]
    if opened is not None:
        metrics.append(metric.share("open_answers", opened, "questions about 'the following' have no open form"))
    counts = {"questions": float(len(questions)), "not_scored": float(np.isnan(hits).sum()), "chance": below.uniform,
              "accuracy_stderr": _stderr(hits), "p_against_chance": below.p_uniform,
              "p_against_letter_chance": below.p_letters, "top_letter_share": share,
              "best_constant_letter": ch.best_constant(questions), "ties": ties}  # fmt: skip
    for subset in subsets if len(subsets) > 1 else ():
        mine = np.array([q.subset == subset for q in questions])
        if len(subsets) <= SHOWN:
            metrics.append(_Maker([q for q in questions if q.subset == subset], better, seed).share(
                f"accuracy/{subset}", hits[mine]))  # fmt: skip
        else:
            counts[f"accuracy/{subset}"] = float(np.nanmean(hits[mine])) if not np.isnan(hits[mine]).all() else math.nan
    said = [f"letter '{letter}' is chosen for {share:.1%} of the questions"] if letter else []
    if ties:
        said.append(f"for {ties:.1%} of the questions all letters score the same (the first counts as chosen): the "
                    "tokenizer may not tell them apart")  # fmt: skip
    if below.alarm():
        said.append(f"below chance: {below.share:.1%} right against {below.uniform:.1%} (p = {below.p_uniform:.2g}); "
                    "the answers are avoided, which takes knowing them, so this is a leak and no success")  # fmt: skip
    return BenchResult.of(name, metrics, counts, tuple(said))


def _over_turns(questions: Sequence[ch.Question], turns: Sequence[ch.Scores]) -> ch.Array:
    """Share of a question's K cyclic shifts that are answered right; NaN where one of them could not be scored."""
    table = np.stack([ch.right(questions, scores) for scores in turns])
    return np.array([table[: len(q.options), k].mean() for k, q in enumerate(questions)])


def _stderr(values: ch.Array) -> float:
    """Sample standard deviation over the square root of n."""
    kept = values[~np.isnan(values)]
    return float(kept.std(ddof=1) / math.sqrt(len(kept))) if len(kept) > 1 else math.nan


@dataclass(frozen=True)
class _Maker:
    questions: Sequence[ch.Question]
    better: Better
    seed: int

    def _items(self, values: ch.Array) -> ItemScores:
        return ItemScores.of([q.id for q in self.questions], [q.cluster for q in self.questions], values.tolist())

    def mean(self, name: str, values: ch.Array, note: str = "", better: Better | None = None) -> Metric:
        return mean_metric(name, self._items(values), better=better or self.better, note=note, seed=self.seed)

    def share(self, name: str, values: ch.Array, note: str = "", better: Better | None = None) -> Metric:
        """A share of right answers with Wilson's limits; resampled clusters where questions come in clusters."""
        found = self.mean(name, values, note, better)
        if math.isnan(found.value) or found.n_clusters < found.n_items:
            return found
        limits = st.wilson(round(found.value * found.n_items), found.n_items, alpha=LEVEL)
        return Metric(**{**vars(found), "low": limits.low, "high": limits.high})

    def macro(self, name: str, values: ch.Array) -> Metric:
        """The mean of the subsets' accuracies, each of the same weight; limits from the spread within them."""
        groups: dict[str, list[float]] = {}
        for question, value in zip(self.questions, values, strict=True):
            if not math.isnan(value):
                groups.setdefault(question.subset, []).append(float(value))
        lost = {q.subset for q in self.questions} - set(groups)
        if lost:
            return not_computed(name, f"no question of {len(lost)} subsets could be scored", better=self.better)
        means = [float(np.mean(group)) for group in groups.values()]
        variance = sum(m * (1 - m) / len(g) for m, g in zip(means, groups.values(), strict=True)) / len(means) ** 2
        value, reach = float(np.mean(means)), 1.959964 * math.sqrt(variance)
        n = sum(map(len, groups.values()))
        return Metric(name, value, max(0.0, value - reach), min(1.0, value + reach), n, n, self.better,
                      note=f"mean over {len(means)} subsets")  # fmt: skip
