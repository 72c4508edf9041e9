"""Description length: exact for a receiver who learns nothing, short for what is told, never for random labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import planted
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_locate_planted import KNOWLEDGE, located
from test_locate_planted import model as planted_model

import repforget as rf
from repforget.errors import UsageError
from repforget.probing import code_lengths
from repforget.probing.inputs import standardise
from repforget.probing.prequential import FRACTIONS, _blocks, smoothed_bits


def data(n: int = 240, classes: int = 4, width: int = 12, seed: int = 0) -> tuple[Any, Any]:
    """Features [3, n, width]: noise, labels in noise, labels as they are."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=n)
    means = np.eye(width)[labels] * 6
    noise = generator.standard_normal((3, n, width))
    return noise + np.stack([0 * means, 0.25 * means, means]), labels


@given(st.integers(2, 12), st.integers(0, 500), st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_a_label_costs_log_k_before_anything_is_seen_and_never_infinitely_much(k: int, t: int, p: float) -> None:
    assert smoothed_bits(p, 0, k) == pytest.approx(np.log2(k), abs=1e-12)
    assert smoothed_bits(1 / k, t, k) == pytest.approx(np.log2(k), abs=1e-9)  # a uniform predictor at any time
    assert 0 <= smoothed_bits(p, t, k) <= np.log2(t + k) + 1e-12
    assert sum(2 ** -smoothed_bits(q, t, k) for q in (p, *[(1 - p) / (k - 1)] * (k - 1))) == pytest.approx(1)


def test_a_uniform_predictor_pays_n_log_k_exactly() -> None:
    features, labels = data()
    code = code_lengths(features, labels, fractions=(1.0,))  # one block, coded before anything is learnt
    assert code.uniform == 240 * 2.0
    np.testing.assert_array_equal(code.bits.sum(1), [480.0] * 3)
    np.testing.assert_array_equal(code.compression, [1.0] * 3)


def test_random_labels_are_not_compressed_and_separable_ones_are() -> None:
    features, labels = data(480)
    code = code_lengths(features, labels, l2=0.1)
    assert 0.9 < code.compression[0] < 1.02 < code.compression[1] < code.compression[2] and code.compression[2] > 4
    shuffled = np.random.default_rng(1).permutation(labels)
    assert (code_lengths(features, shuffled, l2=0.1).compression < 1.03).all()


@given(st.integers(2, 60), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_blocks_cover_every_row_once_and_split_no_group(groups: int, each: int, seed: int) -> None:
    of = np.repeat(np.arange(groups), each)
    rows, ends = _blocks(of, FRACTIONS, np.random.default_rng(seed))
    assert sorted(rows.tolist()) == list(range(groups * each)) and ends[-1] == len(rows) and ends == sorted(set(ends))
    assert all(of[rows[e - 1]] != of[rows[e]] for e in ends[:-1])


@pytest.mark.parametrize("classes", [2, 3])
def test_scikit_learn_pays_the_same(classes: int) -> None:
    """Every block coded by its logistic regression, taught by the blocks before."""
    from sklearn.linear_model import LogisticRegression

    features, labels = data(90, classes, width=5)
    code = code_lengths(features[1:2], labels, l2=0.05, fractions=(0.2, 0.5, 1.0))
    bits = np.zeros((3, 90))
    import torch

    x = standardise(torch.as_tensor(features[1:2]))[0].numpy()
    for k in range(3):
        rows, ends = _blocks(np.arange(90), (0.2, 0.5, 1.0), np.random.default_rng([0, k]))
        bits[k, rows[: ends[0]]] = np.log2(classes)
        for start, stop in zip(ends, ends[1:], strict=False):
            taught, sent = rows[:start], rows[start:stop]
            model = LogisticRegression(C=1 / (0.05 * start), tol=1e-8, max_iter=2000).fit(x[taught], labels[taught])
            p = model.predict_proba(x[sent])[np.arange(len(sent)), labels[sent]]
            bits[k, sent] = smoothed_bits(p, start, classes)
    assert code.bits.sum() == pytest.approx(bits.mean(0).sum(), rel=0.01)
    np.testing.assert_allclose(code.bits[0], bits.mean(0), atol=0.15)


def test_the_order_is_drawn_three_times_at_least_and_by_the_seed() -> None:
    features, labels = data(60)
    with pytest.raises(UsageError, match="at least 3"):
        code_lengths(features, labels, permutations=2)
    with pytest.raises(UsageError, match="at least 3"):
        rf.locate(planted_model(0), KNOWLEDGE, "mdl_probe", permutations=1)
    with pytest.raises(UsageError, match="whole sites"):
        rf.locate(planted_model(0), KNOWLEDGE, "mdl_probe", nodes=("heads",))
    one, two, other = (code_lengths(features, labels, seed=s).bits for s in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert np.abs(one - other).max() > 0.1


def test_every_layer_is_coded_by_itself() -> None:
    features, labels = data(60)
    together = code_lengths(features, labels).bits
    alone = np.concatenate([code_lengths(features[k : k + 1], labels).bits for k in range(3)])
    np.testing.assert_allclose(together.sum(1), alone.sum(1), rtol=0.005)  # fits stop together when all have converged
    np.testing.assert_allclose(together, alone, atol=0.2)


@pytest.mark.slow
def test_planted_layers() -> None:
    """One of four, as by chance: the last MLP saves most bits whichever layer holds the facts."""
    found = [located(layer, "mdl_probe", nodes=("mlp_out",), items=60) for layer in planted.LAYERS]
    assert [one.layers("mlp_out")[0] for one in found] == [3, 3, 3, 3]


def test_the_unknown_cannot_be_learnt() -> None:
    known, unknown = (rf.locate(planted_model(k), KNOWLEDGE, "mdl_probe", nodes=("resid_post",), draws=20)
                      for k in (2, None))  # fmt: skip
    assert max(known.scores) > 1.0 > 0.3 > max(unknown.scores)
