"""TOFU: question answering about fictitious authors, some of whom must be forgotten (arXiv 2401.06121)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from repforget.bench import _tofu as t
from repforget.bench._asking import Scores, asked, attacks, before, recalls, rendered
from repforget.bench._data import Source, card, estimated_tokens, rows, text, texts
from repforget.bench._records import BenchResult, Metric, Part, Reference, Work, mean_metric, not_computed
from repforget.errors import UsageError
from repforget.models._fingerprint import tokenizer_digest
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import ItemScores
from repforget.scoring import metrics
from repforget.scoring.rouge import rouge_l

DATA = "locuslab/TOFU"
CARD = "tofu.yaml"
AGGREGATION = ("truth_ratio", "compat", "unpaired")  # settings that no forward pass depends on
PREFILL = "Sure, here is the answer:"
AUTHOR = 20  # consecutive rows of the full order
TABLES = {name: f"{name}_perturbed" for name in t.UTILITY_SETS}
FIRST_ROW = {("forget01_perturbed", 40): 3960, ("forget05_perturbed", 200): 3800, ("forget10_perturbed", 400): 3600,
             ("retain_perturbed", 400): 0}  # fmt: skip
HOLDOUT_COLUMNS = ("question", "answer")


class Card(BaseModel):
    """``tofu.yaml`` beside own data of the same schema: how its questions are put."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    template: str = "Question: {question}\nAnswer:"
    separator: str = " "
    new_tokens: int = Field(default=200, ge=1)
    about: str = ""


@dataclass(frozen=True)
class Question:
    """One row: what is asked, the right answer, what takes the paraphrase's place, and the wrong answers."""

    id: str
    cluster: str
    question: str
    answer: str
    instead: str = ""
    wrong: tuple[str, ...] = ()
    otherwise: str = ""  # the question in other words


def tofu(
    model: LoadedModel, *, data: Source, part: Part, reference: Reference | None = None, seed: int = 0,
    progress: Progress | None = None, split: str = "forget10", ds_size: int | None = None,
    template: str | None = None, separator: str | None = None, new_tokens: int | None = None,
    truth_ratio: Literal["geometric", "arithmetic"] = "geometric", holdout: str | None = None,
    compat: Literal["none", "open-unlearning"] = "none", unpaired: bool = False,
) -> BenchResult:  # fmt: skip
    """Forgetting of one part of TOFU's authors, and what is left of everything else.

    ``ds_size=300`` is what the first published numbers used; None takes every row. ``template`` holds ``{question}``,
    or is ``chat`` for the tokenizer's own; None reads ``tofu.yaml`` beside the data and else puts
    "Question: ...\\nAnswer:". ``holdout`` names a table of questions that the model never saw, for membership
    attacks. ``compat="open-unlearning"`` computes that project's numbers with what they get wrong (1e-10 in
    denominators, extraction strength that is never 0, exact memorization without the last token).

    Source: Maini et al. 2024, arXiv 2401.06121; aggregates of arXiv 2506.12618. Cost: one forward pass over each
    answer, its paraphrase and the wrong answers, and three greedy generations per forget question, one per other.

    Good numbers here do not show that the knowledge is gone: every question is put in the words of the training
    data, and forget quality cannot tell much at these sizes. Attack the edit as well.
    """
    form = _form(data, template, separator, new_tokens)
    sets, outside = _read(data, split, ds_size, holdout)
    _same_questions(sets["forget"], reference, unpaired)
    rouge_l("", "")  # a missing library is said before anything is scored

    answers = {name: part(f"{name}-answers", partial(_answers, model, q, form, progress)) for name, q in sets.items()}
    said = {name: part(f"{name}-said", partial(_said, model, name, q, form, answers[name]["hits"], progress))
            for name, q in sets.items()}  # fmt: skip
    scored = {name: _scored(q, answers[name], said[name]["recall"]) for name, q in sets.items()}
    cells = {name: t.cells(name, s, mean=truth_ratio, compat=compat) for name, s in scored.items()}
    ratio = scored["forget"].items(t.log_truth_ratio(scored["forget"], mean=truth_ratio, compat=compat))
    found = [t.model_utility(cells, seed=seed), *_against(reference, ratio, model, unpaired, seed)]
    found += [metric for name, group in cells.items() for metric in t.means(name, group, seed=seed)]
    found += _forgotten(scored["forget"], answers["forget"], said["forget"], compat, seed)
    loss = scored["retain"].items(scored["retain"].loss)
    found += [
        mean_metric("forget.log_truth_ratio", ratio, better="reference", token_based=True, seed=seed,
                    note="ln R: below 0 where the model prefers the truth"),
        mean_metric("retain.loss", loss, better="lower", token_based=True, seed=seed),
    ]  # fmt: skip
    found += _membership(model, sets["forget"], outside, form, part, seed)
    found += _aggregates(found, reference)
    counts = _counts(sets, outside, answers, said)
    return BenchResult.of("tofu", found, counts, _notes(form, reference, truth_ratio, compat, ds_size))


