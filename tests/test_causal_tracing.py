"""Causal tracing: total effect, no effect, the noise itself, brute force, planted facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import hypothesis
import known_words
import numpy as np
import planted
import pytest
import test_locate_planted as planted_truth
import tiny_models
import torch
from hypothesis import strategies as st
from test_circuits import model_of, runs

import repforget as rf
from repforget.causal import Run, answer_metric, patch_effects, prepare
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import Knowledge
from repforget.locate._tracing import (
    ROLES,
    Noise,
    embedding_scale,
    noise_for,
    role_scores,
    token_roles,
    trace,
    windows,
)
from repforget.locate._units import expand_nodes
from repforget.models.capture import capture, hooks
from repforget.models.sites import site_map
from repforget.records import Component, Site

ALL = pytest.mark.parametrize("name", tiny_models.ALL)
SMALL: dict[str, Any] = {"items": 12, "samples": 2}


def about(subject: range = range(1, 4), lengths: tuple[int, ...] = (9, 8, 11)) -> list[Run]:
    """Runs whose positions are a subject, clean on both sides."""
    return [replace(run, base=run.donor, positions=tuple(subject)) for run in runs(lengths)]


@ALL
def test_restoring_everything_at_the_subject_is_the_total_effect_and_nothing_is_none(name: str) -> None:
    model, items = model_of(name), about()
    kinds = ("embed", "resid_post", "attn_out", "mlp_out")
    everything = [Component(s) for kind in kinds for s in site_map(model).expand(kind)]
    noise = Noise(3 * embedding_scale(model, items), 1, 0)
    found = patch_effects(model, items, [everything, [Component(Site("embed"))], []],
                          shift=noise_for(model, items, noise))  # fmt: skip
    scale = float(np.abs(found.gap).max())
    assert scale > 0.05
    np.testing.assert_allclose(found.moved[:2], np.stack([found.gap] * 2), atol=2e-5 * max(1.0, scale))
    np.testing.assert_allclose(found.moved[2], 0.0, atol=2e-5)


@ALL
def test_without_noise_nothing_is_lost_and_nothing_restored(name: str) -> None:
    model = model_of(name)
    components = expand_nodes(model, ("resid_post", "mlp_out", "attn_out"))
    traces = trace(model, about(), [(c,) for c in components], "logprob", Noise(0.0, 2, 0))
    np.testing.assert_allclose(traces.moved, 0.0, atol=2e-5)
    np.testing.assert_allclose(traces.gap, 0.0, atol=2e-5)
    with pytest.raises(UsageError, match="nothing to locate"):
        role_scores(traces, None, 0.0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "falcon"])
@pytest.mark.parametrize("scale", ["logprob", "probability"])
def test_brute_force_of_one_state_at_one_kind_of_token(name: str, scale: Any) -> None:
    """Draw by draw and site by site, each run alone: the noise is its own, whatever it is batched with."""
    model, items, noise = model_of(name), about(), Noise(0.7, 2, 5)
    sites = [Site("resid_post", 0), Site("mlp_out", 1)]
    found = trace(model, items, [(Component(s),) for s in sites], scale, noise)

    def score(edits: Any, item: Any) -> float:
        with torch.no_grad(), hooks(model, edits):
            value = float(answer_metric(model, item.base, item, "logprob")[0])
        return value if scale == "logprob" else float(np.exp(value))

    for n, run in enumerate(items):
        item = next(iter(prepare(model, [run])))
        clean = capture(model, sites, item.base, "all")
        shifts = [noise_for(model, [run, run], noise)(replace(item, rows=(draw,))) for draw in (0, 1)]
        assert not torch.equal(*shifts) and not shifts[0][:, 4:].any() and not shifts[0][:, 0].any()
        for place, role in enumerate(ROLES):
            at = token_roles(run)[role]
            for k, site in enumerate(sites):
                moved = []
                for shift in shifts:
                    def put(x: Any, values: Any = clean[site], at: Any = at) -> Any:
                        y = x.clone()
                        y[:, list(at)] = values[:, list(at)]
                        return y

                    noised = {Site("embed"): lambda x, shift=shift: x + shift}
                    moved.append(score({**noised, site: put}, item) - score(noised, item))
                assert found.moved[place, k, n] == pytest.approx(np.mean(moved), abs=3e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_the_scale_of_the_noise_is_that_of_the_subject_embeddings(name: str) -> None:
    model, items = model_of(name), about()
    rows = model.module.get_input_embeddings().weight[sorted({r.donor[p] for r in items for p in r.positions})]
    factor = tiny_models.WIDTH**0.5 if name == "gemma2" else 1.0
    assert embedding_scale(model, items) == pytest.approx(factor * float(rows.detach().double().std(correction=0)))
    shift = noise_for(model, about(lengths=(40,) * 200), Noise(2.0, 1, 0))
    drawn = torch.cat([shift(item)[item.base.ids >= 0] for item in prepare(model, about(lengths=(40,) * 200))])
    assert float(drawn[drawn.abs().sum(-1) > 0].std()) == pytest.approx(2.0, rel=0.05)


@hypothesis.given(first=st.integers(0, 5), length=st.integers(1, 5), later=st.integers(0, 5))
def test_every_token_has_one_role_and_the_last_of_the_subject_is_there(first: int, length: int, later: int) -> None:
    start = first + length + later
    ids = tuple(range(start + 2))
    roles = token_roles(Run("a", "a", ids, ids, start, tuple(range(first, first + length))))
    places = [p for found in roles.values() for p in found]
    assert len(places) == len(set(places)) and ROLES[2] in roles
    subject = [p for role in ROLES[:3] for p in roles.get(role, ())]
    assert sorted(subject) == list(range(first, first + length))
    assert (ROLES[4] in roles) == (later > 0) and (ROLES[3] in roles) == (later > 1)
    assert not later or roles[ROLES[4]] == (start - 1,)


def test_windows_are_centred_and_end_where_the_model_does() -> None:
    model = planted_truth.model(0)
    components = expand_nodes(model, ("mlp_out", "resid_post"))
    layers = [[c.site.layer for c in patch] for patch in windows(model, components, 3)]
    assert layers == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3], [0], [1], [2], [3]]
    assert windows(model, components, "auto") == [(c,) for c in components]
    for wrong in (0, 5):
        with pytest.raises(UsageError, match="window"):
            windows(model, components, wrong)


def test_the_last_state_at_the_last_token_brings_everything_back_and_the_last_mlp_elsewhere_nothing() -> None:
    for corruption in ("noise", "replace"):
        found = planted_truth.located(1, "causal_tracing", nodes=("resid_post", "mlp_out"), corruption=corruption,
                                      **SMALL)  # fmt: skip
        states, mlps = (rows for title, rows in found.tables.items())
        names = next(iter(found.tables)).split(": ")[1].split(", ")
        assert names == [ROLES[0], ROLES[2], ROLES[4]]  # two tokens have no middle, and one token follows them
        np.testing.assert_allclose(states[3], [0, 0, 1], atol=1e-4)
        np.testing.assert_allclose(mlps[3][:2], 0.0, atol=1e-4)
        assert found.components[0] == Component(Site("resid_post", 3))
        best = {str(c): s for c, s in zip(found.components, found.scores, strict=True)}
        assert best["mlp_out.0"] == pytest.approx(max(mlps[0]))


@pytest.mark.slow
@pytest.mark.parametrize(("given", "least"), [
    ({"corruption": "noise", "samples": 5}, 3),
    ({"corruption": "replace", "partners": 2, "metric": "logit_difference"}, 4),
])  # fmt: skip
def test_the_planted_layer_leads_beside_retain_facts(given: dict[str, Any], least: int) -> None:
    """Without the contrast the last MLP leads in all four, for it says the answer."""
    found = [planted_truth.located(k, "causal_tracing", nodes=("mlp_out",), contrast=1.0, **given).layers()[0]
             for k in planted.LAYERS]  # fmt: skip
    assert sum(a == b for a, b in zip(found, planted.LAYERS, strict=True)) >= least
    assert planted_truth.located(1, "causal_tracing", nodes=("mlp_out",), items=16, samples=2).layers()[0] == 3


@pytest.mark.parametrize(("wrong", "match"), [({"noise": -1.0}, "size of at least 0"), ({"samples": 0}, "one draw"),
                                              ({"noise": 0.0}, "nothing to locate"),
                                              ({"window": 9}, "window")])  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        planted_truth.located(1, "causal_tracing", **{**SMALL, **wrong})


def test_a_subject_that_is_not_in_its_prompt_is_refused() -> None:
    items = [[replace(item, subject="Zed") for item in part]
             for part in (planted_truth.KNOWLEDGE.forget, planted_truth.KNOWLEDGE.retain)]  # fmt: skip
    with pytest.raises(KnowledgeError, match="subject"):
        rf.locate(planted_truth.model(1), Knowledge.build("none", *items), "causal_tracing", draws=20, **SMALL)


@ALL
def test_the_locator_runs_on_every_architecture(name: str) -> None:
    model = model_of(name)
    for corruption in ("noise", "replace"):
        found = rf.locate(model, known_words.knowledge_of(model), "causal_tracing", corruption=corruption, draws=20,
                          nodes=("resid_post", "mlp_out", "attn_out"), contrast=float(corruption == "replace"),
                          **SMALL)  # fmt: skip
        assert len(found.components) == 6 and len(found.tables) == 3 and max(map(abs, found.scores)) > 1e-3
