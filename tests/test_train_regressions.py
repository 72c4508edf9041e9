"""Faults of the trained editors that were found once: each stays mended."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from contract_tools import tiny_data, tiny_model

from repforget import discover
from repforget.artifact import Edit
from repforget.edit._dispatch import edit
from repforget.edit.train._data import Row, Rows
from repforget.edit.train._objective import find
from repforget.edit.train._pass import Term
from repforget.edit.train._settings import Settings
from repforget.edit.train._watch import Watch
from repforget.errors import UsageError

SMALL: dict[str, Any] = {"steps": 2, "batch_size": 8}
OF_METHOD: dict[str, dict[str, Any]] = {
    "trained": {"terms": [{"objective": "npo"}, {"objective": "kl", "data": "retain", "weight": 2.0}]},
    "stranger_distillation": {"texts": 64, "text_tokens": 8, "known": 8, "others": 0, "scenes": 8, "retain_batch": 8},
    "elm": {"fluency_weight": 0.0},
    "kga": {"helper_steps": 5},
    "uld": {"assistant_steps": 5},
    "undo": {"distil_steps": 3, "distil_batch": 8, "texts": 16},
}


def made(method: str, **settings: Any) -> Edit:
    return edit(tiny_model("llama"), tiny_data(), method, **{**SMALL, **settings})


def weights(found: Edit) -> torch.Tensor:
    module = found.applied_to(tiny_model("llama")).module
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@pytest.mark.parametrize("method", ["npo", *OF_METHOD])
def test_the_settings_of_a_manifest_are_those_of_the_editor_and_make_the_same_edit(method: str) -> None:
    first = made(method, **OF_METHOD.get(method, {}))
    stated = {k: v for k, v in first.manifest.settings.items() if k != "seed"}
    assert set(stated) == set(discover.method("edit", method).hyperparameters)
    assert edit(tiny_model("llama"), tiny_data(), method, **stated).digest == first.digest


def test_one_lost_answer_does_not_stand_for_all_of_them() -> None:
    model, npo = tiny_model("llama"), find("npo")
    rows = tuple(Row(ids, len(ids) - 1) for ids in _forget_ids())
    term = Term(npo, {"beta": 0.1}, "forget", 1.0, Rows("forget", rows))
    with torch.no_grad():
        probabilities = [model.module(torch.tensor([r.ids])).logits[0, -2].softmax(-1)[r.ids[-1]] for r in rows]
    parameters = list(model.module.parameters())
    watch = Watch(model, [term], Settings(), parameters, parameters)
    watch.look(0)
    assert watch.looks[0].forget == pytest.approx(float(torch.stack(probabilities).mean()), rel=1e-5)
    assert watch.looks[0].forget > 3 * math.exp(float(torch.stack(probabilities).log().mean()))


def _forget_ids() -> list[tuple[int, ...]]:
    """Forget facts, and one with an answer that nothing would ever say."""
    model = tiny_model("llama")
    facts = tiny_data().forget[:3]
    found = [tuple(model.tokenizer(fact.prompt + fact.answer)["input_ids"]) for fact in facts]
    with torch.no_grad():
        worst = int(model.module(torch.tensor([found[0]])).logits[0, -2].argmin())
    return [*found, (*found[0][:-1], worst)]


def test_elm_keeps_every_set_that_it_is_told_to_keep() -> None:
    plain = made("elm", fluency_weight=0.0, retain="kl", lr=1e-2)
    both = made("elm", fluency_weight=0.0, retain="kl", lr=1e-2, retain_on=["retain", "general"], retain_weight=5.0)
    one = made("elm", fluency_weight=0.0, retain="kl", lr=1e-2, retain_weight=5.0)
    assert not torch.equal(weights(one), weights(plain))
    assert not torch.equal(weights(both), weights(one))


def test_elastic_weights_know_what_an_adapter_matters_for() -> None:
    plain = made("npo", adapter="lora", rank=4, retain="l2", retain_weight=0.0, steps=4)
    held = made("npo", adapter="lora", rank=4, retain="ewc", retain_weight=1e6, steps=4)
    start = weights(made("npo", steps=1, lr=1e-9))
    assert float((weights(held) - start).norm()) < 0.9 * float((weights(plain) - start).norm())


def test_a_term_on_weights_counts_once_however_many_sets_are_kept() -> None:
    one, two = (weights(made("npo", retain="l2", retain_weight=50.0, retain_on=sets))
                for sets in (["retain"], ["retain", "general"]))  # fmt: skip
    torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_every_setting_of_a_trained_editor_is_listed_with_its_type() -> None:
    for name in ("npo", "trained", "elm"):
        for setting, parameter in discover.method("edit", name).hyperparameters.items():
            assert isinstance(parameter.annotation, str) and "Union" not in parameter.annotation, setting


def test_a_localisation_without_layers_does_not_mean_everything() -> None:
    from repforget.records import Component, Localization, RandomBand

    where = Localization("test", (Component.parse("embed"),), (1.0,), RandomBand(1, 3, 1.0, 0.1, 0.2, "made up"))
    with pytest.raises(UsageError, match="names no layer"):
        edit(tiny_model("llama"), tiny_data(), "npo", where=where, steps=1)


def test_a_clamp_below_zero_is_refused() -> None:
    with pytest.raises(UsageError, match="clamp"):
        edit(tiny_model("llama"), tiny_data(), "npo", clamp=-1.0, steps=1)
