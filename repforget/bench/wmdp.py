"""WMDP: questions that stand in for hazardous knowledge.  None is ever shown, stored or put into an error."""

from __future__ import annotations

from typing import Literal

from repforget.bench._choices import Question, Scores, read_questions
from repforget.bench._data import Source, rows
from repforget.bench._quiz import Forms, quiz, quiz_work
from repforget.bench._records import BenchResult, Part, Reference, Work
from repforget.bench._saying import not_negative
from repforget.errors import UsageError
from repforget.models.load import LoadedModel
from repforget.progress import Progress

DATA = "cais/wmdp"
AGGREGATION = ("permutations", "cloze", "open_answers")
TOPICS = {"bio": "biology", "chem": "chemistry", "cyber": "cybersecurity"}
Subset = Literal["bio", "chem", "cyber"]


def wmdp(
    model: LoadedModel, *, data: Source, reference: Reference | None = None, part: Part, seed: int = 0,
    progress: Progress | None = None, subsets: tuple[Subset, ...] = ("bio", "chem", "cyber"),
    engine: Literal["own", "lm-eval"] = "own", permutations: bool = True, cloze: bool = True,
    open_answers: bool = False, limit: int = 0,
) -> BenchResult:  # fmt: skip
    """Ask the WMDP questions (Li et al. 2024, arXiv 2403.03218) without examples; chance is 25 %.

    ``data``: the hub set cais/wmdp or a folder with wmdp-bio.jsonl, wmdp-chem.jsonl, wmdp-cyber.jsonl (question,
    choices, answer as a number).  ``accuracy`` weighs the subsets by size, as the harness's group does;
    ``accuracy_macro`` weighs them alike.  Forms and metrics are those of the benchmark ``mcq``; with
    ``engine="lm-eval"`` the prompts and scores are lm-eval's own and only the letter form is asked.  Cost: four passes
    per question, eight short rows for the cloze forms (about 4,000 questions).

    Chance accuracy does not show that the knowledge is gone: compare the cloze forms, and attack the model.  Results
    hold ids and numbers only.
    """
    not_negative(limit=limit)
    tables = {subset: _rows(data, subset, limit) for subset in subsets}
    questions, forms = _questions(data, tables), _forms(permutations, cloze, open_answers)

    def harness() -> Scores:
        from repforget.bench._lm_eval import harness_scores

        tasks = {f"wmdp_{subset}": {"test": found} for subset, found in tables.items()}
        scores = harness_scores(model, tasks, shots=0)
        return [row for task in tasks for row in scores[task]]

    return quiz("wmdp", model, questions, forms, part=part, progress=progress, seed=seed, reference=reference,
                engine=None if engine == "own" else harness)  # fmt: skip


def work(
    data: Source, *, subsets: tuple[Subset, ...] = ("bio", "chem", "cyber"),
    engine: Literal["own", "lm-eval"] = "own", permutations: bool = True, cloze: bool = True,
    open_answers: bool = False, limit: int = 0,
) -> Work:  # fmt: skip
    """Cost of the same settings."""
    questions = _questions(data, {subset: _rows(data, subset, limit) for subset in subsets})
    own = engine == "own"
    return quiz_work(questions, _forms(permutations and own, cloze and own, open_answers and own))


def _forms(permutations: bool, cloze: bool, open_answers: bool) -> Forms:
    return Forms(permutations, cloze, open_answers, hazardous=True, better="reference")


def _table(data: Source, subset: str) -> str:
    return f"wmdp-{subset}/test"


def _rows(data: Source, subset: Subset, limit: int) -> list[dict[str, object]]:
    return rows(data, _table(data, subset), ("question", "choices", "answer"), hazardous=True)[: limit or None]


def _questions(data: Source, tables: dict[Subset, list[dict[str, object]]]) -> list[Question]:
    if not tables:
        raise UsageError("wmdp was given no subsets: choose among bio, chem and cyber.")
    return [question for subset, found in tables.items()
            for question in read_questions(found, f"'{_table(data, subset)}' of '{data.where}'", subset=subset,
                                           topic=TOPICS[subset])]  # fmt: skip
