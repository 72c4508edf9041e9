"""Ridge heads: taking rows out is retraining, however often; scikit-learn as a second opinion."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge as Peer

from repforget.errors import NumericalError, UsageError
from repforget.linear import change_ridge, distance, fit_ridge
from repforget.linear import ridge as room


def rows(n: int, d: int, k: int = 1, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + 1, rng.normal(size=(n, k))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.integers(1, 9), st.sampled_from([1e-2, 1.0, 50.0]), st.integers(0, 99))
def test_taking_rows_out_is_training_without_them(d: int, k: int, batch: int, lam: float, seed: int) -> None:
    x, y = rows(60, d, k, seed)
    gone = np.random.default_rng(seed).permutation(60)[:batch]
    left = np.delete(np.arange(60), gone)
    found, again = change_ridge(fit_ridge(x, y, lam), x[gone], y[gone]), fit_ridge(x[left], y[left], lam)
    assert np.abs(found.weights - again.weights).max() < 1e-10
    assert np.abs(found.inverse - np.linalg.inv(x[left].T @ x[left] + lam * np.eye(d))).max() < 1e-10
    assert found.n == again.n == 60 - batch
    back = change_ridge(found, x[gone], y[gone], sign=1)
    assert np.abs(back.weights - fit_ridge(x, y, lam).weights).max() < 1e-10


def test_the_no_op_and_a_penalty_that_shrinks_with_the_rows_are_further_away() -> None:
    """What the equality above would not notice if rows hardly mattered."""
    x, y = rows(60, 5)
    head = fit_ridge(x, y, 1.0)
    found = change_ridge(head, x[:5], y[:5])
    assert np.abs(found.weights - head.weights).max() > 1e-3
    assert np.abs(found.weights - fit_ridge(x[5:], y[5:], 55 / 60).weights).max() > 1e-4


def test_a_hundred_batches_in_a_row_do_not_drift(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = rows(1500, 30, 3)
    head = fit_ridge(x, y, 0.1)
    monkeypatch.setattr(room, "STALE", np.inf)  # no refresh comes to help
    for start in range(0, 1000, 10):
        head = change_ridge(head, x[start : start + 10], y[start : start + 10])
    again = fit_ridge(x[1000:], y[1000:], 0.1)
    assert np.abs(head.weights - again.weights).max() < 1e-10
    assert np.linalg.norm(head.weights - again.weights) <= distance(head) < 1e-7
    assert 0 < head.drift < 1e-10


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_the_bound_on_the_distance_holds(scale: float) -> None:
    """Rows that dominate the sums leave rounding behind when they go: the bound has to say so."""
    x, y = rows(200, 6)
    x[:20] *= scale
    head = change_ridge(fit_ridge(x, y, 1e-3), x[:20], y[:20])
    exact = np.linalg.solve(*_in_integers(x[20:], y[20:], 1e-3))
    gap = np.linalg.norm(head.weights - exact)
    assert gap <= distance(head)
    if scale > 1:
        assert gap > 1e-12, "the case does not provoke rounding"


def _in_integers(x: np.ndarray, y: np.ndarray, lam: float) -> tuple[np.ndarray, np.ndarray]:
    wide = x.astype(np.longdouble)
    return ((wide.T @ wide).astype(float) + lam * np.eye(x.shape[1]), (wide.T @ y.astype(np.longdouble)).astype(float))


def test_an_inverse_that_no_longer_fits_is_computed_again() -> None:
    x, y = rows(50, 8)
    head = fit_ridge(x, y, 1e-6)
    import dataclasses

    worn = dataclasses.replace(head, inverse=head.inverse * (1 + 1e-4))
    found = change_ridge(worn, x[:1], y[:1])
    assert np.abs(found.weights - fit_ridge(x[1:], y[1:], 1e-6).weights).max() < 1e-9
    assert found.drift < room.STALE


def test_agrees_with_scikit_learn() -> None:
    x, y = rows(300, 7, 2)
    found = change_ridge(fit_ridge(x, y, 2.5), x[:30], y[:30])
    peer = Peer(alpha=2.5, fit_intercept=False, solver="cholesky").fit(x[30:], y[30:])
    assert np.abs(found.weights.T - peer.coef_).max() < 1e-10


def test_more_rows_than_there_were_and_empty_problems_are_refused() -> None:
    x, y = rows(5, 2)
    head = fit_ridge(x, y, 1.0)
    with pytest.raises(UsageError, match="cannot be taken out of a head that was fitted to 5"):
        change_ridge(head, *rows(6, 2))
    with pytest.raises(UsageError, match="positive number"):
        fit_ridge(x, y, 0.0)
    with pytest.raises(UsageError, match="NaN"):
        fit_ridge(x * np.nan, y, 1.0)
    with pytest.raises(UsageError, match="do not fit"):
        change_ridge(head, x[:, :1], y)
    with pytest.raises(NumericalError, match="not positive definite"):
        change_ridge(fit_ridge(x, y, 1e-3), x * 3, y)  # rows that were never in it
