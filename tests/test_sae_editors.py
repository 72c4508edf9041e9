"""Editors on an autoencoder with an exact dictionary, whose answers are known, and the locator on planted people."""

from __future__ import annotations

import dataclasses
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import contract_tools
import planted
import pytest
import tiny_models
import torch
from artifact_tools import tiny as build_tiny
from contract.test_locators import _items
from torch import Tensor

import repforget as rf
from repforget.artifact import ClampFeatures, LowRankDelta
from repforget.edit._dispatch import edit as run_editor
from repforget.edit.surgery.pisces import majority_sign, turned
from repforget.edit.train.crisp import silence, states_stay
from repforget.errors import NoEffectError, SiteError, UsageError
from repforget.features import SparseAutoencoder, measure, save, told
from repforget.knowledge import EditData, Knowledge
from repforget.models.capture import Batch, capture, forward
from repforget.models.load import LoadedModel, wrap
from repforget.models.weights import find, get_weight
from repforget.records import Component, Localization, RandomBand, Site


@cache
def tiny() -> LoadedModel:
    return build_tiny("llama")


@cache
def data() -> EditData:
    """The people of the editors' contract, under other surnames."""
    general = ["the red cat lives in Rome", "the blue dog lives in Oslo", "what is the name of the bird"]
    people = contract_tools.people("f", range(5, 7)), contract_tools.people("r", range(10, 18))
    return Knowledge.build("tiny", *people, (), general).for_editor()


@cache
def texts() -> tuple[list[Any], list[Any]]:
    return told(tiny(), data().forget), told(tiny(), data().retain, data().general)


@cache
def dictionary(kind: str = "resid_post", layer: int = 0) -> SparseAutoencoder:
    """An orthonormal basis in both signs, its first direction that of the forget token furthest from retained ones,
    active on forget texts alone."""
    model, site = tiny(), Site(kind, layer)
    own, other = (capture(model, [site], Batch.pad(rows), "tokens")[site] for rows in texts())
    moment = (other - other.mean(0)).T @ (other - other.mean(0)) / len(other) + 1e-3 * other.var() * torch.eye(32)
    away = own - other.mean(0)
    far = torch.linalg.solve(moment, away.T).T
    first = far[(far * away).sum(1).argmax()]
    basis = torch.linalg.qr(torch.cat([first[:, None], torch.eye(32)], 1)).Q.T[:32]
    basis[0] *= torch.sign(basis[0] @ first)
    rows = torch.cat([basis, -basis])
    threshold = torch.zeros(64)
    threshold[0] = float((other @ basis[0]).max().clamp(min=0)) + 1e-3
    assert bool((own @ basis[0] > threshold[0]).any())
    return SparseAutoencoder(site, rows, rows, torch.zeros(64), torch.zeros(32), "jumprelu", threshold)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(save(dictionary(), tmp_path / "sae"))


def states(model: LoadedModel, rows: list[Any], layer: int = 0) -> Tensor:
    site = Site("resid_post", layer)
    return capture(model, [site], Batch.pad(rows), "tokens")[site]


# A complete basis explains every site, so that none fits better than another.
SETTINGS = {"features": 1, "most_retain": 1e-6, "check": False}


def test_the_clamp_takes_the_feature_to_its_negative_and_leaves_retained_texts(file: str) -> None:
    model, sae = tiny(), dictionary()
    edit = run_editor(model, data(), "sae_clamp", sae=file, clamp=3.0, **SETTINGS)
    (operation,) = edit.operations
    assert isinstance(operation, ClampFeatures) and edit.manifest.settings["chosen_features"] == {"resid_post.0": [0]}
    own, other = texts()
    before, kept = sae.encode(states(model, own))[:, 0], forward(model, Batch.pad(other))
    usual = before[before > 0].mean()
    with edit.attach(model):
        after = states(model, own) @ sae.encoder[0]
        assert torch.equal(forward(model, Batch.pad(other)), kept)
    torch.testing.assert_close(after[before > 0], (-3.0 * usual).expand(int((before > 0).sum())), atol=1e-3, rtol=1e-3)


