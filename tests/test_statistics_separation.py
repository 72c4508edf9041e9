"""Telling two groups apart, and any statistic of clustered items: oracles, coverage, edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import special
from scipy import stats as scipy_stats
from sklearn.metrics import roc_curve

from repforget.verify import statistics as st

RUNS, PER, ICC = 500, 5, 0.15


def names(prefix: str, clusters: int) -> list[str]:
    return [f"{prefix}{k:02d}" for k in range(clusters) for _ in range(PER)]


def scores(generator: np.random.Generator, clusters: int, shift: float) -> np.ndarray:
    shared = generator.standard_normal((RUNS, clusters, 1)) * math.sqrt(ICC)
    own = generator.standard_normal((RUNS, clusters, PER)) * math.sqrt(1 - ICC)
    return (shared + own).reshape(RUNS, -1) + shift


@pytest.mark.parametrize(("clusters", "shift"), [(5, 0.0), (20, 0.0), (20, 1.2)])
def test_the_limits_of_the_auc_cover(clusters: int, shift: float) -> None:
    """Two independent groups; with five clusters each side the limits are Student's t."""
    generator = np.random.default_rng(clusters)
    truth = scipy_stats.norm.cdf(shift / math.sqrt(2))
    high, low = scores(generator, clusters, shift), scores(generator, clusters, 0.0)
    sides = names("h", clusters), names("l", clusters)
    found = [st.auc_interval(a, b, *sides, alpha=0.025, draws=300) for a, b in zip(high, low, strict=True)]
    covered = np.mean([i.low <= truth <= i.high for i in found])
    assert np.mean([i.se**2 for i in found]) == pytest.approx(np.var([i.point for i in found]), rel=0.15)
    assert 0.93 <= covered <= (0.97 if clusters >= st.FEW_CLUSTERS else 1.0)


def test_shared_clusters_are_drawn_together() -> None:
    """The same authors on two models: what they have in common is no noise in the difference."""
    generator, clusters = np.random.default_rng(0), 20
    common = np.repeat(generator.standard_normal(clusters) * 3, PER)
    high, low = (common + 0.1 * generator.standard_normal(clusters * PER) + shift for shift in (0.05, 0.0))
    together = st.auc_interval(high, low, names("a", clusters), names("a", clusters))
    apart = st.auc_interval(high, low, names("h", clusters), names("l", clusters))
    assert together.n_clusters == clusters
    assert apart.n_clusters == 2 * clusters
    assert together.se < apart.se / 3


def test_ties_count_half_in_every_draw() -> None:
    generator, clusters = np.random.default_rng(1), names("a", 20)
    high, low = (np.rint(generator.random(20 * PER) * 2 + shift) for shift in (0.3, 0.0))
    fast = st.auc_interval(high, low, clusters, clusters)
    slow = st.bootstrap(lambda rows: st.auc(rows[:, 0], rows[:, 1]), np.stack([high, low], axis=1), clusters)
    assert fast.point == slow.point
    assert fast.se == pytest.approx(slow.se * math.sqrt(20 / 19), rel=0.06)


def test_few_clusters_are_as_sure_as_the_fewer() -> None:
    generator = np.random.default_rng(2)
    found = st.auc_interval(generator.random(20) + 0.3, generator.random(200), names("h", 4), names("l", 40))
    reach = special.logit(found.high) - special.logit(found.point)
    assert reach == pytest.approx(scipy_stats.t.isf(0.05, 3) * found.se / (found.point * (1 - found.point)))


def test_draws_without_one_side_say_nothing() -> None:
    """All negatives lie in one of twelve shared clusters, which a third of the draws lack."""
    high, clusters = np.arange(60.0), names("a", 12)
    found = st.auc_interval(high, high[:PER] + 20, clusters, ["a00"] * (PER - 1) + ["a01"])
    assert (found.low, found.high) == (0.0, 1.0)


