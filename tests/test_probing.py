"""Probing classifiers: planted information is found, absent information is not, scikit-learn agrees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid

from repforget.errors import KnowledgeError, NumericalError, UsageError
from repforget.probing import cluster_interval, fit_sweep, fit_transfer
from repforget.probing.closed import SHRINKAGE, discriminant, nearest_mean
from repforget.probing.folds import control_labels, grouped_folds, row_folds, shuffled_labels
from repforget.probing.inputs import standardise
from repforget.probing.logistic import Problem, fit, principal_axes, with_constant

GROUPS = np.repeat(np.arange(80), 5)
KINDS = ("logistic", "mean_difference", "lda", "mlp")
FAST = {"hidden": 16, "steps": 80}


def planted(seed: int = 0, layers: int = 2, width: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Layer 0 is noise; the others carry a random bit along one direction."""
    rng = np.random.default_rng(seed)
    bit = rng.integers(0, 2, len(GROUPS))
    x = rng.standard_normal((layers, len(GROUPS), width))
    direction = rng.standard_normal(width)
    x[1:] += 5 * (bit - 0.5)[:, None] * direction / np.linalg.norm(direction)
    return x, bit


def problem(labels: np.ndarray, train: np.ndarray, penalty: float, classes: int) -> Problem:
    weights = torch.from_numpy(train / train.sum(1, keepdims=True))
    return Problem(
        torch.from_numpy(labels), weights, torch.full((1, len(labels)), penalty, dtype=torch.float64), classes
    )


class TestLogistic:
    @given(st.integers(0, 10**6), st.sampled_from([2, 3, 5]), st.sampled_from([1e-3, 1e-2, 1.0]), st.integers(2, 30))
    @settings(max_examples=8, deadline=None)
    def test_equals_scikit_learn(self, seed: int, classes: int, penalty: float, width: int) -> None:
        """Several labellings and training sets in one call; each must be the optimum of its own problem."""
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((60, width)) @ np.diag(np.arange(1, width + 1) ** -0.7)
        labels = np.stack([np.concatenate([np.arange(classes), rng.integers(0, classes, 60 - classes)])] * 3)
        labels[1] = np.roll(labels[1], 1)
        train = np.ones((3, 60), dtype=bool)
        train[2, 40:] = False
        features = torch.from_numpy(x)[None]
        fits = fit(with_constant(features), principal_axes(features, 8), problem(labels, train, penalty, classes),
                   tol=1e-10, max_iter=500)  # fmt: skip
        assert fits.converged.all()
        for j in range(3):
            n = int(train[j].sum())
            oracle = LogisticRegression(C=1 / (penalty * n), tol=1e-8, max_iter=10000)
            oracle.fit(x[train[j]], labels[j, train[j]])
            mine = fits.theta[0, j].numpy()
            assert mine[:, :-1] == pytest.approx(oracle.coef_, abs=1e-3)
            logits = fits.logits[0, j].numpy()
            likely = 1 / (1 + np.exp(-logits[0])) if classes == 2 else (np.exp(logits) / np.exp(logits).sum(0)).T
            expected = oracle.predict_proba(x)
            assert likely == pytest.approx(expected[:, 1] if classes == 2 else expected, abs=1e-3)

    def test_single_precision_is_close_enough(self) -> None:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((300, 40)).astype(np.float32)
        y = (x[:, 0] + rng.standard_normal(300) > 0).astype(np.int64)
        features = torch.from_numpy(x)[None]
        weights = torch.full((1, 300), 1 / 300)
        task = Problem(torch.from_numpy(y)[None], weights, torch.full((1, 1), 1e-2), 2)
        fits = fit(with_constant(features), principal_axes(features, 16), task, tol=1e-6, max_iter=100)
        oracle = LogisticRegression(C=1 / (1e-2 * 300), tol=1e-8, max_iter=1000).fit(x, y)
        assert fits.theta[0, 0, 0, :-1].numpy() == pytest.approx(oracle.coef_[0], abs=3e-3)

    @pytest.mark.parametrize("classes", [2, 8])
    def test_held_out_accuracy_equals_scikit_learn(self, classes: int) -> None:
        rng = np.random.default_rng(1)
        groups = np.repeat(np.arange(240), 5)
        y = rng.integers(0, classes, 1200)
        x = rng.standard_normal((1, 1200, 48)) + 0.5 * rng.standard_normal((classes, 48))[y]
        found = fit_sweep(x, y, groups, l2=1e-2, control=False)
        z = standardise(torch.from_numpy(x))[0].numpy()
        right = np.zeros(1200, dtype=bool)
        for f in range(5):
            held = found.folds == f
            oracle = LogisticRegression(C=1 / (1e-2 * (~held).sum()), max_iter=1000).fit(z[~held], y[~held])
            right[held] = oracle.predict(z[held]) == y[held]
        assert abs(found.accuracy[0] - right.mean()) <= 0.005

    def test_layers_and_fits_do_not_influence_each_other(self) -> None:
        x, bit = planted(layers=3)
        together = fit_sweep(x, bit, GROUPS)
        alone = fit_sweep(x[2:], bit, GROUPS)
        assert together.penalty[2] == pytest.approx(alone.penalty[0])
        assert together.probability[2] == pytest.approx(alone.probability[0], abs=0.02)


