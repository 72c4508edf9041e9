"""Edits from the moments of many clients: those that all the data in one place would have given."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import edit_models
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.artifact import Edit
from repforget.edit._concept import Concept
from repforget.edit.erase._leace_math import fit_eraser
from repforget.edit.erase._scrub import Reading
from repforget.edit.erase.leace import leace as leace_of_one
from repforget.edit.surgery._keyspace import LayerKeys, Moment, directions
from repforget.errors import KnowledgeError, UsageError
from repforget.federated.moments import (
    HEADER,
    Local,
    Question,
    bandwidth,
    fewest,
    key_directions,
    leace,
    null_space,
    within,
)
from repforget.guarantee import unearned
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel, wrap
from repforget.records import Site
from repforget.stats import Statistics

F64 = torch.float64


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return edit_models.double()


@pytest.fixture(scope="module")
def data() -> EditData:
    return edit_models.people().for_editor()


def split(model: LoadedModel, data: EditData, owner: list[int], count: int) -> dict[str, Local]:
    """Facts and texts dealt out by ``owner``; a client may get nothing."""

    def part(rows: tuple[Any, ...], number: int) -> tuple[Any, ...]:
        return tuple(row for i, row in enumerate(rows) if owner[i % len(owner)] == number)

    return {f"c{n}": Local(f"c{n}", model, dataclasses.replace(
        data, forget=part(data.forget, n), retain=part(data.retain, n), general=part(data.general, n)))
        for n in range(count)}  # fmt: skip


def distance(a: Edit, b: Edit) -> float:
    """Largest difference of the maps, relative to the largest entry."""
    assert [str(x.site) for x in a.operations] == [str(x.site) for x in b.operations]
    worst = 0.0
    for x, y in zip(a.operations, b.operations, strict=True):
        p, q = x.left @ x.right, y.left @ y.right
        worst = max(worst, float((p - q).abs().max() / q.abs().max()), float((x.center - y.center).abs().max()))
    return worst


@pytest.mark.parametrize("target", ["answer", "membership"])
@pytest.mark.parametrize("metric", ["text", "concept"])
@pytest.mark.parametrize("sequential", [False, True])
def test_leace_of_the_clients_is_leace_of_all_data(
    model: LoadedModel, data: EditData, target: Any, metric: Any, sequential: bool
) -> None:
    how = {"target": target, "metric": metric, "sequential": sequential, "sites": ["mlp_in.0", "mlp_in.1"]}
    whole = leace_of_one(model, data, **how)
    clients = split(model, data, [0, 1, 1, 0, 3, 1, 0], 4)  # c2 has nothing
    found = leace(model, clients, minimum=1, **how)
    assert distance(found, whole) < 1e-10
    assert distance(found, leace(model, dict(reversed(clients.items())), minimum=1, **how)) == 0
    less = leace_of_one(model, clients["c0"].data, **how)
    assert distance(less, whole) > 1e-3  # one client alone gives something else


@settings(max_examples=5, deadline=None)
@given(owner=st.lists(st.integers(0, 4), min_size=3, max_size=11))
def test_no_split_of_the_data_makes_a_difference(model: LoadedModel, data: EditData, owner: list[int]) -> None:
    how: dict[str, Any] = {"sites": ["mlp_in.1"], "metric": "retain", "sequential": False}
    found = leace(model, split(model, data, owner, 5), minimum=1, **how)
    assert distance(found, leace_of_one(model, data, **how)) < 1e-10


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=6), seed=st.integers(0, 99), order=st.randoms())
def test_erasers_of_merged_statistics_equal_the_whole(sizes: list[int], seed: int, order: Any) -> None:
    sizes = [*sizes, 0, 1, 60]  # an empty client and one with a single record
    draw = torch.Generator().manual_seed(seed)
    n, d, k = sum(sizes), 7, 3
    z = torch.randint(0, k, (n,), generator=draw)
    x = torch.randn(n, d, generator=draw, dtype=F64) * torch.logspace(-2, 2, d, dtype=F64) + 5 + z[:, None]
    whole = Statistics.empty(d, k)
    whole.update(x, z)
    parts = []
    for a, b in zip(x.split(sizes), z.split(sizes), strict=True):
        parts.append(Statistics.empty(d, k))
        parts[-1].update(a, b)
    order.shuffle(parts)
    merged = Statistics.empty(d, k)
    for part in parts:
        merged = merged.merge(part)
    concept = Concept(z, torch.zeros(k, dtype=torch.long), ("a", "b", "c"))
    a, b = (fit_eraser(s, cross=concept.cross(s), shrinkage="diagonal") for s in (merged, whole))
    scale = b.projector.abs().max()
    assert float((a.projector - b.projector).abs().max() / scale) < 1e-10
    assert float((a.center - b.center).abs().max()) < 1e-10  # type: ignore[operator]


def test_the_classes_of_a_client_are_told_apart_from_those_of_others(model: LoadedModel, data: EditData) -> None:
    only = {answer: tuple(f for f in data.forget if f.answer == answer) for answer in {f.answer for f in data.forget}}
    clients = {name.strip(): Local(name.strip(), model, dataclasses.replace(data, forget=facts))
               for name, facts in only.items()}  # fmt: skip
    found = leace(model, clients, minimum=1, sites=["mlp_in.1"], metric="concept")
    assert distance(found, leace_of_one(model, data, sites=["mlp_in.1"], metric="concept")) < 1e-10
    with pytest.raises(KnowledgeError, match="single answer"):
        leace(model, {"Rome": clients["Rome"]}, minimum=1, sites=["mlp_in.1"])


# ------------------------------------------------------------------ what is sent, what it tells


@pytest.mark.parametrize(("d", "k", "covariance"), [(16, 0, True), (33, 5, True), (64, 3, False), (128, 7, True)])
@pytest.mark.parametrize("n", [3, 500])
def test_bandwidth_is_what_is_written_whatever_the_number_of_records(
    tmp_path: Path, d: int, k: int, covariance: bool, n: int
) -> None:
    stats = Statistics.empty(d, k, covariance=covariance, meta={"model": "f" * 64, "site": "mlp_post.31"})
    stats.update(torch.randn(n, d), torch.arange(n) % k if k > 1 else None)
    stats.save(tmp_path / "s.safetensors")
    size = (tmp_path / "s.safetensors").stat().st_size
    assert 0 < size - bandwidth(d, k, covariance=covariance) <= HEADER


def test_one_record_is_told_exactly_and_therefore_refused(model: LoadedModel, data: EditData) -> None:
    x = torch.randn(1, 9, dtype=F64)
    stats = Statistics.empty(9)
    stats.update(x)
    assert torch.equal(stats.mean_x, x[0]) and fewest(stats) == 1
    small = dataclasses.replace(data, forget=data.forget[:1])
    clients = {"big": Local("big", model, data), "small": Local("small", model, small)}
    with pytest.raises(UsageError, match=r"'small' has a mean of 1 points at .* that activation itself.*minimum=1"):
        leace(model, clients, sites=["mlp_in.1"])
    allowed = leace(model, clients, sites=["mlp_in.1"], minimum=1)
    assert any("single point" in note for note in allowed.manifest.notes)
    assert not unearned(" ".join(allowed.manifest.notes))


def test_a_class_of_one_point_is_a_mean_of_one_point() -> None:
    x, z = torch.randn(50, 4, dtype=F64), torch.zeros(50, dtype=torch.long)
    z[17] = 1
    stats = Statistics.empty(4, 2, covariance=False)
    stats.update(x, z)
    assert fewest(stats) == 1
    told = stats.mean_x + stats.cross[:, 1] * (stats.n - 1) / stats.n / stats.mean_z[1]
    assert torch.allclose(told, x[17], atol=1e-12)  # the activation, out of the moments


def test_other_models_and_nobody_are_refused(model: LoadedModel, data: EditData) -> None:
    other = edit_models.model("gpt2")
    clients = {"a": Local("a", model, data), "odd": Local("odd", other, data)}
    with pytest.raises(UsageError, match="'odd' sent no moments of 'tiny-double'"):
        leace(model, clients, sites=["mlp_in.1"], minimum=1)
    with pytest.raises(UsageError, match="no client"):
        leace(model, {}, sites=["mlp_in.1"])


# ------------------------------------------------------------------ the key side of null-space surgery


def test_key_directions_are_those_of_null_space_surgery() -> None:
    draw = torch.Generator().manual_seed(0)
    forget = torch.randn(60, 12, generator=draw, dtype=F64) * torch.linspace(1, 3, 12)
    kept = torch.randn(90, 12, generator=draw, dtype=F64) @ torch.randn(12, 12, generator=draw, dtype=F64)
    keys = LayerKeys(forget=[forget], kept={"retain": Moment(kept.T @ kept, len(kept))})
    expected = directions(keys, 6, 0.01).double()
    metric = keys.metric(0.01, check=True)
    found, energies = key_directions(forget.T @ forget / 60, metric, 6)
    assert torch.allclose(found @ metric @ found.T, torch.eye(6, dtype=F64), atol=1e-10)
    unit = expected / expected.norm(dim=1, keepdim=True)
    cosines = ((found / found.norm(dim=1, keepdim=True)) * unit).sum(1).abs()
    assert torch.allclose(cosines, torch.ones(6, dtype=F64), atol=1e-6) and bool((energies.diff() <= 0).all())


def test_within_is_the_scatter_about_the_class_means() -> None:
    x, z = torch.randn(40, 5, dtype=F64) + 9, torch.arange(40) % 3
    stats = Statistics.empty(5, 4)  # one class never occurs
    stats.update(x, z)
    centred = x - torch.stack([x[z == c].mean(0) for c in range(3)])[z]
    assert torch.allclose(within(stats), centred.T @ centred / 40, atol=1e-11)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_null_space_of_the_clients_is_that_of_all_data(architecture: str, data: EditData) -> None:
    loaded = edit_models.model(architecture)
    model = wrap(loaded.module.double(), loaded.tokenizer, "double")
    whole = null_space(model, {"all": Local("all", model, data)}, [0, 1], rank=6)
    found = null_space(model, split(model, data, [0, 1, 1, 2, 0, 1], 4), [0, 1], rank=6, minimum=1)
    for a, b in zip(found.operations, whole.operations, strict=True):
        assert a.weight == b.weight
        x, y = a.u.double() @ a.v.double(), b.u.double() @ b.v.double()
        assert float((x - y).abs().max() / y.abs().max()) < 1e-10
    wrong = [{"rank": 0}, {"keep": 0.0}, {"ridge": 0.0}]
    for settings_ in wrong:
        with pytest.raises(UsageError, match="above 0"):
            null_space(model, split(model, data, [0], 1), [0], **settings_)  # type: ignore[arg-type]


def test_null_space_is_the_normal_equation(model: LoadedModel, data: EditData) -> None:
    client, site = Local("all", model, data), Site("mlp_post", 1)
    op = null_space(model, {"all": client}, [1], rank=10_000, keep=0.3).operations[0]
    how = Reading("answer", "last", ["mlp_post.1"], 1, False, 6000, "text")
    classes = client.classes(Question((site,), how))
    forget, kept = client.keys(Question((site,), how, classes))[site]
    a = kept.second_moment
    a = a + 0.01 * a.diagonal().mean() * torch.eye(len(a), dtype=F64)
    s = within(forget)
    weight = model.module.get_parameter(op.weight).detach()
    expected = -torch.linalg.solve(s + 0.3 * a, s @ weight.T).T
    assert float((op.u.double() @ op.v.double() - expected).abs().max()) < 1e-6 * float(expected.abs().max())


# ------------------------------------------------------------------ sums that can be added up


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_statistics_come_back_from_added_sums(sizes: list[int], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    sizes = [*sizes, 40]
    x, z = torch.randn(sum(sizes), 4, generator=draw, dtype=F64) + 3, torch.arange(sum(sizes)) % 2
    whole, total = Statistics.empty(4, 2), dict[str, torch.Tensor]()
    whole.update(x, z)
    for a, b in zip(x.split(sizes), z.split(sizes), strict=True):
        part = Statistics.empty(4, 2)
        part.update(a, b)
        total = {name: total.get(name, 0) + value for name, value in part.sums().items()}
    found = Statistics.from_sums(total)
    assert found.n == whole.n
    for name in ("mean_x", "mean_z", "cross", "cov", "second_moment"):
        assert torch.allclose(getattr(found, name), getattr(whole, name), rtol=1e-11, atol=1e-11)
