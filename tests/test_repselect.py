"""RepSelect: how far it goes, what it leaves alone, and what collapsing does for what must stay."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.train._budget import Line, divergence, examples, longest, norm, probability
from repforget.edit.train._data import fact_rows
from repforget.edit.train.repselect import gradient
from repforget.errors import KnowledgeError, NumericalError, RepforgetError, SiteError, UsageError
from repforget.models.load import LoadedModel, fingerprint
from repforget.models.weights import find, get_weight
from repforget.records import Component, Localization, RandomBand
from repforget.training import finetune

DATA = people().for_editor()
_KNOWN: dict[str, LoadedModel] = {}


def taught(architecture: str = "llama") -> LoadedModel:
    """A tiny model that has learned everybody's facts."""
    if architecture not in _KNOWN:
        model = tiny(architecture)
        rows = fact_rows(model, (*DATA.forget, *DATA.retain), "both")[0]
        for parameter in model.module.parameters():
            parameter.requires_grad_(False)
        finetune(model.module, examples(rows), steps=120, lr=1e-2, seed=0, batch_size=96)
        _KNOWN[architecture] = dataclasses.replace(model, fingerprint=fingerprint(model.module))
    return _KNOWN[architecture]


@settings(max_examples=40, deadline=None)
@given(st.floats(0.5, 3.0), st.floats(-3.0, 3.0), st.floats(-4.0, 0.0))
def test_the_longest_step_nearly_uses_the_budget(power: float, size: float, budget: float) -> None:
    factor, limit = 10.0**size, 10.0**budget
    step, cost = longest(lambda t: factor * t**power, limit, 1e-3, 30)
    assert cost == pytest.approx(factor * step**power)
    assert 0.9 * limit <= cost <= limit


def test_the_search_ends_early_or_says_that_nothing_fits() -> None:
    tried: list[float] = []

    def cost(step: float) -> float:
        tried.append(step)
        return step**2

    assert longest(cost, 1e9, 1.0, 20, enough=lambda step: step > 10)[0] < 100
    assert len(tried) < 20
    assert longest(lambda t: math.inf if t > 0.02 else 0.0, 1.0, 1.0, 25)[0] == pytest.approx(0.02, rel=0.3)
    with pytest.raises(NumericalError, match="larger budget"):
        longest(lambda t: math.inf, 1.0, 1.0, 5)


def test_divergence_is_zero_here_positive_elsewhere_and_the_line_restores_every_bit() -> None:
    model = taught()
    ref = find(model.module, "mlp_out", 1)
    line = Line(model, [ref.name], [torch.ones(32, 48)])
    measure, known = divergence(model, DATA, 0), probability(model, DATA.forget, "forget", 0)
    assert measure() == pytest.approx(0.0, abs=1e-7)
    start, before = get_weight(model.module, ref), known()
    assert line.at(0.1, measure) > 0.01
    assert line.at(0.1, known) != before
    with line.moved(0.1):
        torch.testing.assert_close(get_weight(model.module, ref), start + 0.1)
    assert fingerprint(model.module) == model.fingerprint
    assert norm([torch.ones(3), torch.ones(1)]) == 2.0
    (operation,) = line.operations(0.1)
    torch.testing.assert_close(operation.delta, torch.full((32, 48), 0.1))
    with pytest.raises(KnowledgeError, match="neither"):
        divergence(model, dataclasses.replace(DATA, retain=(), general=()), 0)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_gradient_is_that_of_the_mean_over_all_tokens(architecture: str) -> None:
    model = taught(architecture)
    texts = examples(fact_rows(model, DATA.forget[:7], "forget")[0])
    own = [model.module.get_parameter(find(model.module, "mlp_up", 0).name)]
    whole, parts = gradient(model, own, texts, 7)[0], gradient(model, own, texts, 3)[0]
    torch.testing.assert_close(whole, parts, atol=1e-7, rtol=1e-4)
    assert float(whole.norm()) > 0
    assert own[0].grad is None and not own[0].requires_grad


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_forget_answers_fall_within_the_budget(architecture: str) -> None:
    model = taught(architecture)
    known, damage = probability(model, DATA.forget, "forget", 0), divergence(model, DATA, 0)
    before = known()
    edit = run_editor(model, DATA, "repselect", max_disruption=0.05, steps=12, elicit_steps=2)
    assert fingerprint(model.module) == model.fingerprint
    assert {name.split(".")[-2] for name in edit.touched} <= {"gate_proj", "up_proj", "down_proj", "c_fc", "c_proj"}
    with edit.attach(model):
        assert damage() <= 0.05 * 1.001
        assert known() < before - 0.02
    assert "divergence" in edit.manifest.notes[0]


def test_the_search_ends_once_answers_are_improbable_enough() -> None:
    model = taught()
    known = probability(model, DATA.forget, "forget", 0)
    reached = []
    for stop in (0.0, 0.97):
        with run_editor(model, DATA, "repselect", max_disruption=5.0, stop_probability=stop).attach(model):
            reached.append(known())
    assert reached[0] < 0.5 * reached[1] <= 0.5 * 0.97


def test_collapsing_forgets_more_for_the_same_damage() -> None:
    model = taught()
    known = probability(model, DATA.forget, "forget", 0)

    def after(collapsed: int) -> float:
        edit = run_editor(model, DATA, "repselect", collapsed=collapsed, max_disruption=0.02, steps=12)
        with edit.attach(model):
            return known()

    assert after(4) < after(0)


def test_without_collapse_it_is_ascent_and_layers_follow_the_localisation() -> None:
    model = taught()
    texts = examples(fact_rows(model, DATA.forget, "forget")[0])
    where = Localization("test", (Component.parse("mlp_out.1"),), (1.0,), RandomBand(1, 5, 1, 0, 0.5, "e"))
    edit = run_editor(model, DATA, "repselect", where=where, collapsed=0, elicit_steps=0, steps=4)
    assert all(".layers.1." in name for name in edit.touched)
    for operation in edit.weight_operations:
        own = [model.module.get_parameter(operation.weight)]  # type: ignore[union-attr]
        way = gradient(model, own, texts, 32)[0]
        delta = operation.delta  # type: ignore[union-attr]
        assert float(torch.nn.functional.cosine_similarity(delta.flatten(), way.flatten(), dim=0)) > 0.999


def test_stacks_of_experts_can_be_collapsed() -> None:
    edit = run_editor(tiny("mixtral"), DATA, "repselect", steps=3, elicit_steps=0)
    assert any("experts" in name for name in edit.touched)


def test_what_it_refuses() -> None:
    model = taught()
    for setting, error in (({"layers": [9]}, SiteError), ({"layers": []}, SiteError), ({"rank": 0}, UsageError),
                           ({"collapsed": -1}, UsageError), ({"max_disruption": 0.0}, UsageError)):  # fmt: skip
        with pytest.raises(error):
            run_editor(model, DATA, "repselect", **setting)  # type: ignore[arg-type]
    with pytest.raises(RepforgetError, match="no retain facts"):
        run_editor(model, dataclasses.replace(DATA, retain=()), "repselect", basis="retain")
    with pytest.raises(NumericalError, match="larger budget"):
        run_editor(model, DATA, "repselect", max_disruption=1e-15, steps=1)
