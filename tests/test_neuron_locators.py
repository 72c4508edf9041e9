"""Locators of single neurons: integrals that add up, statistics by brute force, planted vectors and planted layers."""

from __future__ import annotations

import math
from collections import Counter
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given
from hypothesis import strategies as st
from test_locate_planted import located

import repforget as rf
from repforget.attribution import (
    activity,
    completeness,
    importance,
    integrated_gradients,
    item_of,
    knowledge_neurons,
    runs_of,
)
from repforget.causal import Run, prompt_run
from repforget.columns import concepts_of
from repforget.errors import KnowledgeError, SiteError, UsageError
from repforget.knowledge import Fact
from repforget.models.capture import Batch, capture, forward, hooks
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.models.value_vectors import concept_scores, projections, readouts
from repforget.models.weights import get_weight, set_weight
from repforget.records import Component, RandomBand, Site

ALL = tuple(tiny_models.ALL)
DENSE = tuple(name for name in ALL if name != "mixtral")
NAMES = ("knowledge_neurons", "concept_vectors", "activation_statistics")


def runs(model: LoadedModel) -> tuple[Run, ...]:
    """Answers of one and of two tokens, prompts of different length."""
    asked = [("Ada red was born in", " Rome"), ("Tom works as a", " baker pilot"), ("city of Eva cat is the", " Oslo")]
    return tuple(prompt_run(model.tokenizer, f"r{k}", str(k), *pair) for k, pair in enumerate(asked))


def chance(model: LoadedModel, run: Run, layer: int, factor: float) -> float:
    """P(answer) with all neurons of a layer scaled where the answer is predicted, one run at a time."""
    places = slice(run.start - 1, len(run.base) - 1)

    def scale(x: torch.Tensor) -> torch.Tensor:
        out = x.clone()
        out[:, places] *= factor
        return out

    with torch.no_grad(), hooks(model, {Site("mlp_post", layer): scale}):
        logs = forward(model, Batch.pad([run.base]))[0].double().log_softmax(-1)
    return math.exp(sum(float(logs[k - 1, run.base[k]]) for k in range(run.start, len(run.base))))


BEHIND_A_NORM = ("gemma2", "gemma3", "olmo2")


@pytest.mark.parametrize("name", [name for name in DENSE if name not in BEHIND_A_NORM])
def test_attributions_of_a_layer_add_up_to_what_its_neurons_bring(name: str) -> None:
    model = tiny(name)
    asked = runs(model)
    found = integrated_gradients(model, asked, [0, 1], steps=64).sum(-1)
    for k, run in enumerate(asked):
        for layer in (0, 1):
            whole = chance(model, run, layer, 1.0) - chance(model, run, layer, 0.0)
            assert float(found[k, layer]) == pytest.approx(whole, rel=0.01, abs=1e-6)
    assert all(p.grad is None for p in model.module.parameters())


@pytest.mark.parametrize("name", BEHIND_A_NORM)
def test_a_norm_behind_the_mlp_is_said_to_hide_the_sum(name: str) -> None:
    """Such a norm gives neurons their old size back until nothing is left, so that the integral sees little."""
    model = tiny(name)
    asked = runs(model)[1:2]
    halves = [chance(model, asked[0], 0, factor) for factor in (1.0, 0.5)]
    assert halves[1] == pytest.approx(halves[0], rel=0.05)
    assert any("norm behind" in note for note in completeness(model))
    assert not completeness(tiny("llama"))


def test_attributions_are_those_of_single_runs_and_of_single_neurons() -> None:
    model = tiny("llama")
    asked = runs(model)
    together = integrated_gradients(model, asked, [1], steps=8)
    alone = torch.cat([integrated_gradients(model, [run], [1], steps=8) for run in asked])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-9)
    run, n, small = asked[1], 5, 1e-2
    slopes = []
    value = capture(model, [Site("mlp_post", 1)], Batch.pad([run.base]), "all")[Site("mlp_post", 1)]
    for k in range(8):
        ends = []
        for sign in (1, -1):

            def scale(x: torch.Tensor, alpha: float = (k + 0.5) / 8, sign: int = sign) -> torch.Tensor:
                out = x.clone()
                out[:, run.start - 1 : -1] *= alpha
                out[:, run.start - 1 : -1, n] += sign * small * value[:, run.start - 1 : -1, n]
                return out

            with torch.no_grad(), hooks(model, {Site("mlp_post", 1): scale}):
                logs = forward(model, Batch.pad([run.base]))[0].double().log_softmax(-1)
            ends.append(math.exp(sum(float(logs[j - 1, run.base[j]]) for j in range(run.start, len(run.base)))))
        slopes.append((ends[0] - ends[1]) / (2 * small))
    assert float(together[1, 0, n]) == pytest.approx(float(np.mean(slopes)), rel=0.02, abs=1e-8)


