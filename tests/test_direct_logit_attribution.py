"""Direct logit attribution: the parts are the logit difference, and TransformerLens says the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import planted
import pytest
import tiny_models
import torch
from test_circuits import model_of, runs
from test_locate_planted import KNOWLEDGE as PLANTED
from test_locate_planted import located
from test_locate_planted import model as planted_model

import repforget as rf
from repforget.causal import prepare
from repforget.errors import KnowledgeError, RecipeError, UsageError
from repforget.locate._units import expand_nodes
from repforget.locate.direct_logit_attribution import direct_effects
from repforget.models.capture import forward
from repforget.models.load import LoadedModel
from repforget.models.norms import gain
from repforget.models.readout import logit_cap
from repforget.models.sites import site_map
from repforget.records import Component, Site

NODES: Any = ("embed", "heads", "attn_out", "mlp_out")


def difference(model: LoadedModel, items: list[Any]) -> np.ndarray[Any, Any]:
    """Truth minus rival of the model's own logits, the soft cap undone, at the first token where they differ."""
    found = np.zeros(len(items))
    limit = logit_cap(model)[1]
    for item in prepare(model, items):
        logits = forward(model, item.base)[:, -item.target.shape[1] :].double()
        logits = logits if limit is None else torch.atanh(logits / limit) * limit
        for row, k in enumerate(item.rows):
            column, truth, rival = item.fork[row].tolist()
            found[k] = logits[row, column, truth] - logits[row, column, rival]
    return found


def wide_norms(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of many models round to float32 within; compute them in float64, as their own weights say."""
    for module in model.module.modules():
        if type(module).__name__.endswith("RMSNorm"):
            factor, eps = gain(module), getattr(module, "variance_epsilon", getattr(module, "eps", None))
            assert isinstance(eps, float)

            def apply(x: torch.Tensor, factor: torch.Tensor = factor, eps: float = eps) -> torch.Tensor:
                return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * factor[: x.shape[-1]]

            monkeypatch.setattr(module, "forward", apply)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_the_parts_are_the_logit_difference(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, attention, MLPs and biases, to 1e-9 in float64 and 1e-5 in float32."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-9)):
        model = model_of(name, dtype)
        if dtype == torch.float64:
            wide_norms(model, monkeypatch)
            model.module.config._experts_implementation = "eager"  # grouped products know no float64
        items = runs() if dtype == torch.float32 else runs((9, 9, 9))  # padding makes NaN of a soft cap in float64
        components = expand_nodes(model, NODES)
        found = direct_effects(model, items, components)
        true = difference(model, items)
        assert np.abs(true).max() > 0.1
        np.testing.assert_allclose(found.total, true, rtol=0, atol=tolerance * max(1.0, np.abs(true).max()))
        parts = dict(zip(components, found.parts, strict=True))
        np.testing.assert_array_equal(parts[Component(Site("embed"))], found.embed)
        np.testing.assert_array_equal(parts[Component(Site("mlp_out", 1))], found.mlp[1])


@pytest.mark.parametrize("name", tiny_models.ARCHITECTURES)
def test_heads_make_up_attention_but_for_its_bias(name: str) -> None:
    """The same gap for every run where no norm follows the projection: the bias does not depend on the prompt but for
    the final norm's scale; none where there is no bias."""
    model = model_of(name)
    found = direct_effects(model, runs(), expand_nodes(model, ("heads",)))
    heads = found.parts.reshape(model.n_layers, -1, 3).sum(1)
    rest = found.attention - heads
    anatomy = site_map(model.module).anatomy
    biased = [getattr(model.module.get_submodule(layer.attention_out), "bias", None) is not None
              for layer in anatomy.layers]  # fmt: skip
    assert (np.abs(rest).max(axis=1) > 1e-4).tolist() == biased
    assert np.abs(found.attention).max() > 0.05


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2", "opt", "olmo2", "phi3"])
def test_neurons_make_up_the_mlp_but_for_its_bias(name: str) -> None:
    model = model_of(name)
    found = direct_effects(model, runs(), expand_nodes(model, ("neurons",)))
    rest = found.mlp - found.parts.reshape(model.n_layers, -1, 3).sum(1)
    assert (np.abs(rest).max() > 1e-4) == (name in ("gpt2", "opt")) and np.abs(found.mlp).max() > 0.05


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3"])
def test_transformer_lens_says_the_same(name: str) -> None:
    """In its compatibility mode (weights folded and centred), the parts of heads and MLPs."""
    from repforget.models.bridge import lens_source

    model = model_of(name)
    item = runs((9,))[0]
    bridge = lens_source(model_of(name)).bridge
    bridge.enable_compatibility_mode()
    ids = torch.tensor([item.base[: item.start]])
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
        stack, labels = cache.decompose_resid(layer=-1, pos_slice=-1, return_labels=True)
        scaled = cache.apply_ln_to_stack(stack, layer=-1, pos_slice=-1)
        truth, rival = item.base[item.start], item.rival[0]
        direction = bridge.W_U[:, truth] - bridge.W_U[:, rival]
        theirs = dict(zip(labels, (scaled[:, 0] @ direction).tolist(), strict=True))
    found = direct_effects(model, [item], expand_nodes(model, NODES))
    for layer in range(model.n_layers):
        assert found.mlp[layer, 0] == pytest.approx(theirs[f"{layer}_mlp_out"], abs=2e-4)
        assert found.attention[layer, 0] == pytest.approx(theirs[f"{layer}_attn_out"], abs=2e-4)


def test_a_run_without_a_rival_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(KnowledgeError, match="rival"):
        direct_effects(model, [runs()[0].__class__(**{**vars(runs()[0]), "rival": ()})], expand_nodes(model, NODES))


def test_refusals() -> None:
    model = planted_model(0)
    with pytest.raises(UsageError, match="besides 'embed'"):
        rf.locate(model, PLANTED, "direct_logit_attribution", nodes=("embed",))
    with pytest.raises(RecipeError, match="nodes"):
        rf.locate(model, PLANTED, "direct_logit_attribution", nodes=("resid_post",))


@pytest.mark.parametrize("layer", planted.LAYERS)
def test_with_a_contrast_the_planted_mlp_comes_first_among_mlps(layer: int) -> None:
    """Four of four; without it the last MLP is first in every model."""
    assert located(layer, "direct_logit_attribution").layers("mlp_out")[0] == layer
    plain = located(layer, "direct_logit_attribution", contrast=0.0)
    assert plain.layers("mlp_out")[0] == 3 and any("logit difference is" in note for note in plain.notes)
