"""TransformerLens as a source: agrees with plain hooks, leaves the model alone, refuses what it cannot
prove."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from repforget.errors import SiteError, UsageError
from repforget.models import bridge
from repforget.models.capture import Batch, capture, forward, hooks
from repforget.models.sites import site_map
from repforget.records import Site


def batch(side: str = "right") -> Batch:
    return Batch.pad(tiny_models.sample_ids(), 0, side)


def assert_close(a: torch.Tensor, b: torch.Tensor, what: str) -> None:
    scale = max(1.0, float(a.abs().max()))
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= 1e-5 * scale, what


def test_agrees_with_plain_hooks_at_every_site(module: Any) -> None:
    source = bridge.lens_source(module)
    places = site_map(module)
    heads = [s for kind in ("q", "k", "v", "attn_z") for s in places.heads(kind)[-2:]]
    sites = [*places.sites, *heads]
    for side in ("left", "right"):
        for gather in ("last", "tokens"):
            ours = capture(module, sites, batch(side), gather)
            theirs = source.capture(sites, batch(side), gather)
            for site in sites:
                assert_close(ours[site], theirs[site], f"{site} {side} {gather}")


def test_leaves_the_model_alone(module: Any, tmp_path: Path) -> None:
    logger = logging.getLogger("transformers")
    level, keys = logger.level, list(module.state_dict())
    types = [(name, type(part)) for name, part in module.named_modules()]
    attention, before = module.config._attn_implementation, forward(module, batch())
    gradients = torch.is_grad_enabled()
    source = bridge.lens_source(module)
    source.capture([Site("resid_post", 0)], batch())
    with source.hooks({Site("resid_post", 0): lambda x: x * 0}):
        source.forward(batch())
    assert logger.level == level
    assert torch.is_grad_enabled() == gradients
    assert list(module.state_dict()) == keys
    assert [(name, type(part)) for name, part in module.named_modules()] == types
    assert module.config._attn_implementation == attention
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(forward(module, batch()), before)
    module.save_pretrained(tmp_path)
    shared = {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in source.bridge.parameters()}
    assert len(shared) == len({p.data_ptr() for p in module.parameters()})  # no second set of weights


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("kind", ["resid_pre", "attn_out", "mlp_out", "attn_z", "mlp_post", "q"])
def test_edits_and_gradients_agree(name: str, kind: str) -> None:
    module = tiny_models.build(name)
    source = bridge.lens_source(module)
    for site in (Site(kind, 1), *([Site(kind, 1, 1)] if kind in ("q", "attn_z") else [])):
        with hooks(module, {site: lambda x: x.roll(1, -1)}):
            ours = forward(module, batch())
        with source.hooks({site: lambda x: x.roll(1, -1)}):
            theirs = source.forward(batch())
        real = batch().mask.bool()
        assert_close(ours[real], theirs[real], str(site))
        assert float((ours[real] - forward(module, batch())[real]).abs().max()) > 1e-4
    weight = next(module.parameters()).requires_grad_(True)
    grads = []
    for values in (capture(module, [Site(kind, 1)], batch(), "last", grad=True),
                   bridge.lens_source(module).capture([Site(kind, 1)], batch(), "last", grad=True)):  # fmt: skip
        grads.append(torch.autograd.grad(values[Site(kind, 1)].square().sum(), weight)[0])
    assert_close(grads[0], grads[1], kind)
    assert float(grads[0].abs().max()) > 0


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "falcon"])
def test_an_edit_makes_it_stale_and_capture_rebuilds(name: str) -> None:
    module = tiny_models.build(name)
    sites = [Site("resid_post", 1)]
    old = bridge.capture(module, sites, batch())
    source = bridge.lens_source(module)
    assert not source.stale
    path = site_map(module).locate(Site("q", 0)).path
    with torch.no_grad():
        module.get_submodule(path).weight.mul_(1.5)
    assert source.stale
    with pytest.raises(UsageError, match="build it again with lens_source"):
        source.capture(sites, batch())
    new = bridge.capture(module, sites, batch())
    assert_close(new[sites[0]], capture(module, sites, batch())[sites[0]], name)
    assert float((new[sites[0]] - old[sites[0]]).abs().max()) > 1e-4


def test_silent_writes_to_copied_projections_are_noticed() -> None:
    module = tiny_models.build("gpt_neox")
    source = bridge.lens_source(module)
    assert source.copied
    module.get_submodule(site_map(module).locate(Site("q", 0)).path).weight.data.mul_(1.5)  # no version counter
    assert source.stale


def test_hooks_on_the_model_make_it_stale() -> None:
    module = tiny_models.build("llama")
    source = bridge.lens_source(module)
    with hooks(module, {Site("mlp_out", 0): lambda x: x * 0}):
        assert source.stale
    assert not source.stale


def test_replaced_weight_makes_it_stale() -> None:
    module = tiny_models.build("llama")
    source = bridge.lens_source(module)
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().clone())
    assert source.stale


def test_refuses_what_it_cannot_reproduce() -> None:
    peft = pytest.importorskip("peft")
    module = tiny_models.build("gpt2")
    wrapped = peft.get_peft_model(module, peft.LoraConfig(target_modules=["c_attn"], r=2, fan_in_fan_out=True,
                                                          init_lora_weights=False))  # fmt: skip
    with pytest.raises(SiteError, match="merge adapters"):
        bridge.lens_source(wrapped)


def test_refuses_absent_sites() -> None:
    source = bridge.lens_source(tiny_models.build("mixtral"))
    with pytest.raises(SiteError, match="mlp_post"):
        source.capture([Site("mlp_post", 0)], batch())
    with pytest.raises(SiteError, match="'logits' cannot be written"), source.hooks({Site("logits"): lambda x: x}):
        pass
    with pytest.raises(SiteError, match="layers"):
        source.capture([Site("resid_post", 9)], batch())


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(SiteError, match="plain hooks"):
        bridge.lens_source(tiny_models.build("falcon_new"))
