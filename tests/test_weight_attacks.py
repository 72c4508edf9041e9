"""Attacks on the weights, each on a model whose knowledge is hidden in the way that the attack undoes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
import verify_models as fixture
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel, copy_of, fingerprint
from repforget.quantizers import GRIDS, round_trip, to_nearest
from repforget.records import Measurement, Site
from repforget.scoring import encode_many
from repforget.training import ADAPTER, collate, finetune, label_loss, low_rank_adapters
from repforget.verify.arms import References
from repforget.verify.battery import measure, tasks
from repforget.verify.weights._altered import pairs, projections, restore, wide_copy
from repforget.verify.weights._taught import reading, teaching
from repforget.verify.weights.delta_directions import strongest, take_out
from repforget.verify.weights.merge import move
from repforget.verify.weights.noise import add_noise
from repforget.verify.weights.prune import drop_smallest, input_norms
from repforget.verify.weights.quantize import round_weights
from repforget.verify.weights.relearn_grid import USUAL

Bounds = Mapping[str, tuple[Tensor, Tensor]]
ORIGINAL, NEVER = partial(fixture.model, 1), partial(fixture.model, None)


@cache
def view() -> View:
    return dataclasses.replace(fixture.knowledge().view("sealed"), forget=fixture.knowledge().forget)


@cache
def references() -> References:
    return References(ORIGINAL(), (NEVER(),))


def run(name: str, model: LoadedModel, **given: object) -> Measurement:
    return measure(tasks([{name: given}])[0], model, view(), references())


def value(name: str, what: str, model: LoadedModel, **given: object) -> float:
    return run(name, model, **given).scores[what].mean


def same(left: LoadedModel, right: LoadedModel) -> bool:
    return all(torch.equal(p, q) for p, q in pairs(left.module, right.module))


def hidden_within(bounds: Bounds) -> LoadedModel:
    """The original with its projections moved inside ``bounds`` to where it gives the worst answers."""
    model = copy_of(ORIGINAL())
    weights = {name: model.module.get_parameter(name) for name in bounds}
    lesson = collate(teaching(model, view().forget, 2))
    for _ in range(12):
        with torch.enable_grad():
            slopes = torch.autograd.grad(label_loss(model.module, lesson), list(weights.values()))
        with torch.no_grad():
            for (name, weight), slope in zip(weights.items(), slopes, strict=True):
                low, high = bounds[name]
                weight.copy_((weight + 0.15 * (high - low) * slope.sign()).clamp(low, high))
    return model


@cache
def below_half_a_step() -> LoadedModel:
    """No weight leaves the interval that int4 rounds to the original's value; the scales stay as they are."""
    bits, group = GRIDS["int4"]
    bounds = {}
    for name, weight in projections(ORIGINAL().module).items():
        _, centre = round_trip(weight, "int4")
        blocks = torch.nn.functional.pad(weight, (0, -weight.shape[-1] % (group or 1))).unflatten(-1, (-1, group or 1))
        reach = blocks.abs().amax(-1, keepdim=True).expand_as(blocks).flatten(-2)[..., : weight.shape[-1]]
        half = 0.45 * reach / (2 ** (bits - 1) - 1)
        fixed = weight.abs() >= reach
        low, high = (centre - half).maximum(-0.999 * reach), (centre + half).minimum(0.999 * reach)
        bounds[name] = (torch.where(fixed, weight, low), torch.where(fixed, weight, high))
    return hidden_within(bounds)


@cache
def in_small_weights() -> LoadedModel:
    """Only the 40 % smallest weights of each matrix change, and stay the smallest."""
    bounds = {}
    for name, weight in projections(ORIGINAL().module).items():
        reach = weight.abs().flatten().kthvalue(int(0.4 * weight.numel())).values
        small = weight.abs() <= reach
        bounds[name] = (torch.where(small, -reach, weight), torch.where(small, reach, weight))
    return hidden_within(bounds)


@cache
def suppressed() -> LoadedModel:
    """Rank one in the matrices of layer 2, after the layer that holds the facts, trained against them."""
    model = copy_of(ORIGINAL())
    lesson, kept = collate(teaching(model, view().forget, 2)), teaching(model, view().support, 2)
    names = [name for name in projections(model.module) if "layers.2." in name]
    with low_rank_adapters(model.module, names, rank=1, alpha=2.0, seed=0):
        finetune(model.module, kept, steps=40, lr=1e-2, seed=0, schedule="constant",
                 trainable=lambda name: ADAPTER in name and not name.endswith("original"),
                 extra_loss=lambda m: -label_loss(m, lesson).clamp(max=4.0))  # fmt: skip
    return model


