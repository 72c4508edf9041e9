"""nnsight as a source: equal to plain hooks, leaves the model alone, says what it cannot read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch

from repforget.errors import SiteError, UsageError
from repforget.models import trace
from repforget.models.capture import Batch, capture, forward
from repforget.models.sites import site_map
from repforget.records import Site


def batch(side: str = "right") -> Batch:
    return Batch.pad(tiny_models.sample_ids(), 0, side)


def readable(module: Any) -> list[Site]:
    places = site_map(module)
    heads = [s for kind in ("q", "k", "v", "attn_z") for s in places.heads(kind)[-2:]]
    falcon = places.anatomy.model_type == "falcon"
    return [s for s in (*places.sites, *heads) if not (falcon and s.kind == "mlp_out")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_equals_plain_hooks_at_every_site(module: Any, side: str) -> None:
    source = trace.trace_source(module)
    sites = readable(module)
    for gather in ("last", "tokens"):
        ours, theirs = capture(module, sites, batch(side), gather), source.capture(sites, batch(side), gather)
        for site in sites:
            assert ours[site].shape == theirs[site].shape
            scale = max(1.0, float(ours[site].abs().max()))
            assert float((ours[site] - theirs[site]).abs().max()) <= 1e-5 * scale, site


def test_leaves_the_model_alone(module: Any) -> None:
    before, keys = forward(module, batch()), list(module.state_dict())
    trace.trace_source(module).capture([Site("resid_post", 0)], batch())
    assert list(module.state_dict()) == keys
    assert not any("forward" in vars(part) for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert torch.equal(forward(module, batch()), before)


def test_sees_edits_of_the_weights() -> None:
    module = tiny_models.build("llama")
    source = trace.trace_source(module)
    sites = [Site("mlp_out", 1)]
    old = source.capture(sites, batch())[sites[0]]
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.mul_(2.0)
    new = source.capture(sites, batch())[sites[0]]
    assert torch.equal(new, capture(module, sites, batch())[sites[0]])
    assert float((new - old).abs().max()) > 1e-4


def test_remote_local_serialises_and_agrees() -> None:
    module = tiny_models.build("gpt2")
    sites = [Site("resid_post", 1), Site("attn_z", 0, 2), Site("mlp_post", 1), Site("logits")]
    found = trace.trace_source(module, remote="local").capture(sites, batch("left"))
    ours = capture(module, sites, batch("left"))
    assert all(torch.equal(found[site], ours[site]) for site in sites)


def test_remote_path_up_to_the_network(tmp_path: Path, tokenizer: Any) -> None:
    module = tiny_models.build("llama")
    module.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    source = trace.trace_source(str(tmp_path), remote=True)
    assert source.remote is True
    assert source.module.device.type == "meta"  # nothing is loaded for a remote model
    here = replace(source, remote="local")  # the same request, answered in this process
    sites = [Site("resid_mid", 0), Site("mlp_out", 1)]
    found, ours = here.capture(sites, batch()), capture(module, sites, batch())
    assert all(torch.equal(found[site], ours[site]) for site in sites)


def test_verbose_flags_of_our_program_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["repforget", "-v"])
    trace.trace_source(tiny_models.build("llama"))
    from nnsight import CONFIG

    assert CONFIG.APP.DEBUG is False
    assert sys.argv == ["repforget", "-v"]


def test_refusals() -> None:
    falcon = trace.trace_source(tiny_models.build("falcon"))
    with pytest.raises(SiteError, match="overwrites it in place"):
        falcon.capture([Site("mlp_out", 0)], batch())
    module = tiny_models.build("llama")
    with pytest.raises(SiteError, match="layers"):
        trace.capture(module, [Site("resid_post", 9)], batch())
    with pytest.raises(UsageError, match="detached"):
        trace.capture(module, [Site("resid_post", 0)], batch(), grad=True)
    with pytest.raises(UsageError, match="needs a hub id"):
        trace.trace_source(module, remote=True)
    with pytest.raises(UsageError, match="needs a loaded model"):
        trace.trace_source("owner/model")