def work(
    data: Source, *, split: str = "forget10", ds_size: int | None = None, new_tokens: int | None = None,
    holdout: str | None = None, **settings: Any,
) -> Work:  # fmt: skip
    """What :func:`tofu` will cost; tokens are estimated from the characters."""
    form = _form(data, settings.get("template"), settings.get("separator"), new_tokens)
    sets, outside = _read(data, split, ds_size, holdout)
    forget, every = sets["forget"], [*(q for group in sets.values() for q in group), *outside]
    sequences = [(q.question, a) for q in every for a in dict.fromkeys((q.answer, q.instead, *q.wrong)) if a]
    sequences += [(q.otherwise, q.answer) for q in forget if q.otherwise]
    characters = sum(len(form.template) + len(prompt) + len(answer) for prompt, answer in sequences)
    said = sum(map(len, sets.values())) + len(forget) * (1 + any(q.otherwise for q in forget))
    return Work(len(sequences), estimated_tokens(characters), said, said * form.new_tokens)


def _read(
    data: Source, split: str, ds_size: int | None, holdout: str | None
) -> tuple[dict[str, tuple[Question, ...]], tuple[Question, ...]]:
    """The four sets of questions, and those that the model never saw."""
    sets = {"forget": questions(data, f"{split}_perturbed", ds_size, instead=True, otherwise=True)}
    sets |= {name: questions(data, table, ds_size, instead=name == "retain") for name, table in TABLES.items()}
    return sets, questions(data, holdout, ds_size, columns=HOLDOUT_COLUMNS) if holdout else ()


def questions(
    data: Source, table: str, ds_size: int | None = None, *, instead: bool = False, otherwise: bool = False,
    columns: Sequence[str] = ("question", "answer", "perturbed_answer"),
) -> tuple[Question, ...]:  # fmt: skip
    """The first ``ds_size`` rows of a table; ids are row numbers of the full order where the table is TOFU's own.

    Own data may bring the columns ``id`` and ``cluster``; else 20 consecutive rows are one author, and a row of the
    real authors or world facts stands for itself.
    """
    found = rows(data, table, (*columns, *(("paraphrased_answer",) if instead else ())))
    first = FIRST_ROW.get((table, len(found)))
    out = []
    for number, row in enumerate(found[:ds_size]):
        place = f"'{table}' of '{data.where}', row {number + 1}"
        name = f"{table}-{number:04d}" if first is None else f"full-{first + number:04d}"
        author = name if not instead else f"author-{((first or 0) + number) // AUTHOR:03d}"
        answer = text(row, "answer", place)
        out.append(Question(
            str(row.get("id") or name), str(row.get("cluster") or author), text(row, "question", place), answer,
            text(row, "paraphrased_answer", place) if instead else answer,
            tuple(texts(row, "perturbed_answer", place)) if "perturbed_answer" in columns else (),
            text(row, "paraphrased_question", place) if otherwise and row.get("paraphrased_question") else "",
        ))  # fmt: skip
    sizes = {len(q.wrong) for q in out}
    if len(sizes) > 1:
        raise UsageError(f"'{table}' of '{data.where}' has between {min(sizes)} and {max(sizes)} wrong answers per "
                         "row: a truth ratio needs the same number in every row.")  # fmt: skip
    return tuple(out)


def _form(data: Source, template: str | None, separator: str | None, new_tokens: int | None) -> Card:
    stated = card(data, CARD, Card)
    given = {"template": template, "separator": separator, "new_tokens": new_tokens}
    form = stated.model_copy(update={name: value for name, value in given.items() if value is not None})
    if form.template != "chat" and re.findall(r"\{(.*?)\}", form.template) != ["question"]:
        raise UsageError(f"The template '{form.template}' must hold {{question}} once and no other placeholder.")
    if form.new_tokens < 1:
        raise UsageError(f"new_tokens is {form.new_tokens}: give at least 1.")
    return form


