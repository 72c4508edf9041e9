"""The locators on the embedded organism, whose twins come from other starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import repforget as rf
from repforget.locate._exact import measure
from repforget.locate._tasks import corrupted_tasks
from repforget.locate._units import Node, expand_nodes
from repforget.locate.attribution_patching import estimate
from repforget.records import Localization


@pytest.fixture(scope="module")
def organism() -> Any:
    return rf.load("organism:bios"), rf.knowledge("bios-people")


@pytest.mark.parametrize("nodes", [("attn_out", "mlp_out"), ("heads",)])
def test_attribution_estimates_exact_patching(organism: Any, nodes: tuple[Node, ...]) -> None:
    model, knowledge = organism
    tasks, _ = corrupted_tasks(model, knowledge, 0, items=24, mode="both")
    components = expand_nodes(model, nodes)
    exact = measure(tasks, [(c,) for c in components]).scores(0.0)
    along = estimate(tasks, components, 8).scores(0.0)
    assert np.corrcoef(along, exact)[0, 1] > 0.9
    assert np.corrcoef(estimate(tasks, components, 1).scores(0.0), exact)[0, 1] > 0.5


def test_what_beats_random_selections_and_what_does_not(organism: Any) -> None:
    model, knowledge = organism
    found: dict[str, Localization] = {
        name: rf.locate(model, knowledge, name) for name in ("activation_patching", "random_sites")
    }
    assert found["activation_patching"].band.beats_random
    assert not found["random_sites"].band.beats_random
    assert any("no localisation is claimed" in note for note in found["random_sites"].notes)


def test_a_twin_from_another_start_is_recognised(organism: Any) -> None:
    model, knowledge = organism
    found = rf.locate(model, knowledge, "twin_patching", twins=[rf.load("organism:bios/twin-0")], items=24)
    assert not found.band.beats_random
    assert any("does not share this model's basis" in note for note in found.notes)
