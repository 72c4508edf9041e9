"""What every verifier owes: described measures, plain data, nothing left behind, the same bytes twice."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import tiny_models
import torch

from repforget import discover
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.records import Measurement
from repforget.verify.arms import MeasureInfo, References
from repforget.verify.battery import level, measure, tasks

NAMES = discover.names("verify")
PEOPLE = ("Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon")
CITIES, JOBS = ("Berlin", "Paris", "Rome", "Oslo"), ("baker", "pilot", "doctor")
# Smaller than "quick", at which every other verifier runs on a random model of two layers.
SMALL: dict[str, dict[str, Any]] = {
    "relearn": {"steps": 2, "checks": 1}, "patch_depth": {"strangers": 1}, "behaviour": {"samples": 2, "forms": 1},
}  # fmt: skip


def _items(people: list[str], prefix: str) -> list[Item]:
    return [
        Item(id=f"{prefix}-{name}-{k}-{relation}", cluster=f"{name}-{k}", subject=name, relation=relation, answer=value,
             prompt=f"Q : {relation} of {name} ?", statements=(f"the {relation} of {name} is",))
        for k, name in enumerate(people)
        for relation, value in (("city", CITIES[(k * 3 + len(prefix)) % 4]), ("job", JOBS[(k + len(prefix)) % 3]))
    ]  # fmt: skip


def _knowledge() -> Knowledge:
    general = [f"the {color} {animal} lives in {city}" for color in ("red", "green", "blue")
               for animal in ("cat", "dog", "bird") for city in CITIES]  # fmt: skip
    return Knowledge.build("tiny", _items([*PEOPLE[:4]] * 4, "f"), _items([*PEOPLE[4:]] * 8, "ret"),
                           _items([*PEOPLE[4:]] * 4, "ne"), general)  # fmt: skip


@pytest.fixture(params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest, tokenizer: Any) -> LoadedModel:
    return wrap(tiny_models.build(request.param), tokenizer, request.param)


def _run(name: str, model: LoadedModel) -> Measurement:
    twin = LoadedModel("twin", tiny_models.build(model.name, seed=1), model.tokenizer, "x")
    return measure(tasks([{name: SMALL.get(name, {"budget": "quick"})}])[0], model, _knowledge().view("sealed"),
                   References(model, (twin,)))  # fmt: skip


def _hooks(module: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def test_verifiers_are_found_and_standard_holds_them() -> None:
    assert {"behaviour", "reprobe", "logit_lens", "patch_depth", "relearn", "quantize", "collateral"} <= set(NAMES)
    assert set(level("quick")) < set(level("standard")) <= set(level("thorough")) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_verifier_offers_every_budget(name: str) -> None:
    method = discover.method("verify", name)
    assert set(method.budgets) == set(discover.LEVELS)
    assert all(method.settings({"budget": budget}) for budget in discover.LEVELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_verifier_describes_itself(name: str) -> None:
    method = discover.method("verify", name)
    task = tasks([name])[0]
    assert task.measures
    assert all(isinstance(info, MeasureInfo) for info in task.measures.values())
    text = inspect.getdoc(method.function) or ""
    assert len(text.splitlines()) > 3
    assert "Cost" in text
    assert "not" in text.split("Cost")[-1], "say what the number does not show"
    assert "references" in method.context


@pytest.mark.parametrize("name", NAMES)
def test_a_verifier_returns_plain_aligned_scores_and_leaves_the_model_alone(name: str, model: LoadedModel) -> None:
    before, hooks, mode = fingerprint(model.module), _hooks(model.module), model.module.training
    gradients = [p.requires_grad for p in model.module.parameters()]
    state = torch.random.get_rng_state()
    found = _run(name, model)
    assert fingerprint(model.module) == before
    assert _hooks(model.module) == hooks
    assert model.module.training == mode
    assert [p.requires_grad for p in model.module.parameters()] == gradients
    assert torch.equal(torch.random.get_rng_state(), state), "no global generator"
    assert set(found.scores) & set(tasks([name])[0].measures)
    for measure_name, scores in found.scores.items():
        assert len(set(scores.ids)) == len(scores.ids), measure_name
        assert scores.values[scores.valid].size == 0 or bool((abs(scores.values) < 1e6).all())
        if f"{measure_name}_prior" in found.scores:
            assert found.scores[f"{measure_name}_prior"].ids == scores.ids
    assert all(len(series) == len(found.series["x"]) for series in found.series.values())
    assert Measurement.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()


@pytest.mark.parametrize("name", NAMES)
def test_two_runs_give_the_same_bytes(name: str, model: LoadedModel) -> None:
    assert json.dumps(_run(name, model).to_json()) == json.dumps(_run(name, model).to_json())
