"""The arithmetic of the judge: coverage, type-I error and power, measured on simulated runs."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats as scipy_stats

from repforget.verify import statistics as st

CLUSTERS, PER_CLUSTER, ICC = 20, 8, 0.15
NAMES = tuple(f"c{k:02d}" for k in range(CLUSTERS) for _ in range(PER_CLUSTER))


def clustered(
    generator: np.random.Generator, runs: int, clusters: int = CLUSTERS, size: int = PER_CLUSTER
) -> np.ndarray:
    """Item values [runs, clusters * size] with variance 1 and intra-cluster correlation ``ICC``."""
    shared = generator.standard_normal((runs, clusters, 1)) * math.sqrt(ICC)
    own = generator.standard_normal((runs, clusters, size)) * math.sqrt(1 - ICC)
    return (shared + own).reshape(runs, -1)


@pytest.mark.parametrize("clusters", [6, 16, 40])
def test_two_sided_coverage_is_near_95_percent(clusters: int) -> None:
    generator = np.random.default_rng(clusters)
    names = [f"c{k:02d}" for k in range(clusters) for _ in range(PER_CLUSTER)]
    values = clustered(generator, 500, clusters) + 0.3
    found = [st.mean_interval(row, names, alpha=0.025) for row in values]
    covered = np.mean([i.low <= 0.3 <= i.high for i in found])
    assert 0.93 <= covered <= 0.97


def test_an_interval_that_ignores_clusters_would_undercover() -> None:
    """The precondition of the test above: with this correlation, items are not the unit."""
    values = clustered(np.random.default_rng(1), 500)
    items = [str(k) for k in range(values.shape[1])]
    found = [st.mean_interval(row, items, alpha=0.025, draws=500) for row in values]
    assert np.mean([i.low <= 0.0 <= i.high for i in found]) < 0.91


def test_ratio_coverage_with_a_noisy_denominator() -> None:
    generator = np.random.default_rng(3)
    share, covered = 0.2, []
    for below, noise in zip(clustered(generator, 500), clustered(generator, 500), strict=True):
        gap = 0.8 + 0.3 * below
        found = st.ratio_interval(share * gap + 0.2 * noise, gap, NAMES, alpha=0.025)
        covered.append(found.low <= share <= found.high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_intersection_union_keeps_its_level() -> None:
    """Three attacks, one of which leaves exactly the margin: all three may pass at most 5 % of the time."""
    generator, margin = np.random.default_rng(4), 0.05
    passed = []
    for run in range(500):
        shared = clustered(generator, 1)[0]
        uppers = []
        for truth in (0.0, 0.0, margin):
            values = truth + 0.1 * (0.7 * shared + 0.7 * clustered(generator, 1)[0])
            uppers.append(st.mean_interval(values, NAMES, seed=run % 7).high)
        passed.append(max(uppers) < margin)
    # 500 runs: the 99.9 % upper limit of a 5 % proportion.
    assert np.mean(passed) <= scipy_stats.binom.ppf(0.999, 500, 0.05) / 500


def test_power_is_as_predicted() -> None:
    """With the number of items that items_needed names, a true zero passes about 80 % of the time."""
    generator, margin = np.random.default_rng(5), 0.05
    pilot = clustered(generator, 1, clusters=400)[0] * 0.25
    pilot_names = [f"c{k:03d}" for k in range(400) for _ in range(PER_CLUSTER)]
    needed = st.items_needed(st.mean_interval(pilot, pilot_names), margin)
    assert needed is not None
    clusters = round(needed / PER_CLUSTER)
    names = [f"c{k:03d}" for k in range(clusters) for _ in range(PER_CLUSTER)]
    runs = clustered(generator, 400, clusters=clusters) * 0.25
    power = np.mean([st.mean_interval(row, names, draws=1000).high < margin for row in runs])
    assert 0.72 <= power <= 0.88


@settings(deadline=None)
@given(some.lists(some.floats(-5, 5), min_size=1, max_size=12), some.lists(some.floats(-5, 5), min_size=1, max_size=12))
def test_auc_is_the_mann_whitney_probability(a: list[float], b: list[float]) -> None:
    x, y = np.array(a), np.array(b)
    slow = np.mean([(p > q) + 0.5 * (p == q) for p in a for q in b])
    assert st.auc(x, y) == pytest.approx(slow)
    assert st.auc(x, y) + st.auc(y, x) == pytest.approx(1.0)


@settings(max_examples=25, deadline=None)
@given(some.integers(2, 14), some.integers(0, 5))
def test_intervals_do_not_depend_on_item_order_and_repeat_exactly(clusters: int, seed: int) -> None:
    generator = np.random.default_rng([clusters, seed])
    names = np.array([f"c{k}" for k in generator.integers(0, clusters, 40)])
    values, order = generator.standard_normal(40), generator.permutation(40)
    first = st.mean_interval(values, list(names), seed=seed)
    assert first == st.mean_interval(values, list(names), seed=seed)
    shuffled = st.mean_interval(values[order], list(names[order]), seed=seed)
    assert (shuffled.low, shuffled.high) == (pytest.approx(first.low), pytest.approx(first.high))
    assert first.low <= first.point <= first.high


def test_few_clusters_use_students_t() -> None:
    values = np.array([0.1, 0.2, 0.3, 0.4])
    found = st.mean_interval(values, ["a", "b", "c", "d"])
    expected = scipy_stats.t.interval(0.9, 3, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (found.low, found.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))


def test_one_cluster_or_no_gap_says_nothing() -> None:
    assert st.mean_interval(np.ones(5), ["only"] * 5).high == math.inf
    nothing = st.ratio_interval(np.ones(4), np.zeros(4), list("abcd"))
    assert math.isnan(nothing.point)
    assert (nothing.low, nothing.high) == (-math.inf, math.inf)
    assert st.ratio_interval(np.zeros(0), np.zeros(0), []).high == math.inf


def test_a_vanishing_denominator_widens_and_never_narrows() -> None:
    """Draws in which the gap changes its sign carry no information about the share."""
    generator = np.random.default_rng(6)
    gap = 0.02 + generator.standard_normal(80)
    gap += 0.02 - gap.mean()
    names = [f"c{k % 20}" for k in range(80)]
    found = st.ratio_interval(np.full(80, 0.01), gap, names)
    assert found.high == math.inf
    assert found.low == -math.inf


def test_holm_rejects_in_steps() -> None:
    assert st.holm([0.01, 0.04, 0.03]) == (True, False, False)
    assert st.holm([0.01, 0.02, 0.03]) == (True, True, True)
    assert st.holm([]) == ()


def test_p_value_agrees_with_the_limit() -> None:
    values = clustered(np.random.default_rng(8), 1)[0]
    found = st.mean_interval(values, NAMES)
    assert found.p_above(found.low) == pytest.approx(0.05, abs=0.02)
    assert found.p_below(found.high) == pytest.approx(0.05, abs=0.02)
    assert found.p_above(0.1) + found.p_below(0.1) == pytest.approx(1.0)
    assert st.mean_interval(np.ones(160), NAMES).p_above(0.5) == 0.0
    assert st.mean_interval(np.ones(160), NAMES).p_above(1.0) == 1.0


def test_nothing_here_knows_a_model() -> None:
    code = "import sys, repforget.verify.statistics; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
