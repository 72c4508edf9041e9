"""MMLU: what a model still knows of 57 subjects."""

from __future__ import annotations

from typing import Any, Literal

from repforget.bench._choices import Question, Scores, read_questions
from repforget.bench._data import Source, rows
from repforget.bench._quiz import Forms, quiz, quiz_work
from repforget.bench._records import BenchResult, Part, Reference, Work
from repforget.bench._saying import not_negative
from repforget.errors import KnowledgeError
from repforget.models.load import LoadedModel
from repforget.progress import Progress

DATA = "cais/mmlu"
AGGREGATION = ("permutations", "cloze")
TEST, DEV = "all/test", "all/dev"
COLUMNS = ("question", "choices", "answer", "subject")
Tables = dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]]  # subject -> questions, worked examples


def mmlu(
    model: LoadedModel, *, data: Source, reference: Reference | None = None, part: Part, seed: int = 0,
    progress: Progress | None = None, shots: int = 5, subjects: tuple[str, ...] = (),
    engine: Literal["own", "lm-eval"] = "own", permutations: bool = False, cloze: bool = False, limit: int = 0,
) -> BenchResult:  # fmt: skip
    """Ask the MMLU questions (Hendrycks et al. 2021, arXiv 2009.03300) with the first five of ``dev`` as examples.

    ``data``: the hub set cais/mmlu or a folder with all/test.jsonl and all/dev.jsonl (question, choices, answer as a
    number, subject).  ``accuracy`` is over questions (micro), ``accuracy_macro`` the mean of the subjects' accuracies,
    a different number; both are usual.  ``limit`` takes the first questions of each subject.  Forms and metrics are
    those of the benchmark ``mcq``.  Cost: one pass per question of about 700 tokens with five examples (14,042
    questions); four times that with ``permutations``.

    An unchanged accuracy does not show that nothing else was lost: neighbours of what was edited away are not in it.
    """
    tables = _tables(data, shots, subjects, limit)
    questions, forms = _questions(tables), Forms(permutations, cloze)

    def harness() -> Scores:
        from repforget.bench._lm_eval import harness_scores

        tasks = {f"mmlu_{subject}": {"test": found, "dev": examples or found[:1]}
                 for subject, (found, examples) in tables.items()}  # fmt: skip
        scores = harness_scores(model, tasks, shots=shots)
        return [row for task in tasks for row in scores[task]]

    return quiz("mmlu", model, questions, forms, part=part, progress=progress, seed=seed, reference=reference,
                engine=None if engine == "own" else harness)  # fmt: skip


def work(
    data: Source, *, shots: int = 5, subjects: tuple[str, ...] = (), engine: Literal["own", "lm-eval"] = "own",
    permutations: bool = False, cloze: bool = False, limit: int = 0,
) -> Work:  # fmt: skip
    """Cost of the same settings."""
    own = engine == "own"
    return quiz_work(_questions(_tables(data, shots, subjects, limit)), Forms(permutations and own, cloze and own))


def _tables(data: Source, shots: int, subjects: tuple[str, ...], limit: int) -> Tables:
    not_negative(shots=shots, limit=limit)
    found = rows(data, TEST, COLUMNS)
    examples = rows(data, DEV, COLUMNS) if shots else []
    if examples and data.seen[DEV] == data.seen[TEST]:
        raise KnowledgeError(f"'{data.where}' has the same rows for dev and test, so the examples would give answers "
                             "away: give all/dev.jsonl and all/test.jsonl, or set shots=0.")  # fmt: skip
    there = dict.fromkeys(str(row["subject"]) for row in found)
    missing = [subject for subject in subjects if subject not in there]
    if missing:
        raise KnowledgeError(f"MMLU subject '{missing[0]}' is not in '{data.where}': found {', '.join(there)}.")
    tables = {}
    for subject in subjects or there:
        near = [row for row in examples if row["subject"] == subject][:shots]
        if len(near) < shots:
            raise KnowledgeError(f"Subject '{subject}' has {len(near)} rows in '{DEV}' for {shots} worked examples: "
                                 "add rows or set shots to fewer.")  # fmt: skip
        tables[subject] = ([row for row in found if row["subject"] == subject][: limit or None], near)
    return tables


def _questions(tables: Tables) -> list[Question]:
    return [question for subject, (found, near) in tables.items()
            for question in read_questions(found, f"subject '{subject}'", subset=subject,
                                           topic=subject.replace("_", " "), shots=near)]  # fmt: skip