def _same_questions(forget: Sequence[Question], reference: Reference | None, unpaired: bool) -> None:
    """Refuse a reference that answered other questions, before anything is scored."""
    theirs = reference.result.metrics.get("forget.log_truth_ratio") if reference else None
    if theirs is None or theirs.items is None or unpaired or theirs.items.ids == tuple(q.id for q in forget):
        return
    shared = len({q.id for q in forget} & set(theirs.items.ids))
    raise UsageError(f"The reference answered {len(theirs.items.ids)} forget questions and this run asks {len(forget)}"
                     f", {shared} of them the same: evaluate both on the same questions, or --set unpaired=true.")


def _answers(
    model: LoadedModel, group: Sequence[Question], form: Card, progress: Progress | None = None
) -> dict[str, Any]:  # fmt: skip
    """Mean loss of every answer of every question, and which tokens of the right one are the arg max."""
    pairs: list[tuple[str, str]] = []
    owner: list[tuple[int, int]] = []
    for q in group:
        prompt = rendered(model, form, q.question)
        mine = [(prompt, q.answer), (prompt, q.instead), *((prompt, wrong) for wrong in q.wrong)]
        mine += [(rendered(model, form, q.otherwise), q.answer)] if q.otherwise else []
        owner.append((len(pairs), len(pairs) + len(mine)))
        pairs += mine
    got = asked(model, pairs, form, progress=progress)
    wrong = [got.loss[a + 2 : a + 2 + len(q.wrong)].tolist() for q, (a, _) in zip(group, owner, strict=True)]
    last = [got.loss[b - 1] if q.otherwise else np.nan for q, (_, b) in zip(group, owner, strict=True)]
    return {
        "loss": got.loss[[a for a, _ in owner]].tolist(), "instead": got.loss[[a + 1 for a, _ in owner]].tolist(),
        "wrong": wrong, "otherwise": last, "hits": [got.hits[a] for a, _ in owner],
        "eos": got.eos,
    }  # fmt: skip


def _said(
    model: LoadedModel, name: str, group: Sequence[Question], form: Card, hits: Sequence[str],
    progress: Progress | None,
) -> dict[str, Any]:  # fmt: skip
    """ROUGE-L recall of the right answer in what the model says; for the forget set also when asked otherwise."""
    prompts, answers = [rendered(model, form, q.question) for q in group], [q.answer for q in group]
    out = {"recall": recalls(model, prompts, answers, form, progress, hits)}
    if name == "forget":
        prefilled = [f"{prompt}{before(form)}{PREFILL}" for prompt in prompts]
        out["prefilled"] = recalls(model, prefilled, answers, form, progress)
    if any(q.otherwise for q in group):
        again = [rendered(model, form, q.otherwise or q.question) for q in group]
        found = recalls(model, again, answers, form, progress)
        out["otherwise"] = [value if q.otherwise else None for q, value in zip(group, found, strict=True)]
    return out


def _scored(group: Sequence[Question], answers: Mapping[str, Any], recall: Sequence[float | None]) -> t.Scored:
    def array(values: Any) -> t.Array:
        return np.array(values, dtype=np.float64)  # None, as JSON writes NaN, becomes NaN

    return t.Scored(tuple(q.id for q in group), tuple(q.cluster for q in group), array(answers["loss"]),
                    array(answers["instead"]), array(answers["wrong"]), array(recall))  # fmt: skip


def _forgotten(
    scored: t.Scored, answers: Mapping[str, Any], said: Mapping[str, Any], compat: t.Compat, seed: int
) -> list[Metric]:
    """What else is known of the forget set: loss, verbatim memory, and the same in other words."""
    peer = compat == "open-unlearning"
    drop = peer or answers["eos"]  # the end token is no part of what is memorised; the peer drops the last in any case
    with np.errstate(invalid="ignore"):  # NaN marks what could not be scored
        knowledge = metrics.truth_ratio(scored.instead, scored.wrong, form="knowledge", epsilon=t.EPSILON[compat])
    hits = [np.array([sign == "1" for sign in line], dtype=np.float64) for line in answers["hits"]]
    values: dict[str, Any] = {
        "loss": scored.loss, "exact_memorization": metrics.exact_memorization(hits, drop_last=drop),
        "extraction_strength": metrics.extraction_strength(hits, drop_last=drop, ou_compat=peer),
        "probability_paraphrased": metrics.probability(-scored.instead),
        "knowledge": knowledge,
        "probability_asked_otherwise": np.exp(-np.array(answers["otherwise"], dtype=np.float64)),
        "rouge_asked_otherwise": said.get("otherwise"), "rouge_prefilled": said.get("prefilled"),
    }  # fmt: skip
    out = []
    for name, column in values.items():
        if column is None or np.isnan(np.array(column, dtype=np.float64)).all():
            why = "the rows have no paraphrased_question" if "otherwise" in name else "no item could be scored"
            out.append(not_computed(f"forget.{name}", why, better="lower"))
            continue
        items = scored.items(np.array(column, dtype=np.float64))
        out.append(mean_metric(f"forget.{name}", items, better="higher" if name == "loss" else "lower",
                               token_based=not name.startswith("rouge"), seed=seed))  # fmt: skip
    return out


