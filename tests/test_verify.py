"""Verifiers on planted models: the layer with the facts is known, and the base is an aligned model that never knew."""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import numpy as np
import planted
import pytest
import torch
import verify_models as fixture
from scipy import stats as scipy_stats

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel, copy_of, fingerprint
from repforget.quantizers import NF4, round_trip
from repforget.records import Measurement
from repforget.verify._asking import limited, prior, prior_said
from repforget.verify._constrained import kept_paths
from repforget.verify.arms import References
from repforget.verify.battery import measure, tasks
from repforget.verify.inside.patch_depth import MATTERS, _weights
from repforget.verify.weights.quantize import projections, round_weights

LAYER = 1


@cache
def view() -> View:
    """All 20 planted people are judged: the sealed half is too small for a property of the model."""
    sealed = fixture.knowledge().view("sealed")
    return dataclasses.replace(sealed, forget=fixture.knowledge().forget)


@cache
def references() -> References:
    return References(fixture.model(LAYER), (fixture.model(None),))


def run(name: str, model: LoadedModel, **settings: object) -> Measurement:
    return measure(tasks([{name: settings}])[0], model, view(), references())


def test_what_arms_share_is_made_anew_for_other_answers_of_the_same_items() -> None:
    shared, model = References(fixture.model(LAYER)), fixture.model(LAYER)
    true, exchanged = view().forget, view().shuffled(0).forget
    knowledge = view().knowledge
    first, other = (kept_paths(shared, model, items, knowledge, forms=1, limit=7) for items in (true, exchanged))
    assert [p.ids for p in first] != [p.ids for p in other]
    assert kept_paths(shared, model, true, knowledge, forms=1, limit=7) is first


def test_the_wrong_answers_of_an_item_do_not_limit_what_a_free_reply_may_say() -> None:
    """Whoever draws a reply by the prior hits one of four options far less often than one time in four."""
    items, knowledge = view().forget, view().knowledge
    chosen = [dataclasses.replace(i, wrong_answers=knowledge.alternatives(i, 3)) for i in items]
    assert prior(chosen, knowledge, 31) == pytest.approx(0.25)
    assert prior_said(chosen, knowledge) == pytest.approx(prior_said(items, knowledge))
    assert prior_said(items, knowledge).max() < 0.25
    alone = [dataclasses.replace(i, relation=i.id, wrong_answers=("a", "b", "c")) for i in items]
    assert prior_said(alone, knowledge) == pytest.approx(0.25)  # nothing else is known to be an answer


def between(share: float) -> LoadedModel:
    """The planted model with its MLP moved towards the base's by ``share``."""
    full, base = fixture.model(LAYER), fixture.model(None)
    mixed = copy_of(full)
    there = dict(base.module.named_parameters())
    with torch.no_grad():
        for name, p in mixed.module.named_parameters():
            p.lerp_(there[name], share)
    return mixed


VOTING = [
    ("behaviour", "contrastive", {}), ("behaviour", "exact_match", {}), ("behaviour", "sampled", {"samples": 4}),
    ("logit_lens", "best_layer", {}), ("patch_depth", "carried", {}), ("quantize", "int8", {}),
    ("quantize", "nf4", {}), ("relearn", "best_step", {"steps": 6, "lr": 1e-4}),
    ("reprobe", "linear", {}), ("reprobe", "mlp", {}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "what", "settings"), VOTING, ids=[f"{n}.{w}" for n, w, _ in VOTING])
def test_a_voting_measure_tells_knowing_from_never_knowing(name: str, what: str, settings: dict[str, object]) -> None:
    known = run(name, fixture.model(LAYER), **settings).scores[what]
    never = run(name, fixture.model(None), **settings)
    floor = max(never.scores[what].mean, never.scores[f"{what}_prior"].mean)
    assert known.valid.all()
    assert known.mean > 0.6
    assert floor < 0.4
    assert known.mean - floor > 0.35


def test_lens_of_the_last_layer_is_the_models_own_contrast() -> None:
    """Answers are single tokens here, so both read the same logits."""
    model = fixture.model(LAYER)
    lens, asked = run("logit_lens", model, layers=[3]), run("behaviour", model, forms=1)
    assert lens.scores["best_layer"].values == pytest.approx(asked.scores["contrastive"].values, abs=1e-5)
    assert lens.scores["own_decoder"].values == pytest.approx(lens.scores["best_layer"].values, abs=1e-6)