class TestClosedForms:
    def test_nearest_mean_equals_scikit_learn(self) -> None:
        x, _ = planted()
        y = np.random.default_rng(3).integers(0, 4, len(GROUPS))
        train = GROUPS < 60
        logits = nearest_mean(torch.from_numpy(x[1:]), problem(y[None], train[None], 1.0, 4))
        oracle = NearestCentroid().fit(x[1, train], y[train])
        assert (logits[0, 0].argmax(0).numpy() == oracle.predict(x[1])).all()

    def test_discriminant_equals_scikit_learn(self) -> None:
        x, bit = planted()
        train = GROUPS < 60
        x = standardise(torch.from_numpy(x), torch.from_numpy(x[:, train]))
        logits = discriminant(x[1:], problem(bit[None], train[None], 1.0, 2))[0, 0].numpy()
        z = x[1].numpy()
        within = sum(np.cov(z[train & (bit == c)].T, bias=True) * (bit[train] == c).mean() for c in (0, 1))
        level = np.trace(within) / len(within)
        means = [z[train & (bit == c)].mean(0) for c in (0, 1)]
        slope = np.linalg.solve((1 - SHRINKAGE) * within + SHRINKAGE * level * np.eye(len(within)), means[1] - means[0])
        expected = (z - (means[0] + means[1]) / 2) @ slope
        assert logits[1] - logits[0] == pytest.approx(expected, abs=1e-8)
        free = LinearDiscriminantAnalysis(priors=[0.5, 0.5]).fit(z[train], bit[train])
        assert np.mean(free.predict(z) == (logits[1] > logits[0])) > 0.97

    def test_class_without_training_rows_is_never_predicted(self) -> None:
        x, bit = planted()
        y = bit.copy()
        y[GROUPS >= 60] = 2
        for function in (nearest_mean, discriminant):
            logits = function(torch.from_numpy(x), problem(y[None], (GROUPS < 60)[None], 1.0, 3))
            assert set(logits.argmax(2).unique().tolist()) <= {0, 1}