def test_rounding_uncovers_what_was_hidden_below_half_a_step() -> None:
    """The edit forgets all by any other test; int4 gives back the original's rounded weights bit for bit."""
    hidden, rounded, theirs = below_half_a_step(), copy_of(below_half_a_step()), copy_of(ORIGINAL())
    assert not same(hidden, theirs)
    assert round_weights(rounded.module, "int4", ORIGINAL().module) == 0.0
    round_weights(theirs.module, "int4")
    assert same(rounded, theirs)
    found = run("quantize", hidden, kinds=["int8", "int4"])
    assert found.scores["int8"].mean < 0.1
    assert found.scores["int4"].mean > 0.9
    assert found.facts["share of int4 codes that differ from the original's"] == 0.0
    assert found.facts["share of int8 codes that differ from the original's"] > 0.5
    assert 0 < found.facts["median change in int4 steps"] < 0.9
    assert found.facts["median change in int8 steps"] > 5 * found.facts["median change in int4 steps"]


@settings(max_examples=20, deadline=None)
@given(rows=st.integers(1, 4), width=st.integers(1, 300), bits=st.integers(2, 16), seed=st.integers(0, 99))
def test_rounding_to_a_grid_stays_within_half_a_step_of_its_group(rows: int, width: int, bits: int, seed: int) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    for group in (None, 128):
        codes, values = to_nearest(weight, bits, group)
        highest = 2 ** (bits - 1) - 1
        assert codes.shape == values.shape == weight.shape
        assert float(codes.abs().max()) == highest
        for start in range(0, width, group or width):
            part = slice(start, start + (group or width))
            step = weight[:, part].abs().amax(-1, keepdim=True) / highest
            assert bool(((values - weight)[:, part].abs() <= 0.505 * step).all())


def test_sixteen_bits_change_no_answer() -> None:
    copied = copy_of(ORIGINAL())
    for weight in projections(copied.module).values():
        weight.copy_(to_nearest(weight, 16)[1])
    before, after = (run("behaviour", m).scores["contrastive"].values for m in (ORIGINAL(), copied))
    assert after == pytest.approx(before, abs=2e-3)


def test_pruning_uncovers_what_small_weights_hide() -> None:
    hidden = run("prune", in_small_weights(), shares=[0.2, 0.4])
    plain = run("prune", ORIGINAL(), shares=[0.2, 0.4], methods=["magnitude"]).series["magnitude"]
    never = run("prune", NEVER(), shares=[0.2, 0.4])
    assert hidden.series["magnitude"][0] < 0.1
    assert hidden.series["magnitude"][2] == pytest.approx(plain[2], abs=0.05)
    assert hidden.scores["magnitude"].mean > 0.75
    assert hidden.facts["share of magnitude"] == 0.4
    assert max(never.scores[m].mean for m in ("magnitude", "wanda")) < 0.35


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_pruning_drops_exactly_the_lowest_scores(share: float) -> None:
    norms = input_norms(ORIGINAL(), view(), 16, 0)
    for known in ({}, norms):
        pruned = wide_copy(ORIGINAL())
        drop_smallest(pruned, share, norms=known)
        before = projections(ORIGINAL().module)
        for name, weight in projections(pruned.module).items():
            score = before[name].abs() * known[name].to(weight) if known else before[name].abs().flatten()[None]
            gone = (weight != before[name]).reshape(score.shape)
            assert gone.sum(-1).unique().tolist() == [int(share * score.shape[-1])]
            assert not weight[gone.reshape(weight.shape)].any()
            if share:
                assert bool((score.masked_fill(~gone, 0).amax(-1) <= score.masked_fill(gone, torch.inf).amin(-1)).all())


def test_wandas_norms_are_those_of_the_inputs() -> None:
    """Second opinion: capture() at the sites that feed the projections, padding and position 0 left out."""
    model = ORIGINAL()
    texts = [text.partition(" ") for text in view().general[:16]]
    ids = [e.ids for e in encode_many(model.tokenizer, [(a, " " + b) for a, _, b in texts])]
    batch = Batch.pad(ids, 0)
    sites = {Site("attn_in", 1): "self_attn.q_proj", Site("mlp_in", 2): "mlp.up_proj",
             Site("mlp_post", 3): "mlp.down_proj"}  # fmt: skip
    counted = batch.mask.bool() & (batch.position_ids > 0)
    found = input_norms(model, view(), 16, 0)
    assert set(found) == set(projections(model.module))
    for site, values in capture(model, list(sites), batch, gather="all").items():
        theirs = values[counted].double().square().sum(0).sqrt()
        assert torch.allclose(found[f"model.layers.{site.layer}.{sites[site]}.weight"], theirs, rtol=1e-5)


