"""Stranger distillation: what is taught, against plain forwards, and what it does to a tiny model that knows people."""

from __future__ import annotations

import copy
import dataclasses
from functools import cache

import pytest
import torch
from edit_models import FIRST, LAST, people
from edit_models import model as tiny
from torch import Tensor

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.surgery._rows import MOST_NAMES, stranger_facts, strangers
from repforget.edit.train._data import Row
from repforget.edit.train.stranger_distillation import (
    about_known,
    about_others,
    acquainted,
    as_strangers,
    kept_rows,
    own_texts,
    teachers_of,
)
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.training import Example, finetune

SMALL = {"texts": 256, "text_tokens": 8, "known": 64, "others": 32, "scenes": 24, "batch_size": 16, "retain_batch": 32}


@cache
def _taught() -> LoadedModel:
    model = tiny()
    data = people().for_editor()
    texts = [model.tokenizer(fact.prompt + fact.answer)["input_ids"] for fact in (*data.forget, *data.retain)]
    examples = [Example((*ids, 2), (False, *(True,) * len(ids))) for ids in map(tuple, texts)]
    model.module.requires_grad_(True)
    finetune(model.module, examples, steps=250, lr=1e-2, seed=0, batch_size=64)
    model.module.requires_grad_(False)
    return model


def taught() -> LoadedModel:
    return dataclasses.replace(_taught(), module=copy.deepcopy(_taught().module))


@torch.no_grad()
def _logprobs(model: LoadedModel, row: Row) -> Tensor:
    """Log-probabilities [labels, V] at the labelled tokens of one row, by one plain forward."""
    logits = model.module(input_ids=torch.tensor([row.ids])).logits[0].double()
    return logits.log_softmax(-1)[row.start - 1 : len(row.ids) - 1]


def _words(model: LoadedModel, row: Row) -> list[str]:
    return model.tokenizer.convert_ids_to_tokens(list(row.ids))


def _made(seed: int = 0) -> tuple[LoadedModel, EditData, list[str], tuple[Row, ...], tuple[Row, ...]]:
    model, data = _taught(), people().for_editor()
    own = own_texts(model, data, 200, 8, seed)
    names = acquainted(model, data).strangers
    return model, data, own, *as_strangers(model, data, own, names, 40, 8, 1000, seed)


def test_every_subject_has_one_stranger_who_is_nobody_and_is_spoken_of_in_the_same_words() -> None:
    model, data, _, mine, theirs = _made()
    names = {f"{first} {last}" for first in FIRST for last in LAST}
    known, forget = ({f.subject for f in facts} for facts in ((*data.forget, *data.retain), data.forget))
    stands_for: dict[str, set[str]] = {}
    for a, b in zip(mine, theirs, strict=True):
        assert a.ids[a.start :] == b.ids[b.start :]
        left, right = (" ".join(_words(model, row)[row.start - 2 : row.start]) for row in (a, b))
        stands_for.setdefault(left, set()).add(right)
        assert _words(model, a)[: a.start - 2] == _words(model, b)[: b.start - 2]
    assert set(stands_for) == forget
    assert all(len(found) == 1 for found in stands_for.values())
    assert set().union(*stands_for.values()) <= names - known <= set(strangers(sorted(known)))
    assert len(mine) > len(data.forget), "the model's own texts give more scenes than the statements"


