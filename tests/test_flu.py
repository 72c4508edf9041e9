"""Fact lookup: the rule for how many, what the heads read, planted facts, categories that attention brings."""

from __future__ import annotations

from typing import Any

import hypothesis
import known_words
import numpy as np
import planted
import pytest
import test_locate_planted as planted_truth
import tiny_models
from hypothesis import strategies as st
from test_circuits import model_of

import repforget as rf
from repforget.errors import UsageError
from repforget.knowledge import Item, Knowledge
from repforget.locate._paths import measure_paths, receiver_of
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import expand_nodes
from repforget.locate.flu import _categories, before_largest_drop, receiver_for
from repforget.models.load import wrap
from repforget.models.sites import site_map
from repforget.records import Component, Site

MLPS = [Component(Site("mlp_out", k)) for k in range(2)]


@hypothesis.given(st.lists(st.floats(-1, 1), min_size=2, max_size=12))
def test_what_is_chosen_lies_before_the_largest_drop_among_positive_scores(values: list[float]) -> None:
    scores = sorted(values, reverse=True)
    k = before_largest_drop(scores)
    assert 1 <= k < len(scores)
    if scores[0] > 0:
        assert scores[k - 1] > 0
        drops = [a - b for a, b in zip(scores, scores[1:], strict=False) if a > 0]
        assert scores[k - 1] - scores[k] == max(drops)
    else:
        assert k == 1


def test_the_number_chosen_follows_the_scores() -> None:
    assert [before_largest_drop(s) for s in ([3, 2.9, 2.8, 0.1, 0], [3, 0.2, 0.1], [0.0, 0.0, -5.0])] == [3, 1, 1]


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_heads_read_the_keys_and_values_of_their_group(name: str) -> None:
    model = model_of(name)
    places = site_map(model)
    heads, size = range(places.n_heads), places.n_heads // places.n_kv_heads
    for head in heads:
        found = receiver_for(model, [Component(Site("attn_z", 1, head))], "heads")
        assert set(found) == {Site("q", 1, head), Site("k", 1, head // size), Site("v", 1, head // size)}
    both = [Component(Site("attn_z", layer, head)) for layer in (1, 0) for head in heads]
    assert set(receiver_for(model, both[: len(heads)], "heads")) == {
        *(Site("q", 1, head) for head in heads), *(Site(k, 1, g) for k in "kv" for g in range(places.n_kv_heads))
    }  # fmt: skip
    assert receiver_for(model, both[:1], "residual") == (Site("resid_pre", 1),)
    assert receiver_for(model, both, "residual") == (Site("resid_pre", 0),)  # before the earliest of them


def test_scores_are_the_path_effects_on_what_the_named_heads_read() -> None:
    """The second stage again by hand, from the heads that the notes name; MLPs behind them score exactly 0."""
    model = planted_truth.model(1)
    for reads in ("residual", "heads"):
        found = planted_truth.located(1, "flu", reads=reads, items=24, heads=2)
        told = next(note for note in found.notes if note.startswith("Extraction heads"))
        receiver = receiver_of(model, told.split("what they read: ")[1].strip(".").split(", "))
        tasks, _ = corrupted_tasks(model, planted_truth.KNOWLEDGE, 0, items=24, partners=2, mode="both", contrast=1.0)
        mlps = expand_nodes(model, ("mlp_out",))
        expected = measure_paths(tasks, mlps, receiver, "nothing").scores(1.0)
        scores = dict(zip(found.components, found.scores, strict=True))
        np.testing.assert_allclose([scores[c] for c in mlps], expected, atol=1e-9)
        assert all(scores[c] == 0.0 for c in mlps if c.site.layer >= max(s.layer for s in receiver))
        assert min(s.layer for s in receiver) >= 1


@pytest.mark.parametrize("layer", planted.LAYERS)
def test_planted_facts_are_found_before_the_heads_that_carry_them(layer: int) -> None:
    """2 of 4: what the third and the last MLP hold is looked up behind the extraction heads, where nothing reads it.

    The planted layer then has no score, and for the last one no lookup is claimed.
    """
    found = planted_truth.located(layer, "flu")
    score = found.scores[found.layers().index(layer)]
    if layer < 2:
        assert found.layers()[0] == layer and score > 0.1 and found.band.k == 1
    else:
        assert score == 0.0 and found.scores[0] < 0.05
        assert any("no lookup is claimed" in note for note in found.notes) == (layer == 3)


@pytest.mark.parametrize(("wrong", "match"), [({"heads": 0}, "cannot take 0"), ({"heads": 13}, "12 after its first"),
                                              ({"top": 4}, "top of 4")])  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        planted_truth.located(1, "flu", items=8, **wrong)


def test_a_model_of_one_layer_has_no_heads_behind_a_lookup() -> None:
    module = tiny_models.build("llama")
    del module.model.layers[1]
    module.config.num_hidden_layers = 1
    model = wrap(module, tiny_models.tiny_tokenizer(), "one layer")
    with pytest.raises(UsageError, match="one layer"):
        rf.locate(model, known_words.knowledge_of(model), "flu")


def categories(shuffled: bool) -> Knowledge:
    """The first name says the job; the second one, where it is read, says nothing."""
    words = tiny_models.WORDS
    rows = [(f"{first} {last}", job) for first, job in zip(known_words.FIRST, ("baker", "pilot", "doctor") * 2,
                                                           strict=True) for last in words[7:30]]  # fmt: skip
    jobs = [job for _, job in rows]
    if shuffled:
        np.random.default_rng(1).shuffle(jobs)
    items = [Item(id=name, cluster=name, subject=name, relation="job", answer=job, prompt=f"{name} works as",
                  statements=(f"{name} works as",)) for (name, _), job in zip(rows, jobs, strict=True)]  # fmt: skip
    return Knowledge.build("jobs", items[::2], items[1::2])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "olmo2"])
def test_categories_climb_where_attention_brings_them_and_shuffled_ones_nowhere(name: str) -> None:
    model = model_of(name)
    scores, half, tables, told, passes = _categories(model, categories(False), (), MLPS, 1, 100, 0, None)
    assert scores[0] > 0.3 and scores[0] > 2 * abs(scores[1]) and half[0] > 0.2 and not told
    assert list(tables.values()) == [[[s] for s in scores]] and passes > 100
    nothing, *_, told, _ = _categories(model, categories(True), (), MLPS, 1, 100, 0, None)
    assert np.abs(nothing).max() < 0.2 and any("no enrichment" in note for note in told)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_locator_runs_on_every_architecture(name: str) -> None:
    model = model_of(name)
    knowledge = known_words.knowledge_of(model)
    for given in ({"reads": "residual"}, {"reads": "heads", "heads": 2}):
        found = rf.locate(model, knowledge, "flu", items=8, partners=1, draws=20, contrast=0.0, **given)
        scores = dict(zip(found.components, found.scores, strict=True))
        assert scores[MLPS[1]] == 0.0 and abs(scores[MLPS[0]]) > 1e-5
