"""Likelihood ratios, exposure and cuts of membership attacks, against simulations and plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import verify_models as fixture
from hypothesis import given
from hypothesis import strategies as some
from scipy import special, stats
from sklearn.metrics import roc_auc_score

from repforget.verify.privacy._likelihood import lira, logit, offline_lira, rmia, rmia_ratio
from repforget.verify.privacy.exposure import bits
from repforget.verify.privacy.extraction import beginning
from repforget.verify.privacy.lira import halves


def test_phi_is_the_logit_far_from_and_at_the_edges() -> None:
    p = np.array([1e-300, 1e-9, 0.2, 0.5, 0.999999])
    assert logit(np.log(p)) == pytest.approx(special.logit(p), rel=1e-9)
    assert np.isfinite(logit(np.array([0.0, -800.0]))).all()
    assert logit(np.array([-800.0]))[0] == pytest.approx(-800.0)


@pytest.mark.parametrize(("shadows", "loss"), [(64, 0.01), (8, 0.03)])
@pytest.mark.parametrize("shift", [2.0, 1.0], ids=["LiRA", "U-LiRA"])
def test_lira_on_gaussians_comes_near_the_best_possible(shadows: int, loss: float, shift: float) -> None:
    """Items differ in difficulty, so one threshold on phi is much worse; U-LiRA's "in" shadows have unlearned part."""
    generator = np.random.default_rng(0)
    n = 4000
    base = generator.normal(0, 3, n)
    member = np.tile([True, False], n // 2)
    inside = np.array([[s % 2 == 0] * n for s in range(shadows)])
    draw = base + generator.normal(size=(shadows, n)) + shift * inside
    phi = base + generator.normal(size=n) + shift * member
    best = stats.norm.cdf(shift / np.sqrt(2))
    reached = roc_auc_score(member, lira(phi, draw, inside))
    assert best - 2.5 * loss - 0.01 < reached < best + 0.02
    assert roc_auc_score(member, phi) < reached - 0.05
    assert roc_auc_score(member, offline_lira(phi, draw[1::2])) > best - 2.5 * loss - 0.02


def test_lira_without_a_side_has_no_value_and_offline_does_not_saturate() -> None:
    phi, draw = np.array([1.0, 1.0]), np.random.default_rng(0).normal(size=(6, 2))
    member = np.array([[True, True], [True, True], [True, True], [False, True], [False, True], [False, True]])
    assert np.isnan(lira(phi, draw, member)).tolist() == [False, True]
    far = offline_lira(np.array([20.0, 40.0]), draw)
    assert far[1] > far[0] > 100


def test_halves_are_balanced_and_never_split_a_cluster() -> None:
    items = fixture.knowledge().forget
    member = halves(items, 6, 0)
    assert (member.sum(0) == 3).all()
    for row in member:
        inside = {i.cluster for i, chosen in zip(items, row, strict=True) if chosen}
        assert inside.isdisjoint({i.cluster for i, chosen in zip(items, row, strict=True) if not chosen})
    assert (halves(items, 6, 1) != member).any()


@given(some.lists(some.floats(-40, 0), min_size=2, max_size=20), some.floats(0, 1))
def test_rmia_rises_with_the_model_and_falls_with_the_reference(logs: list[float], a: float) -> None:
    own, out = np.sort(logs), np.array([sorted(logs)])
    flat = np.full((1, len(logs)), -2.0)
    assert (np.diff(rmia_ratio(own, flat, a)) >= 0).all()
    assert (np.diff(rmia_ratio(np.full(len(logs), -2.0), out, a)) <= 1e-12).all()
    ratio = rmia_ratio(own, out, a)
    plain = np.exp(own) / (((1 + a) * np.exp(out[0]) + (1 - a)) / 2)
    assert np.exp(ratio) == pytest.approx(plain, rel=1e-9)
    score = rmia(ratio, ratio)
    assert score == pytest.approx([((ratio < r).mean() + (ratio <= r).mean()) / 2 for r in ratio])
    assert score.mean() == pytest.approx(0.5)


def test_uniform_ranks_have_an_exposure_of_log2_e() -> None:
    n = 4000
    values = [bits(np.concatenate([[-rank], -np.delete(np.arange(n), rank)]).astype(float)) for rank in range(0, n, 7)]
    assert np.mean(values) == pytest.approx(np.log2(np.e), abs=0.02)
    assert bits(np.array([0.0, *[-1.0] * 1023])) == pytest.approx(10.0)
    assert bits(np.array([-1.0, *[0.0] * 1023])) == pytest.approx(0.0)


def test_ties_count_as_every_place_they_may_stand_for() -> None:
    distinct = [bits(np.array([float(-k), *[float(-j) for j in range(5) if j != k]])) for k in range(5)]
    assert bits(np.zeros(5)) == pytest.approx(np.mean(distinct))
    assert bits(np.array([1.0, 1.0, 0.0, 2.0, np.nan])) == pytest.approx(2 - np.log2([2, 3]).mean())
    assert np.isnan(bits(np.array([np.nan, 1.0, 2.0])))


@given(some.lists(some.text("ab ", min_size=1), min_size=1, max_size=6), some.integers(1, 9))
def test_a_beginning_and_its_rest_are_the_text_and_the_answer_is_never_given(parts: list[str], words: int) -> None:
    statement = "x" + " ".join(parts).rstrip()
    begin, rest = beginning(statement, " the answer", words)
    assert begin + rest == statement + " the answer"
    assert len(begin) <= len(statement)
    assert len(begin.split()) == min(words, len(statement.split()))
