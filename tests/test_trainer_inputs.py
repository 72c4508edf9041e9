"""What cannot be trained is refused in one sentence of this package, and the model keeps its bits."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import edit_models
import pytest

from repforget.edit._dispatch import edit
from repforget.errors import NoEffectError, NumericalError, RepforgetError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel, fingerprint


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    made: LoadedModel = edit_models.model()
    for parameter in made.module.parameters():
        parameter.requires_grad_(False)
    return made


def facts(change: Callable[[Fact], Fact], side: str = "forget") -> EditData:
    data = edit_models.people().for_editor()
    return dataclasses.replace(data, **{side: tuple(map(change, getattr(data, side)))})


def data(**changes: Any) -> EditData:
    return dataclasses.replace(edit_models.people().for_editor(), **changes)


def refused(
    model: LoadedModel, method: str, words: str, given: EditData | None = None,
    error: type[RepforgetError] = UsageError, **settings: Any,
) -> None:  # fmt: skip
    with pytest.raises(error, match=words) as caught:
        edit(model, given or data(), method, **settings)
    assert "\n" not in str(caught.value)
    assert fingerprint(model.module) == model.fingerprint
    assert not any(p.requires_grad or p.grad is not None for p in model.module.parameters())


@pytest.mark.parametrize("method", ["altpo", "prior_relabelling"])
def test_objectives_without_another_answer(model: LoadedModel, method: str) -> None:
    lone = facts(lambda fact: dataclasses.replace(fact, relation=fact.id))
    refused(model, method, "No alternative answer is known", lone)


@pytest.mark.parametrize(("line", "words"), [
    ({"id": "nobody", "answers": ["red"]}, "gives no answers for item"),
    ({"id": "nobody"}, "Line 1 .* has the answers None: give a list of texts"),
    ({"id": "nobody", "answers": "red"}, "has the answers 'red'"),
    ({"id": "nobody", "answers": [5]}, r"has the answers \[5\]"),
])  # fmt: skip
def test_a_file_of_answers_that_does_not_fit(model: LoadedModel, tmp_path: Path, line: Any, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(line))
    refused(model, "idk_dpo", words, answers=str(path))


@pytest.mark.parametrize(("answer", "words"), [("", "no tokens"), ("red " * 100, "does not fit the model's context")])
def test_answers_that_cannot_be_said(model: LoadedModel, tmp_path: Path, answer: str, words: str) -> None:
    path = tmp_path / "answers.jsonl"
    ids = {fact.id.rpartition("#")[0] for fact in data().forget}
    path.write_text("\n".join(json.dumps({"id": i, "answers": [answer]}) for i in sorted(ids)))
    refused(model, "idk_dpo", words, answers=str(path))


@pytest.mark.parametrize(("terms", "words"), [
    ([], "at least one term"),
    (["npo"], "valid dictionary"),
    ([{"objective": "npo", "wieght": 1}], "did you mean 'weight'"),
    ([{"data": "forget"}], "names no objective"),
    ([{"objective": "npoo"}], "did you mean 'npo'"),
    ([{"objective": "npo", "weight": "much"}], "weight 'much': give a number"),
    ([{"objective": "npo", "weight": math.nan}], "weight nan: give a number"),
    ([{"objective": "npo", "weight": True}], "weight True: give a number"),
    ([{"objective": "npo", "side": "left"}], "write forget or retain"),
    ([{"objective": "npo", "settings": [1]}], "name: value"),
    ([{"objective": "npo", "settings": {"betta": 1}}], "did you mean 'beta'"),
    ([{"objective": "npo", "settings": {"beta": "x"}}], "beta 'x': input should be a valid number"),
    ([{"objective": "rmu", "settings": {"layers": 3}}], "layers 3: input should be 'auto' or .* list"),
    ([{"objective": "npo"}, {"objective": "nll", "data": "retian"}], "no data set or file 'retian'"),
])  # fmt: skip
def test_terms_that_say_nothing(model: LoadedModel, terms: Any, words: str) -> None:
    refused(model, "trained", words, terms=terms, steps=1)


@pytest.mark.parametrize(("settings", "words"), [
    ({"retain": "npo"}, "'npo' forgets and cannot be what keeps"),
    ({"retain": {"kl": "x"}}, "is written 'name' or"),
    ({"retain": {"kl": {}, "nll": {}}}, "is written 'name' or"),
    ({"retain": {"answer_preservation": {"beta": "x"}}}, "beta 'x'"),
    ({"robust": {"sam": {"rho": "x"}}}, "rho 'x'"),
    ({"combine": {"gru": {"newest": "x"}}}, "newest 'x'"),
    ({"retain_on": ["nowhere.jsonl"]}, "no data set or file 'nowhere.jsonl'"),
    ({"retain_on": ["."]}, "cannot be read as a file"),
    ({"retain_on": []}, "no set to keep facts of"),
    ({"retain_on": ["strangers"]}, "made up for strangers"),
    ({"targets": ["("]}, "no regular expression"),
    ({"targets": []}, "trains nothing"),
    ({"retain_weight": -1.0}, "retain_weight -1.0"),
    ({"forget_weight": math.nan}, "forget_weight nan"),
    ({"batch_size": 3000}, "retain_batch: 48"),
])  # fmt: skip
def test_settings_that_cannot_be(model: LoadedModel, settings: dict[str, Any], words: str) -> None:
    refused(model, "npo", words, steps=1, **settings)


def test_no_layers_are_not_all_layers(model: LoadedModel) -> None:
    refused(model, "rmu", r"layers \[\]: give some of 0 to 1", layers=[])


def test_sets_that_hold_nothing(model: LoadedModel) -> None:
    nameless = facts(lambda fact: dataclasses.replace(fact, subject=""))
    long = facts(lambda fact: dataclasses.replace(fact, prompt="Q " * 100))
    refused(model, "npo", "No made-up subjects", nameless, retain="kl", retain_on=["strangers"])
    refused(model, "npo", "None of the 96 facts of 'forget' fits", long)
    refused(model, "npo", "'forget' has no facts", data(forget=()))
    refused(model, "npo", "'retain' has no facts", data(retain=()))
    for texts in ((), ("",)):
        refused(model, "npo", "no text of two tokens", data(general=texts), retain_on=["general"])


def test_steps_that_change_nothing(model: LoadedModel) -> None:
    refused(model, "npo", "changes nothing", error=NoEffectError, steps=0)


@pytest.mark.parametrize("retain", ["nll", "none"])
def test_a_loss_that_is_no_number(model: LoadedModel, retain: str) -> None:
    refused(model, "npo", "diverged by step 2", error=NumericalError, lr=1e9, steps=3, retain=retain)


def test_a_batch_larger_than_the_forget_set_takes_all_of_it(model: LoadedModel) -> None:
    few = data(forget=data().forget[:4])
    made = [edit(model, few, "npo", steps=2, batch_size=size, retain_batch=4) for size in (4, 300)]
    assert len({fingerprint(each.applied_to(model).module) for each in made} | {model.fingerprint}) == 2
