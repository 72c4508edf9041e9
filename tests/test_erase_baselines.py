"""Null-space and orthogonal projections, and erasure that sees the labels: against oracles and their own claims."""

from __future__ import annotations

from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_leace import class_gap, logistic, moments, sample
from torch import Tensor

from repforget.edit.erase._leace_math import fit_eraser
from repforget.edit.erase._projections import explained, fit_nullspace, fit_orthogonal
from repforget.edit.erase._quadratic import barycentre, fit_oracle, fit_quadratic, transport
from repforget.edit.erase.inlp import inlp
from repforget.edit.erase.mean_direction import mean_direction
from repforget.edit.erase.orthogonal_projection import orthogonal_projection
from repforget.errors import NoEffectError, NumericalError, UsageError
from repforget.models.capture import Batch, forward
from repforget.records import Component, Localization, RandomBand, Site

EDITORS = {"inlp": inlp, "orthogonal_projection": orthogonal_projection}


def refitted(x: Tensor, z: Tensor, k: int, rounds: int, step: int, ridge: float) -> Tensor:
    """The slow right answer: sklearn's ridge on projected points, again and again; the directions taken [d, r]."""
    from sklearn.linear_model import Ridge

    unit = x.var(0).mean().sqrt()
    centred = (x - x.mean(0)) / unit
    labels = torch.nn.functional.one_hot(z, k).double()
    labels = labels - labels.mean(0)
    taken = x.new_zeros(x.shape[1], 0)
    for _ in range(rounds):
        left = centred - centred @ taken @ taken.mT
        weights = Ridge(alpha=ridge * (len(x) - 1), fit_intercept=False, solver="cholesky").fit(left.numpy(), labels)
        predicted = torch.tensor(weights.predict(left.numpy()))
        contrasts = torch.linalg.eigh(labels.mT @ predicted)[1].flip(1)[:, :step]
        taken = torch.linalg.qr(torch.cat([taken, torch.tensor(weights.coef_).mT @ contrasts], 1))[0]
    return taken


@pytest.mark.parametrize(("k", "rounds", "step"), [(2, 3, 1), (4, 4, 1), (4, 2, 2)])
def test_directions_are_those_of_classifiers_fitted_again_on_projected_points(k: int, rounds: int, step: int) -> None:
    x, z = sample(300, 12, k, gap=1.0)
    stats = moments(x, z, k)
    eraser = fit_nullspace(stats, stats.cross, rank=rounds * step, step=step, ridge=1e-2)
    slow = refitted(x, z, k, rounds, step, 1e-2)
    torch.testing.assert_close(eraser.left @ eraser.right, slow @ slow.mT, atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(st.integers(40, 200), st.integers(6, 24), st.integers(2, 5), st.booleans(), st.integers(0, 99))
def test_projections_are_orthogonal_and_keep_the_mean(n: int, d: int, k: int, affine: bool, seed: int) -> None:
    x, z = sample(n, d, k, seed)
    stats = moments(x, z, k)
    for eraser in (fit_orthogonal(stats, stats.cross, affine=affine),
                   fit_nullspace(stats, stats.cross, rank=3, affine=affine)):  # fmt: skip
        p = eraser.projector
        torch.testing.assert_close(p @ p, p, atol=1e-9, rtol=0)
        torch.testing.assert_close(p, p.mT, atol=1e-12, rtol=0)
        if affine:
            torch.testing.assert_close(eraser(x).mean(0), x.mean(0), atol=1e-9, rtol=1e-9)
    whole = fit_orthogonal(stats, stats.cross, affine=affine)
    assert class_gap(x, z) > 0.05 and class_gap(whole(x), z) < 1e-6
    assert whole.rank == whole.total == int(torch.linalg.matrix_rank(stats.cross, rtol=1e-9))
    one = fit_orthogonal(stats, stats.cross, rank=1)
    torch.testing.assert_close(one.left[:, 0].abs(), torch.linalg.svd(stats.cross)[0][:, 0].abs(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("k", [2, 4])
def test_the_orthogonal_projection_is_that_of_concept_erasure(k: int) -> None:
    erasure = pytest.importorskip("concept_erasure")
    x, z = sample(500, 16, k)
    fitter = erasure.LeaceFitter(16, k, method="orth", dtype=torch.float64, shrinkage=False, svd_tol=1e-7)
    fitter.update(x, torch.nn.functional.one_hot(z, k))
    stats = moments(x, z, k)
    torch.testing.assert_close(fit_orthogonal(stats, stats.cross)(x), fitter.eraser(x), atol=1e-7, rtol=1e-7)


def test_probes_fall_with_every_round_and_leace_needs_fewer_directions() -> None:
    x, z = sample(500, 12, 2, seed=1, gap=1.0)
    stats = moments(x, z, 2)
    learned, majority = logistic(x, z)
    shares = [explained(stats, stats.cross, 0.5, fit_nullspace(stats, stats.cross, rank=r).left) for r in (1, 4, 8)]
    before = explained(stats, stats.cross, 0.5, x.new_zeros(12, 0))
    assert learned > majority + 0.1 and before > shares[0] > shares[1] > shares[2] >= 0
    left = logistic(fit_nullspace(stats, stats.cross, rank=8)(x), z)[0]
    assert left < learned - 0.1
    leace = fit_eraser(stats)
    first = fit_nullspace(stats, stats.cross, rank=1)
    assert leace.rank == 1 and class_gap(leace(x), z) < 1e-9 < class_gap(first(x), z)
    change = (leace(x) - x).square().sum()
    assert float(change) < float((fit_orthogonal(stats, stats.cross)(x) - x).square().sum())


def test_an_exhausted_concept_ends_the_search_and_nothing_is_rank_zero() -> None:
    """Unit covariance: the first classifier reads the only direction there is."""
    x, z = sample(400, 6, 2)
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.mT))).mT
    stats = moments(x, z, 2)
    eraser = fit_nullspace(stats, stats.cross)
    assert eraser.rank == eraser.total == 1
    nothing = torch.zeros_like(stats.cross)
    assert fit_nullspace(stats, nothing).rank == fit_orthogonal(stats, nothing).rank == 0
    for wrong in ({"rank": 0}, {"step": 0}, {"ridge": 0.0}):
        with pytest.raises(UsageError, match="positive"):
            fit_nullspace(stats, stats.cross, **wrong)


