"""CIR: the updates it takes, what it projects out of them, and the budget it keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from edit_models import model as tiny
from edit_models import people

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.train._budget import divergence
from repforget.edit.train.cir import _batches, _forgotten, _kept, _layers, _Run
from repforget.errors import KnowledgeError, NumericalError, SiteError, UsageError
from repforget.models.load import LoadedModel, fingerprint
from repforget.records import Component, Localization, RandomBand

DATA = people().for_editor()


def frozen(architecture: str = "llama") -> LoadedModel:
    model = tiny(architecture)
    for parameter in model.module.parameters():
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "phi3", "opt", "gemma2"])
def test_without_projections_the_update_is_the_gradient_of_the_loss(architecture: str) -> None:
    """Autograd on the weights as second opinion; within one layer, tokens that are left out send no gradient anyway."""
    model = frozen(architecture)
    run = _Run(model, (1,), -9.0)
    (batch, *_) = _batches(model, _forgotten(model, DATA, 8, 0), 8, 0)
    with run.training():
        with torch.no_grad():
            for parameter in run.parameters:
                parameter.mul_(0.9)
        own = run.confusing(batch, [_nothing(pair) for pair in run.flows(batch)])
        then = run.before("mlp_out", (1,), batch)
        now = run.read("mlp_out", (1,), batch)
        loss = ((now * then).sum(-1) / then.pow(2).sum(-1)).mean()
        expected = torch.autograd.grad(loss, run.parameters)
    for mine, theirs in zip(own, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-3)
    assert fingerprint(model.module) == model.fingerprint


def _nothing(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return pair[0].new_zeros(pair[0].shape[1], 0), pair[1].new_zeros(pair[1].shape[1], 0)


def test_updates_hold_nothing_of_the_shared_directions_and_have_the_size_asked_for() -> None:
    model = frozen()
    run = _Run(model, (0, 1), 0.0)
    batches = _batches(model, _forgotten(model, DATA, 99, 0), 8, 0)
    with run.training():
        shared = run.shared(batches, 3, 5, 0)
        found = run.confusing(batches[0], shared)
        for gradient, (inputs, outputs) in zip(found, shared, strict=True):
            assert (inputs.shape[1], outputs.shape[1]) == (3, 5)
            assert float(gradient.norm()) > 0
            assert float((gradient @ inputs).abs().max()) < 1e-5 * float(gradient.abs().max() + 1)
            assert float((outputs.mT @ gradient).abs().max()) < 1e-5 * float(gradient.abs().max() + 1)
        run.move(found, 0.01)
        moved = torch.cat([op.delta.flatten() for op in run.operations()]).norm()
        assert float(moved) == pytest.approx(0.01 * run.length, rel=1e-3)
        before = run.operations()[0].delta.clone()
        run.move([torch.zeros_like(g) for g in found], 0.01)
        assert torch.equal(run.operations()[0].delta, before), "no gradient, no step"
        auto = run.shared(batches, "auto", "auto", 0)
        assert [pair[0].shape[1] for pair in auto] == [1, 1, 1] * 2


def test_it_turns_outputs_away_and_repair_brings_states_back() -> None:
    model = frozen()
    run = _Run(model, (0,), 0.0)
    forget = _batches(model, _forgotten(model, DATA, 99, 0), 16, 0)
    kept = _batches(model, _kept(model, DATA, 99, 0), 16, 0)

    def away(kind: str, layer: int) -> float:
        with torch.no_grad():
            now, then = run.read(kind, (layer,), kept[0]), run.before(kind, (layer,), kept[0])
            return float((now - then).norm())

    def aligned() -> float:
        with torch.no_grad():
            now, then = (f("mlp_out", (0,), forget[0]) for f in (run.read, run.before))
            return float(((now * then).sum(-1) / then.pow(2).sum(-1)).mean())

    with run.training():
        shared = run.shared(forget, 1, 1, 0)
        assert aligned() == pytest.approx(1.0, abs=1e-5)
        for i in range(10):
            run.move(run.confusing(forget[i % len(forget)], shared), 0.02)
        turned, far = aligned(), away("resid_post", 1)
        assert turned < 0.7
        for _ in range(10):
            run.move(run.repairing(kept[0]), 0.005)
        assert away("resid_post", 1) < 0.9 * far


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_budget_is_kept_and_the_model_left(architecture: str) -> None:
    model = frozen(architecture)
    damage = divergence(model, DATA, 0)
    edit = run_editor(model, DATA, "cir", size=0.02, max_disruption=0.02, steps=12, check_every=3)
    assert fingerprint(model.module) == model.fingerprint
    with edit.attach(model):
        assert 0.0 < damage() <= 0.02 * 1.001
    assert "last good state" in edit.manifest.notes[0]
    assert edit.manifest.settings["layers"] == [0, 1]


def test_layers_follow_the_localisation_and_the_depth() -> None:
    model = frozen()
    where = Localization("test", (Component.parse("mlp_out.1"),), (1.0,), RandomBand(1, 5, 1, 0, 0.5, "e"))
    assert _layers(model, "auto", where, 4) == [1]
    assert _layers(model, "auto", None, 4) == [0, 1]
    for depth, expected in ((32, list(range(6, 12))), (4, [0, 1, 2, 3]), (12, [2, 3, 4, 5])):
        deep = dataclasses.replace(model, module=_Deep(depth))
        assert _layers(deep, "auto", None, 4) == expected


class _Deep(torch.nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.config = type("C", (), {"num_hidden_layers": depth, "get_text_config": lambda self, **_: self})()


def test_what_it_refuses() -> None:
    model = frozen()
    for setting, error in (({"layers": [9]}, SiteError), ({"steps": 0}, UsageError), ({"size": 0.0}, UsageError)):
        with pytest.raises(error):
            run_editor(model, DATA, "cir", **setting)  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="batched experts"):
        run_editor(tiny("mixtral"), DATA, "cir", steps=1)
    with pytest.raises(KnowledgeError, match="no facts to forget"):
        run_editor(model, dataclasses.replace(DATA, forget=()), "cir")
    with pytest.raises(NumericalError, match="smaller size"):
        run_editor(model, DATA, "cir", max_disruption=1e-15, steps=1)
    assert fingerprint(model.module) == model.fingerprint
