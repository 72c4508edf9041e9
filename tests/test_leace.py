"""LEACE: probes that had learned are blind afterwards, and the change is the least that does it."""

from __future__ import annotations

from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.edit._collect import choose_sites, read_points, text_sequences
from repforget.edit._concept import answer_concept, contrast, membership_concept
from repforget.edit._contrast import contrasts
from repforget.edit.erase._leace_math import Eraser, fit_eraser
from repforget.edit.erase.leace import leace
from repforget.edit.erase.mean_direction import mean_direction
from repforget.errors import KnowledgeError, NoEffectError, UsageError
from repforget.knowledge import Fact
from repforget.models.capture import Batch, capture, forward
from repforget.records import Component, Localization, RandomBand, Site
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


# ------------------------------------------------------------------ the editor


def eraser_of(op: Any) -> Eraser:
    """An Affine operation as a function, in float64."""
    center = None if op.center is None else op.center.double()
    return Eraser(op.left.double(), op.right.double(), center, op.left[0], op.left.shape[1], False)


def facts_at(model: Any, site: Site, facts: tuple[Fact, ...]) -> Tensor:
    points = read_points(model, facts)
    return torch.cat([
        capture(model, [site], Batch(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)))[site]
        for ids in points.ids
    ]).double()  # fmt: skip


def within_relation_gap(x: Tensor, facts: tuple[Fact, ...]) -> float:
    worst = 0.0
    for relation in {f.relation for f in facts}:
        rows = [i for i, f in enumerate(facts) if f.relation == relation]
        answers = sorted({facts[i].answer for i in rows})
        worst = max(worst, class_gap(x[rows], torch.tensor([answers.index(facts[i].answer) for i in rows])))
    return worst


SITES = ["mlp_in.0", "attn_in.1", "mlp_in.1"]


@pytest.mark.parametrize("metric", ["text", "retain", "concept"])
@pytest.mark.parametrize("sequential", [True, False])
def test_every_edited_site_is_blind_within_relations(metric: Any, sequential: bool) -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = leace(model, data, sites=SITES, rank="full", metric=metric, sequential=sequential)
    assert edit.touched == tuple(SITES) and edit.artifact == "weights"
    before = {site: facts_at(model, Site.parse(site), data.forget) for site in SITES}
    relation = torch.tensor([f.relation == "city" for f in data.forget]).long()
    folded = edit.applied_to(model)
    for number, text in enumerate(SITES):
        site, op = Site.parse(text), edit.site_operations[number]
        x = facts_at(folded, site, data.forget)  # what the site receives, with all upstream erasers at work
        eraser = eraser_of(op)
        gap = within_relation_gap(eraser(x), data.forget)
        assert within_relation_gap(before[text], data.forget) > 0.2
        if sequential or number == 0:
            assert gap < 1e-4
        else:
            assert gap > 1e-3  # fitted on what is no longer there
        assert class_gap(eraser(x), relation) > 0.2  # which relation is asked is no knowledge, and stays


@pytest.mark.parametrize("architecture", tiny_models.ARCHITECTURES)
def test_folded_weights_compute_what_the_hooks_do(architecture: str) -> None:
    model, data = edit_models.model(architecture), edit_models.people().for_editor()
    edit = leace(model, data, max_facts=24)
    batch = Batch.pad(tiny_models.sample_ids())
    base = forward(model, batch)
    with edit.attach(model):
        hooked = forward(model, batch)
    assert torch.equal(forward(model, batch), base)
    undo = edit.fold(model)
    folded = forward(model, batch)
    real = batch.mask.bool()
    assert float((hooked - base)[real].abs().max()) > 1e-3
    assert float((folded - hooked)[real].abs().max()) < 1e-5
    assert undo.hooked == (("mlp_in.0", "mlp_in.1") if architecture == "mixtral" else ())
    undo()
    assert torch.equal(forward(model, batch), base)


def test_membership_equals_the_two_groups_within_relations() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = leace(model, data, target="membership", sites=["mlp_in.1"], metric="concept")
    x = facts_at(model, Site("mlp_in", 1), (*data.forget, *data.retain))
    (op,) = edit.site_operations
    eraser = eraser_of(op)
    member = torch.arange(len(x)) < len(data.forget)
    for relation in ("city", "job"):
        rows = torch.tensor([f.relation == relation for f in (*data.forget, *data.retain)])
        assert class_gap(x[rows], member[rows].long()) > 0.1
        assert class_gap(eraser(x)[rows], member[rows].long()) < 1e-5


def test_subject_tokens_are_where_the_subject_ends() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    points = read_points(model, data.forget, "both")
    rows = zip(data.forget, points.ids, points.positions, points.groups, strict=True)
    for fact, ids, (last, subject), frames in rows:
        words = model.tokenizer.convert_ids_to_tokens(list(ids))
        assert last == len(ids) - 1 and words[subject] == fact.subject.split()[-1]
        assert frames == (f"{fact.relation}/last", f"{fact.relation}/subject")
    lost = Fact("x", "c", "Zoe", "city", "Ada red was born in", " Rome")
    with pytest.raises(KnowledgeError, match="does not mention its subject"):
        read_points(model, [lost], "subject")


def test_the_editor_is_deterministic_and_reads_its_sites_from_the_localization() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    band = RandomBand(1, 10, 1.0, 0.0, 0.5, "test")
    where = Localization("probe", (Component(Site("resid_post", 1)),), (1.0,), band)
    edits = [leace(model, data, where=where, top_layers=1, seed=3) for _ in range(2)]
    assert edits[0].digest == edits[1].digest and edits[0].touched == ("attn_in.1", "mlp_in.1")
    everywhere = choose_sites(model, "auto", None, kinds=("attn_in",), top_layers=1)
    assert everywhere == (Site("attn_in", 0), Site("attn_in", 1))
    notes = " ".join(edits[0].manifest.notes)
    assert "fewer than 100 per feature" in notes and "only the strongest directions" in notes


