"""Rows of a trained editor: every pass uses each once, and answers are put in the place of the true ones."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import pytest
from contract_tools import tiny_data, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.edit._dispatch import edit
from repforget.edit.train._data import load_rows, step_plan
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel


@pytest.fixture(scope="module")
def data() -> EditData:
    return tiny_data()


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@given(st.lists(st.integers(2, 30), min_size=1, max_size=40), st.lists(st.integers(2, 30), min_size=3, max_size=50),
       st.integers(1, 9), st.integers(0, 3))  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_every_pass_uses_each_row_once(first: list[int], second: list[int], size: int, seed: int) -> None:
    steps = 3 * max(len(first), len(second))
    plan = step_plan([first, second], [size, 3], steps, seed)
    assert plan == step_plan([first, second], [size, 3], steps, seed)
    for k, lengths in enumerate((first, second)):
        per_pass = -(-len(lengths) // (size, 3)[k])
        for at in range(0, steps - per_pass, per_pass):
            seen = Counter(i for step in plan[at : at + per_pass] for i in step[k])
            assert seen == Counter(range(len(lengths)))


def test_answers_put_in_the_place_of_the_true_ones(model: LoadedModel, data: EditData) -> None:
    def rows(kind: Any) -> Any:
        return load_rows(model, data, "forget", instead=kind, answers="auto", max_facts=1000, seed=0)

    other, fresh, refusal = rows("alternative"), rows("fresh"), rows("refusal")
    assert other.instead is not None and fresh.instead is not None and refusal.instead is not None
    for i, row in enumerate(other.own):
        changed = other.instead(0, i)
        assert changed == other.instead(7, i)
        assert changed.ids[: changed.start] == row.ids[: row.start], "the same prompt"
        assert changed.ids != row.ids, "another answer"
    drawn = {fresh.instead(step, 0).ids for step in range(30)}
    assert len(drawn) > 1 and fresh.instead(3, 0) == fresh.instead(3, 0)
    assert not fresh.fixed


def test_an_answer_without_alternatives_says_how_to_make_them(model: LoadedModel, data: EditData) -> None:
    lone = dataclasses.replace(data.forget[0], relation="unique")
    with pytest.raises(KnowledgeError, match=r"No alternative answer.*JSON-lines file with the keys id and answers"):
        edit(model, dataclasses.replace(data, forget=(lone, *data.forget[1:])), "altpo", steps=1)


def test_answers_from_a_file(model: LoadedModel, data: EditData, tmp_path: Any) -> None:
    import json

    path = tmp_path / "answers.jsonl"
    ids = sorted({fact.id.rpartition("#")[0] for fact in data.forget})
    path.write_text("\n".join(json.dumps({"id": i, "answers": ["red", "blue"]}) for i in ids))
    rows = load_rows(model, data, "forget", instead="alternative", answers=str(path), max_facts=1000, seed=0)
    assert rows.instead is not None
    said = {model.tokenizer.decode(rows.instead(0, i).ids[rows.instead(0, i).start :]).strip() for i in range(9)}
    assert said == {"red", "blue"}
    path.write_text(json.dumps({"id": ids[0], "answers": ["red"]}))
    with pytest.raises(UsageError, match="gives no answers for item"):
        load_rows(model, data, "forget", instead="alternative", answers=str(path), max_facts=1000, seed=0)
