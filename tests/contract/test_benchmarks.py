"""Every benchmark found in its room: settings that resolve, a plan for the same settings, a docstring with facts."""

from __future__ import annotations

import inspect
import re

import pytest

from repforget import discover
from repforget.bench._records import mean_metric
from repforget.records import ItemScores

NAMES = discover.names("bench")


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_states_what_it_is(name: str) -> None:
    method = discover.method("bench", name)
    text = inspect.getdoc(method.function) or ""
    cost = re.search(r"\bCost\b", text)
    assert cost, "the docstring says what it costs"
    assert re.search(r"\bnot\b", text[cost.end() :]), "and then what its numbers do not show"
    assert re.search(r"\d{4}\.\d{5}", text), "and where it comes from"


@pytest.mark.parametrize("name", NAMES)
def test_settings_and_plan_agree(name: str) -> None:
    method = discover.method("bench", name)
    settings = method.settings({})  # every annotation resolves, every default is valid
    work = method.constant("work")
    bound = inspect.signature(work).bind(None, **settings)
    bound.apply_defaults()
    parameters = inspect.signature(work).parameters
    for setting, value in settings.items():
        if setting in parameters:
            assert parameters[setting].default == value, f"{name}: work() has another default of {setting}"
    late = method.constant("AGGREGATION", ())
    assert set(late) <= set(settings)


def test_a_mean_without_spread_has_the_limits_of_no_event() -> None:
    names = [f"i{k}" for k in range(40)]
    clusters = [f"c{k // 2}" for k in range(40)]
    none, every = (mean_metric("m", ItemScores.of(names, clusters, [value] * 40)) for value in (0.0, 1.0))
    assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / 20)))
    assert (every.low, every.high) == (pytest.approx(0.025 ** (1 / 20)), 1.0)
