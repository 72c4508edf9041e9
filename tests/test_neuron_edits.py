"""Edits of single units and weights: exact removal, what they may touch, conditions that hold after them, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from test_locate_planted import KNOWLEDGE
from test_neuron_locators import CITIES, plant
from torch import Tensor

import repforget as rf
from repforget.artifact import Edit
from repforget.columns import value_vector
from repforget.edit.surgery._units import channel_removal, removal
from repforget.errors import NoEffectError, SiteError, UsageError
from repforget.masks import masks_of
from repforget.models.capture import Batch, forward, hooks
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
