"""Requests in a row: the matrix, what came back, what it costs, whether the order matters."""

from __future__ import annotations

import dataclasses

import contract_tools
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import UsageError
from repforget.guarantee import unearned
from repforget.records import ItemScores
from repforget.requests._picture import kept, matrix
from repforget.requests.stability import Look, look, never_known, one_shot, order_spread, stability

NAMES = ("a", "b", "c")
PEOPLE, PER = 6, 4


def column(level: float, name: str, noise: float = 0.0, seed: int = 0) -> ItemScores:
    ids = [f"{name}{k}" for k in range(PEOPLE * PER)]
    values = level + noise * np.random.default_rng(seed).standard_normal(len(ids))
    return ItemScores.of(ids, [f"{name}-{k // PER}" for k in range(len(ids))], list(values))


def a_look(levels: tuple[float, ...], keep: float = 0.9, noise: float = 0.0, seed: int = 0) -> Look:
    rows = enumerate(zip(NAMES, levels, strict=True))
    known = {name: column(level, name, noise, seed + k) for k, (name, level) in rows}
    return Look(known, column(keep, "keep", noise, seed + 9))


FLOOR = a_look((0.1, 0.1, 0.1))
BEFORE = a_look((0.9, 0.9, 0.9))


def test_an_editor_that_does_nothing_leaves_everything_as_it_was() -> None:
    found = stability([BEFORE] * 4, FLOOR)
    np.testing.assert_allclose(found.left, 1.0)
    np.testing.assert_allclose(found.kept, 1.0)
    assert found.slope.point == pytest.approx(0.0, abs=1e-12) and found.area == pytest.approx(1.0)
    assert all(interval.point == 0.0 for interval in found.re_emerged)


def test_taking_out_what_nothing_else_holds_never_comes_back() -> None:
    states = [a_look(tuple(0.1 if k < j else 0.9 for k in range(3))) for j in range(4)]
    found = stability(states, FLOOR)
    np.testing.assert_allclose(found.left, [[1, 1, 1], [0, 1, 1], [0, 0, 1], [0, 0, 0]], atol=1e-12)
    assert found.area == pytest.approx(0.0, abs=1e-12) and found.before == pytest.approx(1.0)
    assert max(interval.high for interval in found.re_emerged) == pytest.approx(0.0, abs=1e-12)


def test_what_comes_back_and_what_it_costs_is_named() -> None:
    levels = [(0.9, 0.9, 0.9), (0.1, 0.7, 0.9), (0.3, 0.1, 0.9), (0.5, 0.1, 0.1)]
    states = [a_look(level, keep=0.9 - 0.09 * j, noise=0.01, seed=7 * j) for j, level in enumerate(levels)]
    found = stability(states, FLOOR)
    assert found.names[found.worst] == "a" and found.re_emerged[0].point == pytest.approx(0.5, abs=0.02)
    assert found.re_emerged[0].low > 0.4 and abs(found.re_emerged[2].point) < 1e-12  # the last is its own state
    assert found.slope.point == pytest.approx(-0.1, abs=0.005) and found.slope.high < 0.0
    assert found.kept[-1] == pytest.approx(0.7, abs=0.02) and found.before == pytest.approx(0.75, abs=0.02)
    text = " ".join(found.sentences())
    assert "'a'" in text and "+50" in text.replace("49.", "50") and unearned(text) == ()
    assert matrix(found).count("<rect") == 12 and "edit" in kept({"edit": found})


def test_the_matrix_needs_every_state_and_knowledge_to_lose() -> None:
    with pytest.raises(UsageError, match="3 states of 3 requests do not fit"):
        stability([BEFORE] * 3, FLOOR)
    with pytest.raises(UsageError, match="Request 'b' was known no better"):
        stability([a_look((0.9, 0.1, 0.9))] * 4, FLOOR)


def test_a_request_that_is_left_out_changes_nothing_for_the_others_but_its_state_counts() -> None:
    levels = [(0.9, 0.1, 0.9), (0.1, 0.1, 0.8), (0.3, 0.1, 0.7), (0.5, 0.1, 0.1)]
    states = [a_look(level, keep=0.9 - 0.09 * j, noise=0.01, seed=7 * j) for j, level in enumerate(levels)]
    unknown = never_known(BEFORE, FLOOR) | never_known(states[0], a_look((0.1, 0.2, 0.1)))
    assert [*unknown] == ["b"] and unknown["b"].startswith("B was known no better")

    def without(each: Look) -> Look:
        return Look({name: own for name, own in each.requests.items() if name != "b"}, each.keep)

    shifted = [Look({**each.requests, "b": column(0.9, "b")}, each.keep) for each in states]  # as if it had been known
    whole = stability(shifted, FLOOR)
    found = stability([without(each) for each in states], without(FLOOR), NAMES, unknown)
    np.testing.assert_allclose(found.left, whole.left[:, [0, 2]])
    assert found.re_emerged == (whole.re_emerged[0], whole.re_emerged[2]) and found.slope == whole.slope
    assert found.outcomes == {"a": "fail", "b": "inconclusive"} and found.before == pytest.approx(0.75, abs=0.02)
    assert [row[0] for row in found.rows()] == ["none", "a", "b", "c"] and unknown["b"] in found.sentences()
    last = stability([without(each) for each in states[:3]], without(FLOOR), ("a", "c"))
    assert last.outcomes == {"a": whole.outcomes["a"]}
    with pytest.raises(UsageError, match="do not fit"):
        stability([without(each) for each in states], without(FLOOR), NAMES)


def test_one_by_one_against_all_at_once() -> None:
    clean, half = a_look((0.1, 0.1, 0.1)), a_look((0.5, 0.5, 0.5), keep=0.72)
    alike = one_shot(clean, clean, BEFORE, FLOOR)
    assert alike.same.side == "within" and alike.knowledge.point == 0.0 == alike.keep.point
    worse = one_shot(half, clean, BEFORE, FLOOR)
    assert worse.same.side == "above" and worse.knowledge.point == pytest.approx(0.5)
    assert worse.keep.point == pytest.approx(-0.2)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.floats(0.1, 0.9), min_size=2, max_size=5))
def test_the_spread_over_orders_is_that_of_the_shares(levels: list[float]) -> None:
    spread = order_spread([a_look((level, 0.1, 0.9)) for level in levels], BEFORE, FLOOR)
    np.testing.assert_allclose(spread, [np.std((np.array(levels) - 0.1) / 0.8, ddof=1), 0.0, 0.0], atol=1e-12)
    with pytest.raises(UsageError, match="at least two orders"):
        order_spread([BEFORE], BEFORE, FLOOR)


def test_a_model_is_asked_and_an_item_without_alternative_is_refused() -> None:
    model, knowledge = contract_tools.tiny_model("llama"), contract_tools.tiny_knowledge()
    asked = look(model, knowledge, {"all": knowledge.forget[:8]}, knowledge.retain[:8])
    assert asked.requests["all"].mean > 0.3 and len(asked.keep.values) == 8  # it has learned them
    lonely = dataclasses.replace(knowledge.forget[0], relation="alone")
    with pytest.raises(UsageError, match=f"Item '{lonely.id}' has no other answer"):
        look(model, knowledge, {"all": [lonely]}, knowledge.retain[:8])