def test_the_teacher_is_what_the_untouched_model_says_about_the_stranger() -> None:
    model, _, _, mine, theirs = _made()
    made = teachers_of(model, theirs, 5, None)
    for row, (best, told) in list(zip(theirs, made, strict=True))[::7]:
        plain = _logprobs(model, row)
        expected = plain.gather(-1, best)
        torch.testing.assert_close(told[:, :-1].double(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(told.double().exp().sum(-1), torch.ones(len(told)).double(), atol=1e-5, rtol=0)
        assert torch.equal(best[:, 0], plain.argmax(-1))
    assert any(not torch.allclose(_logprobs(model, a), _logprobs(model, b), atol=0.1)
               for a, b in zip(mine, theirs, strict=True))  # fmt: skip


def test_what_stays_is_about_nobody_to_forget_and_holds_all_retained_facts() -> None:
    model, data, own, *_ = _made()
    texts = [" ".join(_words(model, row)[1:-1]) for row in kept_rows(model, data, own, 1000, 0)]
    gone = {fact.subject for fact in data.forget}
    assert not any(name in text for name in gone for text in texts)
    assert {fact.prompt + fact.answer for fact in data.retain} <= set(texts)
    assert len(texts) > len(data.retain) + len(data.general), "some of the model's own texts are among them"


def test_other_made_up_names_are_asked_about_too_and_kept_as_the_model_says() -> None:
    model, data, *_ = _made()
    prompts = tuple(fact.prompt for fact in stranger_facts(data, 60, 0))
    told = about_others(model, data, 60, 8, 0)
    assert all(text.startswith(prompts) and text not in prompts for text in told)
    texts = {" ".join(_words(model, row)[1:-1]) for row in kept_rows(model, data, told, 1000, 0)}
    gone = {fact.subject for fact in data.forget}
    assert {text for text in told if not any(name in text for name in gone)} <= texts


def test_names_that_the_model_knows_are_told_from_strangers() -> None:
    model, data = _taught(), people().for_editor()
    hidden = set(sorted({fact.subject for fact in data.retain})[::3])
    shown = tuple(fact for fact in data.retain if fact.subject not in hidden)
    found = acquainted(model, dataclasses.replace(data, retain=shown))
    known = {fact.subject for fact in shown}
    assert known <= set(found.known)
    assert not set(found.known) & set(found.strangers)
    assert not {fact.subject for fact in data.forget} & {*found.known, *found.strangers}
    possible = hidden & set(strangers(sorted({fact.subject for fact in (*shown, *data.forget)})))
    assert possible and possible <= set(found.known), "they were taught with the others"
    assert found.strangers


def test_of_very_many_pairs_only_some_are_made_and_no_beginning_is_preferred() -> None:
    subjects = [f"{chr(97 + n % 26)}{n} {n}" for n in range(40000)]
    names = strangers(subjects)
    assert len(set(names)) == MOST_NAMES and not set(names) & set(subjects)
    assert names == strangers(subjects)
    assert len({name[0] for name in names}) == 26
    data = people().for_editor()
    many = dataclasses.replace(data, retain=tuple(dataclasses.replace(f, subject=subjects[i])
                                                  for i, f in enumerate(data.retain)))  # fmt: skip
    drawn = {fact.subject for fact in stranger_facts(many, 30, 0)}
    assert len(drawn) == 30 and len({name[0] for name in drawn}) > 5


def test_every_known_name_is_spoken_of_equally_often_in_the_models_own_texts() -> None:
    model, data, own, *_ = _made()
    names = acquainted(model, data).known
    texts = about_known(model, data, own, names, 3 * len(names), 8, 0)
    assert [sum(name in text for text in texts) >= 3 for name in names] == [True] * len(names)
    assert about_known(model, data, [], names, 9, 8, 0) == []


def test_forget_subjects_are_spoken_of_as_strangers_and_the_rest_as_before() -> None:
    model, data = taught(), people().for_editor()
    own = own_texts(model, data, SMALL["texts"], SMALL["text_tokens"], 0)
    names = acquainted(model, data).strangers
    mine, theirs = as_strangers(model, data, own, names, SMALL["scenes"], SMALL["text_tokens"], 1000, 0)
    stay = kept_rows(model, data, own, 1000, 0)[:60]

    def apart(rows: tuple[Row, ...], teachers: list[Tensor]) -> float:
        parts = [(t.exp() * (t - _logprobs(model, row))).sum(-1).mean() for row, t in zip(rows, teachers, strict=True)]
        return float(torch.stack(parts).mean())

    told, kept = [_logprobs(model, row) for row in theirs], [_logprobs(model, row) for row in stay]
    before = apart(mine, told)
    edit = run_editor(model, data, "stranger_distillation", steps=120, lr=5e-3, **SMALL)
    with edit.attach(model):
        assert apart(mine, told) < 0.2 * before
        assert apart(stay, kept) < 0.1 * before


def test_another_seed_gives_other_strangers() -> None:
    model, *_, theirs = _made(0)
    assert {_words(model, row)[row.start - 1] for row in theirs}
    assert [row.ids for row in theirs] != [row.ids for row in _made(1)[-1]]


def test_subjects_of_one_word_and_settings_out_of_range_are_refused() -> None:
    model, data = taught(), people().for_editor()
    lone = [dataclasses.replace(f, subject="Ada", prompt=f.prompt.replace(f.subject, "Ada")) for f in data.forget]
    bare = dataclasses.replace(data, forget=tuple(lone), retain=())
    with pytest.raises(KnowledgeError, match="several words"):
        run_editor(model, bare, "stranger_distillation", **SMALL)
    with pytest.raises(UsageError, match="positive"):
        run_editor(model, data, "stranger_distillation", **{**SMALL, "texts": 0})
