"""Multiple-choice questions of one's own: any folder of rows with question, options and answer."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from repforget.bench._choices import Question, read_questions
from repforget.bench._data import Source, rows
from repforget.bench._quiz import Forms, quiz, quiz_work
from repforget.bench._records import BenchResult, Part, Reference, Work
from repforget.bench._saying import not_negative
from repforget.models.load import LoadedModel
from repforget.progress import Progress

AGGREGATION = ("permutations", "cloze", "open_answers", "about")


def mcq(
    model: LoadedModel, *, data: Source, reference: Reference | None = None, part: Part, seed: int = 0,
    progress: Progress | None = None, table: str = "questions", shots_table: str = "", shots: int = 5, topic: str = "",
    subset_column: str = "subject", about: Literal["kept", "forgotten"] = "kept", hazardous: bool = False,
    permutations: bool = True, cloze: bool = True, open_answers: bool = False, limit: int = 0,
) -> BenchResult:  # fmt: skip
    """Ask multiple-choice questions by letter, in all cyclic orders, as whole options and openly.

    ``data`` is a folder with ``<table>.jsonl``, or that file itself: question, answer (number from 0, letter or text)
    and ``choices`` or option1..option8; ``shots`` rows of ``shots_table`` become worked examples.  Prompt of Hendrycks
    et al. (2021, arXiv 2009.03300): heading, question, lettered options, "Answer:"; the highest of log p(" A"), ...
    wins, ties to the first.  ``accuracy`` has Wilson's limits; ``accuracy_permuted`` is the mean over the K cyclic
    orders, which a constant letter answers at exactly 1/K; ``accuracy_prior_corrected`` subtracts each letter's mean
    score; ``cloze*`` score the options' own text (per character, or less its score after a bare "Answer:").  An
    accuracy significantly below chance is an alarm: ``accuracy_inverted`` then says how well the least likely option
    answers.  Cost: K passes per question (one without ``permutations``), 2 K short rows for the cloze forms, one
    generation of 16 tokens with ``open_answers``.

    Chance accuracy does not show that the knowledge is gone: the letter form is the first thing an edit breaks.
    ``hazardous`` sets leave ids and numbers behind, no text.
    """
    forms = _forms(about, hazardous, permutations, cloze, open_answers)
    questions = _questions(data, table, shots_table, shots, topic, subset_column, hazardous, limit)
    return quiz("mcq", model, questions, forms, part=part, progress=progress, seed=seed, reference=reference)


def work(
    data: Source, *, table: str = "questions", shots_table: str = "", shots: int = 5, topic: str = "",
    subset_column: str = "subject", about: Literal["kept", "forgotten"] = "kept", hazardous: bool = False,
    permutations: bool = True, cloze: bool = True, open_answers: bool = False, limit: int = 0,
) -> Work:  # fmt: skip
    """Cost of the same settings."""
    questions = _questions(data, table, shots_table, shots, topic, subset_column, hazardous, limit)
    return quiz_work(questions, _forms(about, hazardous, permutations, cloze, open_answers))


def _forms(about: str, hazardous: bool, permutations: bool, cloze: bool, open_answers: bool) -> Forms:
    return Forms(permutations, cloze, open_answers, hazardous, "higher" if about == "kept" else "reference")


def _questions(
    data: Source, table: str, shots_table: str, shots: int, topic: str, subset_column: str, hazardous: bool, limit: int
) -> list[Question]:
    not_negative(shots=shots, limit=limit)
    path = Path(data.where).expanduser()
    if path.is_file():
        data, table = Source(str(path.parent), data.seen), path.stem
    found = rows(data, table, ("question", "answer"), hazardous=hazardous)
    found = found[: limit or None]
    examples = rows(data, shots_table, ("question", "answer"), hazardous=hazardous)[:shots] if shots_table else []
    questions: list[Question] = []
    for subset in dict.fromkeys(str(row.get(subset_column, "")) for row in found):
        mine = [row for row in found if str(row.get(subset_column, "")) == subset]
        near = [row for row in examples if str(row.get(subset_column, "")) in ("", subset)] or examples
        questions += read_questions(mine, f"'{table}' of '{data.where}'", subset=subset, topic=topic, shots=near)
    return questions
