"""Metric formulas: closed forms, bounds and symmetries, and defects of released codes that must not return."""

from __future__ import annotations

import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from repforget.errors import UsageError
from repforget.scoring import metrics as m

EPS = m.OPEN_UNLEARNING_EPSILON
losses = st.floats(0.01, 80)
wrongs = arrays(np.float64, (1, 5), elements=losses)
hit_lists = st.lists(st.booleans(), min_size=1, max_size=12)


def test_probability_of_uniform_and_certain_answers() -> None:
    uniform = [np.full(t, -np.log(50.0)) for t in (1, 3, 9)]
    assert m.probability([x.mean() for x in uniform]) == pytest.approx(1 / 50, rel=1e-12)
    assert m.probability([0.0, -np.inf]).tolist() == [1, 0] and np.isnan(m.probability([np.nan]))[0]


@given(st.floats(-900, 0), st.integers(1, 6))
def test_identical_options_share_the_probability(mean: float, k: int) -> None:
    assert m.option_probability([mean], np.full((1, k), mean)) == pytest.approx(1 / (1 + k), rel=1e-12)


@given(losses, wrongs)
def test_option_probability_is_the_quotient(right: float, wrong: np.ndarray) -> None:
    p, q = np.exp(-right), np.exp(-wrong).sum()
    assert m.option_probability([-right], -wrong) == pytest.approx(p / (p + q), rel=1e-10)
    assert m.option_probability([-right], -wrong, epsilon=EPS) == pytest.approx(p / (p + q + EPS), rel=1e-10)


@given(losses, losses)
def test_swapping_right_and_wrong_inverts_the_truth_ratio(a: float, b: float) -> None:
    one, other = m.truth_ratio([a], [[b]]), m.truth_ratio([b], [[a]])
    assert one * other == pytest.approx(1, rel=1e-9)
    assert m.truth_ratio([a], [[b]], form="inverse") == pytest.approx(other, rel=1e-12)
    assert m.truth_ratio([a], [[a] * 5]) == pytest.approx(1, rel=1e-12)
    assert m.truth_ratio_cell(one) == pytest.approx(m.truth_ratio_cell(other), rel=1e-9)


@given(losses, wrongs)
def test_truth_ratio_variants_agree_with_their_quotients(right: float, wrong: np.ndarray) -> None:
    p, each = np.exp(-right), np.exp(-wrong)
    by_mean = {"geometric": np.exp(-wrong.mean()), "arithmetic": each.mean()}
    for mean, q in by_mean.items():
        assert m.truth_ratio([right], wrong, mean=mean) == pytest.approx(q / p, rel=1e-9)
        assert m.truth_ratio([right], wrong, mean=mean, epsilon=EPS) == pytest.approx(q / (p + EPS), rel=1e-9)
        known = m.truth_ratio([right], wrong, mean=mean, form="knowledge")
        assert known == pytest.approx(p / (p + q), rel=1e-9) and 0 <= known[0] <= 1
    assert by_mean["arithmetic"] >= by_mean["geometric"] * (1 - 1e-12)


@given(arrays(np.float64, 7, elements=st.floats(0, 1e300)))
def test_cells_are_bounded(ratio: np.ndarray) -> None:
    for cell in (m.truth_ratio_cell(ratio), m.truth_ratio_cell(ratio, "utility")):
        assert ((cell >= 0) & (cell <= 1)).all()


def test_truth_ratio_of_a_collapsed_model() -> None:
    """Losses of 60 nats per token: a denominator of p + 1e-10 would make every item look known."""
    rng = np.random.default_rng(0)
    right = rng.normal(60, 2, 400)
    wrong = right[:, None] + rng.normal(0.3, 0.3, (400, 5))
    ratio = m.truth_ratio(right, wrong)
    assert np.median(ratio) == pytest.approx(0.74, abs=0.03)
    assert m.truth_ratio_cell(ratio).mean() > 0.6
    peer = m.truth_ratio(right, wrong, epsilon=EPS)
    assert np.median(peer) < 1e-14  # the option reproduces it
    assert np.isfinite(m.truth_ratio(right * 50, wrong * 50)).all()


@given(arrays(np.float64, st.integers(1, 9), elements=st.floats(1e-6, 1)))
def test_harmonic_mean(cells: np.ndarray) -> None:
    mean = m.harmonic_mean(cells)
    assert cells.min() * (1 - 1e-12) <= mean <= min(cells.min() * len(cells), cells.max()) * (1 + 1e-12)
    assert m.harmonic_mean(np.full(9, cells[0])) == pytest.approx(cells[0], rel=1e-12)
    assert m.harmonic_mean([*cells, 0.0]) == 0 and np.isnan(m.harmonic_mean([*cells, np.nan]))


