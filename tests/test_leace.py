"""LEACE: probes that had learned are blind afterwards, and the change is the least that does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.edit.erase._leace_math import fit_eraser
from repforget.errors import UsageError
from repforget.stats import Statistics

F64 = torch.float64


def sample(
    n: int, d: int, k: int, seed: int = 0, gap: float = 3.0, rank: int | None = None, outlier: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Correlated features [n, d] whose mean depends on the class [n]; the last feature has std ``outlier``."""
    rng = torch.Generator().manual_seed(seed)
    mix = torch.randn(rank or d, d, generator=rng, dtype=F64) / d**0.5
    z = torch.randint(0, k, (n,), generator=rng)
    means = gap * torch.randn(k, rank or d, generator=rng, dtype=F64)
    x = (torch.randn(n, rank or d, generator=rng, dtype=F64) + means[z]) @ mix
    x = x + torch.randn(d, generator=rng, dtype=F64)
    x[:, -1] = x[:, -1] + torch.randn(n, generator=rng, dtype=F64) if outlier == 1.0 else x[:, -1] * outlier
    return x, z


def moments(x: Tensor, z: Tensor, k: int, **options: Any) -> Statistics:
    stats = Statistics.empty(x.shape[1], k, **options)
    stats.update(x, z)
    return stats


def class_gap(x: Tensor, z: Tensor) -> float:
    """Largest distance of a class mean from the overall mean, in standard deviations of each feature."""
    means = torch.stack([x[z == c].mean(0) for c in z.unique()])
    return float(((means - x.mean(0)).abs() / x.std(0).clamp_min(1e-12)).max())


def logistic(x: Tensor, z: Tensor) -> tuple[float, float]:
    """Training accuracy of an (almost) unpenalised logistic probe on standardised features, and majority."""
    from sklearn.linear_model import LogisticRegression

    scaled = ((x - x.mean(0)) / x.std(0).clamp_min(1e-9)).numpy()
    probe = LogisticRegression(C=1e4, max_iter=2000).fit(scaled, z.numpy())
    return float(probe.score(scaled, z.numpy())), float(z.bincount().max() / len(z))


# ------------------------------------------------------------------ the erasure itself