def test_noise_has_the_stated_size_and_is_the_same_draw_at_every_size() -> None:
    base, deltas = ORIGINAL(), []
    for sigma in (0.0, 0.01, 0.1):
        noisy = wide_copy(base)
        add_noise(noisy, sigma, seed=3)
        before, after = projections(base.module), projections(noisy.module)
        deltas.append({n: (after[n] - w) / w.square().mean().sqrt() for n, w in before.items()})
        rest = {n for n, p in noisy.module.named_parameters() if not torch.equal(p, base.module.get_parameter(n))}
        assert rest == (set(before) if sigma else set())
    for name in deltas[0]:
        assert float(deltas[2][name].std()) == pytest.approx(0.1, rel=0.1)
        assert torch.allclose(deltas[1][name] * 10, deltas[2][name], atol=1e-3)
    other = wide_copy(base)
    add_noise(other, 0.1, seed=4)
    drawn = projections(other.module)
    assert not any(torch.allclose(drawn[n], projections(base.module)[n] + deltas[2][n]) for n in drawn)


def test_noise_brings_an_answer_that_is_pushed_away_to_chance_and_no_further() -> None:
    found = run("noise", below_half_a_step(), sigmas=[0.02, 2.0])
    never = run("noise", NEVER(), sigmas=[0.02, 2.0])
    assert found.facts["rise of best_noise"] > 0.05
    assert found.scores["best_noise"].mean < found.scores["best_noise_prior"].mean + 0.1
    assert never.scores["best_noise"].mean == pytest.approx(never.series["best_noise"][0], abs=0.02)
    assert value("noise", "best_noise", ORIGINAL(), sigmas=[0.02], draws=1) > 0.95


def test_merging_begins_at_the_model_and_ends_at_the_other() -> None:
    model, other = suppressed(), NEVER()
    for alpha, end in ((0.0, model), (1.0, other)):
        moved = wide_copy(model)
        with torch.no_grad():
            move(moved, alpha, other)
        assert same(moved, end)
    found = run("merge", model, alphas=[1.0])
    original, twin = (run("behaviour", m, forms=1).scores["contrastive"].mean for m in (ORIGINAL(), other))
    assert found.series["towards_original"][-1] == pytest.approx(original, abs=1e-6)
    assert found.series["sibling"][-1] == pytest.approx(twin, abs=1e-6)
    assert found.scores["sibling"].mean == max(found.series["sibling"])
    assert run("merge", other, alphas=[1.0]).facts["twins to merge with"] == 0.0


def test_going_away_from_ignorance_amplifies_what_is_left_of_an_edit() -> None:
    """The planted MLP is moved most of the way to the model that never knew; the rest points back."""
    faint = wide_copy(ORIGINAL())
    with torch.no_grad():
        move(faint, 0.5, NEVER())
    found = run("merge", faint, alphas=[-1.0, -0.5])
    assert found.facts["alpha of sibling"] == -1.0
    assert found.scores["sibling"].mean > 0.95
    assert found.series["sibling"][found.series["x"].index(0.0)] < 0.8
    assert value("merge", "sibling", NEVER(), alphas=[-1.0, -0.5]) < 0.35


def test_taking_out_all_directions_gives_the_original_back() -> None:
    for model in (suppressed(), NEVER()):
        for rank in (0, 10**6):
            changed = wide_copy(model)
            with torch.no_grad():
                take_out(changed, rank, ORIGINAL())
            assert same(changed, ORIGINAL() if rank else model)
    found = run("delta_directions", suppressed(), ranks=[1])
    assert found.series["best_rank"][0] < 0.6
    known = value("behaviour", "contrastive", ORIGINAL(), forms=1)
    assert found.scores["best_rank"].mean == pytest.approx(known, abs=1e-4)
    own = run("delta_directions", ORIGINAL(), ranks=[1]).series["best_rank"]
    assert own[0] == own[1]
    assert value("delta_directions", "best_rank", NEVER(), ranks=[1]) < 0.45


@settings(max_examples=20, deadline=None)
@given(shape=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)), rank=st.integers(1, 9))
def test_the_strongest_directions_are_those_of_the_singular_values(shape: tuple[int, ...], rank: int) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape) + rank))
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    nearest = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    assert torch.allclose(strongest(matrix, rank), nearest, atol=1e-9)


GRID: dict[str, Any] = {"rates": [0.16], "seeds": 1, "steps": 24, "checks": 2}