def _against(
    reference: Reference | None, ratio: ItemScores, model: LoadedModel, unpaired: bool, seed: int
) -> list[Metric]:
    if reference is None:
        return t.no_quality("no reference was given: a model that never saw the forget set")
    theirs = reference.result.metrics.get("forget.log_truth_ratio")
    if theirs is None or theirs.items is None:
        return t.no_quality("the reference's row has no per-item truth ratios")
    if reference.tokenizer and reference.tokenizer != tokenizer_digest(model.tokenizer):
        return t.no_quality("the reference has another tokenizer, so that values per token are not of the same things")
    return t.forget_quality(ratio, theirs.items, unpaired=unpaired, seed=seed)


def _membership(
    model: LoadedModel, forget: Sequence[Question], outside: Sequence[Question], form: Card, part: Part, seed: int
) -> list[Metric]:
    """AUC of four membership attacks, forget against holdout questions: 1 = forget answers stand out as trained on."""
    if not outside:
        return []
    sides: list[Scores] = []
    for name, group in (("forget", forget), ("holdout", outside)):
        pairs = [(rendered(model, form, q.question), q.answer) for q in group]
        sides.append(Scores.of(part(f"{name}-membership", partial(_member_scores, model, pairs, form))))
    clusters = [[q.cluster for q in group] for group in (forget, outside)]
    return attacks(sides[0], sides[1], clusters[0], clusters[1], seed=seed)


def _member_scores(model: LoadedModel, pairs: Sequence[tuple[str, str]], form: Card) -> dict[str, Any]:
    return asked(model, pairs, form, moments=True).to_json()


def _aggregates(found: Sequence[Metric], reference: Reference | None) -> list[Metric]:
    """The peer's lost aggregates, where what they need is there."""
    of = {metric.name: metric for metric in found}
    mine = [metric for metric in found if metric.name.startswith("membership.")]
    memory, private = t.memorization(of), t.privacy(mine, reference.result.metrics if reference else {})
    why = "its Utility needs the original model and an outside fluency classifier"
    return [memory, private, not_computed("aggregate_overall", why)]


def _counts(
    sets: Mapping[str, Sequence[Question]], outside: Sequence[Question], answers: Mapping[str, Any],
    said: Mapping[str, Any],
) -> dict[str, float]:  # fmt: skip
    sequences = sum(2 + len(q.wrong) + bool(q.otherwise) for group in sets.values() for q in group) + len(outside)
    lost = sum(value is None or value != value for group in answers.values() for value in group["loss"])
    generations = sum(len(values) for group in said.values() for values in group.values())
    return {"questions": sum(map(len, sets.values())) + len(outside), "sequences": sequences,
            "generations": generations, "invalid": lost}  # fmt: skip


def _notes(
    form: Card, reference: Reference | None, mean: str, compat: str, ds_size: int | None
) -> tuple[str, ...]:  # fmt: skip
    notes = [f"questions are put as {form.template!r} with {before(form)!r} before the answer",
             f"truth ratio with the {mean} mean of the wrong answers, answers with their end token"]  # fmt: skip
    if ds_size is not None:
        notes.append(f"only the first {ds_size} rows of each table")
    if compat != "none":
        notes.append("compat open-unlearning: that project's numbers with what they get wrong")
    if reference is not None:
        of = reference.result.metrics
        pair = [of[name].items for name in ("retain.loss", "forget.loss") if name in of]
        known = t.knows_too(*pair) if len(pair) == 2 and None not in pair else None  # type: ignore[arg-type]
        if known is not None:
            notes.append(f"the reference '{reference.name}' answers forget questions about as well as its own retain "
                         f"questions (AUC of the loss {known:.2f}): it may know them too, and then forget quality "
                         "says nothing")  # fmt: skip
    return tuple(notes)
