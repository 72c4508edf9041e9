"""Epsilons against published values, closed forms and each other."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from repforget import gaussian
from repforget.errors import MissingExtraError, UsageError
from repforget.guarantee import unearned
from repforget.private import accounting as a
from repforget.private.statement import group_report, group_rows, statement

GOLDEN = [  # noise, rate, steps, delta, rdp, prv
    (1.1, 256 / 60000, 14062, 1e-5, 2.597, 2.392),
    (1.0, 0.01, 1000, 1e-5, 2.101, 1.838),
    (4.0, 1.0, 1, 1e-5, 1.013, 0.936),
]


def epsilon(kind: str, noise: float, rate: float, steps: int, delta: float = 1e-5) -> float:
    return a.spent(a.accountant_of(kind, [(noise, rate, steps)]), delta)


@pytest.mark.parametrize("noise,rate,steps,delta,rdp,prv", GOLDEN)
def test_golden_epsilons(noise: float, rate: float, steps: int, delta: float, rdp: float, prv: float) -> None:
    assert epsilon("rdp", noise, rate, steps, delta) == pytest.approx(rdp, abs=6e-4)
    assert epsilon("prv", noise, rate, steps, delta) == pytest.approx(prv, abs=6e-4)
    assert prv <= rdp


def test_the_exact_gaussian_is_below_both_accountants() -> None:
    exact = gaussian.gaussian_epsilon(1 / 4, 1e-5)
    assert exact == pytest.approx(0.92634, abs=1e-5)
    assert exact <= epsilon("prv", 4.0, 1.0, 1) <= epsilon("rdp", 4.0, 1.0, 1)
    composed = gaussian.gaussian_epsilon(math.sqrt(10) / 10, 1e-5)
    assert composed == pytest.approx(1.1994, abs=1e-4)
    assert epsilon("prv", 10.0, 1.0, 10) == pytest.approx(1.2095, abs=6e-4)
    assert composed <= epsilon("prv", 10.0, 1.0, 10)


@given(st.floats(0.0, 4.0), st.floats(0.1, 4.0))
@settings(max_examples=25, deadline=None)
def test_hockey_stick_is_the_integral_of_what_exceeds(e: float, r: float) -> None:
    def excess(x: float) -> float:
        return max(0.0, float(stats.norm.pdf(x, r) - math.exp(e) * stats.norm.pdf(x)))

    start = r / 2 + e / r  # where the densities cross
    integral, _ = integrate.quad(excess, start, start + 14, epsabs=1e-12)
    assert gaussian.hockey_stick(e, r) == pytest.approx(integral, abs=1e-9)


@given(st.floats(0.05, 10.0), st.floats(1e-8, 0.1))
@settings(max_examples=25, deadline=None)
def test_distance_and_epsilon_are_inverse(e: float, delta: float) -> None:
    assert gaussian.gaussian_epsilon(gaussian.gaussian_distance(e, delta), delta) == pytest.approx(e, rel=1e-6)


@pytest.mark.parametrize("kind", a.ACCOUNTANTS)
def test_epsilon_grows_with_steps_and_ever_more_slowly(kind: str) -> None:
    found = [epsilon(kind, 1.0, 0.05, steps) for steps in (100, 200, 300, 400, 500)]
    rises = [b - c for b, c in zip(found[1:], found, strict=False)]
    assert all(rise > 0 for rise in rises)
    assert all(later < earlier for later, earlier in zip(rises[1:], rises, strict=False))


@pytest.mark.parametrize("kind", a.ACCOUNTANTS)
def test_the_noise_keeps_the_budget_and_hardly_more(kind: str) -> None:
    noise = a.noise_multiplier(2.0, 1e-3, 0.25, 40, kind)
    assert epsilon(kind, noise, 0.25, 40, 1e-3) <= 2.0 < epsilon(kind, noise * 0.97, 0.25, 40, 1e-3)


def test_steps_counted_one_by_one_are_steps_counted_together() -> None:
    one = a.accountant_of("rdp")
    for _ in range(7):
        one.step(noise_multiplier=1.3, sample_rate=0.2)
    assert a.spent(one, 1e-3) == epsilon("rdp", 1.3, 0.2, 7, 1e-3)
    assert a.spent(a.accountant_of("rdp"), 1e-3) == 0.0


def test_group_privacy_and_where_it_ends() -> None:
    assert a.group(0.5, 1e-5, 1) == pytest.approx((0.5, 1e-5))
    assert a.group(0.5, 1e-5, 5) == pytest.approx((2.5, 3.7e-4), rel=0.01)
    assert a.group(0.5, 1e-5, 20)[1] == 1.0
    most = a.reach(0.5, 1e-5)
    assert a.group(0.5, 1e-5, most)[1] < 1.0 == a.group(0.5, 1e-5, most + 1)[1]
    assert [row["vacuous"] for row in group_rows(0.5, 1e-5, 99, (1, most, most + 1))] == [False, False, True]


def test_the_end_of_a_group_is_found_however_far_it_is() -> None:
    most = a.reach(1e-9, 1e-12)
    assert a.group(1e-9, 1e-12, most)[1] < 1.0 == a.group(1e-9, 1e-12, most + 1)[1] and most > 10**9


@pytest.mark.parametrize("kind", a.ACCOUNTANTS)
def test_epsilon_is_never_below_zero(kind: str) -> None:
    assert epsilon(kind, 6.0, 0.02, 30, 0.1) == 0.0  # the accountants say -0.1, which would shrink with the group


def test_noise_that_does_not_keep_the_budget_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a.noise_multiplier.cache_clear()
    monkeypatch.setattr("opacus.accountants.utils.get_noise_multiplier", lambda **given: 1.0)
    with pytest.raises(UsageError, match="No noise keeps"):
        a.noise_multiplier(0.5, 1e-5, 1.0, 7, "rdp")


def test_no_more_units_are_named_than_there_are() -> None:
    assert "delta 0.04," in group_report(8.0, 0.04, "cluster", 9)
    assert group_rows(0.1, 1e-6, 5)[-1]["units"] == 5
    assert a.reach(0.1, 1e-6) > 64
    for asked in (None, 80):
        said = group_report(0.1, 1e-6, "cluster", 64, asked)
        assert "A forget set of 64 clusters" in said and "all 64 are within it" in said
    assert "beyond 18 clusters" in group_report(0.5, 1e-5, "cluster", 64)


def test_the_report_names_the_unit_and_says_nothing_unearned() -> None:
    facts: dict[str, Any] = {"accountant": "prv", "noise": 1.0, "clip": 1.0, "rate": 0.1, "steps": 3, "secret": "kept"}
    held = statement(8.0, 0.01, "cluster", 64, facts)
    near, far = group_report(0.5, 1e-5, "cluster", 64, 5), group_report(8.0, 0.01, "record", 64, 16)
    assert "5 clusters is covered at epsilon 2.5, delta 0.00037" in near
    assert "16 records is not covered" in far and "vacuous" in far
    for text in (near, far, *(text for _, text in held.lines())):
        assert not unearned(text, [held])
    assert near.endswith("(unit: cluster).") and far.endswith("(unit: record).")


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: a.accountant_of("gdp"), "understate"),
        (lambda: a.noise_multiplier(0.0, 1e-5, 0.1, 10, "rdp"), "no budget"),
        (lambda: a.noise_multiplier(1e6, 1e-5, 0.1, 10, "rdp"), "no budget"),
        (lambda: a.noise_multiplier(1e-5, 1e-300, 1.0, 10**6, "rdp"), "No noise keeps"),
    ],
)
def test_refusals(call: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        call()


def test_without_opacus_one_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus.accountants", None)
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(MissingExtraError, match=r"repforget\[dp\]"):
        a.accountant_of("rdp")