def test_a_closed_detector_leaves_every_bit(file: str) -> None:
    """Never more retained texts than allowed; where it is shut the clamp is not seen."""
    model = tiny()
    edit = run_editor(model, data(), "sae_clamp", sae=file, check=False, features=20, most_retain=0.5,
                      condition="prefix", false_open=0.2)  # fmt: skip
    base, changed = [], 0
    for row in texts()[1]:
        base.append(forward(model, Batch.pad([row])))
    own = forward(model, Batch.pad(texts()[0]))
    with edit.attach(model):
        for row, before in zip(texts()[1], base, strict=True):
            changed += not torch.equal(forward(model, Batch.pad([row])), before)
        assert not torch.equal(forward(model, Batch.pad(texts()[0])), own)
    assert changed <= 0.2 * len(base) + 1


@pytest.mark.parametrize("false_open", [0.05, 0.2])
def test_the_guardrail_opens_for_as_many_retained_texts_as_allowed(tmp_path: Path, false_open: float) -> None:
    """Features active on both kinds of text, so that the gate has to count; the bits of closed texts stay."""
    sae = dictionary()
    values = states(tiny(), texts()[1]) @ sae.encoder.T
    noisy = dataclasses.replace(sae, threshold=values.quantile(0.85, dim=0).clamp(min=0))
    model, path = tiny(), save(noisy, tmp_path / "sae")
    edit = run_editor(model, data(), "dsg", sae=str(path), check=False, features=2, percentile=50,
                      false_open=false_open, prior=1.0)  # fmt: skip
    (operation,) = edit.operations
    assert operation.share is not None
    rows = texts()[1]
    before = [forward(model, Batch.pad([row])) for row in rows]
    with edit.attach(model):
        opened = [not torch.equal(forward(model, Batch.pad([row])), old) for row, old in zip(rows, before, strict=True)]
    assert sum(opened) <= false_open * len(rows) + 1
    own = [forward(model, Batch.pad([row])) for row in texts()[0]]
    with edit.attach(model):
        assert any(not torch.equal(forward(model, Batch.pad([row])), o) for row, o in zip(texts()[0], own, strict=True))


def test_pisces_turns_the_feature_around_in_its_main_neurons_only(tmp_path: Path) -> None:
    model, sae = tiny(), dictionary("mlp_out")
    edit = run_editor(model, data(), "pisces", sae=str(save(sae, tmp_path / "sae")), check=False, features=1,
                      percentile=90.0, threshold=0.5, strength=1.5)  # fmt: skip
    (operation,) = edit.operations
    assert isinstance(operation, LowRankDelta)
    weight = get_weight(model.module, find(model.module, "mlp_out", 0))
    changed = weight + operation.u @ operation.v
    (index,) = edit.manifest.settings["chosen_features"]["mlp_out.0"]
    held, new = sae.encoder[index] @ weight, sae.encoder[index] @ changed
    main = held.abs() > 0.5 * held.abs().max()
    assert 0 < int(main.sum()) < len(main)
    assert torch.equal(weight[:, ~main], changed[:, ~main])
    sign = majority_sign(model, Site("mlp_post", 0), texts()[0])
    torch.testing.assert_close(new[main], (-1.5 * held.abs().max() * sign)[main], atol=1e-5, rtol=1e-4)
    off = sae.encoder[[k for k in range(32) if k != index % 32]]
    torch.testing.assert_close(off @ changed, off @ weight, atol=1e-5, rtol=1e-4)
    out = Site("mlp_out", 0)
    before = capture(model, [out], Batch.pad(texts()[0]), "tokens")[out] @ sae.encoder[index]
    with edit.attach(model):
        after = capture(model, [out], Batch.pad(texts()[0]), "tokens")[out] @ sae.encoder[index]
    assert after.mean() < before.mean()


def test_the_sign_of_a_neuron_is_that_of_most_of_its_activations() -> None:
    site = Site("mlp_post", 0)
    rows = texts()[0]
    each = torch.cat([capture(tiny(), [site], Batch.pad([row]), "all")[site][0, 1:] for row in rows])
    expected = torch.where((each > 0).sum(0) >= (each < 0).sum(0), 1.0, -1.0)
    assert expected.unique().tolist() == [-1.0, 1.0]
    assert torch.equal(majority_sign(tiny(), site, rows), expected)


