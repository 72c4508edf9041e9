"""Two samples: the exact KS test against published p-values and enumeration, and the paired permutation."""

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

# (n, h) -> p as published with the TOFU leaderboard (locuslab/tofu, MIT).
PUBLISHED = {
    (300, 119): 1.834066410994743e-21, (300, 104): 2.1942743021891237e-16, (200, 82): 1.99799391269964e-15,
    (200, 75): 6.540866008411473e-13, (40, 17): 0.0012708143485281624, (40, 16): 0.003018184077228396,
    (40, 14): 0.01430154804770646, (200, 22): 0.17793352788293415, (200, 43): 0.00018395764501293307,
}  # fmt: skip


@pytest.mark.parametrize(("n", "h"), PUBLISHED)
def test_published_p_values(n: int, h: int) -> None:
    assert st.ks_p_value(h, n, n) == pytest.approx(PUBLISHED[n, h], rel=1e-12)


def test_extreme_p_values_do_not_round_to_zero() -> None:
    assert st.ks_p_value(200, 200, 200) == pytest.approx(1.9426434495222363e-119, rel=1e-12)
    assert st.ks_p_value(400, 400, 400) == pytest.approx(1.0635896769518568e-239, rel=1e-12)


def test_critical_counts() -> None:
    found = {n: (st.ks_critical(n, 0.05), st.ks_critical(n, 0.01)) for n in (40, 100, 200, 300, 400)}
    assert found == {40: (13, 15), 100: (20, 23), 200: (28, 33), 300: (34, 40), 400: (39, 47)}


@settings(max_examples=40, deadline=None)
@given(some.integers(1, 6), some.integers(1, 6), some.integers(0, 1000))
def test_the_p_value_is_the_share_of_orders_that_differ_as_much(n: int, m: int, seed: int) -> None:
    values = np.random.default_rng(seed).permutation(n + m).astype(float)
    found = st.ks_exact(values[:n], values[n:], unpaired=True)
    reached = total = 0
    for chosen in combinations(range(n + m), n):
        rest = np.delete(np.arange(n + m, dtype=float), chosen)
        total += 1
        reached += st.ks_exact(np.array(chosen, float), rest, unpaired=True).h >= found.h
    assert found.p == pytest.approx(reached / total, rel=1e-12)


