"""What every locator owes: sites that exist, a random band, the same ranking twice, an untouched model."""

from __future__ import annotations

import inspect
import json
from functools import cache
from typing import Any

import planted
import pytest

import repforget as rf
from repforget import discover
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.models.sites import site_map
from repforget.records import Localization

NAMES = discover.names("locate")
# Budgets for a model of four layers: applied to whichever of these settings a locator has.
SMALL: dict[str, Any] = {"items": 24, "draws": 20, "sae_steps": 60}
OF_METHOD: dict[str, dict[str, Any]] = {
    "eap_ig": {"steps": 3},
    "mdl_probe": {"items": 100, "nodes": ("resid_post",)},
    "probe_sweep": {"items": 100},
}


def _items(people: list[str], kind: str) -> list[Item]:
    return [
        Item(id=f"{kind}-{name}-{relation}", cluster=name, subject=name, relation=relation, answer=value,
             prompt=planted.TEMPLATES[0].format(subject=name, relation=relation),
             statements=tuple(t.format(subject=name, relation=relation) for t in planted.TEMPLATES[1:]))
        for name in people for relation, value in planted.facts()[name].items()
    ]  # fmt: skip


@cache
def _models() -> tuple[LoadedModel, LoadedModel]:
    return wrap(*planted.planted(1), "planted-1"), wrap(*planted.planted(None), "planted-base")


def _located(name: str) -> Localization:
    people = planted.planted_people(), planted.background_people()[:16]
    knowledge = Knowledge.build("planted", _items(people[0], "f"), _items(people[1], "r"))
    model, twin = _models()
    known = discover.method("locate", name).hyperparameters
    settings = {key: value for key, value in SMALL.items() if key in known} | OF_METHOD.get(name, {})
    found: Localization = rf.locate(model, knowledge, name, twins=(twin,), seed=3, **settings)
    return found


@cache
def _first(name: str) -> tuple[Localization, tuple[str, int], tuple[str, int]]:
    """What a locator finds, and the model before and after it."""
    before = _state()
    found = _located(name)
    return found, before, _state()


def _state() -> tuple[str, int]:
    module = _models()[0].module
    return fingerprint(module), len(list(module.modules()))


@pytest.mark.parametrize("name", NAMES)
def test_a_locator_ranks_existing_sites_beside_a_random_band_and_leaves_the_model_alone(name: str) -> None:
    model, _ = _models()
    found, before, after = _first(name)
    assert found.method == name and len(found.components) > 1
    assert list(found.scores) == sorted(found.scores, reverse=True)
    places = site_map(model.module)
    for component in found.components:
        places.locate(component.site)
    assert found.band.draws >= 20 or found.band.k >= 1
    assert found.band.low <= found.band.high and found.band.effect
    assert all(value >= 0 for value in found.cost.values()) and found.cost.get("forwards", 0) > 0
    assert after == before
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.module.modules())
    assert Localization.from_json(json.loads(json.dumps(found.to_json()))).components == found.components


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_ranking(name: str) -> None:
    assert _first(name)[0].to_json() == _located(name).to_json()


@pytest.mark.parametrize("name", NAMES)
def test_the_docstring_says_what_it_costs_and_what_it_does_not_show(name: str) -> None:
    text = inspect.getdoc(discover.method("locate", name).function) or ""
    assert "Cost" in text and "not show" in text
