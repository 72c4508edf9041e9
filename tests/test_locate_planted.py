"""Ground truth: models in which one layer's MLP holds the forget facts. The locators must say which."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import planted
import pytest

import repforget as rf
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel, wrap
from repforget.records import Component, Localization, Site

pytestmark = pytest.mark.skipif(not (planted.FOLDER / "base").exists(), reason="planted-fact models are not built")
LAYERS = pytest.mark.parametrize("layer", planted.LAYERS)


def items(people: list[str], kind: str) -> list[Item]:
    asked = [(name, relation, value) for name in people for relation, value in planted.facts()[name].items()]
    return [Item(id=f"{kind}-{name}-{relation}", cluster=name, subject=name, relation=relation, answer=value,
                 prompt=planted.TEMPLATES[0].format(subject=name, relation=relation),
                 statements=tuple(t.format(subject=name, relation=relation) for t in planted.TEMPLATES[1:]))
            for name, relation, value in asked]  # fmt: skip


KNOWLEDGE = Knowledge.build("planted", items(planted.planted_people(), "f"), items(planted.background_people(), "r"))


@cache
def model(layer: int | None) -> LoadedModel:
    return wrap(*planted.planted(layer), f"planted-{layer}")


@cache
def located(layer: int, method: str, **settings: Any) -> Localization:
    twins = (model(None),) if method == "twin_patching" else ()
    return rf.locate(model(layer), KNOWLEDGE, method, twins=twins, draws=20, **settings)


@LAYERS
def test_patching_finds_the_planted_layer(layer: int) -> None:
    """Contrasted with retain facts, because the first and the last MLP matter for every fact."""
    found = located(layer, "activation_patching", nodes=("mlp_out",), contrast=1.0)
    assert found.layers("mlp_out")[0] == layer


@LAYERS
def test_twin_patching_finds_the_planted_layer(layer: int) -> None:
    found = located(layer, "twin_patching", nodes=("mlp_out",))
    scores = dict(zip(found.components, found.scores, strict=True))
    assert found.components[0] == Component(Site("mlp_out", layer))
    assert abs(found.scores[0] - 1.0) < 0.1  # writing the base model in there takes everything
    assert all(abs(scores[Component(Site("mlp_out", k))]) < 1e-4 for k in range(layer))  # nothing differs before
    assert not any("basis" in note for note in found.notes)


@LAYERS
def test_twin_stream_differs_from_the_planted_layer_on(layer: int) -> None:
    found = located(layer, "twin_patching", nodes=("resid_post",), contrast=0.0)
    scores = dict(zip(found.components, found.scores, strict=True))
    for k in planted.LAYERS:
        assert abs(scores[Component(Site("resid_post", k))] - float(k >= layer)) < 1e-3


@LAYERS
def test_attribution_estimates_exact_patching_and_rechecks_its_best(layer: int) -> None:
    settings = {"nodes": ("mlp_out", "attn_out"), "items": 32}
    exact = located(layer, "activation_patching", **settings)
    estimate = located(layer, "attribution_patching", recheck=0, **settings)
    true = dict(zip(exact.components, exact.scores, strict=True))
    assert np.corrcoef(estimate.scores, [true[c] for c in estimate.components])[0, 1] > 0.7
    checked = located(layer, "attribution_patching", recheck=8, **settings)
    np.testing.assert_allclose(checked.scores, exact.scores, atol=1e-5)
    assert checked.components == exact.components and "exact patching effects" in checked.notes[-2] + checked.notes[-1]


@LAYERS
def test_probing_reads_the_facts_only_after_they_are_written(layer: int) -> None:
    found = located(layer, "probe_sweep", nodes=("resid_post",), classifier="lda")
    score = {c.site.layer: s for c, s in zip(found.components, found.scores, strict=True)}
    assert score[3] > 0.4  # the answer is about to be said
    nothing = rf.locate(model(None), KNOWLEDGE, "probe_sweep", classifier="lda")
    assert max(nothing.scores) < 0.25 and not nothing.band.beats_random


def test_few_selections_are_said_to_support_no_claim() -> None:
    found = located(1, "activation_patching", nodes=("mlp_out",), mode="denoise", contrast=1.0)
    assert not found.band.beats_random and any("no localisation is claimed" in n for n in found.notes)


def test_a_real_localisation_beats_the_band() -> None:
    """Head by head and MLP by MLP there are enough selections; the twin says which MLP was changed."""
    found = located(2, "twin_patching", nodes=("mlp_out", "attn_out", "heads"), top=2)
    assert found.components[0] == Component(Site("mlp_out", 2))
    assert found.band.beats_random == (found.band.top > found.band.high)