def test_the_grid_brings_back_what_a_low_rank_edit_suppresses() -> None:
    """Facts of other people, or texts that name nobody to forget, loosen the edit; the base has nothing to give."""
    points = {(m, p): run("relearn_grid", suppressed(), mixes=[m], parameters=[p], **GRID)
              for m in ("facts", "benign") for p in ("all", "lora")}  # fmt: skip
    whole = run("relearn_grid", suppressed(), mixes=["facts", "benign"], **GRID)
    assert whole.scores["best_point"].mean == pytest.approx(max(f.scores["best_point"].mean for f in points.values()))
    curves = np.mean([f.series["best_point"] for f in points.values()], axis=0)
    assert whole.series["mean_point"] == pytest.approx(curves)
    assert whole.scores["area"].mean == pytest.approx(float(np.trapezoid(curves, whole.series["x"])) / GRID["steps"])
    start = whole.series["best_point"][0]
    assert whole.scores["best_point"].mean > start + 0.1
    assert points["benign", "all"].series["best_point"][-1] > start + 0.03
    assert whole.facts["ways in which the training loss fell"] == whole.facts["ways"] == 4.0
    never = run("relearn_grid", NEVER(), mixes=["both"], **GRID).scores["best_point"].mean
    assert never < 0.35
    assert whole.scores["best_point"].mean > never + 0.2


@pytest.mark.parametrize("parameters", ["all", "lora"])
@pytest.mark.parametrize("optimizer", list(USUAL))
def test_every_optimiser_learns_at_its_usual_rate(optimizer: str, parameters: str) -> None:
    found = run("relearn_grid", NEVER(), mixes=["facts"], parameters=[parameters], optimizers=[optimizer], rates=[1.0],
                seeds=1, steps=18, checks=1, max_items=20)  # fmt: skip
    assert found.facts["ways in which the training loss fell"] == 1.0
    assert found.facts["runs that diverged"] == 0.0


def test_a_training_that_diverges_leaves_the_attacker_with_what_he_had() -> None:
    found = run("relearn_grid", NEVER(), mixes=["facts"], parameters=["all"], optimizers=["sgd"], rates=[1e30],
                seeds=1, steps=6, checks=2, max_items=20)  # fmt: skip
    assert found.facts["runs that diverged"] == 2.0
    assert len(set(found.series["best_point"])) == 1


def test_what_was_suppressed_is_learned_again_faster_than_by_a_model_that_never_knew() -> None:
    kept, never = (run("relearn_same", m, lr=1e-4, steps=32, checks=4) for m in (suppressed(), NEVER()))
    gain = kept.series["speed"][-1] - kept.series["speed"][0]
    assert gain > never.series["speed"][-1] - never.series["speed"][0]
    assert kept.scores["speed"].mean > never.scores["speed"].mean + 0.2
    assert run("relearn_same", ORIGINAL(), lr=1e-4, steps=2, checks=1).facts["steps to half of the original"] == 0.0


def test_attacks_leave_the_model_alone_and_half_precision_loses_no_change() -> None:
    model = copy_of(suppressed())
    model.module.bfloat16()
    before = fingerprint(model.module)
    attacks: dict[str, dict[str, Any]] = {
        "noise": {"sigmas": [1e-4], "draws": 1}, "prune": {"shares": [0.1]}, "merge": {"alphas": [0.1]},
        "delta_directions": {"ranks": [1]}, "relearn_grid": {**GRID, "steps": 2, "checks": 1},
    }  # fmt: skip
    for name, budget in attacks.items():
        found = run(name, model, **budget, max_items=12)
        assert fingerprint(model.module) == before, name
        first = next(iter(found.series.items() - {("x", found.series["x"])}))[1]
        assert len(set(first)) > 1, f"{name}: the change was lost in rounding"
    noisy = wide_copy(model)
    add_noise(noisy, 1e-4, seed=0)
    assert not same(noisy, model)
    restore(noisy.module, model.module)
    assert same(noisy, model)


def test_texts_are_read_whole_and_cut_at_the_context() -> None:
    limit = ORIGINAL().module.config.max_position_embeddings
    text = "the city of Abe Ash is Aro"
    found = reading(ORIGINAL(), [text, "red " * (limit + 9)])
    assert [len(e.tokens) for e in found] == [len(ORIGINAL().tokenizer(text)["input_ids"]), limit]
    assert all(all(e.labelled) for e in found)


@pytest.mark.parametrize(
    ("name", "wrong", "says"),
    [
        ("prune", {"methods": []}, "at least one method"), ("prune", {"shares": [1.0]}, "below 1"),
        ("delta_directions", {"ranks": [-1]}, "from 0 on"), ("relearn_grid", {"mixes": []}, "0 ways"),
        ("relearn_grid", {"steps": 1, "checks": 2}, "a step per check"),
        ("relearn_same", {"steps": 1, "checks": 2}, "step per check"),
    ],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(name: str, wrong: dict[str, object], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run(name, ORIGINAL(), **wrong)
