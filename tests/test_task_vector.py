"""Task vectors and their unanimous mean: exact arithmetic, and what subtracting them does."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from test_repselect import taught

from repforget.artifact import BiasDelta, DenseDelta, LowRankDelta
from repforget.edit._dispatch import edit as run_editor
from repforget.edit.arithmetic._vectors import Tuning, dense, negated, tuned
from repforget.edit.arithmetic.neg_merge import unanimous
from repforget.edit.train._budget import examples, probability
from repforget.edit.train._data import fact_rows
from repforget.errors import KnowledgeError, NoEffectError, UsageError
from repforget.models.load import copy_of, fingerprint
from repforget.records import Component, Localization, RandomBand
from repforget.training import finetune

DATA = people().for_editor()
HOW = Tuning(5, 1e-3, 16, "none", 4, 100)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.module(input_ids=torch.arange(4, 16)[None]).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_strength_of_minus_one_is_the_fine_tuned_model(architecture: str) -> None:
    model = taught(architecture)
    edit = run_editor(model, DATA, "task_vector", strength=-1.0, steps=5, lr=1e-3, batch_size=16, adapter="none",
                      max_facts=100)  # fmt: skip
    other = copy_of(model)
    finetune(other.module, examples(fact_rows(other, DATA.forget, "forget")[0]), steps=5, lr=1e-3, seed=0,
             batch_size=16)  # fmt: skip
    with edit.attach(model):
        for (name, mine), theirs in zip(model.module.named_parameters(), other.module.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0, msg=name)
    assert fingerprint(model.module) == model.fingerprint


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_strength_scales_the_change_and_zero_is_refused(adapter: str) -> None:
    model = taught()
    settings_ = {"steps": 3, "adapter": adapter, "lr": 1e-3}
    one = run_editor(model, DATA, "task_vector", strength=1.0, **settings_)
    half = run_editor(model, DATA, "task_vector", strength=0.5, **settings_)
    with one.scaled(0.5).attach(model):
        expected = logits(model)
    with half.attach(model):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-4)
    assert {type(op) for op in one.operations} == {LowRankDelta if adapter == "lora" else DenseDelta}
    with pytest.raises(NoEffectError):
        run_editor(model, DATA, "task_vector", strength=0.0, **settings_)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_low_rank_changes_are_negated_as_products(architecture: str) -> None:
    model = taught(architecture)
    changes = tuned(model, DATA, dataclasses.replace(HOW, adapter="lora"), None, 0)
    assert fingerprint(model.module) == model.fingerprint
    for change in changes:
        name, delta = dense(model, change)
        assert delta.shape == model.module.get_parameter(name).shape
        assert torch.equal(dense(model, negated(change, 2.0))[1], -2.0 * delta)
    assert any(float(dense(model, change)[1].norm()) > 0 for change in changes)


@pytest.mark.parametrize("name", ["task_vector", "neg_merge"])
def test_the_automatic_strength_keeps_what_it_says(name: str) -> None:
    model = taught()
    known = {side: probability(model, getattr(DATA, side), side, 0) for side in ("forget", "retain")}
    before = {side: measure() for side, measure in known.items()}
    edit = run_editor(model, DATA, name, keep=0.9, steps=20, lr=1e-3)
    with edit.attach(model):
        after = {side: measure() for side, measure in known.items()}
    assert after["retain"] >= 0.9 * before["retain"] - 1e-6
    assert after["forget"] / before["forget"] < after["retain"] / before["retain"]
    assert edit.manifest.settings["strength"] > 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 999), st.integers(1, 5))
def test_only_entries_of_one_sign_are_merged(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    changes = [torch.randn(6, 5, generator=generator) for _ in range(n)]
    merged = unanimous(changes)
    for place in torch.cartesian_prod(torch.arange(6), torch.arange(5)):
        entries = torch.stack([c[tuple(place)] for c in changes])
        same = bool((entries > 0).all() or (entries < 0).all())
        assert float(merged[tuple(place)]) == pytest.approx(float(entries.mean()) if same else 0.0)
    assert torch.equal(unanimous([changes[0]] * n), torch.stack([changes[0]] * n).mean(0))
    assert not unanimous([changes[0], -changes[0]]).any()
    assert int((unanimous([*changes, torch.randn(6, 5, generator=generator)]) != 0).sum()) <= int((merged != 0).sum())


def test_one_tuning_is_a_task_vector() -> None:
    model = taught()
    settings_ = {"steps": 3, "lr": 1e-3, "strength": 1.0}
    one = run_editor(model, DATA, "neg_merge", tunings=1, **settings_)
    vector = run_editor(model, DATA, "task_vector", **settings_)
    for mine, theirs in zip(one.operations, vector.operations, strict=True):
        assert torch.equal(mine.delta, theirs.delta)  # type: ignore[union-attr]


def test_it_follows_the_localisation_and_refuses_what_it_cannot_do() -> None:
    model = taught()
    where = Localization("test", (Component.parse("mlp_out.1"),), (1.0,), RandomBand(1, 5, 1, 0, 0.5, "e"))
    edit = run_editor(model, DATA, "task_vector", where=where, strength=1.0, steps=2)
    assert all(".layers.1." in name for name in edit.touched)
    for setting in ({"steps": 0}, {"keep": 1.5}, {"rank": 0}):
        with pytest.raises(UsageError):
            run_editor(model, DATA, "task_vector", **{"steps": 2, "strength": 1.0, **setting})
    with pytest.raises(UsageError):
        run_editor(model, DATA, "neg_merge", tunings=0)
    with pytest.raises(KnowledgeError, match="nothing to tune"):
        run_editor(model, dataclasses.replace(DATA, forget=()), "task_vector")
    with pytest.raises(KnowledgeError, match="give a number"):
        run_editor(model, dataclasses.replace(DATA, retain=()), "task_vector", steps=1)
    with pytest.raises(UsageError, match="no fine-tuned weight"):
        negated(BiasDelta("x", torch.ones(1)), 1.0)