def test_a_strength_that_gives_what_is_there_changes_nothing() -> None:
    held = torch.tensor([[2.0, -2.0, 0.1]])
    assert torch.equal(turned(held, -held[0].sign(), 0.3, 1.0), held)
    held = torch.tensor([[2.0, -1.0, 0.2], [0.5, 0.4, 3.0]])
    assert turned(held, torch.tensor([1.0, -1.0, 1.0]), 0.3, 2.0).tolist() == [[-4.0, 4.0, held[0, 2]],
                                                                               [0.5, held[1, 1], -6.0]]  # fmt: skip


TRAINING = {"check": False, "features": 1, "relative": 1.5, "steps": 40, "batch_size": 16, "adapter": "none",
            "lr": 1e-3, "retain_batch": 16}  # fmt: skip


def test_crisp_lowers_its_features_and_keeps_the_states_of_the_rest(file: str) -> None:
    model, sae = tiny(), dictionary()
    edit = run_editor(model, data(), "crisp", sae=file, beta=0.5, **TRAINING)
    own, other = texts()
    before, kept = measure(model, sae, own), states(model, other)
    with edit.attach(model):
        after, now = measure(model, sae, own), states(model, other)
    chosen = edit.manifest.settings["chosen_features"]["resid_post.0"]
    assert float(after.mean[chosen].sum()) < 0.5 * float(before.mean[chosen].sum())
    assert float((now - kept).norm() / (kept - kept.mean(0)).norm()) < 0.3
    assert edit.artifact == "weights"


def test_with_beta_one_only_distances_remain_whose_gradient_is_exactly_zero_at_the_start(file: str) -> None:
    x = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (gradient,) = torch.autograd.grad(states_stay(x, x.detach()).sum(), x)
    assert not gradient.any()
    with pytest.raises(NoEffectError, match="nothing to forget"):
        run_editor(tiny(), data(), "crisp", sae=file, beta=1.0, **TRAINING)


def test_the_losses_of_crisp_are_their_formulas() -> None:
    from repforget.edit._features import Chosen

    sae = dictionary()
    seen = measure(tiny(), sae, [*texts()[0], *texts()[1]])
    chosen = Chosen(sae, torch.tensor([0, 5]), seen, seen, (), (), ())
    x = torch.randn(6, 1, 32, generator=torch.Generator().manual_seed(0)) * 3
    f = sae.encode(x[:, 0])[:, [0, 5]] / seen.mean[[0, 5]].float()
    torch.testing.assert_close(silence((chosen,), torch.device("cpu"))(x), f.mean(1))
    near = x + 0.1
    spread = (x[:, 0] - x[:, 0].mean(0)).square().sum(1).mean()
    torch.testing.assert_close(states_stay(near, x), (torch.full((6,), 0.32) / spread), atol=1e-5, rtol=1e-4)


def test_features_of_a_localisation_are_taken_for_the_same_autoencoder_only(file: str) -> None:
    model, site = tiny(), Site("resid_post", 0)
    band = RandomBand(1, 20, 1.0, 0.0, 0.5, "made up")
    components = (Component(site, feature=7), Component(site, feature=3), Component(site, feature=9))
    for digest, expected in ((dictionary().digest, [7, 3]), ("another", [0])):
        where = Localization("sae_features", components, (2.0, 1.0, 0.0), band,
                             settings={"autoencoders": {str(site): digest}})  # fmt: skip
        edit = run_editor(model, data(), "sae_clamp", where=where, sae=file, check=False, most_retain=1e-6,
                          features=5 if digest != "another" else 1)  # fmt: skip
        assert edit.manifest.settings["chosen_features"] == {"resid_post.0": expected}


@pytest.mark.parametrize("name", ["sae_clamp", "dsg", "crisp"])
def test_an_autoencoder_one_layer_off_is_refused_by_name(name: str, tmp_path: Path) -> None:
    rows = [*texts()[0], *texts()[1]]
    x = states(tiny(), rows, 1)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False).Vh[:6]
    both = torch.cat([axes, -axes])
    wrong = SparseAutoencoder(Site("resid_post", 0), both, both, torch.zeros(12), x.mean(0))
    path = str(save(wrong, tmp_path / "sae"))
    with pytest.raises(SiteError, match=r"least variance unexplained at resid_post\.1"):
        run_editor(tiny(), data(), name, sae=path)


