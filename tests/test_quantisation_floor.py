"""Edits above the rounding step: what rounding tells apart, and what it must leave alone."""

from __future__ import annotations

import pytest
import torch
from edit_models import model as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.artifact import BiasDelta, DenseDelta, Edit, LowRankDelta, floored, load_edit, magnitude_floor
from repforget.artifact.floor import floor
from repforget.errors import NoEffectError, UsageError
from repforget.quantizers import FORMS, Form, levels, projections, round_trip, scales

KINDS = st.sampled_from(FORMS)


def _pair(seed: int, size: float, out: int = 6, width: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, width, generator=generator), size * torch.randn(out, width, generator=generator)


@settings(max_examples=25, deadline=None)
@given(KINDS, st.integers(0, 999))
def test_levels_and_scales_are_those_of_the_rounding(kind: Form, seed: int) -> None:
    weight, _ = _pair(seed, 0.0)
    codes, values = round_trip(weight, kind)
    book = levels(kind)
    lowest = 0 if kind == "nf4" else -(len(book) // 2)
    torch.testing.assert_close(book[codes.long() - lowest] * scales(weight, kind), values)


@settings(max_examples=40, deadline=None)
@given(KINDS, st.sampled_from(["balance", "zero", "enlarge"]), st.integers(0, 999), st.sampled_from([1e-3, 0.05, 1.0]))
def test_every_entry_either_keeps_its_bits_or_gets_another_code(kind: Form, small: str, seed: int, size: float) -> None:
    weight, change = _pair(seed, size)
    value = floor(weight, change, kind, small)  # type: ignore[arg-type]
    before, after = round_trip(weight, kind)[0], round_trip(value, kind)[0]
    assert torch.equal(before != after, value != weight)
    assert torch.equal(scales(value, kind), scales(weight, kind))
    assert bool(((value - weight).sign() * change.sign() >= 0).all()), "nothing moves against what was asked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FORMS)
def test_enlarged_all_free_entries_change_code(kind: Form, dtype: torch.dtype) -> None:
    weight, change = _pair(0, 1e-4)
    weight = weight.to(dtype)
    assert torch.equal(floor(weight, change, kind, "zero"), weight)
    codes = round_trip(weight, kind)[0]
    flipped = round_trip(floor(weight, change, kind, "enlarge"), kind)[0] != codes
    ends = {int(codes.min()), int(codes.max())}
    free = torch.tensor([[int(c) not in ends for c in row] for row in codes])
    assert bool(flipped[free].all())


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["int4", "int3"]), st.integers(0, 999))
def test_balance_moves_the_largest_by_as_many_steps_as_were_asked_of_all(kind: Form, seed: int) -> None:
    weight, change = _pair(seed, 0.01)
    moved = floor(weight, change, kind, "balance") != weight
    gap = scales(weight, kind) * (levels(kind)[1] - levels(kind)[0])
    steps = change.abs() / gap
    free = weight.abs() < scales(weight, kind) - gap / 2
    assert float(moved.sum()) == pytest.approx(float(steps[moved | free].sum()), abs=1.0, rel=0.15)
    assert float(steps[moved].min()) > 0.9999 * float(steps[free & ~moved].max())


def test_a_change_of_a_whole_step_is_left_as_it_is() -> None:
    weight, _ = _pair(1, 0.0)
    step = float((levels("int8")[1] - levels("int8")[0]) * scales(weight, "int8").max())
    value = floor(weight, torch.full_like(weight, 1.2 * step), "int8")
    scale = scales(weight, "int8")
    inside = (weight.abs() < scale) & ((weight + 1.2 * step).abs() < scale)
    assert torch.equal(value[inside], (weight + 1.2 * step)[inside])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_small_edit_survives_the_rounding_it_was_made_for(architecture: str) -> None:
    model = tiny(architecture)
    names = list(projections(model.module))[:3]
    generator = torch.Generator().manual_seed(0)
    operations = [DenseDelta(n, 1e-3 * torch.randn(model.module.get_parameter(n).shape, generator=generator))
                  for n in names]  # fmt: skip
    edit = magnitude_floor(Edit.build("dense", {}, model, "d", operations), model, "nf4")
    assert edit.manifest.settings["quantisation_floor"] == "nf4"
    assert "nf4 floor (balance)" in edit.manifest.notes[-1]
    before = {name: round_trip(w, "nf4")[0] for name, w in projections(model.module).items()}
    own = {name: w.clone() for name, w in projections(model.module).items()}
    with edit.attach(model):
        for name, weight in projections(model.module).items():
            codes = round_trip(weight, "nf4")[0]
            assert torch.equal(codes != before[name], weight != own[name])
            assert bool((codes != before[name]).any()) == (name in names)


def test_the_rest_of_an_edit_stays_and_it_can_be_saved(tmp_path: object) -> None:
    model = tiny("llama")
    down = "model.layers.0.mlp.down_proj"
    low = LowRankDelta(f"{down}.weight", torch.ones(32, 1) * 0.1, torch.ones(1, 48) * 0.1)
    bias = BiasDelta(f"{down}.bias", torch.ones(32))
    operations, note = floored([low, bias], model, "int4")
    assert operations[0] is bias
    assert [type(op) for op in operations[1:]] != [LowRankDelta]
    assert "int4" in note
    edit = magnitude_floor(Edit.build("low", {}, model, "d", [low, bias]), model, "int4")
    assert load_edit(edit.save(f"{tmp_path}/edit")).digest == edit.digest


def test_what_cannot_be_floored_is_refused() -> None:
    model = tiny("llama")
    table = DenseDelta("model.embed_tokens.weight", torch.ones(96, 32))
    with pytest.raises(UsageError, match="nf4"):
        floored([table], model, "fp4")
    with pytest.raises(UsageError, match="No projection"):
        floored([table], model, "nf4")
    name = "model.layers.0.mlp.down_proj.weight"
    tiny_change = Edit.build("dense", {}, model, "d", [DenseDelta(name, torch.full((32, 48), 1e-6))])
    with pytest.raises(NoEffectError):
        magnitude_floor(tiny_change, model, "nf4", "zero")