def test_harmonic_mean_of_published_cells() -> None:
    """Model utility of the Llama-2 target, TOFU leaderboard (locuslab/tofu, MIT)."""
    cells = [0.9895272274, 0.9856545938, 0.4746985880, 0.4554820778, 0.9330000000, 0.5962289158, 0.4185618076,
             0.8824786325, 0.5390328416]  # fmt: skip
    assert m.harmonic_mean(cells) == pytest.approx(0.6226773637427153, abs=1e-9)


def brute_force_strength(hits: list[bool]) -> float:
    return 1 - next(k for k in range(len(hits) + 1) if all(hits[k:])) / len(hits)


@given(hit_lists)
def test_memorisation(hits: list[bool]) -> None:
    em, es = m.exact_memorization([hits])[0], m.extraction_strength([hits])[0]
    assert es == pytest.approx(brute_force_strength(hits)) and em >= es - 1e-12
    assert em == pytest.approx(np.mean(hits))
    peer = m.extraction_strength([hits], ou_compat=True)[0]
    assert peer == pytest.approx(max(es, 1 / len(hits)))
    if len(hits) > 1:
        assert m.exact_memorization([hits], drop_last=True) == m.exact_memorization([hits[:-1]])


@pytest.mark.parametrize("length", [1, 2, 3, 10])
def test_nothing_is_extracted_from_a_model_that_is_always_wrong(length: int) -> None:
    wrong = [np.zeros(length, dtype=bool)]
    assert m.extraction_strength(wrong)[0] == 0 and m.exact_memorization(wrong)[0] == 0
    assert m.extraction_strength(wrong, ou_compat=True)[0] == pytest.approx(1 / length)
    last = [np.arange(length) == length - 1]
    assert m.extraction_strength(last)[0] == pytest.approx(1 / length)


def test_items_without_tokens_are_nan() -> None:
    hits = [np.zeros(0), np.ones(1)]
    for values in (m.exact_memorization(hits), m.extraction_strength(hits), m.min_k(hits)):
        assert np.isnan(values[0]) and not np.isnan(values[1])
    assert np.isnan(m.exact_memorization([np.ones(1)], drop_last=True))[0]


token_lists = arrays(np.float64, st.integers(1, 30), elements=st.floats(-50, 0))


@given(token_lists, st.floats(0.05, 1))
def test_min_k(logprobs: np.ndarray, k: float) -> None:
    value = m.min_k([logprobs], k)[0]
    assert logprobs.min() - 1e-9 <= value <= logprobs.mean() + 1e-9
    assert m.min_k([logprobs], 1.0)[0] == pytest.approx(logprobs.mean())
    assert m.min_k([logprobs[::-1]], k)[0] == value
    peer = m.min_k([logprobs], k, muse_compat=True)[0]
    assert np.isnan(peer) if int(k * len(logprobs)) == 0 else peer == value
    # Standardising by mean 0 and variance 1 changes nothing.
    zeros, ones = np.zeros(len(logprobs)), np.ones(len(logprobs))
    assert m.min_k_plus_plus([logprobs], [zeros], [ones], k)[0] == pytest.approx(value, rel=1e-12)


@given(st.integers(2, 40), st.integers(0, 2**31))
@settings(max_examples=30)
def test_min_k_plus_plus_is_standardised(vocabulary: int, seed: int) -> None:
    """Over tokens drawn from the model itself the standard score has mean 0 and variance 1."""
    logits = np.random.default_rng(seed).normal(0, 2, vocabulary)
    logp = logits - np.logaddexp.reduce(logits)
    p = np.exp(logp)
    mu, sigma2 = p @ logp, p @ (logp - p @ logp) ** 2
    z = np.array([m.min_k_plus_plus([[x]], [[mu]], [[sigma2]])[0] for x in logp])
    assert p @ z == pytest.approx(0, abs=1e-9) and p @ z**2 == pytest.approx(1, rel=1e-9)


def test_min_k_plus_plus_bounds_small_variances() -> None:
    assert m.min_k_plus_plus([[-1.0]], [[0.0]], [[0.0]])[0] == pytest.approx(-1 / np.sqrt(m.SIGMA2_FLOOR))


def test_scores_against_text_length() -> None:
    texts = ["Oslo", "the city of New York " * 9]
    sizes = [len(zlib.compress(t.encode())) for t in texts]
    assert m.zlib_score([-2.0, -2.0], texts) == pytest.approx([-2 / n for n in sizes])
    with pytest.raises(UsageError, match="1 scores and 2 texts"):
        m.zlib_score([-1.0], texts)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="geometric or arithmetic"):
        m.truth_ratio([1.0], [[1.0]], mean="median")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'forget' and 'utility'"):
        m.truth_ratio_cell([1.0], "retain")  # type: ignore[arg-type]
    for cells in ([], [-0.1, 1.0]):
        with pytest.raises(UsageError, match="harmonic_mean"):
            m.harmonic_mean(cells)