def test_requests_without_effect_are_refused() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    with pytest.raises(NoEffectError, match="attn_in.0"):  # the last token alone says nothing yet
        leace(model, data, sites=["attn_in.0"])
    with pytest.raises(UsageError, match="rank 0"):
        leace(model, data, rank=0)
    with pytest.raises(UsageError, match="No site was given"):
        leace(model, data, sites=[])
    same = tuple(Fact(f.id, f.cluster, f.subject, f.relation, f.prompt, " Rome") for f in data.forget)
    with pytest.raises(KnowledgeError, match="single answer"):
        answer_concept(read_points(model, same))


def test_conditional_cross_covariance_is_the_definition() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    points = read_points(model, data.forget)
    concept = answer_concept(points)
    x = torch.randn(len(points.ids), 7, generator=torch.Generator().manual_seed(0), dtype=F64)
    stats = moments(x, concept.labels, concept.k)
    found, means = concept.cross(stats), concept.means(stats)
    frames = concept.frames[concept.labels]
    for c in range(concept.k):
        rows, frame = concept.labels == c, frames == concept.frames[c]
        expected = rows.sum() / (len(x) - 1) * (x[rows].mean(0) - x[frame].mean(0))
        torch.testing.assert_close(found[:, c], expected)
        torch.testing.assert_close(means[c], x[rows].mean(0))


def test_sets_without_a_common_relation_are_compared_across_relations() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    cities = tuple(f for f in data.forget if f.relation == "city")
    jobs = tuple(f for f in data.retain if f.relation == "job")
    points = read_points(model, (*cities, *jobs))
    concept = membership_concept(points, frozenset(f.id for f in cities))
    assert set(concept.names) == {"last=forget", "last=retain"}
    x = torch.randn(len(points.ids), 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    difference = x[: len(cities)].mean(0) - x[len(cities) :].mean(0)
    torch.testing.assert_close(contrast(concept, moments(x, concept.labels, 2)), difference)


# ------------------------------------------------------------------ mean directions


@pytest.mark.parametrize("center", ["retain", "none"])
def test_mean_direction_leaves_no_difference_along_itself(center: Any) -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = mean_direction(model, data, sites=["mlp_in.1"], center=center)
    (op,) = edit.site_operations
    direction = op.right[0].double()  # type: ignore[union-attr]
    site = Site("mlp_in", 1)
    forget, retain = facts_at(model, site, data.forget), facts_at(model, site, data.retain)
    gaps = []
    for relation in ("city", "job"):
        a = torch.tensor([f.relation == relation for f in data.forget])
        b = torch.tensor([f.relation == relation for f in data.retain])
        gaps.append(forget[a].mean(0) - retain[b].mean(0))
    expected = (gaps[0] + gaps[1]) / 2
    torch.testing.assert_close(direction, expected / expected.norm(), rtol=1e-5, atol=1e-6)
    moved = eraser_of(op)(forget)
    level = float(retain.mean(0) @ direction) if center == "retain" else 0.0
    torch.testing.assert_close(moved @ direction, torch.full((len(moved),), level, dtype=F64), rtol=1e-5, atol=1e-5)


def test_sites_without_a_difference_are_left_alone_or_refused() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    edit = mean_direction(model, data)  # at attn_in.0 the last token is the same for everyone
    assert edit.touched == ("mlp_in.0", "attn_in.1", "mlp_in.1")
    assert edit.manifest.notes == ("no difference of means at attn_in.0: left alone",)
    with pytest.raises(NoEffectError, match="same mean at attn_in.0"):
        mean_direction(model, data, sites=["attn_in.0", "mlp_in.1"])


def test_principal_directions_keep_the_mean_that_centring_would_remove() -> None:
    """A constant shift of the forget points is the leading uncentred direction; centred PCA cannot see it."""
    model, data = edit_models.model(), edit_models.people().for_editor()
    sites = [Site("resid_post", 1)]
    one = contrasts(model, sites, data.forget, data.retain)[sites[0]]
    many = contrasts(model, sites, data.forget, data.retain, rank=4, principal=True)[sites[0]]
    torch.testing.assert_close(many.directions @ many.directions.T, torch.eye(4, dtype=F64), rtol=1e-9, atol=1e-9)
    x = facts_at(model, sites[0], data.forget)
    frames = torch.tensor([f.relation == "city" for f in data.forget])
    retain = facts_at(model, sites[0], data.retain)
    kept = torch.tensor([f.relation == "city" for f in data.retain])
    x = x - torch.where(frames[:, None], retain[kept].mean(0), retain[~kept].mean(0))
    _, _, vh = torch.linalg.svd(x, full_matrices=False)
    torch.testing.assert_close((many.directions * vh[:4]).sum(1).abs(), torch.ones(4, dtype=F64), rtol=1e-6, atol=0)
    torch.testing.assert_close(one.difference, x.mean(0), rtol=1e-5, atol=1e-6)
    with pytest.raises(UsageError, match="one direction and rank=2"):
        mean_direction(model, data, rank=2)


def test_retained_text_is_whole_statements_and_general_texts() -> None:
    model, data = edit_models.model(), edit_models.people().for_editor()
    texts = text_sequences(model, data, data.retain)
    assert len(texts) == len(data.retain) + len(data.general)
    first = data.retain[0]
    assert model.tokenizer.decode(list(texts[0]), skip_special_tokens=True) == first.prompt + first.answer