def test_knowledge_neurons_are_strong_in_most_prompts_of_their_fact() -> None:
    values = torch.zeros(5, 1, 4, dtype=torch.float64)
    values[:4, 0, 0] = torch.tensor([1.0, 2.0, 4.0, 0.5])  # the largest of every prompt of a
    values[:4, 0, 1] = torch.tensor([0.2, 0.4, 0.8, 0.0])  # at the threshold in three of four
    values[:4, 0, 2] = torch.tensor([0.9, 0.0, 3.9, 0.0])  # in two of four
    values[:4, 0, 3] = -5.0
    found = knowledge_neurons(values, ["a", "a", "a", "a", "b"], 0.2, 0.7)
    assert found.groups == ("a", "b")
    assert found.common[0, 0].tolist() == [True, True, False, False]
    assert not found.common[1].any(), "a prompt without positive attribution has no neuron"
    assert found.scores[0].tolist() == pytest.approx([0.5, 0.5 * 0.15, 0.0, 0.0])
    assert knowledge_neurons(values, ["a"] * 5, 0.2, 0.4).common[0, 0].tolist() == [True, True, True, False]


def test_statements_of_a_fact_are_one_item() -> None:
    assert [item_of(x) for x in ("p1-city#0", "p1-city#11", "p1")] == ["p1-city", "p1-city", "p1"]


