"""Shares and leaks: exact limits against tables, enumeration and simulation."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats as scipy_stats

from repforget.errors import UsageError
from repforget.verify import statistics as st


@pytest.mark.parametrize(("n", "alpha", "upper"), [
    (20, 0.05, 0.139), (40, 0.05, 0.072), (100, 0.05, 0.0295), (300, 0.05, 0.0099), (400, 0.05, 0.0075),
    (1024, 0.05, 0.0029), (400, 0.01, 0.0115), (1024, 0.01, 0.0045)])  # fmt: skip
def test_zero_events(n: int, alpha: float, upper: float) -> None:
    last_place = 10.0 ** (2 - len(str(upper)))
    assert st.clopper_pearson(0, n, alpha=alpha).high == pytest.approx(upper, abs=0.6 * last_place)
    assert st.zero_event_limit(n, alpha) == pytest.approx(st.clopper_pearson(0, n, alpha=alpha).high, rel=1e-9)
    assert st.clopper_pearson(0, n).low == 0.0


@settings(max_examples=50, deadline=None)
@given(some.integers(1, 80), some.data())
def test_limits_agree_with_scipy_and_mirror(n: int, data: some.DataObject) -> None:
    k = data.draw(some.integers(0, n))
    test = scipy_stats.binomtest(k, n)
    for ours, method in ((st.clopper_pearson, "exact"), (st.wilson, "wilson")):
        found, other = ours(k, n, alpha=0.025), test.proportion_ci(0.95, method=method)
        assert (found.low, found.high) == (pytest.approx(other.low, abs=1e-12), pytest.approx(other.high, abs=1e-12))
        turned = ours(n - k, n, alpha=0.025)
        assert (turned.low, turned.high) == (pytest.approx(1 - found.high), pytest.approx(1 - found.low))


@pytest.mark.parametrize(("n", "share"), [(15, 0.03), (40, 0.2), (100, 0.5)])
def test_exact_limits_never_err_too_often(n: int, share: float) -> None:
    """Summed over all outcomes, not simulated."""
    mass = scipy_stats.binom.pmf(np.arange(n + 1), n, share)
    exact = np.array([st.clopper_pearson(k, n).high < share for k in range(n + 1)])
    assert mass @ exact <= 0.05


def test_no_trial_says_nothing_and_nonsense_is_refused() -> None:
    assert (st.wilson(0, 0).low, st.clopper_pearson(0, 0).high) == (0.0, 1.0)
    assert st.zero_event_limit(0) == 1.0
    with pytest.raises(UsageError, match="no count"):
        st.wilson(5, 4)


def test_below_chance_is_an_alarm() -> None:
    low, middle, high = (st.binomial_test_chance(k, 100, 0.25) for k in (8, 25, 60))
    assert (low.side, middle.side, high.side) == ("below", "not told apart", "above")
    assert low.p == pytest.approx(scipy_stats.binomtest(8, 100, 0.25).pvalue)
    assert st.binomial_test_chance(0, 0, 0.25).side == "not told apart"
    with pytest.raises(UsageError, match="guesser"):
        st.binomial_test_chance(3, 4, 1.0)


@settings(max_examples=40, deadline=None)
@given(some.lists(some.floats(0, 1), min_size=1, max_size=9), some.data())
def test_the_best_of_k_is_that_of_all_choices(values: list[float], data: some.DataObject) -> None:
    k = data.draw(some.integers(1, len(values)))
    slow = np.mean([max(chosen) for chosen in combinations(values, k)])
    assert st.leak_at_k(values, k) == pytest.approx(slow, abs=1e-12)


@settings(deadline=None)
@given(some.integers(1, 60), some.data())
def test_leaks_are_scores_of_zero_and_one(n: int, data: some.DataObject) -> None:
    leaks, k = data.draw(some.integers(0, n)), data.draw(some.integers(1, n))
    share = 1 - math.comb(n - leaks, k) / math.comb(n, k)
    assert st.leak_share(leaks, n, k) == pytest.approx(share, abs=1e-11)
    assert st.leak_at_k([1.0] * leaks + [0.0] * (n - leaks), k) == pytest.approx(share, abs=1e-11)


def test_many_samples_stay_finite_and_items_are_kept_apart() -> None:
    assert st.leak_share([0, 1, 1024], 1024, 64) == pytest.approx([0.0, 64 / 1024, 1.0])
    rows = np.array([[0.0, 0.0, 1.0], [0.5, 0.5, 0.5]])
    assert st.leak_at_k(rows, 2) == pytest.approx([2 / 3, 0.5])
    with pytest.raises(UsageError, match="best of 4"):
        st.leak_at_k(rows, 4)
    with pytest.raises(UsageError, match="12"):
        st.leak_share(12, 10, 1)


def test_bounds_on_a_prompt_that_never_leaked() -> None:
    nothing = np.zeros(128)
    assert st.anderson_mean_bound(nothing, alpha=0.01) == pytest.approx(0.13412, abs=5e-6)
    assert st.tail_bound(nothing, 0.0, alpha=0.01) == pytest.approx(0.13412, abs=5e-6)
    assert st.clopper_pearson(0, 1024, alpha=0.01).high == pytest.approx(0.004487, abs=5e-7)


def test_bounds_hold_and_move_towards_the_truth() -> None:
    generator = np.random.default_rng(0)
    for n in (30, 300):
        runs = generator.beta(0.3, 2.0, size=(500, n))
        means = np.array([st.anderson_mean_bound(row) for row in runs])
        tails = np.array([st.tail_bound(row, 0.5) for row in runs])
        assert (means < 0.3 / 2.3).mean() <= 0.05
        assert (tails < scipy_stats.beta.sf(0.5, 0.3, 2.0)).mean() <= 0.05
    assert st.anderson_mean_bound(generator.beta(0.3, 2.0, size=100_000)) == pytest.approx(0.3 / 2.3, abs=0.01)


@pytest.mark.parametrize("wrong", [[], [[0.0]], [1.5]])
def test_a_bound_of_something_else_is_refused(wrong: list[float]) -> None:
    with pytest.raises(UsageError):
        st.anderson_mean_bound(wrong)
