"""Pruning and dampening: what is taken, how much of it, and in which order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given
from hypothesis import strategies as st
from test_locate_planted import KNOWLEDGE
from test_locate_planted import model as planted_model
from test_neuron_edits import changed, columns_down, neuron, probability, where
from torch import Tensor

import repforget as rf
from repforget.artifact import Edit
from repforget.attribution import runs_of, visit_gradients
from repforget.columns import value_vector
from repforget.edit.surgery._units import removal
from repforget.edit.surgery.ssd import _information, _texts, dampened
from repforget.errors import NoEffectError
from repforget.masks import masks_of
from repforget.models.capture import Batch, capture
from repforget.models.value_vectors import projections
from repforget.models.weights import find, get_weight
from repforget.records import Component, Site


@pytest.mark.parametrize("units", ["neurons", "attention", "both"])
def test_pruning_takes_the_ratio_in_every_step(units: Any) -> None:
    model = tiny("llama")
    for steps in (1, 3):
        edit = rf.edit(model, people(), "selective_pruning", units=units, ratio=0.05, max_steps=steps, target=0.0)
        after = edit.applied_to(model)
        down = sum(int((get_weight(after.module, ref) == 0).all(0).sum()) for ref in projections(after.module))
        z = sum(int((get_weight(after.module, find(after.module, "attn_out", k)) == 0).all(0).sum()) for k in (0, 1))
        assert down == (0 if units == "attention" else steps * round(0.05 * 96))
        assert z == (0 if units == "neurons" else steps * round(0.05 * 64))


def test_pruning_takes_what_forget_texts_use_most_relative_to_retained_ones() -> None:
    model, data, site = tiny("llama"), people().for_editor(), Site("mlp_post", 0)

    def used(texts: list[str]) -> Tensor:
        rows = [model.tokenizer(text)["input_ids"] for text in texts]
        sites = [site, Site("mlp_post", 1)]
        found = [capture(model, sites, Batch.pad([row]), "all") for row in rows]
        return torch.cat([torch.cat([x[s][0, 1:] for x in found]).double().abs().mean(0) for s in sites])

    ratio = used([f.prompt + f.answer for f in data.forget]) / used(
        [*(f.prompt + f.answer for f in data.retain), *data.general])  # fmt: skip
    edit = rf.edit(model, people(), "selective_pruning", ratio=0.05, max_steps=1, target=0.0, damping=1e-9)
    best = ratio.argsort(descending=True)[: round(0.05 * len(ratio))].tolist()
    width = len(ratio) // 2
    assert columns_down(model, edit) == {neuron(n // width, n % width) for n in best}


def test_pruning_stops_at_its_target_and_spares_idle_units() -> None:
    known = planted_model(1)
    first = probability(known)
    edit = rf.edit(known, KNOWLEDGE, "selective_pruning", ratio=0.05, target=0.5)
    left = probability(edit.applied_to(known))
    assert left <= 0.5 * first and f"-> {left:.3f}" in edit.manifest.notes[-1]
    longer = rf.edit(known, KNOWLEDGE, "selective_pruning", ratio=0.05, target=0.25)
    assert set(columns_down(known, edit)) < set(columns_down(known, longer))
    model = tiny("llama")
    idle = Edit.build("idle", {}, model, "x", removal(model, [neuron(0, n) for n in range(24)], "all"))
    muted = idle.applied_to(model)
    whole = rf.edit(muted, people(), "selective_pruning", ratio=0.9, target=0.0, max_steps=1, max_facts=8)
    weights = {op.weight for op in whole.operations}
    assert weights and not any(op.values.eq(0).any() for op in whole.operations), "what is 0 already was not taken"


def test_pruning_follows_a_localisation_in_its_order() -> None:
    model = tiny("llama")
    order = [neuron(1, 7), neuron(0, 2), neuron(0, 5), neuron(1, 1)]
    edit = rf.edit(model, people(), "selective_pruning", where=where(*order), ratio=0.02, max_steps=1, target=0.0)
    after = edit.applied_to(model)
    gone = {c for c in order if not value_vector(after, c).any()}
    assert gone == set(order[: round(0.02 * 96)])
    heads = where(Component(Site("attn_z", 1, 2)), Component(Site("attn_z", 0, 1)))
    edit = rf.edit(model, people(), "selective_pruning", units="attention", where=heads, ratio=8 / 64, max_steps=1,
                   target=0.0)  # fmt: skip
    (differs,) = changed(model, edit).values()
    assert differs.any(0).nonzero()[:, 0].tolist() == list(range(16, 24))


# ssd


@given(st.integers(0, 2**31 - 1), st.floats(0.1, 20), st.floats(0, 5))
def test_weights_shrink_only_where_forget_information_dominates(seed: int, alpha: float, dampening: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    forget, retain = torch.rand(2, 6, 5, generator=generator).pow(4)
    forget[0], retain[1] = 0, 0
    factor = dampened(forget, retain, alpha, dampening)
    assert ((factor >= 0) & (factor <= 1)).all() and (factor[0] == 1).all()
    kept = forget <= alpha * retain
    assert (factor[kept] == 1).all() and (factor[1] == 0).all()
    expected = (dampening * retain.double() / forget.double()).clamp(max=1.0)
    torch.testing.assert_close(factor[~kept], expected[~kept], rtol=1e-9, atol=0)
    assert (dampened(torch.zeros_like(forget), retain, alpha, dampening) == 1).all()


def test_information_is_of_single_facts() -> None:
    model = tiny("llama")
    asked = runs_of(model.tokenizer, people().for_editor().forget[:4])
    name = "model.layers.0.mlp.up_proj.weight"
    (whole,) = _information(model, asked, [name], None).values()
    singles = [next(iter(_information(model, [run], [name], None).values())) for run in asked]
    torch.testing.assert_close(whole, torch.stack(singles).mean(0), rtol=1e-5, atol=1e-12)
    gradients: list[Tensor] = []
    visit_gradients(model, asked, [name], lambda g: gradients.append(g[name]))
    batch = torch.stack(gradients).mean(0).square()
    assert float(batch.sum()) < 0.9 * float(whole.sum()), "the square of a mean is another, smaller number"


def test_information_is_of_the_mean_over_tokens() -> None:
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    for text in ("the red cat", "the red cat lives in Oslo and the dog in Rome"):
        (found,) = _information(model, _texts(model, [text]), [name], None).values()
        (ids,) = model.tokenizer([text], return_tensors="pt")["input_ids"][:, :]
        weight = model.module.get_parameter(name)
        weight.requires_grad_(True)
        told = model.module(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        (slope,) = torch.autograd.grad(told.gather(1, ids[1:, None]).mean(), [weight])
        weight.requires_grad_(False)
        torch.testing.assert_close(found, slope.square(), rtol=1e-4, atol=1e-9)


def test_ssd_shrinks_and_keeps_to_the_units_of_a_localisation() -> None:
    model = tiny("llama")
    edit = rf.edit(model, people(), "ssd", alpha=1.0, max_facts=12)
    after = edit.applied_to(model)
    for name, differs in changed(model, edit).items():
        old, new = model.module.get_parameter(name)[differs], after.module.get_parameter(name)[differs]
        assert (new.abs() <= old.abs()).all() and (new * old >= 0).all()
    chosen = [neuron(0, 3), Component(Site("attn_z", 1, 2))]
    held = rf.edit(model, people(), "ssd", alpha=1.0, max_facts=12, where=where(*chosen))
    masks = masks_of(model, chosen).masks
    for name, differs in changed(model, held).items():
        assert not (differs & ~masks[name]).any()
    alone = changed(model, rf.edit(model, people(), "ssd", alpha=1.0, max_facts=12, parameters="mlp"))
    assert alone and all(".mlp." in name for name in alone)
    with pytest.raises(NoEffectError):
        rf.edit(model, people(), "ssd", alpha=1e12, max_facts=12, parameters="attention")