def test_another_unembedding_is_no_hiding_place_for_the_fixed_decoder() -> None:
    """Scrambling the arm's unembedding hides the answer from its own decoder and not from the original's."""
    hidden = copy_of(fixture.model(LAYER))
    weight = hidden.module.get_output_embeddings().weight
    with torch.no_grad():
        weight.copy_(weight[torch.randperm(len(weight), generator=torch.Generator().manual_seed(0))])
    found = run("logit_lens", hidden)
    assert found.scores["best_layer"].mean > 0.9
    assert found.scores["own_decoder"].mean < 0.5


def test_depth_of_the_original_is_full_and_of_the_twin_none() -> None:
    own = run("patch_depth", fixture.model(LAYER)).scores
    twin = run("patch_depth", fixture.model(None)).scores
    valid = own["uds"].valid
    assert valid.mean() > 0.8
    assert own["uds"].values[valid] == pytest.approx(1.0, abs=1e-6)
    assert twin["uds"].values[valid] == pytest.approx(0.0, abs=1e-6)
    assert own["uds_unclipped"].values[valid] == pytest.approx(1.0, abs=1e-6)
    assert own["carried"].mean > 0.9
    assert twin["carried"].mean < own["carried_prior"].mean + 0.15


def test_depth_falls_along_the_way_from_full_to_base() -> None:
    shares = [run("patch_depth", between(t)).scores["carried"].mean for t in (0.0, 0.35, 0.7, 1.0)]
    uds = [run("patch_depth", between(t)).scores["uds"].mean for t in (0.0, 0.35, 0.7, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert uds == sorted(uds, reverse=True)
    assert shares[0] - shares[-1] > 0.4


def test_depth_shows_that_early_layers_hold_nothing() -> None:
    """The facts enter in layer 1, at the name; no layer before that may count."""
    found = run("patch_depth", fixture.model(LAYER))
    layers = [int(name.rsplit(" ", 1)[1]) for name in found.facts]
    assert layers
    assert min(layers) >= LAYER


def test_layer_weights_need_an_effect() -> None:
    weights = _weights(np.array([0.0, 0.4 * MATTERS, 0.4, 0.2]))
    assert weights == pytest.approx([0.0, 0.2 / 0.8, 0.4 / 0.8, 0.2 / 0.8])
    assert np.isnan(_weights(np.array([0.01, 0.02]))).all()


def test_relearning_leaves_the_model_alone_and_teaches_the_copy() -> None:
    model = fixture.model(None)
    before = fingerprint(model.module)
    found = run("relearn", model, steps=30, checks=3, lr=3e-4)
    assert fingerprint(model.module) == before
    assert found.series["x"] == (0.0, 10.0, 20.0, 30.0)
    # Independent facts: what was taught says nothing about the other half.
    assert found.series["best_step"][-1] < 0.35
    halves = view().halves(0)
    assert {i.cluster for i in halves[0]}.isdisjoint({i.cluster for i in halves[1]})
    assert set(found.scores["best_step"].ids) == {i.id for i in view().forget}


def test_relearning_brings_back_what_was_only_suppressed() -> None:
    """The planted MLP is turned down by a scale that training can undo; the base has nothing to bring back."""
    dimmed = copy_of(fixture.model(LAYER))
    with torch.no_grad():
        dimmed.module.model.layers[LAYER].mlp.down_proj.weight.mul_(0.7)
    settings = {"steps": 48, "lr": 1e-4}
    curve = run("relearn", dimmed, **settings).series["best_step"]
    never = run("relearn", fixture.model(None), **settings).series["best_step"]
    assert max(curve) > curve[0] + 0.05
    assert max(curve) > max(never) + 0.3


def test_collateral_of_the_untouched_original_is_zero_and_noise_does_damage() -> None:
    own = run("collateral", fixture.model(LAYER))
    assert own.facts["KL(original || arm) at retain answers, nats"] == 0.0
    noisy = copy_of(fixture.model(LAYER))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in noisy.module.parameters():
            p.add_(0.5 * p.std() * torch.randn(p.shape, generator=generator) if p.ndim > 1 else 0.0)
    found = run("collateral", noisy)
    assert found.facts["KL(original || arm) at retain answers, nats"] > 0.5
    for name in ("retain", "retain_exact", "neighbours", "neighbours_exact"):
        assert own.scores[name].mean > 0.95
        assert found.scores[name].mean < own.scores[name].mean - 0.1


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_rounding_stays_within_half_a_step_and_repeats(kind: str) -> None:
    weight = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    codes, values = round_trip(weight, kind)  # type: ignore[arg-type]
    again = round_trip(values, kind)  # type: ignore[arg-type]
    assert torch.equal(again[0], codes)
    assert torch.allclose(again[1], values, atol=1e-6)
    reach = weight.abs().amax(-1, keepdim=True)
    widest = 1 / 127 if kind == "int8" else max(b - a for a, b in zip(NF4, NF4[1:], strict=False))
    assert bool(((values - weight).abs() <= 0.5001 * widest * reach).all())


def test_nf4_levels_are_normal_quantiles() -> None:
    """Both halves hold equally likely values of a normal, joined at zero (2305.14314, section 3)."""
    offset = 0.5 * (1 / 32 + 1 / 30)
    upper = scipy_stats.norm.ppf(np.linspace(1 - offset, 0.5, 9)[:-1])
    lower = -scipy_stats.norm.ppf(np.linspace(1 - offset, 0.5, 8)[:-1])
    book = np.sort(np.concatenate([upper, [0.0], lower]))
    assert pytest.approx(book / book.max(), abs=1e-4) == np.array(NF4)


def test_an_edit_below_half_a_step_is_undone_by_rounding() -> None:
    """The trap of quantisation: the edited model loses the edit, code by code."""
    original = fixture.model(LAYER)
    rounded, edited = copy_of(original), copy_of(original)
    assert round_weights(rounded.module, "nf4", original.module) == 0.0
    with torch.no_grad():
        for weight in projections(edited.module).values():
            codes, values = round_trip(weight, "nf4")
            # towards the level it already belongs to, where no code can flip
            keep = weight.abs() == weight.abs().amax(-1, keepdim=True)
            weight.copy_(torch.where(keep, weight, weight + 0.1 * (values - weight)))
    share = round_weights(edited.module, "nf4", original.module)
    assert share is not None
    assert share < 0.01
    ask = run("behaviour", rounded).scores["contrastive"].values
    assert run("behaviour", edited).scores["contrastive"].values == pytest.approx(ask, abs=0.05)


def test_projections_leave_embedding_and_unembedding() -> None:
    names = set(projections(fixture.model(None).module))
    assert len(names) == 4 * 7
    assert not [n for n in names if "embed" in n or "lm_head" in n or "norm" in n]


def test_limiting_items_keeps_clusters_and_order() -> None:
    items = view().forget
    few = limited(items, 20, seed=0)
    assert len(few) == 20
    assert len({i.cluster for i in few}) == 20
    assert list(few) == [i for i in items if i in few]
    assert limited(items, 20, seed=0) == few
    assert limited(items, 1000, seed=0) == items


def test_contrast_is_independent_of_how_the_prompt_is_answered() -> None:
    """An added token that swallows all probability changes likelihood, and not the contrast."""
    from repforget.models.capture import hooks
    from repforget.records import Site

    model = fixture.model(LAYER)
    plain = run("behaviour", model)

    def swallow(logits: torch.Tensor) -> torch.Tensor:
        out = logits.clone()
        out[..., 4] += 50.0
        return out

    with hooks(model, {Site("logits"): swallow}):
        refusing = run("behaviour", model)
    assert refusing.scores["exact_match"].mean == 0.0
    assert refusing.scores["log_probability"].mean < -20
    assert refusing.scores["contrastive"].values == pytest.approx(plain.scores["contrastive"].values, abs=1e-4)


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(UsageError, match="step per check"):
        run("relearn", fixture.model(LAYER), steps=1, checks=3)
    with pytest.raises(UsageError, match="no kinds"):
        run("quantize", fixture.model(LAYER), kinds=[])


def test_everything_measured_is_finite() -> None:
    found = run("behaviour", fixture.model(LAYER))
    assert all(math.isfinite(s.mean) for s in found.scores.values())
    assert planted.SEED == 7
