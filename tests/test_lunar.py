"""LUNAR in closed form: against least squares and descent, and what it does to states of forgotten and kept facts."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.artifact import LowRankDelta
from repforget.edit._dispatch import edit as run_editor
from repforget.edit.train.lunar import gate, lunar
from repforget.errors import KnowledgeError, NoEffectError, SiteError, UsageError
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.models.weights import writers
from repforget.records import Site

SANDWICH = ("gemma2", "gemma3", "olmo2")


def _keys(n: int, m: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(rows, m, generator=generator, dtype=torch.float64) + 0.5 for rows in (n, 2 * n))  # type: ignore[return-value]


def _loss(key: Tensor, forget: Tensor, retain: Tensor, weight: float, size: float) -> Tensor:
    return (forget @ key - 1).square().mean() + weight * (retain @ key).square().mean() + size * key.square().sum()


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(1, 9), st.floats(0, 4), st.floats(1e-3, 1), st.integers(0, 99))
def test_it_is_the_ridge_solution_and_no_descent_does_better(
    n: int, m: int, weight: float, ridge: float, seed: int
) -> None:
    forget, retain = _keys(n, m, seed)
    moments = forget.T @ forget / n, retain.T @ retain / (2 * n)
    size = ridge * float((moments[0] + weight * moments[1]).diagonal().mean())
    rows = torch.cat([forget / n**0.5, retain * (weight / (2 * n)) ** 0.5, size**0.5 * torch.eye(m).double()])
    wanted = torch.cat([torch.full((n,), 1 / n**0.5), torch.zeros(2 * n + m)]).double()
    key = gate(forget.mean(0), *moments, weight, ridge)
    np.testing.assert_allclose(key, np.linalg.lstsq(rows.numpy(), wanted.numpy(), rcond=None)[0], atol=1e-8)

    walk = torch.zeros(m, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.Adam([walk], lr=0.05)
    for _ in range(30):
        optimiser.zero_grad()
        _loss(walk, forget, retain, weight, size).backward()
        optimiser.step()
    assert _loss(key, forget, retain, weight, size) <= _loss(walk, forget, retain, weight, size) + 1e-12


def _states(model: LoadedModel, layer: int, facts: list[str]) -> Tensor:
    batches = [Batch.pad([model.tokenizer(text)["input_ids"]]) for text in facts]
    return torch.cat([capture(model, [Site("resid_post", layer)], batch)[Site("resid_post", layer)]
                      for batch in batches])  # fmt: skip


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gpt_neox"])
def test_states_move_along_the_way_as_far_as_the_notes_say(architecture: str) -> None:
    model, data = tiny(architecture), people().for_editor()
    prompts = ["red green blue", "the cat is a dog of a bird", "what is a job"]
    made = lunar(model, data, layer=1, tokens="last", prompts=prompts, ridge=1e-6)
    asked = [fact.prompt for fact in data.forget]
    before = _states(model, 1, asked)
    way = _states(model, 1, prompts).double().mean(0) - before.double().mean(0)
    with made.attach(model):
        moved = (_states(model, 1, asked) - before).double()
    share = moved @ way / (way @ way)
    torch.testing.assert_close(moved, share[:, None] * way, atol=1e-4, rtol=1e-3)  # nowhere but along the way
    said = float(made.manifest.notes[0].split(": ")[1].split(" ")[0])
    assert float(share.mean()) == pytest.approx(2 * said, abs=2e-3)
    assert 0.3 < said <= 1


def test_more_weight_on_retained_tokens_moves_them_less() -> None:
    model, data = tiny(), people().for_editor()
    texts = [fact.prompt + fact.answer for fact in data.retain]
    before = _states(model, 1, texts)
    moved = []
    for weight in (0.0, 1.0, 100.0):
        with lunar(model, data, layer=1, retain_weight=weight).attach(model):
            moved.append(float((_states(model, 1, texts) - before).norm()))
    assert moved[0] > moved[1] > moved[2] > 0


def test_one_matrix_changes_by_rank_one() -> None:
    made = lunar(tiny(), people().for_editor())
    (delta,) = made.operations
    assert isinstance(delta, LowRankDelta)
    assert delta.weight == next(w.name for w in writers(tiny()) if w.role == "mlp_out" and w.layer == 1)
    assert delta.u.shape[1] == delta.v.shape[0] == 1
    assert made.manifest.settings["layer"] == 1


def test_no_way_no_edit() -> None:
    data = people().for_editor()
    with pytest.raises(NoEffectError):
        lunar(tiny(), data, prompts=[fact.prompt for fact in data.forget])


def test_a_way_that_is_short_for_the_model_is_told() -> None:
    data = people().for_editor()
    near = lunar(tiny(), data, prompts=[fact.prompt for fact in data.forget[4:]])
    assert "hardly tells them apart" in near.manifest.notes[1]
    assert len(lunar(tiny(), data, prompts=["red green blue"]).manifest.notes) == 1


@pytest.mark.parametrize("architecture", sorted({*tiny_models.ALL} - {*SANDWICH, "mixtral"}))
def test_every_architecture_with_a_plain_projection(architecture: str) -> None:
    model = tiny(architecture)
    made = lunar(model, people().for_editor(), layer=0)
    prompt = [people().for_editor().forget[0].prompt]
    before = _states(model, 0, prompt)
    with made.attach(model):
        assert not torch.equal(_states(model, 0, prompt), before)


@pytest.mark.parametrize("architecture", SANDWICH)
def test_a_norm_behind_the_projection_is_refused(architecture: str) -> None:
    with pytest.raises(SiteError, match="a norm behind its MLP.*representation_rerouting"):
        lunar(tiny(architecture), people().for_editor())


def test_what_it_cannot_use_is_refused() -> None:
    model, data = tiny(), people().for_editor()
    for wrong in ({"ridge": 0.0}, {"coefficient": 0.0}, {"retain_weight": -1.0}):
        with pytest.raises(UsageError, match="lunar was given"):
            lunar(model, data, **wrong)
    with pytest.raises(SiteError, match="0 to 1"):
        lunar(model, data, layer=2)
    with pytest.raises(SiteError, match="batched experts"):
        lunar(tiny("mixtral"), data)
    with pytest.raises(KnowledgeError, match="no retain facts"):
        lunar(model, dataclasses.replace(data, retain=()))
    single = tuple(dataclasses.replace(f, subject="", cluster="x") for f in data.forget)
    nobody = dataclasses.replace(data, forget=single, retain=single)
    with pytest.raises(KnowledgeError, match="give some"):
        lunar(model, nobody)
    assert run_editor(model, nobody, "lunar", prompts=["red green"]).touched


def test_the_seed_chooses_the_facts() -> None:
    model, data = tiny(), people().for_editor()
    first, same, other = (lunar(model, data, seed=seed, max_facts=20) for seed in (0, 0, 1))
    assert first.digest == same.digest != other.digest
