"""The answer by layer: the last reading is the model's own, a translator at rest is the logit lens."""

from __future__ import annotations

import numpy as np
import planted
import pytest
import tiny_models
import torch
from test_circuits import model_of, runs
from test_locate_planted import KNOWLEDGE, located
from test_locate_planted import model as planted_model

import repforget as rf
from repforget.causal import patch_scores, prepare
from repforget.errors import UsageError
from repforget.knowledge import Knowledge
from repforget.locate.lens_trajectory import Trajectory, _scores, logit_readings, trajectory, tuned_readings
from repforget.models.capture import capture, forward
from repforget.models.load import fingerprint
from repforget.models.readout import lens
from repforget.records import Site


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_last_layer_reads_what_the_model_says(name: str) -> None:
    model, items = model_of(name), runs()
    found = trajectory(model, items, logit_readings(model))
    np.testing.assert_allclose(found.logprob[-1], patch_scores(model, items, [()])[0], atol=1e-4)
    for item in prepare(model, items):
        logits = forward(model, item.base)[:, -item.target.shape[1] :]
        rank = (logits > logits.gather(-1, item.target[..., None])).sum(-1).double().mean(1)
        np.testing.assert_allclose(found.rank[-1, list(item.rows)], rank, atol=0.51)  # rounding may swap neighbours
    np.testing.assert_allclose(found.logprob[0] + found.increments.sum(0), found.logprob[-1])
    assert np.abs(found.increments).max() > 0.1


def test_earlier_layers_are_read_by_the_models_own_norm_and_unembedding() -> None:
    model, items = model_of("gemma2"), runs((9,))
    found = trajectory(model, items, logit_readings(model))
    (item,) = prepare(model, items)
    state = capture(model, [Site("resid_post", 0)], item.base, gather="all")[Site("resid_post", 0)][:, -2:]
    by_hand = lens(model, state).double().log_softmax(-1).gather(-1, item.target[..., None]).sum()
    assert found.logprob[1, 0] == pytest.approx(float(by_hand), abs=1e-5)


def test_padding_changes_nothing() -> None:
    model, items = model_of("llama"), runs((9, 6, 11))
    together = trajectory(model, items, logit_readings(model)).logprob
    alone = np.concatenate([trajectory(model, [run], logit_readings(model)).logprob for run in items], axis=1)
    np.testing.assert_allclose(together, alone, atol=1e-5)


def divergence(model: object, items: list[object], readings: list[object]) -> np.ndarray:
    """Mean KL of the model's own distribution from the reading of every state, on all tokens [layers + 1]."""
    sites = [Site("resid_pre", 0), *(Site("resid_post", k) for k in range(model.n_layers))]
    total = np.zeros(len(sites))
    for item in prepare(model, items):
        values = capture(model, sites, item.base, gather="tokens")
        with torch.no_grad():
            own = lens(model, values[sites[-1]]).log_softmax(-1)
            for k, (site, read) in enumerate(zip(sites, readings, strict=True)):
                said = read(values[site]).log_softmax(-1)
                total[k] += float((own.exp() * (own - said)).sum(-1).mean())
    return total


def test_a_tuned_lens_says_more_of_the_last_layer_and_leaves_the_model_alone() -> None:
    model, items = model_of("llama"), runs((12, 11, 10, 12))
    before = fingerprint(model.module)
    plain = divergence(model, items, logit_readings(model))
    tuned = divergence(model, items, tuned_readings(model, items, 60, 1e-2, 0))
    assert (tuned[:-1] < 0.8 * plain[:-1]).all() and tuned[-1] < 1e-9 and plain[-1] < 1e-9
    assert fingerprint(model.module) == before and all(p.requires_grad for p in model.module.parameters())
    still = tuned_readings(model, items, 1, 0.0, 0)  # no step taken: the identity
    np.testing.assert_allclose(divergence(model, items, still), plain, rtol=1e-5)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="at least one of each"):
        rf.locate(planted_model(0), KNOWLEDGE, "lens_trajectory", steps=0)
    alone = Knowledge.build("alone", KNOWLEDGE.forget, KNOWLEDGE.retain[:3])
    with pytest.raises(rf.errors.RepforgetError):
        rf.locate(planted_model(0), alone, "lens_trajectory", layers=[7])


@pytest.mark.parametrize("read", ["logit", "tuned"])
def test_planted_layers(read: str) -> None:
    """One of four, as by chance: the last layer comes first whichever layer holds the facts."""
    firsts = [located(layer, "lens_trajectory", read=read).layers()[0] for layer in planted.LAYERS]
    assert firsts == [3, 3, 3, 3]


def test_what_is_not_known_is_not_raised() -> None:
    """The base, which never saw the planted people, raises their answers far less than the last layer's holder."""
    known = located(3, "lens_trajectory", contrast=0.0)
    unknown = rf.locate(planted_model(None), KNOWLEDGE, "lens_trajectory", contrast=0.0, draws=20)
    name = next(n for n in known.tables if n.startswith("log p"))
    assert known.tables[name][3][0] > unknown.tables[name][3][0] + 1
    assert known.band.effect.startswith("mean exact") and not known.band.beats_random  # four layers are too few


def test_the_rise_on_retain_facts_is_subtracted() -> None:
    generator = np.random.default_rng(0)
    known, beside = (Trajectory(generator.random((4, n)), np.zeros((4, n))) for n in (5, 3))
    chosen = np.array([True, False, True, False, False])
    rises = [np.diff(t.logprob, axis=0) for t in (known, beside)]
    expected = rises[0][:, chosen].mean(1) - 0.5 * rises[1].mean(1)
    np.testing.assert_allclose(_scores(known, beside, 0.5, chosen), expected)
    np.testing.assert_allclose(_scores(known, None, 0.5), rises[0].mean(1))
