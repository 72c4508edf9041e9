"""Records survive JSON unchanged and refuse what cannot exist."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repforget.errors import SiteError, nearest
from repforget.records import (
    GLOBAL_KINDS,
    HEAD_KINDS,
    SITE_KINDS,
    Claim,
    Component,
    Curve,
    Edge,
    Evidence,
    ItemScores,
    Localization,
    RandomBand,
    Site,
    Verdict,
)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    kind = draw(st.sampled_from(SITE_KINDS))
    if kind in GLOBAL_KINDS:
        return Site(kind)
    head = draw(st.none() | st.integers(0, 63)) if kind in HEAD_KINDS else None
    return Site(kind, draw(st.integers(0, 120)), head)


@given(sites(), st.none() | st.integers(0, 10_000))
def test_sites_and_components_print_and_parse_back(site: Site, neuron: int | None) -> None:
    assert Site.parse(str(site)) == site
    for component in (Component(site, neuron), Component(site, feature=neuron)):
        assert Component.parse(str(component)) == component


@pytest.mark.parametrize(
    ("text", "expected"),
    [("resid_pots.3", "did you mean 'resid_post'"), ("resid_post", "only embed, final_norm and logits have no layer"),
     ("embed.2", "was given layer 2"), ("mlp_out.1.h3", "has no heads"), ("!!", "is not a site")],
)  # fmt: skip
def test_impossible_sites_are_refused_with_the_way_out(text: str, expected: str) -> None:
    with pytest.raises(SiteError, match=expected):
        Site.parse(text)


def test_nearest_names() -> None:
    assert nearest("leac", ["leace", "steering"]) == "did you mean 'leace'?"
    assert nearest("zzz", ["a", "b"]) == "choose one of: a, b"
    assert nearest("zzz", []) == "none is available"


def _localization() -> Localization:
    components = (Component(Site("mlp_out", 2)), Component(Site("attn_z", 0, 1)), Component(Site("mlp_out", 0)),
                  Component(Site("mlp_out", 2), 7))  # fmt: skip
    band = RandomBand(k=2, draws=50, top=0.9, low=0.1, high=0.4, effect="joint patch effect")
    return Localization("activation_patching", components, (0.9, 0.5, 0.2, 0.1), band, {"forwards": 12.0},
                        {"mode": "denoise"}, {"mlp_out": [[0.2], [0.0], [0.9]]}, ("note",),
                        (Edge(components[0], Component(Site("logits")), 0.4),))  # fmt: skip


def test_localization_round_trips_and_lists_layers_once() -> None:
    where = _localization()
    again = Localization.from_json(json.loads(json.dumps(where.to_json())))
    assert again.components == where.components
    assert again.band == where.band and again.edges == where.edges and len(again.edges) == 1
    assert again.band.beats_random
    assert where.layers() == (2, 0)
    assert where.layers("attn_z") == (0,)


def test_item_scores_keep_invalid_items_visible_and_out_of_the_mean() -> None:
    scores = ItemScores.of(["a", "b", "c"], ["x", "x", "y"], [1.0, math.nan, 0.0])
    assert scores.mean == 0.5
    assert scores.valid.tolist() == [True, False, True]
    again = ItemScores.from_json(json.loads(json.dumps(scores.to_json())))
    assert np.array_equal(again.values, scores.values) and np.array_equal(again.valid, scores.valid)
    with pytest.raises(ValueError, match="one entry per item"):
        ItemScores(("a",), (), np.zeros(1), np.ones(1, bool))


def test_evidence_and_verdict_round_trip_with_nan_as_null() -> None:
    scores = ItemScores.of(["a"], ["x"], [0.25])
    curve = Curve("relearn", "steps", "accuracy", (0.0, 1.0), {"edit": (0.1, 0.2)})
    evidence = Evidence("relearn", "other_half", "knowledge", "weights", True, {"edit": scores}, scores,
                        {"steps": 20.0}, "half of the facts", (curve,), {"edit": {"flip": 0.5}})  # fmt: skip
    assert Evidence.from_json(json.loads(json.dumps(evidence.to_json()))).curves == (curve,)
    claim = Claim("relearn.other_half", "knowledge", "weights", "no power", "no gap", 0.05)
    verdict = Verdict("inconclusive", "We cannot tell.", None, (claim,), {"placebo": "as expected"})
    text = json.dumps(verdict.to_json(), allow_nan=False)
    again = Verdict.from_json(json.loads(text))
    assert math.isnan(again.claims[0].rho) and again.outcome == "inconclusive"