def test_what_does_not_fit_is_refused_in_one_sentence(file: str, tmp_path: Path) -> None:
    model = tiny()
    with pytest.raises(SiteError, match="pisces acts on autoencoders of mlp_out"):
        run_editor(model, data(), "pisces", sae=file, check=False, percentile=50.0)
    mlp = str(save(dictionary("mlp_out"), tmp_path / "mlp"))
    with pytest.raises(SiteError, match="crisp acts on autoencoders of resid_post"):
        run_editor(model, data(), "crisp", sae=mlp, check=False, relative=1.0)
    with pytest.raises(NoEffectError, match="No feature of the autoencoder"):
        run_editor(model, data(), "sae_clamp", sae=file, check=False, most_retain=0.0)
    for name, setting in (("sae_clamp", {"clamp": -1.0}), ("dsg", {"false_open": 1.0}), ("pisces", {"threshold": 1.0}),
                          ("crisp", {"beta": 1.5}), ("dsg", {"features": 0})):  # fmt: skip
        with pytest.raises(UsageError):
            run_editor(model, data(), name, sae=file, check=False, **setting)


@pytest.mark.parametrize("architecture", tiny_models.ALL)
def test_on_every_architecture_they_work_or_say_why_not(architecture: str) -> None:
    """An autoencoder is trained where none is given; batched experts and norms behind the MLP are pisces' limit."""
    model = wrap(tiny_models.build(architecture), tiny_models.tiny_tokenizer(), architecture)
    small = {"sae_steps": 5, "size": 48, "active": 8, "max_facts": 24}
    edit = run_editor(model, data(), "sae_clamp", most_retain=1.1, **small)
    batch = Batch.pad(texts()[0][:4])
    before = forward(model, batch)
    with edit.attach(model):
        assert not torch.equal(forward(model, batch), before)
    try:
        edit = run_editor(model, data(), "pisces", percentile=0.0, **small)
        assert edit.artifact == "weights"
    except SiteError as error:
        assert architecture in ("gemma2", "gemma3", "mixtral", "olmo2") and "pisces" not in str(error)


def test_removing_features_counts_less_what_it_takes_from_retained_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    room, after = import_module("repforget.locate.sae_features"), {"forget": -3.0, "retain": -2.5}
    sae = dictionary()
    monkeypatch.setattr(room, "_answers", lambda model, batches, removed: after[batches])
    for contrast in (0.0, 0.5, 1.0):
        taken = room._taken(tiny(), list(after), [-1.0, -2.0], {sae.site: sae}, [Component(sae.site, feature=1)],
                            contrast)  # fmt: skip
        assert taken == pytest.approx(2.0 - contrast * 0.5)


@pytest.mark.skipif(not (planted.FOLDER / "base").exists(), reason="planted-fact models are not built")
def test_the_band_compares_with_features_of_like_frequency_on_other_facts() -> None:
    """A band that removed features would not move (or that looked at the facts that ranked) is none."""
    people = planted.planted_people()[:12], planted.background_people()[:20]
    knowledge = Knowledge.build("planted", _items(people[0], "f"), _items(people[1], "r"))
    model = wrap(*planted.planted(1), "planted-1")
    settings = {"sites": ["mlp_out.1"], "size": 64, "sae_steps": 40, "items": 8, "draws": 20, "percentile": 50.0}
    where = rf.locate(model, knowledge, "sae_features", **settings)
    assert {c.site for c in where.components} == {Site("mlp_out", 1)} and where.band.k == 20
    assert where.band.low < where.band.high and where.band.effect.endswith("takes from the answers of the other")
    again = run_editor(model, knowledge.for_editor(), "sae_clamp", where=where, sites=["mlp_out.1"], size=64,
                       sae_steps=40, features=3)  # fmt: skip
    (chosen,) = again.manifest.settings["chosen_features"].values()
    assert chosen == [c.feature for c in where.components[:3]]
    with pytest.raises(UsageError, match="is the autoencoder of one site"):
        rf.locate(model, knowledge, "sae_features", sae="a folder", sites=["mlp_out.1", "mlp_out.2"])
