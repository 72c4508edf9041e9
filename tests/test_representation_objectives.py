"""Objectives on hidden states: their formulas against slow ones, their zeros, and what a few steps on them do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.train._data import fact_rows
from repforget.edit.train._depth import at_depth
from repforget.edit.train._objective import find
from repforget.edit.train._pass import HIDDEN, Request, read
from repforget.edit.train.objectives.adaptive_rmu import adaptive_rmu
from repforget.edit.train.objectives.representation_rerouting import representation_rerouting
from repforget.edit.train.objectives.rmu import direction, rmu
from repforget.edit.train.retain.hidden_distance import hidden_distance
from repforget.edit.train.retain.hidden_state import hidden_state
from repforget.knowledge import Fact
from repforget.models.load import LoadedModel
from repforget.models.weights import writers

RMU, ADAPTIVE = rmu.objective.function, adaptive_rmu.objective.function
REROUTE = representation_rerouting.objective.function
STATE, DISTANCE = hidden_state.objective.function, hidden_distance.objective.function
PROPERTY = settings(max_examples=25, deadline=None)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(2, 12), st.integers(0, 99))


def states(m: int, layers: int, width: int, seed: int) -> Tensor:
    return torch.randn(m, layers, width, generator=torch.Generator().manual_seed(seed))


@PROPERTY
@given(shapes, st.floats(0.0, 50.0))
def test_rmu_is_the_mean_squared_distance_to_one_vector(shape: tuple[int, int, int, int], length: float) -> None:
    hidden = states(*shape)
    target = length * direction(hidden, "normal", 3)
    slow = [sum(float(((h - target) ** 2).sum()) / len(target) for h in token) / len(token) for token in hidden]
    torch.testing.assert_close(RMU(hidden, coefficient=length, seed=3), torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_the_random_vector_is_a_unit_vector_of_its_seed_alone() -> None:
    hidden = states(1, 1, 512, 0)
    state = torch.random.get_rng_state()
    first, same, other = (direction(hidden, "normal", seed) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float(first.norm()) == pytest.approx(1)
    assert abs(float(first @ other)) < 0.2
    flat = [direction(hidden, "uniform01", seed) for seed in (0, 1)]
    assert float(flat[0] @ flat[1]) == pytest.approx(0.75, abs=0.05)  # E[x]² / E[x²] of a uniform draw
    assert float(flat[0].sum()) / math.sqrt(512) == pytest.approx(math.sqrt(0.75), abs=0.03)


@PROPERTY
@given(shapes, st.floats(0.1, 30.0))
def test_adaptive_rmu_scales_with_the_model(shape: tuple[int, int, int, int], factor: float) -> None:
    hidden = states(*shape)
    norms = hidden.norm(dim=-1).mean(0)
    small, large = ADAPTIVE(hidden, norms=norms), ADAPTIVE(factor * hidden, norms=factor * norms)
    torch.testing.assert_close(large, factor**2 * small, rtol=1e-3, atol=1e-6)


def test_adaptive_rmu_is_rmu_of_the_measured_length() -> None:
    hidden = states(5, 1, 8, 0)
    torch.testing.assert_close(ADAPTIVE(hidden, norms=torch.tensor([1.5]), scale=4.0, seed=2),
                               RMU(hidden, coefficient=6.0, seed=2))  # fmt: skip


@pytest.mark.parametrize("values", ["rmu", "adaptive"])
def test_steps_on_it_make_states_the_vector(values: str) -> None:
    hidden = states(6, 2, 16, 1).requires_grad_()
    optimiser = torch.optim.SGD([hidden], lr=3.0)
    for _ in range(80):
        loss = RMU(hidden, coefficient=7.0) if values == "rmu" else ADAPTIVE(hidden, norms=torch.tensor([1.4, 1.4]))
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    u = direction(hidden, "normal", 0)
    assert bool((torch.cosine_similarity(hidden, u, dim=-1) > 0.99).all())
    torch.testing.assert_close(hidden.detach().norm(dim=-1), torch.full((6, 2), 7.0), rtol=1e-2, atol=1e-2)


@PROPERTY
@given(shapes)
def test_rerouting_starts_at_one_and_ends_where_states_are_orthogonal(shape: tuple[int, int, int, int]) -> None:
    original = states(*shape)
    ones = torch.ones(shape[0])
    torch.testing.assert_close(REROUTE(original, original), ones)
    torch.testing.assert_close(REROUTE(3 * original, original), ones)
    assert bool((REROUTE(-original, original) == 0).all())
    turned = torch.stack([-original[..., 1], original[..., 0]], -1)  # a right angle in the first two coordinates
    assert float(REROUTE(turned, original[..., :2]).max()) < 1e-5


def test_weight_moves_from_rerouting_to_retaining() -> None:
    hidden, original = states(4, 2, 8, 0), states(4, 2, 8, 1)
    away = (hidden - original).norm(dim=-1).mean(1)
    for done in (0.0, 0.5, 1.0):
        torch.testing.assert_close(DISTANCE(hidden, original, turn=0.5, relative=False, done=done), 0.5 * done * away)
        torch.testing.assert_close(REROUTE(hidden, original, turn=0.5, done=done),
                                   (1 - 0.5 * done) * REROUTE(hidden, original, turn=0.5))  # fmt: skip
    torch.testing.assert_close(REROUTE(hidden, original, turn=0.25, done=1.0), 0.75 * REROUTE(hidden, original))


@PROPERTY
@given(shapes, st.floats(0.1, 30.0))
def test_relative_distance_does_not_depend_on_how_long_states_are(
    shape: tuple[int, int, int, int], factor: float
) -> None:
    hidden, original = states(*shape), states(shape[0], shape[1], shape[2], shape[3] + 1)
    small, large = DISTANCE(hidden, original, done=1.0), DISTANCE(factor * hidden, factor * original, done=1.0)
    torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(DISTANCE(2 * original, original, turn=1.0, done=1.0), torch.ones(shape[0]))


def test_retain_terms_are_zero_with_zero_gradient_at_the_start() -> None:
    original = states(4, 2, 8, 0)
    hidden = original.clone().requires_grad_()
    for loss in (STATE(hidden, original), DISTANCE(hidden, original, done=1.0)):
        assert bool((loss == 0).all())
        (gradient,) = torch.autograd.grad(loss.sum(), hidden)
        assert bool((gradient == 0).all())  # the length has a corner here: no NaN may come out of it


def test_hidden_state_is_the_mean_squared_change() -> None:
    hidden, original = states(3, 2, 8, 0), states(3, 2, 8, 1)
    torch.testing.assert_close(STATE(hidden, original), ((hidden - original) ** 2).flatten(1).mean(1))
    torch.testing.assert_close(STATE(hidden.bfloat16(), original.bfloat16()).float(), STATE(hidden, original),
                               rtol=2e-2, atol=2e-2)  # fmt: skip


@PROPERTY
@given(shapes)
def test_tokens_are_independent(shape: tuple[int, int, int, int]) -> None:
    hidden, original = states(*shape), states(shape[0], shape[1], shape[2], shape[3] + 1)
    norms = torch.ones(shape[1])
    for values in (lambda h, o: RMU(h), lambda h, o: ADAPTIVE(h, norms=norms), REROUTE, STATE, DISTANCE):
        whole = values(hidden, original)
        parts = torch.cat([values(h[None], o[None]) for h, o in zip(hidden, original, strict=True)])
        torch.testing.assert_close(whole, parts)


def test_layers_follow_the_depth() -> None:
    early = rmu.objective.layers
    assert early is not None
    assert [early(depth) for depth in (32, 26, 4, 2, 1)] == [(7,), (6,), (1,), (0,), (0,)]
    assert at_depth(10 / 32, 20 / 32)(32) == (10, 20)
    assert at_depth(10 / 32, 20 / 32)(2) == (1,)
    assert all(0 <= layer < depth for depth in range(1, 99) for layer in at_depth(0.1, 0.99)(depth))


def test_the_two_sides_are_found_and_read_the_same_layers() -> None:
    for forget, retain in (("rmu", "hidden_state"), ("adaptive_rmu", "hidden_state"),
                           ("representation_rerouting", "hidden_distance")):  # fmt: skip
        own = find(forget)
        assert own.defaults["retain"] == {retain: {}}
        kept = find(retain, "retain")
        assert kept.role == "retain"
        assert own.layers is not None and kept.layers is not None
        assert all(own.layers(depth) == kept.layers(depth) for depth in range(1, 64))
    assert "norms" not in adaptive_rmu.objective.settings
    assert "done" not in representation_rerouting.objective.settings


def _hidden(model: LoadedModel, facts: Sequence[Fact]) -> Tensor:
    rows, _ = fact_rows(model, facts, "facts")
    found = read(model, [Request(rows, frozenset({HIDDEN}), (1,))])[0].hidden
    assert found is not None
    return found.detach()[:, 0]


def test_training_moves_forget_states_to_the_vector_through_the_named_matrices_alone() -> None:
    model, data = tiny(), people().for_editor()
    before = _hidden(model, data.forget), _hidden(model, data.retain)
    length = float(before[0].norm(dim=-1).mean())
    u = direction(before[0], "normal", 0)
    turned = {}
    for weight in (0.0, 30.0):
        made = run_editor(model, data, "adaptive_rmu", layers=[1], steps=50, lr=0.04, batch_size=16, scale=5.0,
                          retain_weight=weight, max_retain_rise=99.0)  # fmt: skip
        assert set(made.manifest.weights) == {w.name for w in writers(model) if w.role == "mlp_out"}
        with made.attach(model):
            forget, retain = _hidden(model, data.forget), _hidden(model, data.retain)
        moved = (retain - before[1]).norm(dim=-1) / before[1].norm(dim=-1)
        turned[weight] = float(torch.cosine_similarity(forget, u, dim=-1).mean()), float(moved.mean())
        if weight == 0.0:
            assert float(forget.norm(dim=-1).mean()) == pytest.approx(5 * length, rel=0.3)
    assert turned[0.0][0] > 0.9
    assert turned[30.0][1] < 0.3 * turned[0.0][1]


def test_training_turns_forget_states_away() -> None:
    model, data = tiny(), people().for_editor()
    before = _hidden(model, data.forget)
    made = run_editor(model, data, "representation_rerouting", layers=[1], steps=60, lr=0.01, batch_size=16,
                      retain="none")  # fmt: skip
    with made.attach(model):
        after = _hidden(model, data.forget)
    assert float(torch.cosine_similarity(before, after, dim=-1).mean()) < 0.1


@pytest.mark.parametrize("name", ["rmu", "adaptive_rmu", "representation_rerouting"])
def test_hidden_objectives_train_faster_than_others(name: str) -> None:
    model, data = tiny(), people().for_editor()
    rates = [run_editor(model, data, each, steps=1, batch_size=4).manifest.settings["lr"] for each in (name, "npo")]
    assert rates[0] == pytest.approx(find(name).rate * rates[1])
    assert find(name).rate > 1
