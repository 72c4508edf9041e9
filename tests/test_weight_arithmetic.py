"""Arithmetic of weights: subspaces that stay orthogonal, straight paths between models, sums of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from artifact_tools import draw
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from test_repselect import taught
from torch import Tensor

from repforget.artifact import AddVector, Edit, LowRankDelta, average
from repforget.edit._dispatch import edit as run_editor
from repforget.edit.arithmetic.subspace_subtraction import discriminated, subspaces
from repforget.edit.train._budget import probability
from repforget.errors import ArtifactError, KnowledgeError, NoEffectError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import copy_of, fingerprint
from repforget.records import Component, Localization, RandomBand, Site

DATA = people().for_editor()
QUICK = {"steps": 3, "lr": 1e-2, "rank": 2, "max_facts": 24}
WHERE = Localization("test", (Component.parse("mlp_out.1"),), (1.0,), RandomBand(1, 5, 1, 0, 0.5, "e"))


# ------------------------------------------------------------------ subspaces


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 6), st.integers(0, 999))
def test_what_is_left_is_orthogonal_to_the_retained_subspaces(rank: int, other: int, most: int, seed: int) -> None:
    forget = LowRankDelta("w", draw(20, rank, seed=seed), draw(rank, 14, seed=seed + 1))
    retain = LowRankDelta("w", draw(20, other, seed=seed + 2), draw(other, 14, seed=seed + 3))
    left = discriminated(forget, retain, most)
    delta, r = left.u.double() @ left.v.double(), retain.u.double() @ retain.v.double()
    u, s, vh = torch.linalg.svd(r)
    kept = min(most, other)
    scale = float((forget.u @ forget.v).norm())
    assert float((u[:, :kept].T @ delta).norm()) < 1e-6 * scale
    assert float((delta @ vh[:kept].T).norm()) < 1e-6 * scale
    into, out = u[:, kept:] @ u[:, kept:].T, vh[kept:].T @ vh[kept:]
    torch.testing.assert_close(delta, into @ (forget.u @ forget.v).double() @ out, atol=1e-5, rtol=1e-5)
    a, b = subspaces(retain, most)
    torch.testing.assert_close(a @ a.T, u[:, :kept] @ u[:, :kept].T, atol=1e-9, rtol=0)
    torch.testing.assert_close(b @ b.T, vh[:kept].T @ vh[:kept], atol=1e-9, rtol=0)


def test_nothing_is_left_of_what_retained_facts_use_whole() -> None:
    one = LowRankDelta("w", draw(10, 3), draw(3, 8))
    left = discriminated(one, one, 3)
    assert float((left.u.double() @ left.v.double()).norm()) < 1e-10
    zero = LowRankDelta("w", torch.zeros(10, 3), draw(3, 8))
    assert torch.equal(discriminated(one, zero, 3).u, one.u)


@pytest.mark.parametrize("architecture", tiny_models.ALL)
def test_layer_by_layer_it_gives_low_rank_deltas(architecture: str) -> None:
    model = tiny(architecture)
    edit = run_editor(model, DATA, "subspace_subtraction", strength=1.0, **{**QUICK, "steps": 1})
    assert fingerprint(model.module) == model.fingerprint and edit.artifact == "weights"
    assert all(isinstance(op, LowRankDelta) and op.u.shape[1] == 2 for op in edit.operations)
    layers = {part for name in edit.touched for part in name.split(".") if part.isdigit()}
    assert layers == {"0", "1"} and "lies outside the subspaces" in edit.manifest.notes[1]


def test_the_strength_keeps_what_it_says_and_the_localisation_says_where() -> None:
    model = taught()
    known = {side: probability(model, getattr(DATA, side), side, 0) for side in ("forget", "retain")}
    before = {side: measure() for side, measure in known.items()}
    edit = run_editor(model, DATA, "subspace_subtraction", keep=0.9, steps=20, rank=4)
    with edit.attach(model):
        after = {side: measure() for side, measure in known.items()}
    assert after["retain"] >= 0.9 * before["retain"] - 1e-6
    assert after["forget"] / before["forget"] < after["retain"] / before["retain"]
    some = run_editor(model, DATA, "subspace_subtraction", where=WHERE, strength=1.0, **QUICK)
    assert all(".layers.1." in name for name in some.touched)


def test_refusals_of_the_subtraction() -> None:
    model = taught()
    for empty in ({"forget": ()}, {"retain": ()}):
        data = EditData(**{**vars(DATA), **empty})
        with pytest.raises(KnowledgeError, match="give facts of both"):
            run_editor(model, data, "subspace_subtraction", **QUICK)
    for wrong in ({"rank": 0}, {"retain_rank": 0}, {"steps": 0}):
        with pytest.raises(UsageError, match="positive"):
            run_editor(model, DATA, "subspace_subtraction", **{**QUICK, **wrong})


# ------------------------------------------------------------------ interpolation


def other_of(model: Any, seed: int = 1) -> Any:
    """Another model of the same shape."""
    from repforget.models.load import wrap

    found = copy_of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in found.module.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return wrap(found.module, model.tokenizer, "other")


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "llama_tied", "mixtral"])
def test_strength_one_is_the_other_model_and_a_half_the_middle(architecture: str, tmp_path: Path) -> None:
    model = tiny(architecture)
    other = other_of(model)
    other.module.save_pretrained(tmp_path)
    other.tokenizer.save_pretrained(tmp_path)
    for strength in (1.0, 0.5, -1.0):
        edit = run_editor(model, DATA, "interpolation", toward=str(tmp_path), strength=strength)
        start = {name: p.detach().clone() for name, p in model.module.named_parameters()}
        with edit.attach(model):
            for (name, mine), theirs in zip(model.module.named_parameters(), other.module.parameters(), strict=True):
                expected = start[name] + strength * (theirs - start[name])
                torch.testing.assert_close(mine, expected, atol=1e-6, rtol=0, msg=name)
    assert fingerprint(model.module) == model.fingerprint


def test_towards_the_model_tuned_on_what_stays() -> None:
    model = taught()
    facts = probability(model, DATA.retain, "retain", 0)
    before = facts()
    edit = run_editor(model, DATA, "interpolation", steps=10, lr=1e-3)
    with edit.attach(model):
        assert facts() > before
    low = run_editor(model, DATA, "interpolation", steps=2, adapter="lora", where=WHERE)
    assert all(isinstance(op, LowRankDelta) and ".layers.1." in op.weight for op in low.operations)


def test_towards_an_edit_of_this_model(tmp_path: Path) -> None:
    model = taught()
    edit = run_editor(model, DATA, "task_vector", strength=1.0, steps=2, adapter="lora")
    edit.save(tmp_path / "edit")
    half = run_editor(model, DATA, "interpolation", toward=str(tmp_path / "edit"), strength=0.5)
    for mine, whole in zip(half.operations, edit.operations, strict=True):
        torch.testing.assert_close(product(mine), 0.5 * product(whole))
    with pytest.raises(ArtifactError, match="was made for"):
        run_editor(tiny("llama"), DATA, "interpolation", toward=str(tmp_path / "edit"))
    hooked = Edit.build("push", {}, model, "", [AddVector(Site("resid_post", 0), torch.ones(model.width))])
    hooked.save(tmp_path / "hooked")
    with pytest.raises(UsageError, match="no straight path"):
        run_editor(model, DATA, "interpolation", toward=str(tmp_path / "hooked"))


def test_models_of_another_shape_or_without_a_difference_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    for name in ("gpt2", "llama"):
        known = tiny(name)
        known.module.save_pretrained(tmp_path / name)
        known.tokenizer.save_pretrained(tmp_path / name)
    with pytest.raises(UsageError, match="have different parameters"):
        run_editor(model, DATA, "interpolation", toward=str(tmp_path / "gpt2"))
    with pytest.raises(NoEffectError, match="changes nothing"):
        run_editor(model, DATA, "interpolation", toward=str(tmp_path / "llama"))
    with pytest.raises(UsageError, match="name a model or an edit"):
        run_editor(model, EditData(**{**vars(DATA), "retain": ()}), "interpolation")


# ------------------------------------------------------------------ adapters


def product(operation: Any) -> Tensor:
    return operation.u.double() @ operation.v.double()  # type: ignore[no-any-return]


def adapter(model: Any, rank: int, seed: int) -> Edit:
    up, out = "model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    return Edit.build("lora", {}, model, str(seed), [
        LowRankDelta(up, draw(48, rank, seed=seed), draw(rank, 32, seed=seed + 1)),
        LowRankDelta(out, draw(32, rank, seed=seed + 2), draw(rank, 32, seed=seed + 3)),
    ])  # fmt: skip


def exported(edit: Edit, model: Any, folder: Path) -> dict[str, Tensor]:
    """The deltas that PEFT merges from the exported adapter."""
    from peft import PeftModel

    base = dict(model.module.named_parameters())
    edit.export_peft(model, folder)
    merged = PeftModel.from_pretrained(copy_of(model).module, str(folder)).merge_and_unload()
    return {n: p.detach().double() - base[n].double() for n, p in merged.named_parameters() if n in edit.touched}


@pytest.mark.parametrize("weights", [[-1.0], [1.0, 1.0], [0.5, -2.0, 0.25], [1.0, -1.0 / 3]])
def test_sums_of_adapters_stay_low_rank_and_are_sums_of_their_deltas(weights: list[float], tmp_path: Path) -> None:
    model = tiny("llama")
    edits = [adapter(model, rank, 10 * rank) for rank in range(1, len(weights) + 1)]
    joined = average(edits, weights)
    assert {op.u.shape[1] for op in joined.operations if isinstance(op, LowRankDelta)} == {sum(range(len(weights) + 1))}
    parts = [exported(edit, model, tmp_path / str(i)) for i, edit in enumerate(edits)]
    found = exported(joined, model, tmp_path / "joined")
    for name, delta in found.items():
        exact = sum(w * product(op) for w, e in zip(weights, edits, strict=True)
                    for op in e.operations if isinstance(op, LowRankDelta) and op.weight == name)  # fmt: skip
        assert isinstance(exact, Tensor)
        assert float((delta - exact).abs().max()) < 1e-6 * max(1.0, float(exact.abs().max())) * 4
        summed = sum(w * part[name] for w, part in zip(weights, parts, strict=True))
        assert isinstance(summed, Tensor)
        torch.testing.assert_close(delta, summed, atol=1e-5, rtol=1e-5)


def test_the_sum_is_that_of_concatenated_adapters_in_peft(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny("llama")
    one, two = adapter(model, 2, 3), adapter(model, 3, 50)
    one.export_peft(model, tmp_path / "one")
    two.export_peft(model, tmp_path / "two")
    peer: Any = PeftModel.from_pretrained(copy_of(model).module, str(tmp_path / "one"), adapter_name="one")
    peer.load_adapter(str(tmp_path / "two"), adapter_name="two")
    peer.add_weighted_adapter(["one", "two"], [2.0, 0.5], "sum", combination_type="cat")
    peer.set_adapter("sum")
    merged = dict(peer.merge_and_unload().named_parameters())
    with average([one, two], [2.0, 0.5]).attach(model):
        for name, mine in model.module.named_parameters():
            torch.testing.assert_close(mine.detach(), merged[name].detach(), atol=1e-5, rtol=1e-5)


def test_an_adapter_less_itself_is_nothing_and_its_inverse_its_negation() -> None:
    model = tiny("llama")
    edit = adapter(model, 2, 5)
    inverse, negated = edit.inverse().operations, average([edit], [-1.0]).operations
    for mine, other in zip(inverse[::-1], negated, strict=True):
        torch.testing.assert_close(product(mine), product(other))
    for op in average([edit, edit], [1.0, -1.0]).operations:
        assert float(product(op).abs().max()) < 1e-6
