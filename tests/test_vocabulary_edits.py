"""Edits told in tokens: ranks lowered in value vectors (revs), factors of embeddings (ember)."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from edit_models import model as tiny
from edit_models import people
from test_neuron_edits import DENSE, columns, neuron, where
from test_neuron_locators import CITIES, plant

import repforget as rf
from repforget.attribution import runs_of
from repforget.columns import value_vector
from repforget.edit.erase.ember import factorised
from repforget.edit.surgery.revs import _linear, _targets, lowered
from repforget.errors import NumericalError, UsageError
from repforget.models.value_vectors import projections, spoken
from repforget.records import Component

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