class TestSweep:
    @pytest.mark.parametrize("kind", KINDS)
    def test_planted_bit_is_found_and_noise_is_not(self, kind: str) -> None:
        x, bit = planted()
        found = fit_sweep(x, bit, GROUPS, kind=kind, **FAST)
        assert found.accuracy[1] > 0.95 and found.low[1] > 0.9
        assert abs(found.accuracy[0] - 0.5) < 0.1 and found.low[0] < 0.5 + 0.02
        assert np.abs(found.shuffled - 0.5).max() < 0.12
        assert found.selectivity[1] > 0.3
        assert found.correct.mean(1) == pytest.approx(found.accuracy)
        assert ((found.probability > 0.5) == found.correct).mean() > 0.99

    def test_interval_of_noise_covers_chance(self) -> None:
        """Not every time, but about as often as promised; grouped noise with a label per group."""
        covered = 0
        for seed in range(20):
            rng = np.random.default_rng(seed)
            labels = rng.integers(0, 2, 80)[GROUPS]
            x = 0.7 * rng.standard_normal((1, 80, 10))[:, GROUPS] + rng.standard_normal((1, 400, 10))
            found = fit_sweep(x, labels, GROUPS, l2=0.1, control=False, seed=seed)
            covered += bool(found.low[0] <= 0.5 <= found.high[0])
        assert covered >= 15

    def test_only_a_network_finds_an_exclusive_or(self) -> None:
        rng = np.random.default_rng(0)
        groups = np.repeat(np.arange(160), 5)
        a, b = rng.integers(0, 2, (2, 800))
        x = rng.standard_normal((1, 800, 16))
        x[0, :, 0] += 6 * (a - 0.5)
        x[0, :, 1] += 6 * (b - 0.5)
        linear = fit_sweep(x, a ^ b, groups, control=False)
        assert abs(linear.accuracy[0] - 0.5) < 0.08
        assert fit_sweep(x, a ^ b, groups, kind="mlp", control=False).accuracy[0] > 0.9

    @pytest.mark.parametrize("kind", KINDS)
    def test_scaling_and_shifting_features_changes_nothing(self, kind: str) -> None:
        x, bit = planted()
        scale = 10.0 ** np.random.default_rng(5).uniform(-3, 3, x.shape[-1])
        first = fit_sweep(x, bit, GROUPS, kind=kind, **FAST)
        second = fit_sweep(x * scale + 7 * scale, bit, GROUPS, kind=kind, **FAST)
        assert second.probability == pytest.approx(first.probability, abs=1e-4)

    @pytest.mark.parametrize("kind", KINDS)
    def test_deterministic_per_seed(self, kind: str) -> None:
        x, bit = planted()
        runs = [fit_sweep(x, bit, GROUPS, kind=kind, seed=s, **FAST) for s in (1, 1, 2)]
        assert (runs[0].probability == runs[1].probability).all() and (runs[0].folds == runs[1].folds).all()
        assert (runs[0].folds != runs[2].folds).any()

    def test_group_identity_does_not_leak_into_the_accuracy(self) -> None:
        """Each group has its own vector and a random label: learnt within groups, not across them."""
        rng = np.random.default_rng(0)
        labels = rng.integers(0, 2, 80)[GROUPS]
        x = 5 * rng.standard_normal((1, 80, 60))[:, GROUPS] + rng.standard_normal((1, 400, 60))
        found = fit_sweep(x, labels, GROUPS, l2=1e-3)
        assert abs(found.accuracy[0] - 0.5) < 0.15
        assert found.seen[0] > 0.9 and found.control[0] > 0.9 and abs(found.selectivity[0]) < 0.1

    def test_penalty_follows_the_data(self) -> None:
        """With many noisy directions a strong penalty generalises better, and the search finds that out."""
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, 400, 300))
        bit = (x[0, :, :40].sum(1) + 4 * rng.standard_normal(400) > 0).astype(int)
        found = fit_sweep(x, bit, GROUPS, control=False)
        weak = fit_sweep(x, bit, GROUPS, l2=1e-3, control=False)
        assert np.median(found.penalty) >= 0.1 and found.accuracy[0] >= weak.accuracy[0]

    def test_constant_features_give_the_majority(self) -> None:
        labels = (GROUPS % 4 == 0).astype(int)
        found = fit_sweep(np.full((1, 400, 8), 3.7), labels, GROUPS)
        assert found.accuracy[0] == pytest.approx(0.75) and found.majority == pytest.approx(0.75)

    def test_types_with_one_row_have_no_control(self) -> None:
        x, bit = planted()
        found = fit_sweep(x, bit)
        assert np.isnan(found.selectivity).all() and "selectivity" in found.notes[0]

    def test_refusals_are_one_sentence(self) -> None:
        x, bit = planted()
        broken = x.copy()
        broken[1, 3, 2] = np.nan
        cases = [
            (KnowledgeError, "two classes", lambda: fit_sweep(x, np.ones(400), GROUPS)),
            (KnowledgeError, "two clusters", lambda: fit_sweep(x, bit, np.zeros(400))),
            (NumericalError, "layer 1", lambda: fit_sweep(broken, bit, GROUPS)),
            (UsageError, "shape", lambda: fit_sweep(x[:, :10], bit, GROUPS)),
            (UsageError, "did you mean 'logistic'", lambda: fit_sweep(x, bit, GROUPS, kind="logistics")),
            (UsageError, "l2", lambda: fit_sweep(x, bit, GROUPS, l2=-1.0)),
            (KnowledgeError, "test label", lambda: fit_transfer(x, bit, x, bit + 5)),
            (UsageError, "layers and width", lambda: fit_transfer(x, bit, x[:1], bit)),
        ]
        for error, words, call in cases:
            with pytest.raises(error, match=words) as caught:
                call()
            assert str(caught.value).endswith((".", "?")) and "\n" not in str(caught.value)


