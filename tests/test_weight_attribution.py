"""Scores of weights: sums over units by brute force, limits of the formulas, and planted layers as they come out."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from hypothesis import given
from hypothesis import strategies as st
from test_locate_planted import located

import repforget as rf
from repforget.attribution import visit_gradients
from repforget.causal import Run
from repforget.errors import UsageError
from repforget.locate._gradients import facts_of, unit_sums, weights
from repforget.locate.wagle import attribution
from repforget.masks import masks_of
from repforget.records import Component, RandomBand

ALL = (*tiny_models.CONFIGS, *tiny_models.VARIANTS)


def components(*texts: str) -> tuple[Component, ...]:
    return tuple(Component.parse(text) for text in texts)


def test_gradients_of_one_fact_are_gone_before_those_of_the_next_are_made() -> None:
    model = tiny("llama")
    name, seen, alive = "model.layers.0.mlp.up_proj.weight", list[Any](), list[bool]()

    def look(*_: Any) -> None:
        alive.extend(ref() is not None for ref in seen)

    facts = facts_of(model, people(), 3, 0).forget
    with_hook = model.module.lm_head.register_forward_hook(look)  # in the forward pass of the next fact
    visit_gradients(model, facts, [name], lambda g: seen.append(weakref.ref(g[name])))
    with_hook.remove()
    assert len(seen) == 3 and alive == [False] * 3


@pytest.mark.parametrize("name", ALL)
def test_sums_over_units_are_those_under_their_masks(name: str) -> None:
    module = tiny(name)
    wanted = ["mlp_out.1", "attn_out.0", "attn_z.0.h1"] + ([] if name == "mixtral" else ["mlp_post.1.n3"])
    units = weights(module, components(*wanted))
    generator = torch.Generator().manual_seed(0)
    table = {n: torch.rand(p.shape, generator=generator) for n, p in module.module.named_parameters()}
    sums, sizes = unit_sums(units, table.__getitem__)
    for component, total, size in zip(units, sums, sizes, strict=True):
        held = {n: m for n, m in masks_of(module, [component]).masks.items() if table[n].ndim > 1}
        by_hand = sum(float(table[n][m.expand_as(table[n])].double().sum()) for n, m in held.items())
        assert total == pytest.approx(by_hand, rel=1e-9)
        assert size == sum(int(m.expand_as(table[n]).sum()) for n, m in held.items())


def _runs(module: Any, items: int = 6) -> tuple[Run, ...]:
    return facts_of(module, people(), items, 0).forget


def test_squares_are_of_single_facts_and_do_not_depend_on_their_order() -> None:
    module = tiny("llama")
    runs = _runs(module)
    name = "model.layers.1.mlp.down_proj.weight"

    def squares(chosen: tuple[Run, ...]) -> torch.Tensor:
        total = torch.zeros(module.module.get_parameter(name).shape, dtype=torch.float64)

        def add(gradients: Any) -> None:
            total.add_(gradients[name].double().square())

        visit_gradients(module, chosen, [name], add)
        return total

    whole = squares(runs)
    assert (whole >= 0).all() and whole.any()
    torch.testing.assert_close(squares(runs[::-1]), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(squares(runs[:2]) + squares(runs[2:]), whole, rtol=1e-6, atol=0)
    assert all(p.grad is None for p in module.module.parameters())


def test_one_gradient_agrees_with_finite_differences() -> None:
    module = tiny("llama")
    (run,) = _runs(module, 1)[:1]
    name, found = "model.layers.0.mlp.up_proj.weight", []
    visit_gradients(module, [run], [name], lambda g: found.append(g[name].clone()))
    parameter = module.module.get_parameter(name)
    direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))

    def logprob() -> float:
        ids = torch.tensor([run.base])
        logits = module.module(ids).logits[0, :-1].double().log_softmax(-1)
        return float(sum(logits[k - 1, run.base[k]] for k in range(run.start, len(run.base))))

    values, step = [], 1e-3
    with torch.no_grad():
        for sign in (1, -1):
            parameter.add_(sign * step * direction)
            values.append(logprob())
            parameter.sub_(sign * step * direction)
    assert float((found[0] * direction).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)


@given(st.integers(0, 2**31 - 1))
def test_wagle_is_snip_for_a_large_mu_and_a_product_of_gradients_for_a_small_one(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight, forget, retain = (torch.randn(5, 7, generator=generator) for _ in range(3))
    snip = (weight.double() * forget.double()).abs()
    torch.testing.assert_close(attribution(weight, forget, retain, 1e12), snip, rtol=0, atol=1e-10)
    product = (retain.double() * forget.double()).abs()
    torch.testing.assert_close(attribution(weight, forget, retain, 1e-9) * 1e-9, product, rtol=0, atol=1e-7)


def test_what_weight_attribution_finds_of_four_planted_layers() -> None:
    """As measured, so that the docstrings stay true: Fisher 0, WAGLE 1, SNIP 4 (chance 1)."""

    def hits(name: str, **settings: Any) -> int:
        return sum(located(k, name, nodes=("mlp_out",), **settings).layers("mlp_out")[0] == k for k in range(4))

    assert hits("wagle", mu=1e9) == 4
    assert hits("wagle") <= 2 and hits("fisher") <= 1


@pytest.mark.parametrize("name", ["fisher", "wagle"])
def test_bad_input_is_refused(name: str) -> None:
    bad = {"fisher": {"damping": 0.0}, "wagle": {"mu": -1.0}}[name]
    with pytest.raises(UsageError, match="must be positive"):
        rf.locate(tiny("llama"), people(), name, **bad)


def test_scores_are_finite_where_retain_facts_do_not_use_a_unit() -> None:
    found = rf.locate(tiny("llama"), people(), "fisher", nodes=["neurons"], items=4, draws=20)
    assert np.isfinite(found.scores).all() and len(found.components) == 2 * 48


@pytest.mark.parametrize("contrast", ["none", "ratio"])
def test_fisher_is_the_mean_square_of_single_gradients(contrast: str) -> None:
    """By hand: log p of each answer from the logits, differentiated fact by fact, squared, summed over each MLP."""
    model, wanted = tiny("llama"), components("mlp_out.0", "mlp_out.1")
    parts = {c: masks_of(model, [c]).masks for c in wanted}
    table = dict(model.module.named_parameters())

    def squares(runs: Sequence[Run]) -> np.ndarray:
        found = np.zeros(len(wanted))
        for run in runs:
            told = model.module(torch.tensor([run.base])).logits[0].log_softmax(-1)
            total = sum(told[k - 1, run.base[k]] for k in range(run.start, len(run.base)))
            names = sorted({n for own in parts.values() for n in own})
            made = dict(zip(names, torch.autograd.grad(total, [table[n] for n in names]), strict=True))
            found += [sum(float((made[n].double().square() * m).sum()) for n, m in own.items())
                      for own in parts.values()]  # fmt: skip
        return found / len(runs)

    facts = facts_of(model, people(), 4, 0)
    forget, retain = squares(facts.forget), squares(facts.retain)
    sizes = [sum(int(m.expand_as(table[n]).sum()) for n, m in own.items()) for own in parts.values()]
    expected = forget / sizes if contrast == "none" else forget / (retain + 0.01 * retain.mean())
    found = rf.locate(model, people(), "fisher", nodes=["mlp_out"], items=4, draws=20, contrast=contrast)
    scores = dict(zip(found.components, found.scores, strict=True))
    np.testing.assert_allclose([scores[c] for c in wanted], expected, rtol=1e-4)


def test_wagle_takes_the_weights_where_retained_data_would_have_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand at a mu where both parts count: |(w - g_r / mu) g_f|, of losses, averaged over each MLP's weights."""
    model, wanted = tiny("llama"), components("mlp_out.0", "mlp_out.1")
    facts, parts = facts_of(model, people(), 4, 0), {c: masks_of(model, [c]).masks for c in wanted}
    names = sorted({n for own in parts.values() for n in own})
    table = [dict(model.module.named_parameters())[n] for n in names]
    none = RandomBand(1, 20, 0.0, 0.0, 0.0, "none"), (), 0.0
    monkeypatch.setattr("repforget.locate._gradients.exact_band", lambda *_: none)

    def slopes(runs: Sequence[Run]) -> list[torch.Tensor]:
        told = [(run, model.module(torch.tensor([run.base])).logits[0].log_softmax(-1)) for run in runs]
        loss = -sum(logp[k - 1, run.base[k]] for run, logp in told for k in range(run.start, len(run.base)))
        return list(torch.autograd.grad(loss, table))

    forget, retain = slopes(facts.forget), slopes(facts.retain)
    table = [w.detach() for w in table]
    mu = sum(float(g.norm()) for g in retain) / sum(float(w.norm()) for w in table)
    each = {n: ((w - g / mu) * f).abs() for n, w, g, f in zip(names, table, retain, forget, strict=True)}
    expected = [sum(float((each[n] * m).sum()) for n, m in own.items())
                / sum(int(m.expand_as(each[n]).sum()) for n, m in own.items()) for own in parts.values()]  # fmt: skip
    found = rf.locate(model, people(), "wagle", nodes=["mlp_out"], items=4, draws=20, mu=mu)
    scores = dict(zip(found.components, found.scores, strict=True))
    np.testing.assert_allclose([scores[c] for c in wanted], expected, rtol=1e-4)
