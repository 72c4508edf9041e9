"""Conditional steering: the best comparison, gates that stay with their sequence, closed ones that change no bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import edit_models
import pytest
import tiny_models
import torch
from artifact_tools import build
from hypothesis import given, settings
from hypothesis import strategies as st
from test_artifact_runtime import gated

from repforget.artifact import AddVector, Gate
from repforget.edit._collect import read_points
from repforget.edit._contrast import contrasts
from repforget.edit.steer.cast import best_gate, cast, extremes
from repforget.errors import NoEffectError, UsageError
from repforget.models.capture import Batch, capture, forward
from repforget.models.load import LoadedModel
from repforget.records import Component, Localization, RandomBand, Site

DATA = edit_models.people().for_editor()


def operation(edit: Any) -> tuple[AddVector, Gate]:
    (op,) = edit.site_operations
    assert isinstance(op, AddVector) and op.gate is not None
    return op, op.gate


def opens(model: LoadedModel, gate: Gate, ids: Any) -> bool:
    """By definition: does any token but the first cross the threshold?"""
    assert gate.site is not None
    x = capture(model, [gate.site], Batch.pad([ids]), gather="all")[gate.site][0, 1:]
    cosine = torch.cosine_similarity(x, gate.direction[None], dim=-1)
    return bool(((cosine > gate.threshold) if gate.above else (cosine < gate.threshold)).any())


def texts(model: LoadedModel) -> list[tuple[int, ...]]:
    return [*read_points(model, DATA.forget).ids, *read_points(model, DATA.retain).ids]


# ------------------------------------------------------------------ the rule


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 999))
def test_the_rule_has_the_best_f1_of_all_thresholds(n: int, m: int, seed: int) -> None:
    from sklearn.metrics import f1_score

    draw = torch.Generator().manual_seed(seed)
    ours, others = (torch.randint(-4, 5, (rows, 2), generator=draw).double() / 5 for rows in (n, m))
    labels = [1] * n + [0] * m
    both = torch.cat([ours, others])
    best = 0.0
    for column, above in ((0, True), (1, False)):
        distinct = both[:, column].unique()
        for low, high in zip(distinct[:-1], distinct[1:], strict=True):
            scores = both[:, column] > (low + high) / 2
            best = max(best, f1_score(labels, (scores if above else ~scores).int().numpy(), zero_division=0.0))
    rule = best_gate(ours, others)
    assert rule.f1 == pytest.approx(best)
    column = both[:, 0 if rule.above else 1]
    said = (column > rule.threshold) if rule.above else (column < rule.threshold)
    if rule.f1:
        assert f1_score(labels, said.int().numpy()) == pytest.approx(rule.f1)
        assert rule.opened == pytest.approx(float(said[:n].double().mean()))
        assert rule.false_open == pytest.approx(float(said[n:].double().mean()))


def test_a_condition_below_its_threshold_is_found_too() -> None:
    ours, others = torch.tensor([[0.5, -0.9], [0.4, -0.8]]), torch.tensor([[0.6, 0.1], [0.3, 0.2], [0.5, 0.0]])
    rule = best_gate(ours.double(), others.double())
    assert (rule.above, rule.f1, rule.opened, rule.false_open) == (False, 1.0, 1.0, 0.0)
    assert -0.8 < rule.threshold < 0.0


def test_cosines_are_those_of_single_texts() -> None:
    model = edit_models.model()
    site, rows = Site("resid_pre", 1), texts(model)[:9]
    axis = torch.randn(model.width, generator=torch.Generator().manual_seed(0)).double()
    found = extremes(model, {site: axis}, rows)[site]
    for row, pair in zip(rows, found, strict=True):
        x = capture(model, [site], Batch.pad([row]), gather="all")[site][0, 1:].double()
        cosine = torch.cosine_similarity(x, axis[None], dim=-1)
        torch.testing.assert_close(pair, torch.stack([cosine.max(), cosine.min()]), atol=1e-5, rtol=0)


# ------------------------------------------------------------------ the edit


@pytest.mark.parametrize("architecture", tiny_models.ALL)
def test_closed_gates_change_no_bit_and_open_ones_do(architecture: str) -> None:
    model = edit_models.model(architecture)
    made = cast(model, DATA, sites=["resid_post.1"], strength=3.0)
    op, gate = operation(made)
    assert made.artifact == "weights+hook" and gate.scope == "prefix" and gate.cosine and gate.site is not None
    scores = extremes(model, {gate.site: gate.direction}, texts(model)[::3])[gate.site][:, 0].unique()
    gap = int((scores[1:] - scores[:-1])[8:-8].argmax()) + 8  # these tiny models hardly tell people apart
    gate = dataclasses.replace(gate, above=True, threshold=float(scores[gap] + scores[gap + 1]) / 2)
    edit = build(model, dataclasses.replace(op, gate=gate))
    changed = {True: 0, False: 0}
    for ids in texts(model)[::3]:
        batch = Batch.pad([ids])
        base = forward(model, batch)
        with edit.attach(model):
            same = torch.equal(forward(model, batch), base)
        assert same != opens(model, gate, ids)
        changed[not same] += 1
    assert changed[True] and changed[False], changed


def test_the_vector_and_the_note_are_what_they_say() -> None:
    model = edit_models.model()
    edit = cast(model, DATA, sites=["resid_post.1"], strength=2.0)
    op, gate = operation(edit)
    torch.testing.assert_close(op.vector.double(), -contrasts(model, [op.site], DATA.forget, DATA.retain)[
        op.site].difference, atol=1e-6, rtol=1e-5)  # fmt: skip
    assert op.scale == 2.0 and edit.manifest.settings["condition"] == str(gate.site)
    forget = [opens(model, gate, ids) for ids in read_points(model, DATA.forget).ids]
    assert f"opens on {sum(forget) / len(forget):.1%} of the forget prompts" in edit.manifest.notes[0]
    assert sum(forget) > 0 and "if always open" in edit.manifest.notes[0]


def test_rows_of_a_batch_change_places_and_nothing_else() -> None:
    model = edit_models.model()
    edit = cast(model, DATA, sites=["resid_post.1"], strength=3.0)
    rows = texts(model)[::5]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    batch, shuffled = Batch.pad(rows), Batch.pad([rows[i] for i in order])
    with edit.attach(model):
        torch.testing.assert_close(forward(model, shuffled), forward(model, batch)[order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_token_by_token_it_decides_as_on_the_whole_text(architecture: str) -> None:
    model = edit_models.model(architecture)
    edit = cast(model, DATA, sites=["resid_post.1"], strength=3.0)
    _, gate = operation(edit)
    row = next(ids for ids in read_points(model, DATA.forget).ids if opens(model, gate, ids))
    with edit.attach(model), torch.no_grad():
        whole = forward(model, Batch.pad([row]))[0]
        cache, parts = None, []
        for part in (row[:2], *([token] for token in row[2:])):
            out = model.module(input_ids=torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits[0])
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_gates_follow_their_beams(architecture: str) -> None:
    """Beams of a prompt open their gates at different generated tokens, and the beams are reordered at every step."""
    model = edit_models.model(architecture)
    ids = torch.tensor([[4, 5, 6], [8, 9, 10]])
    options = {"max_new_tokens": 8, "num_beams": 4, "num_return_sequences": 4, "do_sample": False, "eos_token_id": None,
               "pad_token_id": 0, "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    def beams(cache: bool = True) -> Any:
        return model.module.generate(ids, attention_mask=torch.ones_like(ids), use_cache=cache, **options)

    plain = beams().sequences[:, 3:]
    some = [t for t in plain.unique().tolist() if 0 < int((plain[:4] == t).any(1).sum()) < 4 and t not in ids]
    assert some, "beams must differ in which tokens they hold"
    changed = 0
    for token in some[:6]:
        with build(model, gated(model, token, scope="prefix")).scaled(4.0).attach(model):
            cached, slow = beams(), beams(False)
        torch.testing.assert_close(cached.sequences_scores, slow.sequences_scores, atol=1e-4, rtol=1e-4)
        assert torch.equal(cached.sequences, slow.sequences)
        changed += not torch.equal(cached.sequences[:, 3:], plain)
    assert changed


def test_settings_and_refusals() -> None:
    model = edit_models.model()
    where = Localization("probe", (Component(Site("mlp_out", 1)),), (1.0,), RandomBand(1, 10, 1.0, 0.0, 0.5, "test"))
    edit = cast(model, DATA, where=where)
    assert edit.manifest.sites == ("resid_post.1",)
    several = cast(model, DATA, sites=["resid_post.0", "resid_post.1"], condition="embed", directions="principal")
    assert {str(op.gate.site) for op in several.site_operations} == {"embed"}  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"does not lie before resid_post\.0"):
        cast(model, DATA, sites=["resid_post.0"], condition="resid_post.0")
    with pytest.raises(NoEffectError, match="same mean at resid_pre.0"):
        cast(model, DATA, condition="resid_pre.0", condition_positions="last")
    with pytest.raises(NoEffectError, match="changes nothing"):
        cast(model, DATA, strength=0.0)