@settings(max_examples=25, deadline=None)
@given(
    st.integers(40, 200), st.integers(6, 40), st.integers(2, 6), st.sampled_from(["none", "identity", "diagonal"]),
    st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_erasure_is_exact_idempotent_and_of_the_right_rank(
    n: int, d: int, k: int, shrinkage: str, affine: bool, seed: int
) -> None:
    x, z = sample(n, d, k, seed)
    stats = moments(x, z, k)
    eraser = fit_eraser(stats, shrinkage=shrinkage, affine=affine)  # type: ignore[arg-type]
    projector = eraser.projector
    assert float((projector @ stats.cross).norm()) <= 1e-12 * float(stats.cross.norm())
    torch.testing.assert_close(projector @ projector, projector, rtol=1e-8, atol=1e-8)
    assert eraser.rank == eraser.total == int(torch.linalg.matrix_rank(stats.cross, rtol=1e-9))
    before, after = class_gap(x, z), class_gap(eraser(x), z)
    assert before > 0.05 and after < 1e-9
    if affine:
        torch.testing.assert_close(eraser(x).mean(0), x.mean(0), rtol=1e-9, atol=1e-9)
    changed = int(torch.linalg.matrix_rank(x - eraser(x), rtol=1e-9))
    assert changed <= eraser.rank


@pytest.mark.parametrize("shrinkage", ["identity", "none"])
@pytest.mark.parametrize(("n", "d", "k", "rank"), [(600, 40, 3, None), (600, 40, 3, 25), (30, 60, 2, None)])
def test_projector_is_that_of_concept_erasure(shrinkage: str, n: int, d: int, k: int, rank: int | None) -> None:
    """The peer in float64 with a tolerance below the concept: there it is right."""
    erasure = pytest.importorskip("concept_erasure")
    x, z = sample(n, d, k, rank=rank, gap=1.0)
    if rank is not None:
        x[:, -1] = x[:, 0] - x[:, 1]  # without the noise of its own: the covariance is singular
    fitter = erasure.LeaceFitter(d, k, dtype=F64, shrinkage=shrinkage == "identity", svd_tol=1e-7)
    fitter.update(x, torch.nn.functional.one_hot(z, k))
    eraser = fit_eraser(moments(x, z, k), shrinkage=shrinkage)  # type: ignore[arg-type]
    torch.testing.assert_close(eraser(x), fitter.eraser(x), rtol=1e-5, atol=1e-5)
    assert eraser.fallback == (shrinkage == "none" and (rank is not None or n < d))


@pytest.mark.parametrize("classes", [2, 3])
def test_a_probe_that_had_learned_is_at_majority_afterwards(classes: int) -> None:
    from sklearn.svm import LinearSVC

    x, z = sample(600, 20, classes, seed=3, gap=1.0)
    after = fit_eraser(moments(x, z, classes))(x)
    learned, majority = logistic(x, z)
    left, _ = logistic(after, z)
    assert learned > majority + 0.2, "the probe must learn before erasure"
    assert left <= majority + 0.005
    standard = ((after - after.mean(0)) / after.std(0)).numpy()
    if classes == 2:
        svc = LinearSVC(C=1e-2, loss="hinge", max_iter=200000, tol=1e-8).fit(x.numpy(), z.numpy())
        assert svc.score(x.numpy(), z.numpy()) > majority + 0.2
        blind = LinearSVC(C=1e-2, max_iter=200000).fit(standard, z.numpy())
        assert blind.score(standard, z.numpy()) <= majority + 0.01


def test_least_change_first_order_optimality_holds_for_every_inner_product() -> None:
    """Moving the eraser within the erasers that share its null space changes no quadratic loss to first order."""
    x, z = sample(500, 16, 3)
    stats = moments(x, z, 3)
    eraser = fit_eraser(stats, shrinkage="none")
    rng = torch.Generator().manual_seed(5)
    root = torch.randn(16, 16, generator=rng, dtype=F64)
    inner = root @ root.T
    u, _, _ = torch.linalg.svd(stats.cross, full_matrices=True)
    nullspace = u[:, : eraser.rank]  # P must vanish here; its action on the complement is free
    free = torch.eye(16, dtype=F64) - nullspace @ nullspace.T
    projector = eraser.projector.clone().requires_grad_()
    moved = (x - x.mean(0)) @ (torch.eye(16, dtype=F64) - projector @ free).T
    loss = ((moved @ inner) * moved).sum(1).mean() / inner.trace()
    (gradient,) = torch.autograd.grad(loss, projector)
    assert float((gradient @ free).abs().max()) < 1e-8
    orthogonal = (free.clone()).requires_grad_()  # the orthogonal eraser is not optimal: the test has power
    moved = (x - x.mean(0)) @ (torch.eye(16, dtype=F64) - orthogonal @ free).T
    (other,) = torch.autograd.grad(((moved @ inner) * moved).sum(1).mean() / inner.trace(), orthogonal)
    assert float((other @ free).abs().max()) > 1e-3


def test_no_eraser_beats_the_oracle_that_sees_the_labels() -> None:
    x, z = sample(400, 12, 3)
    onehot = torch.nn.functional.one_hot(z, 3).double()
    stats = moments(x, z, 3)
    centred = onehot - onehot.mean(0)
    oracle = x - centred @ torch.linalg.pinv(centred) @ (x - x.mean(0))
    change = (fit_eraser(stats, shrinkage="none")(x) - x).square().mean()
    least = (oracle - x).square().mean()
    random = fit_eraser(stats, cross=torch.randn(12, 2, generator=torch.Generator().manual_seed(0)).double())
    assert class_gap(oracle, z) < 1e-9
    assert least <= change + 1e-12
    assert float(change) > 0 and class_gap(random(x), z) > 0.1


# ------------------------------------------------------------------ where the peer fails


@pytest.mark.parametrize("outlier", [100.0, 1e3, 1e4])
@pytest.mark.parametrize("shrinkage", ["none", "identity", "diagonal"])
@pytest.mark.parametrize("precision", ["single", "double"])
def test_massive_features_cost_no_precision_in_float32(outlier: float, shrinkage: str, precision: str) -> None:
    x, z = sample(4000, 96, 2, gap=1.0, outlier=outlier)
    x32 = x.float()
    stats = moments(x32, z, 2, precision=precision)
    eraser = fit_eraser(stats, shrinkage=shrinkage)  # type: ignore[arg-type]
    exact = moments(x32.double(), z, 2)
    scale = exact.variances.sqrt()[:, None]
    rest, whole = (eraser.projector @ exact.cross) / scale, exact.cross / scale
    assert float(rest.norm()) <= 1e-12 * float(whole.norm())
    erased = eraser(x32)
    assert erased.dtype == torch.float32
    left = moments(erased, z, 2)
    assert float((left.cross / scale).norm()) <= 1e-6 * float(whole.norm())
    assert class_gap(x, z) > 0.2 and logistic(x, z)[0] > 0.8
    accuracy, majority = logistic(erased.double(), z)
    assert accuracy <= majority + 0.03  # float32 rows are rounded, so a probe finds a little noise


@pytest.mark.parametrize("prevalence", [1e-3, 1e-4, 1e-5])
def test_rare_concepts_are_erased(prevalence: float) -> None:
    n, d = int(5 / prevalence), 4 if prevalence < 1e-4 else 12
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=rng)
    z = torch.zeros(n, dtype=torch.long)
    z[:5] = 1
    x[:5, 0] += 6.0
    eraser = fit_eraser(moments(x, z, 2))
    after = eraser(x.double())
    gap = float((x[z == 1].mean(0) - x[z == 0].mean(0)).norm())
    assert gap > 5
    assert float((after[z == 1].mean(0) - after[z == 0].mean(0)).norm()) < 1e-9
    assert eraser.rank == 1
    torch.testing.assert_close(after.mean(0), x.double().mean(0))


