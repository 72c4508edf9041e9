"""The operation that clamps features: analytic with an exact dictionary, the sequence gate with and without a cache."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from artifact_tools import hook_count, tiny
from torch import Tensor

from repforget.artifact import AddVector, ClampFeatures, Edit, Gate, average, load_edit, placebo_of, size
from repforget.artifact.operations import is_zero, scaled
from repforget.errors import ArtifactError, NoEffectError
from repforget.models.capture import Batch, capture, forward
from repforget.models.load import LoadedModel, wrap
from repforget.records import Site

HERE = Site("resid_post", 0)
BASIS = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3))).Q
ROWS = [[4, 9, 6, 7, 11], [5, 9], [8, 4, 9, 9]]


def clamp(n: int = 3, factor: float = 0.0, value: float = 0.0, threshold: float = 0.0, **changes: Any) -> ClampFeatures:
    """The first ``n`` directions of an orthonormal basis, read by relu."""
    whole = torch.full((n,), 1.0)
    return ClampFeatures(HERE, BASIS[:n], torch.zeros(n), threshold * whole, BASIS[:n], factor * whole, value * whole,
                         **changes)  # fmt: skip


def build(model: LoadedModel, *operations: Any) -> Edit:
    return Edit.build("clamp", {}, model, "data", operations)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny("llama")


def states(model: LoadedModel, row: list[int]) -> Tensor:
    return capture(model, [HERE], Batch.pad([row]), "all")[HERE][0]


@pytest.mark.parametrize(("factor", "value"), [(0.0, 0.0), (0.0, -2.0), (-1.5, 0.0), (0.5, 1.0)])
def test_active_features_take_the_value_and_nothing_else_moves(model: LoadedModel, factor: float, value: float) -> None:
    before = states(model, ROWS[0])
    with build(model, clamp(factor=factor, value=value)).attach(model):
        after = states(model, ROWS[0])
    f, new = before @ BASIS.T, after @ BASIS.T
    wanted = f.clone()
    wanted[1:, :3] = torch.where(f[1:, :3] > 0, factor * f[1:, :3] + value, f[1:, :3])
    torch.testing.assert_close(new, wanted, atol=1e-5, rtol=1e-4)
    assert torch.equal(before[0], after[0]) and not torch.equal(before, after)


def test_with_nothing_active_or_at_its_own_value_it_is_the_identity(model: LoadedModel) -> None:
    before = forward(model, Batch.pad(ROWS))
    with build(model, clamp(value=-5.0, threshold=1e6)).attach(model):
        assert torch.equal(forward(model, Batch.pad(ROWS)), before)
    with build(model, clamp(value=-5.0)).scaled(0.0).attach(model):
        assert torch.equal(forward(model, Batch.pad(ROWS)), before)
    assert is_zero(clamp(factor=1.0)) and is_zero(scaled(clamp(value=3.0), 0.0)) and not is_zero(clamp())
    with pytest.raises(NoEffectError):
        build(model, clamp(factor=1.0))


def test_half_strength_goes_half_the_way(model: LoadedModel) -> None:
    edit = build(model, clamp(value=-2.0))
    before = states(model, ROWS[0])
    with edit.attach(model):
        whole = states(model, ROWS[0])
    with edit.scaled(0.5).attach(model):
        half = states(model, ROWS[0])
    torch.testing.assert_close(half, (before + whole) / 2, atol=1e-5, rtol=1e-4)
    assert size(clamp(value=-2.0)) == pytest.approx((3 * (1 + 4)) ** 0.5, rel=1e-5)


def test_scaled_inputs_are_changed_in_their_own_units(model: LoadedModel) -> None:
    before = states(model, ROWS[0])
    unit = before.norm(dim=1, keepdim=True) / 32**0.5
    with build(model, clamp(value=-2.0, scaling="constant_norm_rescale")).attach(model):
        after = states(model, ROWS[0])
    f = before / unit @ BASIS[:3].T
    moved = torch.where(f > 0, -2.0 - f, 0.0) @ BASIS[:3] * unit
    torch.testing.assert_close(after[1:], (before + moved)[1:], atol=1e-5, rtol=1e-4)


GATES = {
    "plain": {},
    "share": {"share": 0.45, "prior": 1.0},
    "share and gate": {"share": 0.2, "gate": Gate(BASIS[5], 0.0, site=Site("embed"))},
}


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_padding_and_batch_do_not_matter(architecture: str, name: str) -> None:
    model = tiny(architecture)
    base = forward(model, Batch.pad([ROWS[0]]))[0]
    with build(model, clamp(6, value=-4.0, **GATES[name])).attach(model):
        alone = [forward(model, Batch.pad([row]))[0] for row in ROWS]
        for side in ("left", "right"):
            batch = Batch.pad(ROWS, side=side)
            together = forward(model, batch)
            for row, single in zip(range(3), alone, strict=True):
                torch.testing.assert_close(together[row][batch.mask[row].bool()], single, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone[0], base, atol=1e-3)


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_token_by_token_it_decides_as_on_the_whole_text(architecture: str, name: str) -> None:
    model = tiny(architecture)
    row = [4, 9, 6, 7, 11, 13, 8]
    with build(model, clamp(6, value=-4.0, **GATES[name])).attach(model), torch.no_grad():
        whole = forward(model, Batch.pad([row]))[0]
        cache, parts = None, []
        for step in ([row[:3]], [row[3:4]], [row[4:5]], [row[5:]]):
            out = model.module(input_ids=torch.tensor(step), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0])
        torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)


def test_the_gate_stays_with_the_rows_of_a_cache(model: LoadedModel) -> None:
    """A repeated prompt continues in each of its rows as it would alone."""
    import copy

    with build(model, clamp(6, value=-4.0, share=0.45)).attach(model), torch.no_grad():
        tails = [[9, 8], [10, 8]]
        whole = [forward(model, Batch.pad([ROWS[0] + tail]))[0, 5:] for tail in tails]
        cache = model.module(input_ids=torch.tensor([ROWS[0]]), use_cache=True).past_key_values
        both = copy.deepcopy(cache)
        both.batch_repeat_interleave(2)
        out = model.module(input_ids=torch.tensor(tails), past_key_values=both, use_cache=True)
        torch.testing.assert_close(out.logits, torch.stack(whole), atol=1e-4, rtol=1e-4)


def test_a_closed_gate_changes_no_bit_and_an_open_one_changes_later_tokens(model: LoadedModel) -> None:
    base = states(model, ROWS[0])
    active = (base[1:] @ BASIS[:3].T > 0).any(1)
    shares = active.cumsum(0) / torch.arange(1, 5)
    with build(model, clamp(value=-4.0, share=float(shares.max()))).attach(model):
        assert torch.equal(states(model, ROWS[0]), base)
    level = float(shares.max()) - 1e-3
    first = int((shares > level).nonzero()[0]) + 1
    with build(model, clamp(value=-4.0, share=level)).attach(model):
        after = states(model, ROWS[0])
    changed = (after != base).any(1)
    wanted = torch.tensor([False, *active.tolist()])
    wanted[:first] = False
    assert torch.equal(changed, wanted)


def test_saved_reloaded_copied_and_composed(model: LoadedModel, tmp_path: Path) -> None:
    edit = build(model, clamp(value=-4.0, **GATES["share and gate"]))
    loaded = load_edit(edit.save(tmp_path / "edit"))
    assert loaded.digest == edit.digest
    with edit.attach(model):
        expected = forward(model, Batch.pad(ROWS))
    assert torch.equal(forward(loaded.applied_to(model), Batch.pad(ROWS)), expected)
    twice = edit.then(build(model, AddVector(HERE, torch.ones(32))))
    assert [op.kind for op in load_edit(twice.save(tmp_path / "both")).operations] == ["clamp_features", "add_vector"]
    assert hook_count(model.module) == 0


def test_it_has_no_form_in_weights(model: LoadedModel, tmp_path: Path) -> None:
    edit = build(model, clamp(value=-4.0))
    assert edit.artifact == "weights+hook"
    with pytest.raises(ArtifactError, match="which a checkpoint cannot hold"):
        edit.export_checkpoint(model, tmp_path / "checkpoint")
    with pytest.raises(ArtifactError, match="no exact inverse"):
        edit.inverse()
    with pytest.raises(ArtifactError, match="no exact average"):
        average([edit])
    undo = edit.fold(model)
    assert undo.hooked == ("resid_post.0",) and not undo.touched
    undo()


def test_its_placebo_is_active_where_it_is(model: LoadedModel) -> None:
    """Same tokens, same lengths and angles, turned directions."""
    edit = build(model, clamp(value=-4.0))
    (turned,) = placebo_of(edit, model, seed=1).operations
    assert isinstance(turned, ClampFeatures)
    torch.testing.assert_close(turned.decoder @ turned.decoder.T, torch.eye(3), atol=1e-5, rtol=0)
    assert not torch.allclose(turned.decoder, BASIS[:3], atol=0.1)
    assert torch.equal(turned.encoder, BASIS[:3])


def test_shapes_that_do_not_fit_are_refused(model: LoadedModel) -> None:
    with pytest.raises(ArtifactError, match="one bias"):
        build(model, dataclasses.replace(clamp(), bias=torch.zeros(2)))
    with pytest.raises(ArtifactError, match="does not fit"):
        build(model, dataclasses.replace(clamp(), encoder=torch.zeros(3, 31)))
    with pytest.raises(ArtifactError, match="does not fit"):
        build(wrap(model.module, None), dataclasses.replace(clamp(), site=Site("mlp_post", 0)))
