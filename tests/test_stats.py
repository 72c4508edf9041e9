"""Streaming moments against the two-pass ones, in every order, batching, dtype and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget import stats as stats_module
from repforget.errors import ArtifactError, NumericalError, UsageError
from repforget.stats import Statistics


def sample(n: int, d: int, k: int, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """Correlated features with large means and classes that shift them."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=rng, dtype=torch.float64)
    x = x @ torch.randn(d, d, generator=rng, dtype=torch.float64) / d**0.5 + offset
    z = torch.randint(0, max(k, 2), (n,), generator=rng)
    return x + torch.randn(max(k, 2), d, generator=rng, dtype=torch.float64)[z], z


def of(x: Tensor, z: Tensor | None = None, k: int = 0, **options: object) -> Statistics:
    out = Statistics.empty(x.shape[1], k, **options)  # type: ignore[arg-type]
    out.update(x, z)
    return out


def distance(a: Statistics, b: Statistics) -> float:
    """Largest difference of two statistics, covariances in units of the features' standard deviations."""
    scale = b.cov.diagonal().clamp_min(1e-300).sqrt()
    parts = [
        (a.mean_x - b.mean_x) / scale,
        a.mean_z - b.mean_z,
        (a.cov - b.cov) / torch.outer(scale, scale),
        (a.cross - b.cross) / scale[:, None],
    ]
    return max(float(part.abs().max()) for part in parts if part.numel())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(2, 90), st.integers(1, 40), st.integers(2, 5), st.lists(st.integers(0, 30), max_size=4),
    st.sampled_from([0.0, 100.0]),
)  # fmt: skip
def test_streaming_equals_two_pass(n: int, d: int, k: int, cuts: list[int], offset: float) -> None:
    x, z = sample(n, d, k, offset=offset)
    edges = [0, *sorted(min(c, n) for c in cuts), n]
    stream = Statistics.empty(d, k)
    for a, b in zip(edges, edges[1:], strict=False):
        stream.update(x[a:b], z[a:b])
    centred = x - x.mean(0)
    onehot = torch.nn.functional.one_hot(z, k).double()
    assert stream.n == n
    torch.testing.assert_close(stream.mean_x, x.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(stream.cov, centred.T @ centred / (n - 1), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(stream.cross, centred.T @ onehot / (n - 1), rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(stream.second_moment, x.T @ x / n, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("blocks", [1, 3])
def test_merged_shards_are_one_batch_in_any_order(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "BLOCK_ROWS", 500 // blocks)
    x, z = sample(1500, 150, 3, offset=50.0)
    whole = of(x, z, 3)
    parts = [of(part, label, 3) for part, label in zip(x.split(400), z.split(400), strict=True)]
    parts.insert(2, Statistics.empty(150, 3))
    forwards, backwards = parts[0], parts[-1]
    for part in parts[1:]:
        forwards = forwards.merge(part)
    for part in reversed(parts[:-1]):
        backwards = backwards.merge(part)
    shuffle = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    assert distance(forwards, whole) < 1e-12
    assert distance(backwards, whole) < 1e-12
    assert distance(of(x[shuffle], z[shuffle], 3), whole) < 1e-12
    assert forwards.n == backwards.n == 1500


def test_batching_of_the_same_rows_does_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stats_module, "BLOCK_ROWS", 64)
    x, z = sample(300, 20, 2)
    whole, ones = of(x, z, 2), Statistics.empty(20, 2)
    for row, label in zip(x.split(1), z.split(1), strict=True):
        ones.update(row, label)
    assert torch.equal(whole.cov, ones.cov) and torch.equal(whole.cross, ones.cross)


def test_update_copies_rows_that_wait_for_their_block() -> None:
    x, _ = sample(10, 4, 2)
    stream, buffer = Statistics.empty(4), torch.empty(5, 4, dtype=torch.float64)
    for half in x.split(5):
        buffer.copy_(half)
        stream.update(buffer)
    assert distance(stream, of(x)) == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["double", "single"])
def test_narrow_input_gives_wide_results(dtype: torch.dtype, precision: str) -> None:
    """The input's rounding is given; nothing may be lost after it, however large the mean or one feature."""
    x, z = sample(3000, 48, 2)
    x[:, 5] *= 1e4
    x[:, 7] += 500.0
    x = x.to(dtype) if dtype != torch.float16 else x.clamp(-6e4, 6e4).to(dtype)
    exact, found = of(x.double(), z, 2), of(x, z, 2, precision=precision)
    bound = 1e-12 if precision == "double" else 5e-6
    assert distance(found, exact) < bound
    scale = exact.variances.sqrt()[:, None]
    assert float(((found.cross - exact.cross) / scale).abs().max()) < 1e-12  # always float64
    assert found.cov.dtype == torch.float64


def test_means_far_larger_than_the_spread_cost_nothing() -> None:
    x, _ = sample(5000, 6, 2)
    near, far = of(x), of(x + 1e6)
    assert float((near.cov - far.cov).abs().max()) < 1e-8  # the rows themselves carry 1e6 * 2^-53


def test_labels_as_classes_and_as_one_hot_agree() -> None:
    x, z = sample(200, 8, 4)
    onehot = torch.nn.functional.one_hot(z, 4)
    for given_z in (onehot, onehot.float(), onehot.bool(), z.int()):
        assert distance(of(x, given_z, 4), of(x, z, 4)) == 0.0
    binary = (z > 1).long()
    assert torch.equal(of(x, binary, 1).cross, of(x, binary.double(), 1).cross)
    assert torch.equal(of(x, binary, 1).cross[:, 0], of(x, binary, 2).cross[:, 1])


@pytest.mark.parametrize("z", [torch.tensor([0, 1, 2]), torch.tensor([-1, 0, 1])])
def test_labels_out_of_range_are_refused(z: Tensor) -> None:
    with pytest.raises(UsageError, match="give k = number of classes"):
        of(torch.randn(3, 4), z, 1)


def test_misfitting_requests_are_one_sentence() -> None:
    stream = Statistics.empty(4, 2)
    with pytest.raises(UsageError, match=r"expected \[n, 4\]"):
        stream.update(torch.zeros(3, 5), torch.zeros(3, 2))
    with pytest.raises(UsageError, match="without z"):
        stream.update(torch.zeros(3, 4))
    with pytest.raises(UsageError, match=r"expected \[3, 2\] numbers"):
        stream.update(torch.zeros(3, 4), torch.zeros(3, 3))
    with pytest.raises(UsageError, match="at least 2 are needed"):
        stream.cov  # noqa: B018
    with pytest.raises(UsageError, match="track no covariance"):
        of(torch.zeros(3, 4), covariance=False).cov  # noqa: B018
    with pytest.raises(UsageError, match="cannot be merged"):
        stream.merge(Statistics.empty(4, 1))
    one, two = Statistics.empty(4, meta={"site": "a"}), Statistics.empty(4, meta={"site": "b"})
    with pytest.raises(UsageError, match="different site"):
        one.merge(two)
    with pytest.raises(UsageError, match="Shrinkage is"):
        of(torch.randn(5, 4)).shrunk("ledoit")  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused_and_leave_no_trace(bad: float) -> None:
    x, _ = sample(40, 4, 2)
    stream = of(x)
    before = stream.cov
    broken = x.clone()
    broken[3, 2] = bad
    with pytest.raises(NumericalError, match="at resid_post.1"):
        of(broken, meta={"site": "resid_post.1"}).cov  # noqa: B018
    assert torch.equal(stream.cov, before)


def test_constant_features_have_no_variance_at_all() -> None:
    x, _ = sample(500, 6, 2)
    x[:, 2] = 0.1  # not a binary fraction: its mean is rounded
    x[:, 4] = 1e5 + 1 / 3
    stream = of(x)
    assert stream.variances[[2, 4]].tolist() == [0.0, 0.0]
    assert float(stream.variances[[0, 1, 3, 5]].min()) > 0.1
    for shrinkage in ("none", "identity", "diagonal"):
        corr, scale = stream.correlation(shrinkage)  # type: ignore[arg-type]
        assert scale[[2, 4]].tolist() == [0.0, 0.0]
        assert torch.equal(corr.diagonal(), torch.ones(6, dtype=torch.float64))
        assert not torch.isnan(torch.triu(corr)).any()
    assert stream.shrunk("identity")[2, 2] > 0


@pytest.mark.parametrize(("n", "d"), [(60, 200), (200, 60), (3000, 70)])
def test_shrinkage_is_the_published_formula(n: int, d: int) -> None:
    erasure = pytest.importorskip("concept_erasure")
    x, _ = sample(n, d, 2)
    stream = of(x)
    biased = stream.cov * (n - 1) / n
    torch.testing.assert_close(stream.shrunk("identity"), erasure.optimal_linear_shrinkage(biased, n))
    spread = biased.diagonal().sqrt()
    corr = biased / torch.outer(spread, spread)
    expected = erasure.optimal_linear_shrinkage(corr, n) * torch.outer(spread, spread)
    torch.testing.assert_close(stream.shrunk("diagonal"), expected)
    torch.testing.assert_close(stream.shrunk("none"), stream.cov)
    for shrinkage in ("none", "identity", "diagonal"):
        scaled, scale = stream.correlation(shrinkage)  # type: ignore[arg-type]
        full = torch.triu(scaled) + torch.triu(scaled, 1).T
        torch.testing.assert_close(full / torch.outer(scale, scale), stream.shrunk(shrinkage))  # type: ignore[arg-type]


def test_diagonal_shrinkage_does_not_depend_on_units() -> None:
    x, _ = sample(80, 40, 2)
    units = torch.ones(40, dtype=torch.float64)
    units[3] = 1e4
    expected = torch.outer(units, units) * of(x).shrunk("diagonal")
    torch.testing.assert_close(of(x * units).shrunk("diagonal"), expected)
    small = of(x * units).shrunk("identity").diagonal()[:3]
    assert float(small.min()) > 10 * float(of(x).shrunk("identity").diagonal()[:3].max())  # the outlier leaks


@pytest.mark.parametrize("centred", [True, False])
def test_principal_directions_are_those_of_the_svd(centred: bool) -> None:
    x, _ = sample(200, 12, 2, offset=3.0)
    directions, moments = of(x).principal(3, centred=centred)
    y = x - x.mean(0) if centred else x
    _, s, vh = torch.linalg.svd(y, full_matrices=False)
    torch.testing.assert_close((directions * vh[:3]).sum(1).abs(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(moments, s[:3].square() / (199 if centred else 200))


@pytest.mark.parametrize("covariance", [True, False])
def test_save_and_load_give_the_same_bits(covariance: bool, tmp_path: Path) -> None:
    x, z = sample(70, 9, 3)
    stream = of(x, z, 3, covariance=covariance, precision="single", meta={"site": "mlp_in.2", "model": "m"})
    path = tmp_path / "folder" / "stats.safetensors"
    stream.save(path)
    again = Statistics.load(path)
    assert (again.n, again.meta, again.precision) == (70, stream.meta, "single")
    assert torch.equal(again.mean_x, stream.mean_x) and torch.equal(again.cross, stream.cross)
    if covariance:
        assert torch.equal(again.cov, stream.cov)
    again.update(x, z)
    assert again.n == 140
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "stats.safetensors"
    of(sample(30, 5, 2)[0]).save(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(ArtifactError, match="damaged"):
        Statistics.load(path)
    path.write_bytes(bytes(data[:-40]))
    with pytest.raises(ArtifactError, match="unreadable"):
        Statistics.load(path)
    with pytest.raises(ArtifactError, match="unreadable"):
        Statistics.load(tmp_path / "absent.safetensors")


def test_merge_keeps_operands_and_the_lesser_precision() -> None:
    x, z = sample(60, 5, 2)
    a, b = of(x[:30], z[:30], 2, precision="single"), of(x[30:], z[30:], 2)
    before = a.cov
    merged = a.merge(b)
    assert torch.equal(a.cov, before)
    assert (merged.precision, a.merge(a).precision, b.merge(b).precision) == ("single", "single", "double")