def test_perfect_separation_is_not_certain() -> None:
    found = st.auc_interval(np.arange(60.0) + 100, np.arange(60.0), names("h", 12), names("l", 12))
    assert (found.point, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(1 - st.zero_event_limit(12))


@settings(max_examples=40, deadline=None)
@given(some.lists(some.integers(0, 8), min_size=1, max_size=30),
       some.lists(some.integers(0, 8), min_size=20, max_size=40), some.sampled_from([0.05, 0.1, 0.5]))  # fmt: skip
def test_true_positives_are_those_of_the_roc_curve(high: list[int], low: list[int], fpr: float) -> None:
    x, y = np.array(high, float), np.array(low, float)
    false, true, _ = roc_curve([1] * len(x) + [0] * len(y), np.concatenate([x, y]), drop_intermediate=False)
    assert st.tpr_at_fpr(x, y, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


def test_a_rate_that_cannot_be_read_off_is_not_a_number_and_says_why() -> None:
    many = np.arange(1000.0)
    assert math.isnan(st.tpr_at_fpr(many, many[:99], 0.01))
    assert st.too_few_for_fpr(99, 0.01) == "a false positive rate of 1.00% needs at least 100 negatives, not 99"
    assert st.tpr_at_fpr(many, many[:100], 0.01) == 0.901
    assert st.too_few_for_fpr(1000, 0.001) is None
    assert math.isnan(st.tpr_interval(many, many[:999], ["a"] * 1000, ["b"] * 999, fpr=0.001).point)


def test_the_limits_of_the_true_positive_rate_cover() -> None:
    generator, clusters = np.random.default_rng(7), 40
    truth = scipy_stats.norm.sf(scipy_stats.norm.isf(0.1) - 1.0)
    high, low = scores(generator, clusters, 1.0)[:300], scores(generator, clusters, 0.0)[:300]
    sides = names("h", clusters), names("l", clusters)
    found = [st.tpr_interval(a, b, *sides, fpr=0.1, alpha=0.025, draws=200) for a, b in zip(high, low, strict=True)]
    assert 0.92 <= np.mean([i.low <= truth <= i.high for i in found]) <= 0.98


def test_the_general_bootstrap_agrees_with_the_fast_one() -> None:
    values = scores(np.random.default_rng(2), 30, 0.4)[0]
    slow = st.bootstrap(np.mean, values, names("a", 30), draws=4000)
    fast = st.mean_interval(values, names("a", 30), draws=4000)
    assert slow.point == pytest.approx(fast.point)
    assert (slow.low, slow.high) == (pytest.approx(fast.low, abs=0.02), pytest.approx(fast.high, abs=0.02))
    few, expected = st.bootstrap(np.mean, values[:30], names("a", 6)), st.mean_interval(values[:30], names("a", 6))
    assert (few.low, few.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_bca_is_that_of_scipy() -> None:
    values, alpha = np.random.default_rng(4).exponential(size=40) ** 1.5, 0.05
    level = scipy_stats.t.sf(scipy_stats.norm.isf(alpha) / math.sqrt(40 / 39), 39)  # widened to 5 %
    names_of = [str(k) for k in range(40)]
    ours = st.bootstrap(np.mean, values, names_of, alpha=level, draws=20_000, method="bca")
    plain = st.bootstrap(np.mean, values, names_of, alpha=level, draws=20_000)
    theirs = scipy_stats.bootstrap((values,), np.mean, confidence_level=1 - 2 * alpha, n_resamples=20_000,
                                   random_state=np.random.default_rng(0)).confidence_interval  # fmt: skip
    near = 0.04 * ours.se
    assert (ours.low, ours.high) == (pytest.approx(theirs.low, abs=near), pytest.approx(theirs.high, abs=near))
    assert min(ours.low - plain.low, ours.high - plain.high) > 2 * near


def test_strata_are_resampled_each_by_itself() -> None:
    """A constant within each of two sets has no spread, although the sets differ."""
    values = np.repeat([0.0, 1.0], 20)
    clusters = [str(k) for k in range(40)]
    assert st.bootstrap(np.mean, values, clusters, strata=["a"] * 20 + ["b"] * 20).se == 0.0
    assert st.bootstrap(np.mean, values, clusters).se > 0.05
    noisy = values + 0.1 * np.random.default_rng(0).standard_normal(40)
    few = st.bootstrap(np.mean, noisy, clusters, strata=["a"] * 3 + ["b"] * 37)
    assert few.high - few.point == pytest.approx(scipy_stats.t.isf(0.05, 2) * few.se), "as sure as the smallest set"


def test_an_undefined_statistic_widens() -> None:
    def share(rows: np.ndarray) -> float:
        return float(rows[:, 0].sum() / rows[:, 1].sum()) if rows[:, 1].sum() else math.nan

    rows = np.array([[1.0, 1.0]] + [[0.0, 0.0]] * 11)
    found = st.bootstrap(share, rows, [str(k) for k in range(12)])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert st.bootstrap(np.mean, np.ones(4), ["one"] * 4).high == math.inf
