"""Gradients of units against differentiating each unit alone; clipping, drawing and noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from repforget.errors import UsageError
from repforget.private.adapters import Trained, everything, low_rank
from repforget.private.gradients import clipped_sum, passes, per_record, record_losses
from repforget.private.units import DRAW, NOISE, Randomness, units_of
from repforget.training import Example, Record, only

FULL = ("gpt2", "llama", "llama_tied", "gpt_neox", "qwen2", "olmo2")

LOW = ("gpt2", "llama", "gemma2", "mixtral")


def units(seed: int = 0) -> list[list[Example]]:
    """Three units of 3, 1 and 4 records of unequal lengths, loss on the last tokens only."""
    ids = tiny_models.sample_ids(8, 9, seed)
    rows = [Example(tuple(r), tuple(k >= len(r) - 1 - n % 3 for k in range(len(r)))) for n, r in enumerate(ids)]
    return [rows[:3], rows[3:4], rows[4:]]


def trained(name: str, rank: int | None) -> tuple[nn.Module, Trained]:
    module = tiny_models.build(name)
    if rank is None:
        return module, everything(module, copy.deepcopy(module))
    target = low_rank(module, rank, seed=1)
    generator = torch.Generator().manual_seed(2)
    for parameter in target.parameters.values():  # so that neither side's gradient is zero
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return module, target


def alone(module: nn.Module, target: Trained, unit: Sequence[Example], loss: Any = "mean") -> list[Tensor]:
    """The slow right answer: one record after the other."""
    parameters = list(target.parameters.values())
    total = [torch.zeros_like(p) for p in parameters]
    for example in unit:
        own = torch.autograd.grad(record_losses(module, [example], loss).sum(), parameters, allow_unused=True)
        total = [t if g is None else t + g / len(unit) for t, g in zip(total, own, strict=True)]
    return total


def norm(gradients: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


@pytest.mark.parametrize("name,rank", [*((n, None) for n in FULL), *((n, 3) for n in LOW)])
def test_each_unit_is_clipped_as_one(name: str, rank: int | None) -> None:
    module, target = trained(name, rank)
    parameters = list(target.parameters.values())
    shapes = [p.shape for p in parameters]
    with only(module, parameters), per_record(module, target.parameters) as gradients:
        for most in (100, 2):  # all records at a time, and units cut into passes
            free, norms = clipped_sum(gradients, units(), shapes, 1e9, most)
            clip = 0.5 * sorted(norms)[1]
            cut, again = clipped_sum(gradients, units(), shapes, clip, most)
            assert again == pytest.approx(norms, rel=1e-4)
            single = [clipped_sum(gradients, [unit], shapes, clip, most)[0] for unit in units()]
            assert all(norm(s) <= clip for s in single)
            assert norm(single[0]) == pytest.approx(clip, rel=1e-5) or norms[0] < clip
    with only(module, parameters):
        exact = [alone(module, target, unit) for unit in units()]
    assert norms == pytest.approx([norm(g) for g in exact], rel=1e-3)
    wanted = [[g * min(1.0, clip / norm(one)) for g in one] for one in exact]
    for place in range(len(parameters)):
        torch.testing.assert_close(free[place], sum(one[place] for one in exact), atol=2e-4, rtol=1e-3)
        torch.testing.assert_close(cut[place], sum(one[place] for one in wanted), atol=2e-4, rtol=1e-3)
    # Clipping record by record instead is another sum, and lets a unit of several records weigh more.
    records = [[min(1.0, clip / norm(g)) * t for t in g] for g in (alone(module, target, [e]) for e in units()[2])]
    assert norm([torch.stack(parts).sum(0) for parts in zip(*records, strict=True)]) > 1.5 * clip


def test_the_model_is_left_without_hooks_and_marks() -> None:
    module, target = trained("gpt2", None)
    with only(module, list(target.parameters.values())), per_record(module, target.parameters) as gradients:
        gradients(units()[0])
    assert not any(part._forward_hooks or part._backward_hooks or part.training for part in module.modules())
    assert not any(hasattr(p, "grad_sample") or p.grad is not None for p in module.parameters())
    assert not any(hasattr(part, "activations") for part in module.modules())


def test_a_records_loss_is_its_own_mean_or_sum_whatever_stands_beside_it() -> None:
    module, _ = trained("llama", None)
    rows = [e for unit in units() for e in unit]
    with torch.no_grad():
        together = record_losses(module, rows)
        single = torch.stack([record_losses(module, [row])[0] for row in rows])
        sums = record_losses(module, rows, "sum")
    torch.testing.assert_close(together, single, atol=1e-5, rtol=1e-5)
    counts = torch.tensor([sum(row.labelled[1:]) for row in rows])
    torch.testing.assert_close(sums, together * counts, atol=1e-5, rtol=1e-5)
    assert len(set(counts.tolist())) > 1


def test_layers_that_mix_records_are_refused_in_our_words() -> None:
    module = tiny_models.build("llama")
    module.model.norm = nn.BatchNorm1d(tiny_models.WIDTH)
    target = everything(module, copy.deepcopy(module))
    with (
        pytest.raises(UsageError, match=r"opacus: BatchNorm .*--rank"), only(module, list(target.parameters.values())),
        per_record(module, target.parameters),
    ):  # fmt: skip
        pass


@pytest.mark.parametrize("name", ["mixtral", "gemma2"])  # experts mix records; an embedding with a buffer
def test_other_layers_that_opacus_cannot_take_are_refused(name: str) -> None:
    module, target = trained(name, None)
    with only(module, list(target.parameters.values())), pytest.raises(UsageError, match="--rank"), \
            per_record(module, target.parameters) as gradients:  # fmt: skip
        gradients(units()[0])


def test_gradients_that_are_not_a_records_own_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from opacus.grad_sample import GradSampleModule

    module, target = trained("llama", 3)
    right = GradSampleModule.GRAD_SAMPLERS[nn.Linear]

    def mixed(layer: Any, activations: Any, backprops: Tensor) -> Any:
        return right(layer, activations, backprops.flip(0))

    monkeypatch.setitem(GradSampleModule.GRAD_SAMPLERS, nn.Linear, mixed)
    with only(module, list(target.parameters.values())), pytest.raises(UsageError, match="not that record's own"), \
            per_record(module, target.parameters) as gradients:  # fmt: skip
        gradients(units()[0])


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_passes_cover_every_record_once_within_the_limit(sizes: list[int], most: int) -> None:
    seen = []
    for piece in passes(sizes, most):
        assert 0 < sum(last - first for _, first, last in piece) <= most
        seen += [(unit, k) for unit, first, last in piece for k in range(first, last)]
    assert seen == [(unit, k) for unit, size in enumerate(sizes) for k in range(size)]


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    def broken(examples: Sequence[Example]) -> list[Tensor]:
        return [torch.tensor([[math.nan, 1.0]] * len(examples))]

    sums, norms = clipped_sum(broken, [units()[0]], [torch.Size([2])], 1.0)
    assert torch.equal(sums[0], torch.zeros(2))
    assert not math.isfinite(norms[0])


def test_no_unit_is_a_zero_sum() -> None:
    sums, norms = clipped_sum(lambda examples: [], [], [torch.Size([2, 3])], 1.0)
    assert torch.equal(sums[0], torch.zeros(2, 3)) and norms == []


def test_noise_has_the_deviation_it_is_said_to_have() -> None:
    source, clip, multiplier = Randomness(5), 0.7, 1.3
    draws = torch.stack([source.add_noise(step, [torch.zeros(1)], multiplier * clip)[0] for step in range(10_000)])
    assert float(draws.std()) == pytest.approx(multiplier * clip, rel=0.03)
    assert abs(float(draws.mean())) < 4 * multiplier * clip / 100
    one, other = (torch.cat([t.flatten() for t in source.add_noise(0, [torch.zeros(50, 2)] * 2, 1.0)]) for _ in "ab")
    assert torch.equal(one, other), "a step done again adds the same noise"
    assert len(set(one.tolist())) == 200, "every coordinate of every tensor has noise of its own"


def test_units_are_drawn_each_with_its_own_chance() -> None:
    source = Randomness(3)
    drawn = np.zeros((4000, 6))
    for step in range(len(drawn)):
        drawn[step, source.drawn(step, 6, 0.3)] = 1
    assert drawn.mean(0) == pytest.approx(np.full(6, 0.3), abs=0.03)
    sizes = drawn.sum(1)
    assert sizes.var() == pytest.approx(6 * 0.3 * 0.7, rel=0.1), "a batch of fixed size would not vary"
    assert (sizes == 0).mean() == pytest.approx(0.7**6, abs=0.02)
    assert source.drawn(0, 6, 1.0) == [0, 1, 2, 3, 4, 5]
    assert Randomness.fresh() != Randomness.fresh()


def test_who_is_drawn_and_the_noise_of_a_step_come_from_streams_of_their_own() -> None:
    source, purposes = Randomness(3), (DRAW, NOISE)
    assert len({source.of(step, purpose).random() for step in range(50) for purpose in purposes}) == 100
    for step in range(3):  # and each is used for what it is there for
        assert source.drawn(step, 9, 0.5) == np.flatnonzero(source.of(step, DRAW).random(9) < 0.5).tolist()
        (noise,) = source.add_noise(step, [torch.zeros(4, dtype=torch.float64)], 1.0)
        assert noise.tolist() == source.of(step, NOISE).standard_normal(4).tolist()


def test_a_unit_is_all_records_of_a_cluster() -> None:
    records = [Record(f"r{n}", "ab"[n % 2], "", "x") for n in range(5)]
    assert units_of(records, "cluster") == ((0, 2, 4), (1, 3))
    assert units_of(records, "record") == ((0,), (1,), (2,), (3,), (4,))
