"""Edits of single units and weights: exact removal, what they may touch, conditions that hold after them, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given
from hypothesis import strategies as st
from test_locate_planted import KNOWLEDGE
from test_locate_planted import model as planted_model
from test_neuron_locators import CITIES, plant
from torch import Tensor

import repforget as rf
from repforget.artifact import Edit
from repforget.attribution import runs_of, visit_gradients
from repforget.columns import value_vector
from repforget.edit.erase.ember import factorised
from repforget.edit.surgery._units import channel_removal, removal
from repforget.edit.surgery.revs import _linear, _targets, lowered
from repforget.edit.surgery.ssd import _information, _texts, dampened
from repforget.errors import NoEffectError, NumericalError, SiteError, UsageError
from repforget.masks import masks_of
from repforget.models.capture import Batch, capture, forward, hooks
from repforget.models.load import LoadedModel
from repforget.models.value_vectors import projections, spoken
from repforget.models.weights import find, get_weight
from repforget.records import Component, Localization, RandomBand, Site
from repforget.scoring import answer_logprobs

DENSE = tuple(name for name in tiny_models.ALL if name != "mixtral")
QUICK: dict[str, dict[str, Any]] = {
    "neuron_zeroing": {"max_facts": 6, "steps": 3}, "needle": {"vectors": 3}, "revs": {"max_facts": 6},
    "selective_pruning": {"max_facts": 12, "max_steps": 2}, "ssd": {"max_facts": 6}, "ember": {"steps": 3},
}  # fmt: skip
OF_COLUMNS = ("neuron_zeroing", "needle", "revs")


def neuron(layer: int, n: int) -> Component:
    return Component(Site("mlp_post", layer), n)


def where(*components: Component, k: int | None = None) -> Localization:
    scores = tuple(float(-i) for i in range(len(components)))
    return Localization("by_hand", components, scores, RandomBand(k or len(components), 20, 1.0, 0.0, 0.5, "words"))


def changed(model: LoadedModel, edit: Edit) -> dict[str, Tensor]:
    """Parameter -> bool tensor of the entries that differ after the edit."""
    after = dict(edit.applied_to(model).module.named_parameters())
    return {name: p != after[name] for name, p in model.module.named_parameters() if not torch.equal(p, after[name])}


def columns(model: LoadedModel, edit: Edit) -> set[Component]:
    """The value vectors that differ, after checking that nothing else does."""
    found: set[Component] = set()
    names = {ref.name: ref for ref in projections(model.module)}
    for name, differs in changed(model, edit).items():
        ref = names.pop(name)
        oriented = differs.T if ref.conv1d else differs
        found |= {neuron(ref.layer, int(n)) for n in oriented.any(0).nonzero()[:, 0]}
    return found


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("part", ["down", "all"])
def test_removed_neurons_are_exactly_gone(name: str, part: Any) -> None:
    model = tiny(name)
    chosen = [neuron(0, 3), neuron(1, 0), neuron(1, 41)]
    batch = Batch.pad([[4, 9, 6, 7], [5, 9]])

    def mute(layer: int) -> Any:
        def run(x: Tensor) -> Tensor:
            out = x.clone()
            out[..., [c.neuron for c in chosen if c.site.layer == layer]] = 0
            return out

        return run

    with hooks(model, {Site("mlp_post", layer): mute(layer) for layer in (0, 1)}):
        expected = forward(model, batch)
    edit = Edit.build("removal", {}, model, "x", removal(model, chosen, part))
    gone = edit.applied_to(model)
    torch.testing.assert_close(forward(gone, batch), expected, atol=1e-5, rtol=1e-5)
    for c in chosen:
        assert not value_vector(gone, c).any()
    masks = masks_of(model, chosen, mlp_part=part).masks
    for parameter, differs in changed(model, edit).items():
        assert torch.equal(differs, masks[parameter].expand_as(differs))
        assert not gone.module.get_parameter(parameter)[differs].any()


@pytest.mark.parametrize("name", DENSE)
def test_removed_attention_dimensions_are_exactly_gone(name: str) -> None:
    model = tiny(name)
    batch = Batch.pad([[4, 9, 6, 7], [5, 9]])

    def mute(x: Tensor) -> Tensor:
        out = x.clone()
        out[..., [2, 9]] = 0
        return out

    with hooks(model, {Site("attn_z", 1): mute}):
        expected = forward(model, batch)
    edit = Edit.build("removal", {}, model, "x", [channel_removal(model, 1, [2, 9])])
    with edit.attach(model):
        torch.testing.assert_close(forward(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert set(changed(model, edit)) == {find(model.module, "attn_out", 1).name}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi3"])
@pytest.mark.parametrize("method", OF_COLUMNS)
def test_columns_of_the_chosen_neurons_change_and_nothing_else(method: str, name: str) -> None:
    model = tiny(name)
    edit = rf.edit(model, people(), method, **QUICK[method])
    found = columns(model, edit)
    assert found and edit.artifact == "weights"
    if "chosen" in edit.manifest.settings:
        assert {str(c) for c in found} == set(edit.manifest.settings["chosen"])
    held = where(neuron(1, 7), neuron(0, 2), neuron(0, 5), Component(Site("attn_out", 0)), k=2)
    located = columns(model, rf.edit(model, people(), method, where=held, **QUICK[method]))
    assert located <= {neuron(1, 7), neuron(0, 2)} and located
    whole = where(Component(Site("attn_out", 0)))
    assert columns(model, rf.edit(model, people(), method, where=whole, **QUICK[method])) == found


@pytest.mark.parametrize("name", tiny_models.ALL)
@pytest.mark.parametrize("method", QUICK)
def test_every_architecture_is_edited_or_refused_with_a_reason(method: str, name: str) -> None:
    model = tiny(name)
    if name == "mixtral" and method not in ("ssd", "ember"):
        with pytest.raises(SiteError, match="expert"):
            rf.edit(model, people(), method, **QUICK[method])
        return
    edit = rf.edit(model, people(), method, **QUICK[method])
    batch = Batch.pad([[1, 9, 6, 7], [1, 9]])
    with edit.attach(model):
        assert bool(forward(model, batch).isfinite().all())
    assert changed(model, edit)


# needle


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_needle_spoils_the_planted_vector_alone(name: str) -> None:
    model = tiny(name)
    planted = plant(model, model.tokenizer.convert_tokens_to_ids(list(CITIES)))
    ref = projections(model.module)[1]
    before = value_vector(model, planted)
    edit = rf.edit(model, people(), "needle", vectors=1, noise=20.0)
    assert columns(model, edit) == {planted}
    after = value_vector(edit.applied_to(model), planted)
    top = [set(spoken(model.module, ref, v[None])[0].topk(10).indices.tolist()) for v in (before, after)]
    assert len(top[0] & top[1]) / len(top[0] | top[1]) < 0.35  # two sets of 10 of 96 share one by chance
    removed = rf.edit(model, people(), "needle", vectors=1, mode="removal")
    assert not value_vector(removed.applied_to(model), planted).any()


def test_needle_noise_is_of_its_size_and_does_not_accumulate() -> None:
    model = tiny("llama")
    before = {n: value_vector(model, neuron(0, n)) for n in range(40)}
    edits = [rf.edit(model, people(), "needle", where=where(*(neuron(0, n) for n in range(40))), seed=seed)
             for seed in (0, 0, 1)]  # fmt: skip
    moved = [torch.stack([value_vector(e.applied_to(model), neuron(0, n)) - before[n] for n in before]) for e in edits]
    assert torch.equal(moved[0], moved[1]) and not torch.equal(moved[0], moved[2])
    sizes = moved[0].square().mean(1).sqrt() / torch.stack([v.square().mean().sqrt() for v in before.values()])
    assert float(sizes.mean()) == pytest.approx(5.0, rel=0.1)
    half = rf.edit(model, people(), "needle", where=where(neuron(0, 3), neuron(0, 9)), noise=1.0)
    one = value_vector(half.applied_to(model), neuron(0, 3)) - before[3]
    torch.testing.assert_close(5 * one, moved[0][3], rtol=1e-3, atol=1e-5)  # a vector's draw is its own
    with pytest.raises(NoEffectError):
        rf.edit(model, people(), "needle", noise=0.0)


# selective pruning


def probability(model: LoadedModel) -> float:
    pairs = [(f.prompt, f.answer) for f in KNOWLEDGE.for_editor().forget]
    return float(np.exp(answer_logprobs(model, pairs).sum_logprob).mean())


def columns_down(model: LoadedModel, edit: Edit) -> set[Component]:
    """The value vectors that an edit sets to zero."""
    after = edit.applied_to(model)
    return {neuron(ref.layer, int(n)) for ref in projections(after.module)
            for n in (get_weight(after.module, ref) == 0).all(0).nonzero()[:, 0]}  # fmt: skip


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


# revs


@pytest.mark.parametrize("name", DENSE)
def test_lowered_tokens_have_their_rank_and_others_move_little(name: str) -> None:
    model = tiny(name)
    ref = projections(model.module)[1]
    vector = value_vector(model, neuron(1, 4))
    readout = _linear(model, ref, vector)
    before = spoken(model.module, ref, vector[None])[0].double()
    tokens = before.topk(2).indices.tolist()
    moved = lowered(model, ref, readout, vector, tokens, 40)
    after = spoken(model.module, ref, moved[None].to(model.dtype))[0].double()
    assert all(int((after > after[t]).sum()) >= 40 for t in tokens)
    plain = readout @ vector.double(), readout @ moved.double()
    change = plain[1] - plain[0]
    others = [t for t in range(len(change)) if t not in tokens]
    assert (change[tokens] < 0).all()
    assert float(change[others].abs().median()) < float(change[tokens].abs().min())
    assert torch.equal(lowered(model, ref, readout, moved, tokens, 40), moved), "the condition holds: nothing to do"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_change_is_the_least_that_reaches_the_tokens(name: str) -> None:
    """Any other change with the same effect on the tokens moves the logits further."""
    model = tiny(name)
    ref = projections(model.module)[0]
    vector = value_vector(model, neuron(0, 4))
    readout = _linear(model, ref, vector)
    tokens = spoken(model.module, ref, vector[None])[0].topk(1).indices.tolist()
    step = lowered(model, ref, readout, vector, tokens, 1).double() - vector.double()
    rows = readout[tokens]
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        other = torch.randn(len(step), generator=generator, dtype=torch.float64) * step.norm() / 5
        other -= torch.linalg.pinv(rows) @ (rows @ other)
        torch.testing.assert_close(rows @ (step + other), rows @ step, rtol=1e-6, atol=1e-8)
        assert float((readout @ (step + other)).norm()) > float((readout @ step).norm()) * (1 - 1e-6)


def test_revs_lowers_the_planted_vectors_answers() -> None:
    model = tiny("llama")
    tokens = model.tokenizer.convert_tokens_to_ids(list(CITIES))
    planted = plant(model, tokens)
    edit = rf.edit(model, people(), "revs", where=where(planted), rank=0.5)
    assert columns(model, edit) == {planted}
    after = spoken(model.module, projections(model.module)[1], value_vector(edit.applied_to(model), planted)[None])[0]
    assert all(int((after > after[t]).sum()) >= 48 for t in tokens)


def test_neurons_are_found_where_the_token_is_predicted_whatever_the_length() -> None:
    """Facts of different lengths in one batch have the neurons that they have alone."""
    model = tiny("llama")
    facts = people().for_editor().forget[:3]
    longer = [dataclasses.replace(f, prompt="the red cat . " * k + f.prompt) for k, f in enumerate(facts)]
    asked = runs_of(model.tokenizer, longer)
    assert len({len(run.base) for run in asked}) == 3
    wanted = [list(range(run.start, len(run.base))) for run in asked]
    refs = projections(model.module)
    union: dict[Component, set[int]] = {}
    for run, own in zip(asked, wanted, strict=True):
        for unit, tokens in _targets(model, [run], [own], refs, 1, 3, None).items():
            union.setdefault(unit, set()).update(tokens)
    assert _targets(model, asked, wanted, refs, 1, 3, None) == union


def test_ranks_that_cannot_be_reached_are_refused() -> None:
    model = tiny("llama")
    ref = projections(model.module)[0]
    vector = value_vector(model, neuron(0, 4))
    readout = _linear(model, ref, vector)
    with pytest.raises(UsageError, match="cannot rank above"):
        lowered(model, ref, readout, vector, list(range(90)), 40)
    with pytest.raises(NumericalError, match="cannot have"):
        lowered(model, ref, readout, vector, list(range(60)), 36)  # 60 conditions on 32 numbers


# ember


def test_factors_are_non_negative_sparse_and_explain_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(12, 24, generator=generator), dim=1)
    codes = torch.rand(300, 12, generator=generator) * (torch.rand(300, 12, generator=generator) < 0.2)
    found = factorised(codes @ truth, 24, 0.05, 40, seed=0)
    assert (found.codes >= 0).all() and found.unexplained < 0.1
    assert float((found.codes > 0).float().mean()) < 0.5
    torch.testing.assert_close(found.dictionary.norm(dim=1), torch.ones(24), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gpt2", "gemma2"])
def test_only_rows_with_a_chosen_factor_change(name: str) -> None:
    model = tiny(name)
    edit = rf.edit(model, people(), "ember", factors=2)
    after = edit.applied_to(model)
    table, new = model.module.get_input_embeddings().weight, after.module.get_input_embeddings().weight
    rows = (table != new).any(1)
    assert 0 < int(rows.sum()) < len(rows)
    assert torch.equal(table[~rows], new[~rows])
    head, kept = model.module.get_output_embeddings().weight, after.module.get_output_embeddings().weight
    assert torch.equal(head, kept), "the unembedding stays, tied or not"
    same = rf.edit(model, people(), "ember", factors=2, untie=False).applied_to(model)
    tied = model.module.get_input_embeddings().weight is head
    assert torch.equal(same.module.get_output_embeddings().weight, head) != tied


def test_factors_of_the_forget_names_are_chosen() -> None:
    """Two directions, one in the names of people to forget alone, one in everybody's: the first goes."""
    model = tiny("llama")
    generator = torch.Generator().manual_seed(3)
    first, second = torch.nn.functional.normalize(torch.randn(2, 32, generator=generator), dim=1)
    table = model.module.get_input_embeddings().weight
    data = people().for_editor()
    ours = {t for f in data.forget for t in model.tokenizer(f.subject)["input_ids"]}
    theirs = {t for f in data.retain for t in model.tokenizer(f.subject)["input_ids"]}
    own = sorted(ours - theirs)
    with torch.no_grad():
        table.mul_(0.01)
        table[own] += first
        table[sorted(ours & theirs)] += second
    model = type(model)(model.name, model.module, model.tokenizer, "changed")
    edit = rf.edit(model, people(), "ember", factors=1, size=8)
    after = edit.applied_to(model, check=False).module.get_input_embeddings().weight
    moved = (after - table).detach().norm(dim=1)
    assert own and float(moved[own].min()) > 0.3 and float(moved[sorted(ours & theirs)].max()) < 0.3


@pytest.mark.parametrize(
    ("method", "settings"),
    [("neuron_zeroing", {"neurons": 0}), ("neuron_zeroing", {"share": 2.0}), ("needle", {"vectors": 0}),
     ("needle", {"noise": -1.0}), ("selective_pruning", {"ratio": 1.0}), ("selective_pruning", {"max_steps": 0}),
     ("ssd", {"alpha": 0.0}), ("ssd", {"dampening": -1.0}), ("revs", {"rank": 1.0}), ("revs", {"neurons": 0}),
     ("ember", {"sparsity": 0.0}), ("ember", {"factors": 0})],
)  # fmt: skip
def test_bad_settings_are_refused(method: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"{method} was given|Knowledge neurons"):
        rf.edit(tiny("llama"), people(), method, **{**QUICK[method], **settings})


def test_no_common_neuron_is_refused() -> None:
    """Over all texts no neuron of a random model is strong in every prompt."""
    with pytest.raises(NoEffectError, match="lower 'share'"):
        rf.edit(tiny("llama"), people(), "neuron_zeroing", aggregate="texts", threshold=1.0, share=1.0, steps=2)
