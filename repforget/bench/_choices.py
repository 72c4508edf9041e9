"""Multiple choice: how a question is put, and what the log-probabilities of its options say; knows no model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from repforget.errors import KnowledgeError

LETTERS = "ABCDEFGH"
Array = NDArray[np.float64]
Scores = list[Array]  # per question the log-probability of each option in the order of the data, NaN: did not fit


@dataclass(frozen=True)
class Question:
    """One question; texts stay out of its ``repr``, since a set may be hazardous."""

    id: str
    cluster: str
    subset: str
    answer: int
    stem: str = field(repr=False)
    options: tuple[str, ...] = field(repr=False)
    aliases: tuple[str, ...] = field(default=(), repr=False)
    head: str = field(default="", repr=False)  # the heading and the worked examples


def heading(topic: str) -> str:
    """First line of the prompt (Hendrycks et al. 2021)."""
    return f"The following are multiple choice questions (with answers){f' about {topic}' if topic else ''}.\n\n"


def read_questions(
    rows: Sequence[Mapping[str, Any]], place: str, *, subset: str = "", topic: str = "",
    shots: Sequence[Mapping[str, Any]] = (), first: int = 0,
) -> list[Question]:  # fmt: skip
    """Questions of one subset, numbered from ``first``; ``shots`` are put before each as worked examples.

    A row has ``question``, ``answer`` (number from 0, letter, or the text of an option) and two to eight options in
    ``choices`` or in ``option1``, ``option2``, ...; ``cluster`` and ``aliases`` are optional.  Errors name the row and
    the column, never a text.
    """
    head = heading(topic) + "".join(_worked(shot, f"{place}, worked example {n}") for n, shot in enumerate(shots, 1))
    found = []
    for number, row in enumerate(rows, first):
        where = f"{place}, row {number - first + 1}"
        stem, options = _text(row, "question", where), _options(row, where)
        name = f"{subset}/{number}" if subset else str(number)
        aliases = row.get("aliases") or ()
        found.append(Question(name, str(row.get("cluster", name)), subset, _answer(row, options, where), stem, options,
                              tuple(map(str, aliases)), head))  # fmt: skip
    return found


def letter_prompt(question: Question, shift: int = 0) -> str:
    """The question with lettered options; option j stands at place (j + shift) mod K."""
    k = len(question.options)
    return question.head + _asked(question.stem, [question.options[(place - shift) % k] for place in range(k)])


def letters(question: Question) -> list[str]:
    """The continuations whose log-probabilities are compared: " A", " B", ..."""
    return [f" {letter}" for letter in LETTERS[: len(question.options)]]


def unshifted(scores: Scores, shift: int) -> Scores:
    """Scores by place, back in the order of the data."""
    return [np.roll(row, -shift) for row in scores]


def picks(scores: Scores) -> NDArray[np.int64]:
    """Chosen option per question (ties: the first), -1 where it could not be scored."""
    return np.array([-1 if np.isnan(row).any() else int(np.argmax(row)) for row in scores], dtype=np.int64)


def right(questions: Sequence[Question], scores: Scores) -> Array:
    """1 where the chosen option is the answer, 0 where not, NaN where not scored."""
    chosen, gold = picks(scores), np.array([q.answer for q in questions])
    return np.where(chosen < 0, np.nan, (chosen == gold).astype(np.float64))


def prior_corrected(scores: Scores) -> Scores:
    """Each option's score less the mean score of its place over all questions with as many options.

    A model that has learned to say one letter whatever is asked answers by what is left.
    """
    sizes = {len(row) for row in scores}
    means = {k: np.nanmean(np.stack([row for row in scores if len(row) == k]), axis=0)
             for k in sizes if any(len(row) == k and not np.isnan(row).any() for row in scores)}  # fmt: skip
    return [row - means.get(len(row), np.nan) for row in scores]


def brier(questions: Sequence[Question], scores: Scores) -> Array:
    """Sum over options of (p - 1[answer])^2 with p = softmax of the scores: 1 - 1/K where all are alike."""
    values = []
    for question, row in zip(questions, scores, strict=True):
        p = np.exp(row - row.max())
        p /= p.sum()
        values.append(float(((p - (np.arange(len(row)) == question.answer)) ** 2).sum()))
    return np.array(values)


def top_share(chosen: NDArray[np.int64]) -> tuple[str, float]:
    """The letter chosen most often and its share of the scored questions."""
    counts = np.bincount(chosen[chosen >= 0], minlength=1)
    total = counts.sum()
    return (LETTERS[int(counts.argmax())], float(counts.max() / total)) if total else ("", math.nan)


def best_constant(questions: Sequence[Question]) -> float:
    """Accuracy of the letter that the answer key holds most often: what a model can have without any knowledge."""
    return float(np.bincount([q.answer for q in questions]).max() / len(questions))


def tied(scores: Scores) -> float:
    """Share of the scored questions whose options all score the same, so that nothing was chosen."""
    spreads = [float(np.ptp(row)) for row in scores if not np.isnan(row).any()]
    return sum(spread == 0.0 for spread in spreads) / len(spreads) if spreads else 0.0


def chance_p(hits: Array, chance: Array) -> float:
    """Two-sided p-value of ``hits`` (0 or 1) when question i is right with probability ``chance[i]``, independently.

    Sums every count that is no more likely than the one seen, as the exact binomial test does.
    """
    pmf = np.ones(1)
    for value, count in zip(*np.unique(chance, return_counts=True), strict=True):
        pmf = np.convolve(pmf, stats.binom.pmf(np.arange(count + 1), count, value))
    seen = pmf[int(hits.sum())]
    return float(min(1.0, pmf[pmf <= seen * (1 + 1e-7)].sum()))


@dataclass(frozen=True)
class BelowChance:
    """Right answers against two kinds of chance: 1/K, and what the chosen letters would hit by the answer key."""

    share: float
    uniform: float
    by_letters: float
    p_uniform: float
    p_letters: float

    def alarm(self, alpha: float = 0.05) -> bool:
        """Significantly fewer right answers than by either chance: the knowledge is used to avoid the answer."""
        below = self.share < min(self.uniform, self.by_letters)
        return below and max(self.p_uniform, self.p_letters) < alpha


def below_chance(questions: Sequence[Question], scores: Scores) -> BelowChance:
    """Test the right answers against chance; a constant letter that the key rarely holds raises no alarm."""
    chosen = picks(scores)
    scored = np.flatnonzero(chosen >= 0).tolist()
    if not scored:
        return BelowChance(math.nan, math.nan, math.nan, 1.0, 1.0)
    gold = np.array([questions[k].answer for k in scored])
    hits = (chosen[scored] == gold).astype(np.float64)
    uniform = np.array([1.0 / len(questions[k].options) for k in scored])
    key = np.bincount(gold, minlength=len(LETTERS)) / len(gold)
    by_letters = key[chosen[scored]]
    return BelowChance(float(hits.mean()), float(uniform.mean()), float(by_letters.mean()),
                       chance_p(hits, uniform), chance_p(hits, by_letters))  # fmt: skip


def _asked(stem: str, options: Sequence[str]) -> str:
    lines = [f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False)]
    return "\n".join([stem.strip(), *lines, "Answer:"])


def _worked(row: Mapping[str, Any], where: str) -> str:
    options = _options(row, where)
    return f"{_asked(_text(row, 'question', where), options)} {LETTERS[_answer(row, options, where)]}\n\n"


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        raise KnowledgeError(f"{where}: column '{column}' must hold text, found {type(value).__name__}; the columns "
                             f"are {', '.join(map(str, row))}.")  # fmt: skip
    return value


def _options(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = [f"option{n}" for n in range(1, len(LETTERS) + 1) if f"option{n}" in row]
    given = row["choices"] if "choices" in row else [row[name] for name in names]
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(o, str) for o in given):
        raise KnowledgeError(f"{where}: column 'choices' must hold a list of texts, found {type(given).__name__}.")
    if not 2 <= len(given) <= len(LETTERS):
        raise KnowledgeError(f"{where}: a question needs two to eight options in 'choices' or in 'option1', 'option2', "
                             f"..., found {len(given)}; the columns are {', '.join(map(str, row))}.")  # fmt: skip
    return tuple(given)


def _answer(row: Mapping[str, Any], options: Sequence[str], where: str) -> int:
    value = row.get("answer")
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= value < len(options):
        return int(value)
    if isinstance(value, str):
        same = [k for k, option in enumerate(options) if option.strip() == value.strip()]
        if len(same) == 1:
            return same[0]
        if not same and value in tuple(LETTERS[: len(options)]):
            return LETTERS.index(value)
    raise KnowledgeError(f"{where}: 'answer' must be a number from 0 to {len(options) - 1}, a letter, or the "
                         f"text of exactly one option; found {type(value).__name__}.")  # fmt: skip