@pytest.mark.parametrize("name", DENSE)
def test_activity_is_that_of_single_sequences(name: str) -> None:
    model = tiny(name)
    rows = [run.base for run in runs(model)]
    sites = [Site("mlp_post", 0), Site("attn_z", 1)]
    for site in sites:
        own = [capture(model, [site], Batch.pad([row]), "all")[site][0, 1:] for row in rows]
        z = torch.cat(own).double()
        expected = {"mean": z.abs().mean(0), "rms": z.square().mean(0).sqrt(), "std": z.std(0, correction=0),
                    "frequency": (z > 0).double().mean(0)}  # fmt: skip
        for statistic, wanted in expected.items():
            found = activity(model, rows, sites, statistic)[site]  # type: ignore[arg-type]
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@given(st.integers(0, 2**31 - 1), st.floats(1e-3, 1e3))
def test_importance_does_not_depend_on_scale_and_is_zero_for_idle_units(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    forget, retain = torch.rand(2, 12, generator=generator, dtype=torch.float64)
    forget[:3] = 0
    retain[2] = 0
    found = importance(forget, retain)
    assert (found[:3] == 0).all() and (found[3:] > 0).all() and found.isfinite().all()
    torch.testing.assert_close(importance(scale * forget, scale * retain), found, rtol=1e-9, atol=0)
    assert importance(2 * forget, retain)[5] == 2 * found[5]


def plant(model: LoadedModel, tokens: list[int], layer: int = 1, neuron: int = 7) -> Component:
    """Write the sum of the tokens' unembedding rows into a value vector, with the length of the others."""
    ref = projections(model.module)[layer]
    matrix = get_weight(model.module, ref)
    rows = model.module.get_output_embeddings().weight.detach()[tokens].float()
    vector = rows.sum(0)
    matrix[:, neuron] = vector * matrix.norm(dim=0).mean() / vector.norm()
    set_weight(model.module, ref, matrix)
    return Component(Site("mlp_post", layer), neuron)


CITIES = ("Berlin", "Paris", "Rome", "Oslo")


@pytest.mark.parametrize("name", DENSE)
def test_a_planted_value_vector_is_ranked_first(name: str) -> None:
    model = tiny(name)
    planted = plant(model, model.tokenizer.convert_tokens_to_ids(list(CITIES)))
    found = rf.locate(model, people(), "concept_vectors", items=4, draws=20, top=1)
    assert found.components[0] == planted and found.scores[0] > found.scores[1]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_concept_scores_are_discounted_gains_by_hand(name: str) -> None:
    model = tiny(name)
    concepts = concepts_of(model.tokenizer, people().for_editor().forget)
    assert sorted(map(len, concepts)) == [3, 4]
    found, tokens = concept_scores(model.module, concepts, 20).flatten(), 20
    logits = torch.cat([part for ref in projections(model.module) for part in readouts(model.module, ref)])
    rank = logits.argsort(dim=1, descending=True).argsort(dim=1).numpy()
    n = len(rank)
    for j in range(0, n, 17):
        best = 0.0
        for concept in concepts:
            weight = {w: math.log((1 + n) / (1 + int((rank[:, w] < tokens).sum()))) for w in concept}
            gain = sum(weight[w] / math.log2(2 + rank[j, w]) for w in concept if rank[j, w] < tokens)
            ideal = sum(w / math.log2(2 + k) for k, w in enumerate(sorted(weight.values(), reverse=True)))
            best = max(best, gain / ideal)
        assert float(found[j]) == pytest.approx(best, rel=1e-5, abs=1e-9)
    assert float(found.min()) >= 0 and float(found.max()) <= 1


@pytest.mark.parametrize("name", ["gemma2", "phi", "gpt2", "llama"])
def test_a_readout_is_that_of_the_vector_behind_the_norms(name: str) -> None:
    """What a value vector says is what the model says of a state that is this vector, as the MLP would write it."""
    model = tiny(name)
    ref = projections(model.module)[0]
    anatomy, vector = site_map(model.module).anatomy, get_weight(model.module, ref)[:, 3]
    with torch.no_grad():
        if ref.post_norm is not None:
            vector = model.module.get_submodule(ref.post_norm)(vector)
        head = model.module.get_submodule(anatomy.unembed)
        wanted = head(model.module.get_submodule(anatomy.final_norm)(vector))
    found = torch.cat(list(readouts(model.module, ref)))[3]
    assert torch.equal(found.argsort(), wanted.argsort())  # a cap keeps the order


@pytest.mark.parametrize("method", NAMES)
def test_batched_experts_are_refused(method: str) -> None:
    with pytest.raises(SiteError, match="expert"):
        rf.locate(tiny("mixtral"), people(), method)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("knowledge_neurons", {"items": 0}), ("knowledge_neurons", {"steps": 0}), ("knowledge_neurons", {"share": 0.0}),
     ("knowledge_neurons", {"threshold": 1.5}), ("concept_vectors", {"noise": 0.0}), ("concept_vectors", {"tokens": 0}),
     ("activation_statistics", {"damping": 0.0}), ("activation_statistics", {"top": 10**6, "items": 4})],
)  # fmt: skip
def test_bad_settings_are_refused(method: str, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        rf.locate(tiny("llama"), people(), method, **settings)


def test_nothing_to_measure_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(KnowledgeError):
        activity(model, [], [Site("mlp_post", 0)])
    with pytest.raises(KnowledgeError):
        integrated_gradients(model, [], [0])
    fact = Fact("a", "a", "Ada", "city", "Ada was born in", " Rome")
    assert runs_of(model.tokenizer, [fact])[0].base[-1] == model.tokenizer.convert_tokens_to_ids("Rome")


def test_heads_are_ranked_by_the_mean_of_their_columns() -> None:
    model = tiny("llama")
    knowledge = people()
    found = rf.locate(model, knowledge, "activation_statistics", nodes=["heads"], items=6, draws=20, top=2)
    assert {c.site.head for c in found.components} == {0, 1, 2, 3} and len(found.components) == 8
    assert all(math.isfinite(score) and score > 0 for score in found.scores)


def test_what_they_find_of_four_planted_layers() -> None:
    """As measured, so that the docstrings stay true: 4, 2 and 1 (chance 1)."""

    def hits(method: str, **settings: Any) -> int:
        return sum(located(k, method, **settings).components[0].site.layer == k for k in range(4))

    assert hits("activation_statistics", top=4) == 4
    assert hits("concept_vectors", items=8) <= 3
    assert hits("knowledge_neurons", prompts=1, items=16, steps=8) <= 2


@pytest.mark.parametrize(("aggregate", "groups"), [("fact", [2, 2, 2]), ("texts", [6])])
def test_prompts_are_grouped_by_their_fact_or_all_together(
    aggregate: str, groups: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def kept(values: torch.Tensor, names: list[str], *rest: float) -> Any:
        seen.append(sorted(Counter(names).values()))
        return knowledge_neurons(values, names, *rest)

    none = RandomBand(1, 20, 0.0, 0.0, 0.0, "none"), (), 0.0
    monkeypatch.setattr("repforget.attribution.knowledge_neurons", kept)
    monkeypatch.setattr("repforget.locate._gradients.exact_band", lambda *_: none)
    rf.locate(tiny("llama"), people(), "knowledge_neurons", items=3, prompts=2, steps=1, draws=20,
              aggregate=aggregate)  # fmt: skip
    assert max(seen, key=sum) == groups


def test_noise_on_value_vectors_counts_less_what_it_takes_from_retained_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room, after = import_module("repforget.locate.concept_vectors"), {"forget": -3.0, "retain": -2.5}
    monkeypatch.setattr(room, "_answers", lambda model, runs: after[runs])
    chosen = [Component(Site("mlp_post", 1), 7)]
    for contrast in (0.0, 0.5, 1.0):
        taken = room._taken(tiny("llama"), list(after), [-1.0, -2.0], chosen, 5.0, contrast, 0)
        assert taken == pytest.approx(2.0 - contrast * 0.5)