def test_a_rare_class_beside_common_ones_keeps_its_own_direction() -> None:
    rng = torch.Generator().manual_seed(1)
    z = torch.cat([torch.zeros(50000), torch.ones(50000), torch.full((3,), 2.0)]).long()
    x = torch.randn(len(z), 6, generator=rng, dtype=F64)
    x[z == 1, 0] += 5.0
    x[z == 2, 3] += 1.0
    eraser = fit_eraser(moments(x, z, 3))
    assert eraser.rank == 2 and class_gap(eraser(x), z) < 1e-9 < class_gap(x, z)


def test_label_forms_agree_and_class_numbers_are_not_a_scalar() -> None:
    x, z = sample(400, 10, 4)
    onehot = torch.nn.functional.one_hot(z, 4)
    erasers = [fit_eraser(moments(x, form, 4)) for form in (z, onehot, onehot.float(), onehot.bool())]
    for eraser in erasers[1:]:
        torch.testing.assert_close(eraser.projector, erasers[0].projector)
    assert class_gap(erasers[0](x), z) < 1e-9
    without_last = fit_eraser(moments(x, onehot[:, :3].float(), 3))  # k-1 columns span the same concept
    torch.testing.assert_close(without_last.projector, erasers[0].projector, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, F64])
def test_every_float_type_goes_in_and_comes_out(dtype: torch.dtype) -> None:
    x, z = sample(500, 24, 2, gap=1.0)
    x = x.to(dtype)
    eraser = fit_eraser(moments(x, z, 2))
    out = eraser(x)
    assert out.dtype == dtype and out.shape == x.shape
    bound = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-6, F64: 1e-12}[dtype]
    assert class_gap(out.double(), z) < bound < class_gap(x.double(), z)
    torch.testing.assert_close(eraser(x.view(20, 25, 24)), out.view(20, 25, 24))


@pytest.mark.parametrize("shrinkage", ["none", "identity", "diagonal"])
def test_fewer_rows_than_features(shrinkage: str) -> None:
    x, z = sample(30, 80, 2)
    eraser = fit_eraser(moments(x, z, 2), shrinkage=shrinkage)  # type: ignore[arg-type]
    assert eraser.fallback == (shrinkage == "none")
    assert class_gap(eraser(x), z) < 1e-9 < class_gap(x, z)