class TestTransfer:
    @pytest.mark.parametrize("kind", KINDS)
    def test_finds_the_same_direction_and_no_other(self, kind: str) -> None:
        x, bit = planted(layers=3)
        moved = x.copy()
        moved[2] = np.random.default_rng(9).standard_normal(moved[2].shape)  # the bit is gone here
        half = GROUPS < 40
        found = fit_transfer(x[:, half], bit[half], moved[:, ~half], bit[~half], groups=GROUPS[half], kind=kind, **FAST)
        assert found.accuracy[1] > 0.95 and abs(found.accuracy[0] - 0.5) < 0.15 and abs(found.accuracy[2] - 0.5) < 0.15

    def test_equals_scikit_learn(self) -> None:
        x, bit = planted()
        half = GROUPS < 40
        found = fit_transfer(x[:, half], bit[half], x[:, ~half], bit[~half], l2=0.1)
        train = x[1, half]
        z = (x[1] - train.mean(0)) / train.std(0)
        oracle = LogisticRegression(C=1 / (0.1 * half.sum())).fit(z[half], bit[half])
        likely = oracle.predict_proba(z[~half])[np.arange((~half).sum()), bit[~half]]
        assert found.probability[1] == pytest.approx(likely, abs=0.02)

    def test_names_as_labels_and_unknown_answers(self) -> None:
        x, bit = planted()
        names = np.array(["Oslo", "Rome"])[bit]
        tests = names.astype(object).copy()
        tests[:5] = "Delhi"
        found = fit_transfer(x, names, x, tests, groups=GROUPS)
        assert found.classes == ("Oslo", "Rome") and found.valid.sum() == len(bit) - 5
        assert not found.correct[:, :5].any() and (found.probability[:, :5] == 0).all()
        assert found.accuracy[1] > 0.95


class TestFolds:
    @given(st.integers(0, 10**6), st.integers(2, 40), st.integers(2, 6), st.integers(2, 5))
    @settings(max_examples=40, deadline=None)
    def test_groups_stay_whole_and_folds_are_even(self, seed: int, n_groups: int, folds: int, classes: int) -> None:
        rng = np.random.default_rng(seed)
        groups = np.repeat(np.arange(n_groups), 4)
        labels = rng.integers(0, classes, len(groups))
        fold = grouped_folds(labels, groups, folds, rng)
        assert all(len(set(fold[groups == g])) == 1 for g in range(n_groups))
        assert set(fold) == set(range(min(folds, n_groups)))
        assert np.bincount(fold).max() - np.bincount(fold).min() <= 4 * classes

    @given(st.integers(0, 10**6), st.integers(2, 20))
    @settings(max_examples=30, deadline=None)
    def test_every_type_is_on_both_sides_of_row_folds(self, seed: int, n_types: int) -> None:
        types = np.repeat(np.arange(n_types), 3)
        fold = row_folds(types, 5, np.random.default_rng(seed))
        assert all(len(set(fold[types == t])) == 3 for t in range(n_types))

    @given(st.integers(0, 10**6))
    @settings(max_examples=30, deadline=None)
    def test_control_and_shuffle_keep_the_structure(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 3, 80)[GROUPS]
        control, shuffled = control_labels(labels, GROUPS, rng), shuffled_labels(labels, GROUPS, rng)
        for drawn in (control, shuffled):
            assert all(len(set(drawn[g == GROUPS])) == 1 for g in range(80))
        assert (np.bincount(shuffled) == np.bincount(labels)).all() and len(set(control)) > 1


class TestInterval:
    def test_independent_rows_give_the_binomial_width(self) -> None:
        values = np.random.default_rng(0).random((1, 1000)) < 0.7
        low, high = cluster_interval(values, np.arange(1000))
        expected = 2 * 1.96 * (values.mean() * (1 - values.mean()) / 1000) ** 0.5
        assert high[0] - low[0] == pytest.approx(expected, rel=0.1)

    def test_clusters_that_agree_are_wider(self) -> None:
        clustered = (np.random.default_rng(0).random((1, 100)) < 0.5)[:, np.repeat(np.arange(100), 10)]
        narrow = np.subtract(*cluster_interval(clustered, np.arange(1000))[::-1])
        wide = np.subtract(*cluster_interval(clustered, np.repeat(np.arange(100), 10))[::-1])
        assert wide[0] > 2.5 * narrow[0]

    def test_few_clusters_use_their_means(self) -> None:
        values = np.repeat([[0.0, 1.0, 1.0]], 1, 0)
        low, high = cluster_interval(values, np.arange(3))
        assert low[0] == 0.0 and high[0] == 1.0