@settings(max_examples=30, deadline=None)
@given(some.integers(2, 60), some.integers(2, 60), some.integers(0, 1000))
def test_scipy_agrees(n: int, m: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = generator.standard_normal(n), generator.standard_normal(m) + 0.5
    found, other = st.ks_exact(x, y, unpaired=True), scipy_stats.ks_2samp(x, y, method="exact")
    assert math.isclose(found.D, other.statistic, abs_tol=1e-12)
    assert found.p == pytest.approx(other.pvalue, rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(some.lists(some.integers(-6, 6), min_size=1), some.lists(some.integers(-6, 6), min_size=1))
def test_only_the_order_counts_and_the_sides_are_alike(a: list[int], b: list[int]) -> None:
    x, y = np.array(a, float), np.array(b, float)
    found = st.ks_exact(x, y, unpaired=True)
    assert found == st.ks_exact(np.exp(x), np.exp(y), unpaired=True)
    turned = st.ks_exact(y, x, unpaired=True)
    assert (found.h, found.p) == (turned.h, turned.p)


def test_other_questions_are_refused() -> None:
    """Rows 200-299 of one table against rows 0-99 of another: a p-value of nothing."""
    x, y = np.arange(4.0), np.arange(4.0) + 0.5
    ids = ["a", "b", "c", "d"]
    assert st.ks_exact(x, y, ids_x=ids, ids_y=ids[::-1]).h == 1
    for others in (["a", "b", "c", "e"], [], ["a", "b", "c"]):
        with pytest.raises(UsageError, match="same questions"):
            st.ks_exact(x, y, ids_x=ids, ids_y=others)
    with pytest.raises(UsageError, match="same items in the same order"):
        st.swap_permutation(x, y, ids_x=ids, ids_y=ids[::-1])
    with pytest.raises(UsageError, match="finite"):
        st.ks_exact([math.nan], [1.0], unpaired=True)


def related(generator: np.random.Generator, n: int, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Two models that answer the same questions alike up to noise."""
    common = 3 * generator.standard_normal(n)
    return common + 0.5 * generator.standard_normal(n) + shift, common + 0.5 * generator.standard_normal(n)


@pytest.mark.parametrize("statistic", ["ks", "mean"])
@pytest.mark.parametrize("clustered", [False, True])
def test_the_permutation_p_is_uniform_under_the_null(statistic: str, clustered: bool) -> None:
    generator, n = np.random.default_rng(0), 80
    ids = [str(k) for k in range(n)]
    clusters = [str(k // 4) for k in range(n)] if clustered else None
    shared = np.repeat(generator.standard_normal((300, n // 4)), 4, axis=1) if clustered else np.zeros((300, n))
    found = []
    for run in range(300):
        x, y = related(generator, n)
        swap = st.swap_permutation(x + shared[run] / 2, y, ids_x=ids, ids_y=ids, clusters=clusters,
                                   statistic=statistic, permutations=199, seed=run)  # type: ignore[arg-type]  # fmt: skip
        found.append(swap.p)
    p = np.array(found)
    for level in (0.05, 0.1, 0.25):  # h is an integer, so that a p-value may be larger than uniform, never smaller
        assert (p <= level).mean() <= scipy_stats.binom.ppf(0.999, 300, level) / 300
    assert (p <= 0.25).mean() > 0.13


def test_swapping_items_of_a_correlated_cluster_would_find_too_much() -> None:
    """The precondition of swapping whole clusters: differences within one are not independent."""
    generator, n = np.random.default_rng(1), 80
    ids = [str(k) for k in range(n)]
    p = []
    for run in range(200):
        x, y = related(generator, n)
        x = x + np.repeat(generator.standard_normal(n // 8), 8)
        p.append(st.swap_permutation(x, y, ids_x=ids, ids_y=ids, statistic="mean", permutations=199, seed=run).p)
    assert np.mean(np.array(p) <= 0.05) > 0.15


def test_pairing_finds_what_independence_hides() -> None:
    x, y = related(np.random.default_rng(2), 300, shift=0.4)
    ids = [str(k) for k in range(300)]
    assert st.ks_exact(x, y, ids_x=ids, ids_y=ids).p > 0.2
    for statistic in ("ks", "mean"):
        swap = st.swap_permutation(x, y, ids_x=ids, ids_y=ids, statistic=statistic)  # type: ignore[arg-type]
        assert swap.p <= 0.001
        expected = st.ks_exact(x, y, ids_x=ids, ids_y=ids).h if statistic == "ks" else np.mean(x - y)
        assert swap.statistic == pytest.approx(expected)
    assert swap == st.swap_permutation(x, y, ids_x=ids, ids_y=ids, statistic="mean")


@settings(max_examples=30, deadline=None)
@given(some.lists(some.tuples(some.integers(-3, 3), some.integers(-3, 3)), min_size=1, max_size=20))
def test_ties_are_counted_together(pairs: list[tuple[int, int]]) -> None:
    x, y = np.array(pairs, float).T
    ids = [str(k) for k in range(len(pairs))]
    swap = st.swap_permutation(x, y, ids_x=ids, ids_y=ids, permutations=9)
    assert swap.statistic == st.ks_exact(x, y, ids_x=ids, ids_y=ids).h


def test_no_p_value_is_below_what_the_permutations_can_tell() -> None:
    x, ids = np.arange(30.0), [str(k) for k in range(30)]
    assert st.swap_permutation(x + 100, x, ids_x=ids, ids_y=ids, permutations=99).p == 1 / 100


def test_the_same_model_twice_is_never_told_apart() -> None:
    x = np.arange(30.0)
    ids = [str(k) for k in range(30)]
    assert st.swap_permutation(x, x, ids_x=ids, ids_y=ids).p == 1.0
    assert st.ks_exact(x, x, ids_x=ids, ids_y=ids).p == 1.0
