"""Many tests, equivalence and power: error rates and power measured on simulated runs."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats as scipy_stats

from repforget.errors import UsageError
from repforget.verify import statistics as st

CLUSTERS, PER, ICC = 20, 8, 0.15
NAMES = tuple(f"c{k:02d}" for k in range(CLUSTERS) for _ in range(PER))


def clustered(generator: np.random.Generator, runs: int, clusters: int = CLUSTERS) -> np.ndarray:
    shared = generator.standard_normal((runs, clusters, 1)) * math.sqrt(ICC)
    own = generator.standard_normal((runs, clusters, PER)) * math.sqrt(1 - ICC)
    return (shared + own).reshape(runs, -1)


def at_most(level: float, runs: int) -> float:
    """The 99.9 % upper limit of a proportion ``level`` in ``runs`` simulations."""
    return float(scipy_stats.binom.ppf(0.999, runs, level)) / runs


def test_holm_keeps_the_family_wise_error() -> None:
    """Twenty correlated nulls beside five true effects: one false rejection in at most 5 % of the runs."""
    generator = np.random.default_rng(0)
    z = 0.6 * generator.standard_normal((2000, 1)) + 0.8 * generator.standard_normal((2000, 25))
    z[:, 20:] += 4.0
    rejected = np.array([st.holm(list(row)) for row in scipy_stats.norm.sf(z)])
    assert rejected[:, :20].any(axis=1).mean() <= at_most(0.05, 2000)
    assert rejected[:, 20:].mean() > 0.75


@settings(deadline=None)
@given(some.lists(some.floats(0, 1), max_size=12))
def test_corrections_agree_with_their_definitions(p: list[float]) -> None:
    plain = tuple(value <= 0.1 for value in p)
    found = st.benjamini_hochberg(p)
    adjusted = scipy_stats.false_discovery_control(p) if p else []
    assert found == tuple(bool(value <= 0.1) for value in adjusted)
    assert all(f >= h for f, h in zip(found, st.holm(p, 0.1), strict=True))
    assert all(one >= f for one, f in zip(plain, found, strict=True))


def test_false_discoveries_stay_at_their_rate() -> None:
    generator = np.random.default_rng(1)
    z = generator.standard_normal((1000, 40))
    z[:, 30:] += 3.0
    listed = np.array([st.benjamini_hochberg(list(row)) for row in scipy_stats.norm.sf(z)])
    share = listed[:, :30].sum(axis=1) / np.maximum(listed.sum(axis=1), 1)
    assert share.mean() <= 0.1 * 30 / 40 + 0.01


def candidates(generator: np.random.Generator, n: int) -> np.ndarray:
    """Clustered and mutually correlated values of ``n`` candidates: [items, n]."""
    return 0.7 * clustered(generator, 1)[0][:, None] + 0.7 * clustered(generator, n).T


def test_the_best_of_many_candidates_keeps_its_level() -> None:
    """The best of 15 paraphrases of a model that knows nothing, against the best of 15 of a twin."""
    generator, runs, naive = np.random.default_rng(2), 400, []
    found = []
    for run in range(runs):
        target, floor = candidates(generator, 15), candidates(generator, 15)
        found.append(st.max_t(target, floor, NAMES, permutations=199, seed=run))
        one = target[:, found[-1].best] - floor[:, 0]
        naive.append(st.mean_interval(one, NAMES, draws=200).low > 0.0)
    assert np.mean([f.p <= 0.05 for f in found]) <= at_most(0.05, runs)
    assert np.mean([f.p <= 0.5 for f in found]) > 0.4
    assert np.mean([min(f.adjusted) <= 0.05 for f in found]) <= at_most(0.05, runs)
    assert np.mean(naive) > 0.15, "selecting on one side only is what max-T is there for"


def test_the_best_candidate_is_found_where_there_is_one() -> None:
    generator = np.random.default_rng(3)
    target, floor = candidates(generator, 8), candidates(generator, 8)
    target[:, 5] += 1.0
    found = st.max_t(target, floor, NAMES)
    assert found.best == int(np.argmin(found.adjusted)) == 5
    assert found.difference == pytest.approx(target.mean(0).max() - floor.mean(0).max())
    assert max(found.p, found.adjusted[5]) < 0.01
    assert min(np.delete(found.adjusted, 5)) > 0.05
    same = st.max_t(target, target, NAMES)
    assert (same.p, same.difference) == (1.0, 0.0)
    with pytest.raises(UsageError, match="candidates"):
        st.max_t(target, floor[:, :3], NAMES)


def test_five_looks_spend_at_most_the_level() -> None:
    """A claim at the edge of its margin, looked at five times on growing data: passing once is an error."""
    generator, runs = np.random.default_rng(4), 4000
    data = clustered(generator, runs, clusters=50)
    passed, naive = np.zeros(runs, bool), np.zeros(runs, bool)
    for look in range(1, 6):
        clusters = 10 * look
        totals = data[:, : clusters * PER].reshape(runs, clusters, PER).mean(axis=2)
        t = -totals.mean(axis=1) / (totals.std(axis=1, ddof=1) / math.sqrt(clusters))
        p = scipy_stats.t.sf(t, clusters - 1)
        passed |= p <= st.spend_alpha(look)
        naive |= p <= 0.05
    assert sum(st.spend_alpha(look) for look in range(1, 60)) <= 0.05
    assert passed.mean() <= at_most(0.05, runs)
    assert naive.mean() > 0.1
    with pytest.raises(UsageError, match="from 1"):
        st.spend_alpha(0)


@pytest.mark.parametrize(("truth", "side"), [(0.0, "within"), (0.2, "above"), (-0.2, "below"), (0.05, "not told")])
def test_equivalence_names_the_side(truth: float, side: str) -> None:
    share = st.mean_interval(truth + 0.02 * clustered(np.random.default_rng(5), 1)[0], NAMES)
    found = st.equivalence(share, 0.05)
    assert found.side == side
    assert (found.p < 0.05) == (side == "within")


def test_equivalence_keeps_its_level_at_both_edges_and_has_its_power() -> None:
    """As many items as items_needed asks for both sides show a true zero in about 80 % of the runs."""
    generator, margin, runs = np.random.default_rng(6), 0.05, 400
    sd, effect = 0.25, 1 + (PER - 1) * ICC
    pilot = st.Interval(0.0, 0.0, 0.0, sd * math.sqrt(effect / 800), 800, 100)
    needed = st.items_needed(pilot, margin, both_sides=True)
    assert needed is not None
    clusters = round(needed / PER)
    names = [f"c{k:03d}" for k in range(clusters) for _ in range(PER)]

    def within(truth: float) -> float:
        data = truth + sd * clustered(generator, runs, clusters)
        found = [st.equivalence(st.mean_interval(row, names), margin).side for row in data]
        return float(np.mean([side == "within" for side in found]))

    assert 0.80 - 0.06 <= within(0.0) <= 0.80 + 0.06
    assert max(within(margin), within(-margin)) <= at_most(0.05, runs)


def test_the_margin_is_never_below_the_noise_of_the_twins() -> None:
    assert st.noise_floor([0.3]) == 0.0
    assert st.noise_floor([0.30, 0.34]) == pytest.approx(0.04)
    assert st.noise_floor([0.30, 0.34, 0.33, 0.31, 0.32]) == pytest.approx(0.04), "of few pairs the largest"
    many = scipy_stats.norm.ppf((np.arange(200) + 0.5) / 200)
    assert st.noise_floor(list(many)) == pytest.approx(1.96 * math.sqrt(2), abs=0.05)
    assert st.margin_above_noise(0.05, 0.04, 0.5) == pytest.approx(0.08)
    assert st.margin_above_noise(0.05, 0.004, 0.5) == 0.05


def test_intra_cluster_correlation_and_design_effect() -> None:
    generator = np.random.default_rng(8)
    names = [f"c{k}" for k in range(1000) for _ in range(PER)]
    values = clustered(generator, 1, 1000)[0]
    assert st.icc(values, names) == pytest.approx(ICC, abs=0.03)
    assert st.design_effect(values, names) == pytest.approx(1 + (PER - 1) * ICC, abs=0.2)
    assert st.icc(np.array([1.0, 2, 3, 5, 4, 4]), list("aabbcc")) == pytest.approx(2 / 3)
    # Squares between 22 5/6 on 2, within 8 on 3 degrees of freedom; m0 = (6 - 14 / 6) / 2.
    assert st.icc(np.array([1.0, 2, 4, 5, 5, 8]), list("abbccc")) == pytest.approx(8.75 / (137 / 12 + 20 / 9))
    assert st.icc(np.repeat([1.0, 2.0, 3.0], 4), list("aaaabbbbcccc")) == 1.0
    assert math.isnan(st.icc(np.arange(3.0), list("abc")))
    assert st.design_effect(np.arange(3.0), list("abc")) == 1.0


@pytest.mark.parametrize(("run", "correlation", "effect"), [
    ("ft_epoch5_lr1e-05_llama2-7b_retain90_wd0.01", 0.13697474581788463, 3.6025201705398078),
    ("ft_epoch5_lr2e-05_phi_retain90_wd0.01", 0.16265550087578226, 4.090454516639863),
])  # fmt: skip
def test_questions_about_one_author_are_alike(run: str, correlation: float, effect: float) -> None:
    """Losses that TOFU's authors logged, 20 questions each about 15 authors: they count for a third or a quarter."""
    losses = np.load(Path(__file__).parent / "data" / "tofu_logs.npz")[f"{run}/forget/avg_gt_loss"].astype(np.float64)
    authors = [f"a{k // 20:02d}" for k in range(len(losses))]
    assert st.icc(losses, authors) == pytest.approx(correlation, abs=1e-8)
    assert st.design_effect(losses, authors) == pytest.approx(effect, abs=1e-5)


def test_a_sample_size_before_and_after_measuring_agree() -> None:
    values = 0.3 * clustered(np.random.default_rng(9), 1, 300)[0]
    names = [f"c{k:03d}" for k in range(300) for _ in range(PER)]
    planned = st.sample_size(float(values.std(ddof=1)), 0.05, st.design_effect(values, names))
    needed = st.items_needed(st.mean_interval(values, names), 0.05)
    assert needed == pytest.approx(planned, rel=0.02)
    assert st.items_needed(st.mean_interval(values, names), 0.0) is None
    assert st.sample_size(1.0, 0.1) == math.ceil((1.6449 + 0.8416) ** 2 * 100)
    assert st.sample_size(1.0, 0.1, alpha=0.025) > st.sample_size(1.0, 0.1)
