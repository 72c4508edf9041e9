"""The experiment on private training: its page shows what was stored, and no attack refutes what was promised."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from repforget.errors import UsageError
from repforget.organism.world import make_world, word_list
from repforget.private.audit import audit, chance, refuted
from repforget.verify.statistics.proportions import clopper_pearson

FOLDER = Path(__file__).parents[1] / "experiments" / "private-training"


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("private_training_measure", FOLDER / "measure.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def result() -> dict[str, Any]:
    return dict(json.loads((FOLDER / "result.json").read_text()))


def test_the_page_shows_the_stored_result(measure: ModuleType, result: dict[str, Any]) -> None:
    page = (FOLDER / "README.md").read_text()
    assert measure.table(result) in page
    assert measure.population.table(result["population"]) in page
    assert result["people"] * measure.DELTA < 1
    private = {name: arm for name, arm in result["arms"].items() if "epsilon" in arm}
    assert private and all(arm["epsilon"] <= measure.ARMS[name] for name, arm in private.items())


def test_no_attack_refutes_a_promise_and_the_same_attack_would_have_refuted_it_of_plain_training(
    measure: ModuleType, result: dict[str, Any]
) -> None:
    part, promised = result["population"], measure.population.ARMS
    arms = part["arms"]
    assert part["in"] * part["delta"] < 0.1 and part["seed"] == measure.population.SEED
    budgets = {name: budget for name, budget in promised.items() if budget is not None}
    for name, budget in budgets.items():
        assert arms[name]["audit"]["epsilon"] <= arms[name]["epsilon"] <= budget
    assert arms["plain"]["audit"]["epsilon"] > min(budgets.values())
    for body in (body for body in arms.values() if "audit" in body):
        own = body["audit"]
        assert refuted(part["people"], own["guesses"], own["correct"], part["delta"]) == pytest.approx(own["epsilon"])


def test_the_rule_is_in_the_towns_and_nothing_tells_who_is_in(measure: ModuleType) -> None:
    folk, within = measure.population.population(600, 5)
    again, _ = measure.population.population(600, 5)
    assert folk == again and len({p.name for p in folk}) == 600 and 240 < within.sum() < 360
    by_stem = {(next(s for s in measure.population.words.STEMS if s in p.town), p.rule) for p in folk}
    assert len(by_stem) == 12 == len({rule for _, rule in by_stem})
    assert 0.85 < np.mean([p.rule == p.plays for p in folk]) < 0.97
    assert not {p.name for p in folk} & {p.name for p in make_world(0).people}
    known = set(word_list())
    records = measure.population.records_about(folk)
    assert {word for r in records for word in (r.prompt + r.answer).split()} <= known
    assert [r.cluster for r in records[:3]] == ["u00000", "u00000", "u00001"]


def test_the_audit_gives_the_published_bounds() -> None:
    """Steinke, Nasr and Jagielski 2023, arXiv 2305.08846: appendix D and section 7 (which cuts the last digit)."""
    assert refuted(1000, 100, 75, 1e-4) == pytest.approx(0.673, abs=5e-4)
    assert refuted(100_000, 1510, 1439, 1e-5) == pytest.approx(2.675, abs=1e-3)


@pytest.mark.parametrize(("guesses", "correct"), [(40, 33), (500, 260), (800, 800), (30, 0)])
def test_without_delta_the_audit_is_the_exact_limit_of_a_share(guesses: int, correct: int) -> None:
    low = clopper_pearson(correct, guesses, alpha=0.05).low
    expected = max(0.0, math.log(low / (1 - low))) if low > 0 else 0.0
    assert refuted(1000, guesses, correct, 0.0) == pytest.approx(expected, abs=1e-5)
    assert refuted(1000, guesses, correct, 1e-4) <= expected + 1e-5
    assert chance(1000, guesses, correct, 1.0, 1e-4) <= chance(1000, guesses, correct, 1.0, 1e-3)


def test_the_audit_calls_the_highest_in_and_the_lowest_out() -> None:
    coins = np.arange(100) % 2 == 0
    found = audit(np.where(coins, 1.0, -1.0), coins, 0.0, share=0.5)
    assert (found.guesses, found.correct) == (50, 50) and found.epsilon == found.ceiling > 2
    turned = audit(np.where(coins, -1.0, 1.0), coins, 0.0, share=0.5)
    assert turned.correct == 0 and turned.epsilon == 0 and turned.ceiling == found.ceiling
    with pytest.raises(UsageError, match="finite score"):
        audit(np.full(100, np.nan), coins, 0.0)
    with pytest.raises(UsageError, match="two units"):
        audit(np.zeros(100), coins, 0.0, share=0.001)
