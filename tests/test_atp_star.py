"""AtP*: the softmax computed anew is exact where all behind it is linear; dropped layers are averaged as defined."""

from __future__ import annotations

from typing import Any

import numpy as np
import planted
import pytest
import tiny_models
import torch
import transformers
from test_circuits import model_of, runs
from test_locate_planted import KNOWLEDGE, located
from test_locate_planted import model as planted_model
from torch import Tensor

import repforget as rf
from repforget.causal import patch_scores, prepare
from repforget.errors import UsageError
from repforget.locate.atp_star import _nodes, _reader, attributions
from repforget.locate.attribution_patching import node_attributions
from repforget.models.capture import capture, hooks
from repforget.models.load import LoadedModel, wrap
from repforget.models.sites import site_map
from repforget.records import Component, RandomBand, Site

PLAIN: dict[str, Any] = {"qk_fix": False, "grad_drop": False}
FIXED: dict[str, Any] = {"qk_fix": True, "grad_drop": False}
QK: Any = ("q", "k")


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_without_repairs_it_is_attribution_patching(name: str) -> None:
    model, items = model_of(name), runs()
    components = _nodes(model, ("q", "k", "v", "heads", "attn_out", "mlp_out"), "all")
    for steps in (1, 3):
        ours = attributions(model, items, components, **PLAIN, steps=steps).parts
        theirs = node_attributions(model, items, components, steps=steps)
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_attention_of_every_patched_head_is_exact(name: str) -> None:
    """One forward pass for all layers and heads gives what patching one head at a time does to attn_z."""
    model = model_of(name)
    (item,) = prepare(model, runs((9,)))
    places = site_map(model.module)
    components = _nodes(model, QK, "all")
    reader = _reader(model, item, components, site_map(model.module).expand("attn_z"), True)
    for component in components:
        site = component.site
        whole, z = Site(site.kind, site.layer), Site("attn_z", site.layer)
        donor = capture(model, [site], item.donor, gather="all")[site]
        before = capture(model, [z], item.base, gather="all")[z]
        with hooks(model, {site: lambda x, donor=donor: torch.where(item.where, donor, x)}):
            change = capture(model, [z], item.base, gather="all")[z] - before
        group = places.n_heads // places.n_kv_heads if site.kind == "k" else 1
        columns = slice(site.head * group * places.head_dim, (site.head + 1) * group * places.head_dim)
        if name == "olmo2":  # a norm joins its heads: each is patched alone, and moves the others
            torch.testing.assert_close(reader.fixed[site].float(), change, atol=2e-5, rtol=1e-4)
            continue
        ours = reader.fixed[whole][..., columns].float()
        torch.testing.assert_close(ours, change[..., columns], atol=2e-5, rtol=1e-4)
        outside = change.clone()
        outside[..., columns] = 0
        assert outside.abs().max() < 1e-5 < change.abs().max() * 10  # other heads do not see it


def linear_head(monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """A model of two layers whose second MLP and norms behind the attention are taken out of the way: the metric is
    linear in the attention of the last layer."""
    model = model_of("llama")
    monkeypatch.setattr(model.module.model.layers[1].mlp, "forward", lambda x: torch.zeros_like(x))
    monkeypatch.setattr(model.module.model.norm, "forward", lambda x: x)
    return model


def test_the_fix_is_the_exact_patch_where_all_behind_attention_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    """One head's query or key patched by itself; the plain gradient is far off."""
    model, items = linear_head(monkeypatch), runs((9, 7))
    components = _nodes(model, QK, [1])
    base, *exact = patch_scores(model, items, [(), *((c,) for c in components)], metric="logit_difference")
    moved = np.stack(exact) - base
    fixed = attributions(model, items, components, "logit_difference", **FIXED).parts
    plain = attributions(model, items, components, "logit_difference", **PLAIN).parts
    np.testing.assert_allclose(fixed, moved, atol=2e-5)
    assert np.abs(plain - moved).max() > 0.1 * np.abs(moved).max() > 0.005


def test_the_fix_is_the_sum_of_attention_changes_times_their_gradients() -> None:
    """The formula itself: weights A of the last layer with and without one patched query head, and dM/dA."""
    model, items = model_of("llama"), runs((9,))
    (item,) = prepare(model, items)
    module = model.module
    module.set_attn_implementation("eager")
    site = Site("q", 1, 2)
    donor = capture(model, [site], item.donor, gather="all")[site]

    def weights() -> Tensor:
        return module(item.base.ids, attention_mask=item.base.mask, output_attentions=True).attentions[1][0, 2]

    with torch.no_grad():
        before = weights()
        with hooks(model, {site: lambda x: torch.where(item.where, donor, x)}):
            after = weights()
    v = capture(model, [Site("v", 1, 1)], item.base, gather="all")[Site("v", 1, 1)][0]  # of the group of heads 2 and 3
    leaf: list[Tensor] = []

    def probe(z: Tensor) -> Tensor:
        leaf.append(torch.zeros_like(z, requires_grad=True))
        return z + leaf[0]

    from repforget.causal import answer_metric

    with torch.enable_grad(), hooks(model, {Site("attn_z", 1, 2): probe}):
        (slope,) = torch.autograd.grad(answer_metric(model, item.base, item, "logprob").sum(), leaf)
    by_hand = float(((after - before) * (slope[0] @ v.T)).sum())
    assert attributions(model, items, [Component(site)], **FIXED).parts[0, 0] == pytest.approx(by_hand, abs=1e-5)
    assert abs(by_hand) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "mixtral"])