# ------------------------------------------------------------------ erasure that sees the labels


@pytest.mark.parametrize("k", [2, 3])
def test_the_oracle_is_that_of_concept_erasure_and_changes_least(k: int) -> None:
    erasure = pytest.importorskip("concept_erasure")
    x, z = sample(400, 10, k)
    onehot = torch.nn.functional.one_hot(z, k)
    peer = erasure.OracleFitter(10, k, dtype=torch.float64, svd_tol=1e-7)
    peer.update(x, onehot)
    mine = fit_oracle(x, z)(x, z)
    torch.testing.assert_close(mine, peer.eraser(x, onehot), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(mine, fit_oracle(x, onehot)(x, onehot))
    assert class_gap(x, z) > 0.2 and class_gap(mine, z) < 1e-9
    blind = fit_eraser(moments(x, z, k), shrinkage="none")(x)
    assert float((mine - x).square().sum()) <= float((blind - x).square().sum())


@settings(max_examples=10, deadline=None)
@given(st.integers(2, 4), st.integers(3, 8), st.integers(0, 99))
def test_classes_share_both_moments_after_quadratic_erasure(k: int, d: int, seed: int) -> None:
    x, z = uneven(120 * k, d, k, seed)
    eraser = fit_quadratic(x, z)
    after = eraser(x, z)
    covariances = [torch.cov(after[z == c].mT) for c in range(k)]
    assert max(float((torch.cov(x[z == c].mT) - torch.cov(x[z == 0].mT)).norm()) for c in range(1, k)) > 0.1
    for covariance in covariances:
        torch.testing.assert_close(covariance, eraser.barycentre, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(after.mean(0), x.mean(0), atol=1e-9, rtol=1e-9)
    assert class_gap(after, z) < 1e-8
    assert all(float(torch.linalg.eigvalsh(t).min()) > 0 for t in eraser.maps)


@pytest.mark.parametrize("k", [2, 3])
def test_quadratic_erasure_is_that_of_concept_erasure(k: int) -> None:
    """Up to the mean, which the peer takes over classes instead of points."""
    erasure = pytest.importorskip("concept_erasure")
    x, z = uneven(600, 6, k, 0)
    peer = erasure.QuadraticFitter(6, k, dtype=torch.float64, shrinkage=False)
    peer.update(x, z)
    mine, other = fit_quadratic(x, z)(x, z), peer.eraser(x, z)
    torch.testing.assert_close(mine - mine.mean(0), other - other.mean(0), atol=1e-5, rtol=1e-5)


def test_a_quadratic_reader_goes_blind_where_leace_leaves_it_everything() -> None:
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    generator = torch.Generator().manual_seed(0)
    z = torch.arange(600) % 2
    x = torch.randn(600, 4, generator=generator, dtype=torch.float64) * torch.where(z[:, None] > 0, 3.0, 1.0)

    def accuracy(points: Tensor) -> float:
        reader = QuadraticDiscriminantAnalysis(reg_param=1e-3)  # leace makes covariances singular
        return float(reader.fit(points.numpy(), z.numpy()).score(points.numpy(), z.numpy()))

    assert accuracy(x) > 0.85 and accuracy(fit_eraser(moments(x, z, 2))(x)) > 0.85
    assert accuracy(fit_quadratic(x, z)(x, z)) < 0.62


def test_transport_and_barycentre_are_what_they_say_and_singular_classes_are_refused() -> None:
    a, b = (torch.cov(sample(50, 5, 2, seed)[0].mT) for seed in (0, 1))
    t = transport(a, b)
    torch.testing.assert_close(t @ a @ t, b, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(barycentre(torch.stack([a, a]), torch.tensor([0.3, 0.7]).double()), a)
    x, z = sample(20, 12, 4)
    with pytest.raises(NumericalError, match=r"Class 0 has \d+ points in 12 dimensions"):
        fit_quadratic(x, z)
    with pytest.raises(UsageError, match="one class per point"):
        fit_quadratic(x, x)


def uneven(n: int, d: int, k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Classes of different size, mean and covariance."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.cat([torch.arange(k), torch.multinomial(torch.arange(1.0, k + 1), n - k, True, generator=generator)])
    z = torch.cat([z, torch.arange(k).repeat(2 * d)])  # enough of each
    mix = torch.randn(k, d, d, generator=generator, dtype=torch.float64) + 2 * torch.eye(d).double()
    means = torch.randn(k, d, generator=generator, dtype=torch.float64)
    x = torch.randn(len(z), d, generator=generator, dtype=torch.float64)
    return (x[:, None] @ mix[z])[:, 0] + means[z], z


# ------------------------------------------------------------------ the editors


@pytest.mark.parametrize("name", EDITORS)
@pytest.mark.parametrize("architecture", tiny_models.ALL)
def test_folded_weights_compute_what_the_hooks_do(name: str, architecture: str) -> None:
    model = edit_models.model(architecture)
    edit = EDITORS[name](model, edit_models.people().for_editor(), max_facts=24)
    batch = Batch.pad(tiny_models.sample_ids())
    real, base = batch.mask.bool(), forward(model, batch)
    with edit.attach(model):
        hooked = forward(model, batch)
    undo = edit.fold(model)
    assert float((hooked - base)[real].abs().max()) > 1e-3
    assert float((forward(model, batch) - hooked)[real].abs().max()) < 1e-5
    assert undo.hooked == (("mlp_in.0", "mlp_in.1") if architecture == "mixtral" else ())
    undo()
    assert torch.equal(forward(model, batch), base)


@pytest.mark.parametrize("name", EDITORS)
def test_settings_reach_the_projection(name: str) -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    editor: Any = EDITORS[name]
    (op,) = editor(model, data, sites=["mlp_in.1"], rank=2).site_operations
    assert op.left.shape == (32, 2) and op.center is not None
    torch.testing.assert_close(op.left.T, op.right)
    (linear,) = editor(model, data, sites=["mlp_in.1"], rank=2, affine=False).site_operations
    assert linear.center is None
    where = Localization("probe", (Component(Site("mlp_out", 1)),), (1.0,), RandomBand(1, 10, 1.0, 0.0, 0.5, "test"))
    assert editor(model, data, where=where, top_layers=1).touched == ("attn_in.1", "mlp_in.1")
    assert "concept of 7 classes in 2 frames" in editor(model, data).manifest.notes[0]
    with pytest.raises(NoEffectError, match="Nothing of the concept"):
        editor(model, data, sites=["attn_in.0"])
    with pytest.raises(UsageError, match="positive rank"):
        editor(model, data, rank=0)


def test_membership_without_the_metric_is_the_difference_of_means() -> None:
    """One relation: a single difference, the direction of mean_direction."""
    model, data = edit_models.model(), edit_models.people().for_editor()
    single = [tuple(f for f in facts if f.relation == "city") for facts in (data.forget, data.retain)]
    import dataclasses

    data = dataclasses.replace(data, forget=single[0], retain=single[1])
    (one,) = orthogonal_projection(model, data, target="membership", sites=["mlp_in.1"], rank="full").site_operations
    (other,) = mean_direction(model, data, sites=["mlp_in.1"]).site_operations
    torch.testing.assert_close(one.left @ one.right, other.left @ other.right, atol=1e-6, rtol=0)


def test_the_notes_of_inlp_say_what_a_classifier_still_reads() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = inlp(model, data, sites=["mlp_in.1"], rank=3)
    share = edit.manifest.notes[1]
    assert "mlp_in.1" in share and "by chance" in share
    before, after = (float(part) for part in share.split("mlp_in.1 ")[1].split(" (")[0].split(" -> "))
    assert 0 < after < before <= 1.0
    assert "stopped at rank=3" in edit.manifest.notes[2]
