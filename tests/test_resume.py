"""Forward passes that begin in the middle: the same scores as full passes, fewer blocks run, nothing left behind."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from test_causal import runs_for

from repforget import causal
from repforget.causal import patch_effects, patch_scores
from repforget.models import resume
from repforget.models.load import LoadedModel, wrap
from repforget.models.resume import Kept, Start, begin, can_resume, start_of
from repforget.models.sites import site_map
from repforget.records import Component, Site


def built(name: str, **config: Any) -> LoadedModel:
    module = tiny_models.build(name)
    for key, value in config.items():
        setattr(module.config, key, value)
    return wrap(module, tiny_models.tiny_tokenizer(), name)


def patches_of(model: LoadedModel) -> list[tuple[Component, ...]]:
    """Every site but logits, heads, a neuron, several at once, and none."""
    places = site_map(model.module)
    single = [(Component(s),) for s in places.sites if s.kind != "logits"]
    heads = [(Component(s),) for kind in ("q", "k", "v", "attn_z") for s in places.heads(kind)]
    joint = [(Component(Site("mlp_out", 0)), Component(Site("attn_z", 1, 2))),
             (Component(Site("attn_out", 1)), Component(Site("attn_z", 1, 0)))]  # fmt: skip
    neuron = [(Component(Site("mlp_post", 1), 3),)] if "mlp_post" in places.kinds else []
    return [(), *single, *heads, *joint, *neuron]


def full(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **more: Any) -> Any:
    with monkeypatch.context() as m:
        m.setattr(causal, "begin", lambda model, changes: {Start(): list(range(len(changes)))})
        return patch_scores(*arguments, **more)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_equals_full_passes_on_every_architecture(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(name)
    patches, runs = patches_of(model), runs_for(model)
    assert len({len(r.base) for r in runs}) > 1  # rows are padded
    assert can_resume(model) and len(begin(model, [causal.patch_plan(model, p) for p in patches])) >= 5
    reference = full(monkeypatch, model, runs, patches)
    np.testing.assert_allclose(patch_scores(model, runs, patches), reference, atol=3e-6)
    small = patch_scores(model, runs, patches, token_budget=60)  # several batches and groups
    np.testing.assert_allclose(small, reference, atol=3e-6)
    subject = runs_for(model, "subject")
    np.testing.assert_allclose(patch_scores(model, subject, patches), full(monkeypatch, model, subject, patches),
                               atol=3e-6)  # fmt: skip


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "mistral", "gpt2", "falcon_sequential"])
def test_short_windows_and_eager_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = {"sliding_window": 3} if hasattr(tiny_models.build(name).config, "sliding_window") else {}
    model = built(name, _attn_implementation="eager", **window)
    patches, runs = patches_of(model), runs_for(model)
    np.testing.assert_allclose(patch_scores(model, runs, patches), full(monkeypatch, model, runs, patches), atol=3e-6)


def test_a_twin_and_shifted_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    model, runs = built("llama"), runs_for(built("llama"))
    twin = wrap(tiny_models.build("llama", seed=3), model.tokenizer, "twin")

    def shift(item: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(*item.base.ids.shape, model.width, generator=generator) * item.where

    for more in ({"donor": twin}, {"shift": shift}, {"donor": twin, "shift": shift, "metric": "logit_difference"}):
        found, reference = (f(model, runs, patches_of(model), **more) for f in
                            (patch_scores, lambda *a, **k: full(monkeypatch, *a, **k)))  # fmt: skip
        np.testing.assert_allclose(found, reference, atol=3e-6)
        assert np.abs(found - found[0]).max() > 1e-2


def test_blocks_before_the_patch_do_not_run() -> None:
    model, runs = built("llama"), runs_for(built("llama"))
    calls = {"mlp": 0, "q_proj": 0, "o_proj": 0}
    for layer in model.module.model.layers:
        for name, part in (("mlp", layer.mlp), ("q_proj", layer.self_attn.q_proj), ("o_proj", layer.self_attn.o_proj)):

            def counted(*args: Any, name: str = name, plain: Any = part.forward, **more: Any) -> Any:
                calls[name] += 1
                return plain(*args, **more)

            part.forward = counted
    heads = [(Component(s),) for s in site_map(model.module).heads("attn_z") if s.layer == 1]
    patch_scores(model, runs, [(), *heads])
    # the donor up to the heads of layer 1; the unpatched pass; the patched ones from there on
    assert calls == {"mlp": 1 + 2 + 1, "q_proj": 2 + 2, "o_proj": 1 + 2 + 1}


def test_where_passes_begin() -> None:
    llama, neox, opt, mixtral = (site_map(tiny_models.build(n)) for n in ("llama", "gpt_neox", "opt", "mixtral"))
    assert start_of(llama, [Site("attn_z", 1, 2)]) == Start(1, "last", "run")
    assert start_of(neox, [Site("attn_z", 1, 2)]) == Start(1, "last", "kept")  # the MLP reads what attention read
    assert start_of(llama, [Site("q", 1)]) == Start(1, "run", "run")
    assert start_of(llama, [Site("attn_out", 1)]) == Start(1, "kept", "run")
    assert start_of(llama, [Site("mlp_post", 1)]) == Start(1, "kept", "last")
    assert start_of(llama, [Site("mlp_post", 1), Site("mlp_up", 1)]) == Start(1, "kept", "run")
    assert start_of(llama, [Site("mlp_out", 1)]) == start_of(llama, [Site("resid_post", 1)]) == Start(1, "kept", "kept")
    assert start_of(llama, [Site("mlp_out", 1), Site("resid_pre", 1)]) == Start(1)
    assert start_of(llama, [Site("mlp_out", 1), Site("q", 0)]) == start_of(llama, [Site("embed")]) == Start()
    assert start_of(llama, []) == start_of(llama, [Site("final_norm")]) == Start(2)
    assert start_of(opt, [Site("mlp_out", 1)]) == Start(1, "kept", "run")  # its block holds the projections itself
    assert start_of(mixtral, [Site("mlp_in", 1)]) == Start(1, "kept", "run")


def test_full_passes_where_resuming_would_not_pay_or_hold() -> None:
    model = built("llama")
    early, late = {Site("resid_pre", 0): None}, {Site("mlp_out", 1): None}
    assert list(begin(model, [early] * 9)) == [Start()] == list(begin(model, [late]))
    assert Start() not in begin(model, [late] * 9)
    handle = model.module.model.layers[0].mlp.register_forward_hook(lambda *a: None)
    assert list(begin(model, [late] * 9)) == [Start()]
    handle.remove()
    assert Start() not in begin(model, [late] * 9)
    wrapper = torch.nn.Module()
    wrapper._orig_mod = model.module  # as a compiled module holds the plain one
    assert list(begin(replace(model, module=wrapper), [late] * 9)) == [Start()]


def test_an_unproven_architecture_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "PROVEN", frozenset())
    assert can_resume(tiny_models.build("gemma2"))
    module = tiny_models.build("llama")
    first, second = module.model.layers
    plain = {block: block.forward for block in (first, second)}
    seen: list[torch.Tensor] = []  # a block that also reads what an earlier block left lying about

    def leaves(x: torch.Tensor, *args: Any, **more: Any) -> Any:
        seen[:] = [x]
        return plain[first](x, *args, **more)

    first.forward, second.forward = leaves, lambda x, *a, **k: plain[second](x + seen[0], *a, **k)
    assert not can_resume(module)


def test_nothing_is_left_behind() -> None:
    model, runs = built("gemma2"), runs_for(built("gemma2"))
    before = dict(model.module.named_modules())
    effects = patch_effects(model, runs, patches_of(model))
    with pytest.raises(RuntimeError, match="stop"):
        kept = Kept.of(model, [Start(1, "kept", "kept")])
        item = next(causal.prepare(model, runs))
        with torch.no_grad():
            kept.record(item.base)
        with kept.resumed(Start(1, "kept", "kept"), 1):
            assert "original" not in dict(model.module.named_modules())
            raise RuntimeError("stop")
    after = dict(model.module.named_modules())
    assert list(before) == list(after) and all(after[n] is part for n, part in before.items())
    assert not any(p._forward_hooks or p._forward_pre_hooks for p in model.module.modules())
    assert np.isfinite(effects.patched).all()