def test_a_prompt_patched_into_itself_moves_nothing(name: str) -> None:
    model = model_of(name)
    same = [run.__class__(**{**vars(run), "donor": run.base}) for run in runs()]
    found = attributions(model, same, _nodes(model, ("q", "k", "heads", "mlp_out"), "all"))
    assert np.abs(found.parts).max() < 1e-5 and np.abs(found.roles).max() < 1e-5


def deep() -> LoadedModel:
    config = transformers.LlamaConfig(**{**tiny_models.CONFIGS["llama"][1], "num_hidden_layers": 3})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return wrap(transformers.LlamaForCausalLM(config).eval(), tiny_models.tiny_tokenizer(), "deep")


@pytest.mark.parametrize("name", ["deep", "gpt_neox", "gemma2"])
def test_dropped_layers_are_averaged_as_defined(name: str) -> None:
    """Brute force: the writes of one layer are cut off from the graph, layer by layer; magnitudes only differ from a
    sum where two layers or more are behind a node, hence one model of three."""
    model, items = deep() if name == "deep" else model_of(name), runs((9, 7))
    components = _nodes(model, ("heads", "mlp_out"), "all")
    passes = []
    for layer in range(model.n_layers):
        cut = {Site(kind, layer): Tensor.detach for kind in ("attn_out", "mlp_out")}
        with hooks(model, cut):
            values = node_attributions(model, items, components)
        own = [k for k, c in enumerate(components) if c.site.layer == layer]
        assert np.abs(values).max() > 1e-3
        values[own] = 0  # a leaf before the cut gets no gradient, one behind it would
        passes.append(np.abs(values))
    found = attributions(model, items, components, qk_fix=False).parts
    np.testing.assert_allclose(found, np.sum(passes, axis=0) / (model.n_layers - 1), atol=1e-5)


def test_roles_and_components_add_up() -> None:
    """Signed estimates of all heads and of the MLP, by role of token, sum to those of all tokens."""
    model, items = model_of("qwen2"), runs()
    components = _nodes(model, ("heads", "mlp_out"), "all")
    found = attributions(model, items, components, **PLAIN)
    for site, roles in zip(found.sites, found.roles, strict=True):
        own = [k for k, c in enumerate(components) if (c.site.kind, c.site.layer) == (site.kind, site.layer)]
        np.testing.assert_allclose(roles.sum(0), found.parts[own].sum(0), atol=1e-6)


@pytest.mark.skipif(not (planted.FOLDER / "base").exists(), reason="planted-fact models are not built")
def test_without_repairs_its_contrasted_scores_are_those_of_attribution_patching(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both ways of patching, whose signs differ, on forget and on retain facts."""
    band = RandomBand(1, 20, 0.0, 0.0, 0.0, "none"), (), 0.0
    scores = []
    for method, given in (("atp_star", PLAIN), ("attribution_patching", {"recheck": 0})):
        monkeypatch.setattr(f"repforget.locate.{method}.exact_band", lambda *_, **__: band)
        found = rf.locate(planted_model(1), KNOWLEDGE, method, nodes=("mlp_out",), mode="both", items=6, partners=1,
                          steps=1, contrast=1.0, **given)  # fmt: skip
        scores.append(dict(zip(found.components, found.scores, strict=True)))
    assert scores[0] == pytest.approx(scores[1], rel=1e-4, abs=1e-6)


def test_one_layer_cannot_be_dropped() -> None:
    config = transformers.LlamaConfig(**{**tiny_models.CONFIGS["llama"][1], "num_hidden_layers": 1})
    with torch.random.fork_rng():
        model = wrap(transformers.LlamaForCausalLM(config).eval(), tiny_models.tiny_tokenizer(), "one")
    with pytest.raises(UsageError, match="two layers or grad_drop=false"):
        attributions(model, runs(), _nodes(model, ("heads",), "all"))
    with pytest.raises(UsageError, match="at least one step"):
        attributions(model, runs(), _nodes(model, ("heads",), "all"), grad_drop=False, steps=0)
    assert attributions(model, runs(), _nodes(model, ("heads",), "all"), grad_drop=False).parts.any()


def test_planted_layers() -> None:
    """Three of four with a contrast and the default steps; one, as by chance, without."""
    ranked = {contrast: [located(layer, "atp_star", contrast=contrast) for layer in planted.LAYERS]
              for contrast in (0.0, 1.0)}  # fmt: skip
    hits = {contrast: sum(each.layers("mlp_out")[0] == layer for layer, each in zip(planted.LAYERS, found, strict=True))
            for contrast, found in ranked.items()}  # fmt: skip
    assert hits == {0.0: 1, 1.0: 3}
    found = ranked[0.0][0]
    assert any("all heads by layer" in name for name in found.tables) and found.band.beats_random