def test_singular_statistics_in_single_precision_are_noticed_and_still_erased() -> None:
    x, z = sample(3000, 40, 2, gap=1.0)
    x[:, 11] = x[:, 3] - 2 * x[:, 5]
    eraser = fit_eraser(moments(x.float(), z, 2, precision="single"), shrinkage="none")
    assert eraser.fallback and class_gap(eraser(x.float().double()), z) < 1e-9


def test_the_factor_of_other_devices_gives_the_same_eraser(monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.edit.erase import _leace_math

    x, z = sample(300, 20, 3)
    stats = moments(x, z, 3)
    expected = fit_eraser(stats)
    monkeypatch.setattr(_leace_math, "_factor_lapack", _leace_math._factor_torch)
    torch.testing.assert_close(fit_eraser(stats).projector, expected.projector, rtol=1e-11, atol=1e-11)
    singular = moments(torch.cat([x, x[:, :1]], 1), z, 3)
    assert fit_eraser(singular, shrinkage="none").fallback


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_statistics_and_eraser_on_the_gpu_equal_those_on_the_cpu() -> None:
    x, z = sample(3000, 64, 3)
    here, there = moments(x.float(), z, 3), moments(x.float().cuda(), z, 3, device="cuda")
    torch.testing.assert_close(there.cov.cpu(), here.cov, rtol=1e-10, atol=1e-11)
    eraser = fit_eraser(there)
    assert eraser.left.is_cuda
    torch.testing.assert_close(eraser.projector.cpu(), fit_eraser(here).projector, rtol=1e-8, atol=1e-9)
    assert class_gap(eraser(x.cuda()).cpu(), z) < 1e-9


@pytest.mark.parametrize("shrinkage", ["none", "identity", "diagonal"])
def test_constant_features_are_left_alone(shrinkage: str) -> None:
    x, z = sample(300, 12, 2)
    x[:, 4] = 0.1
    x[:, 7] = 3e4
    eraser = fit_eraser(moments(x, z, 2), shrinkage=shrinkage)  # type: ignore[arg-type]
    out = eraser(x)
    assert torch.equal(out[:, [4, 7]], x[:, [4, 7]])
    live = [i for i in range(12) if i not in (4, 7)]
    assert class_gap(out[:, live], z) < 1e-9 < class_gap(x[:, live], z)


def test_rank_takes_the_strongest_directions_only() -> None:
    x, z = sample(800, 16, 5, gap=1.0)
    stats = moments(x, z, 5)
    full = fit_eraser(stats)
    gaps = []
    for rank in (1, 2, 3, 4):
        eraser = fit_eraser(stats, rank=rank)
        assert eraser.rank == rank and eraser.total == 4
        torch.testing.assert_close(eraser.projector @ eraser.projector, eraser.projector)
        torch.testing.assert_close(eraser.strengths, full.strengths[:rank])
        gaps.append(class_gap(eraser(x), z))
    assert gaps[0] > 0.05 and gaps[-1] < 1e-9
    torch.testing.assert_close(fit_eraser(stats, rank=4).projector, full.projector)
    with pytest.raises(UsageError, match="rank 0"):
        fit_eraser(stats, rank=0)


def test_linear_form_erases_too_and_moves_the_mean() -> None:
    x, z = sample(500, 10, 2)
    linear = fit_eraser(moments(x, z, 2), affine=False)
    assert linear.center is None and class_gap(linear(x), z) < 1e-9
    assert float((linear(x).mean(0) - x.mean(0)).norm()) > 0.1


def test_nothing_to_erase_is_rank_zero() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([x, x])
    z = torch.arange(200) // 100
    eraser = fit_eraser(moments(x, z, 2))
    assert eraser.rank == eraser.total == 0 and torch.equal(eraser(x), x)


def test_another_metric_erases_as_well_and_disturbs_its_own_rows_least() -> None:
    x, z = sample(500, 12, 3)
    other, label = sample(500, 12, 3, seed=8)
    own, space = moments(x, z, 3), moments(other, label, 3)
    plain, foreign = fit_eraser(own, shrinkage="none"), fit_eraser(space, cross=own.cross, shrinkage="none")
    assert class_gap(foreign(x), z) < 1e-9
    moved = [(e(other) - other).square().sum() for e in (foreign, plain)]
    assert float(moved[0]) < 0.9 * float(moved[1])
