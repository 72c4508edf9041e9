"""The readout is the model's own, and direct logits add up to it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import ALL, LAYERS, VOCAB, WIDTH, build, sample_ids

from repforget.errors import SiteError, UsageError
from repforget.models.capture import Batch, capture, forward
from repforget.models.norms import freeze, gain
from repforget.models.readout import cap, direct_logits, head_writes, lens, neuron_writes
from repforget.models.sites import site_map
from repforget.models.weights import find, get_bias, get_weight
from repforget.records import Site

BATCH = Batch.pad(sample_ids())
REAL = BATCH.mask.bool()
LAST = Site("resid_post", LAYERS - 1)


@pytest.mark.parametrize("name", ALL)
def test_the_lens_on_the_last_state_is_the_model(name: str) -> None:
    module = build(name)
    read = lens(module, capture(module, [LAST], BATCH, "all")[LAST])
    torch.testing.assert_close(read[REAL], forward(module, BATCH)[REAL], atol=1e-5, rtol=1e-5)
    earlier = lens(module, capture(module, [Site("resid_post", 0)], BATCH, "all")[Site("resid_post", 0)])
    assert not torch.allclose(earlier[REAL], read[REAL], atol=1e-2)


def test_the_soft_cap_is_applied() -> None:
    module = build("gemma2")
    module.config.final_logit_softcapping = 0.5
    read = lens(module, capture(module, [LAST], BATCH)[LAST])
    assert read.abs().max() < 0.5
    torch.testing.assert_close(read, capture(module, [Site("logits")], BATCH)[Site("logits")], atol=1e-5, rtol=1e-5)


def test_the_decoder_may_be_another_model() -> None:
    a, b = build("llama"), build("llama", seed=1)
    resid = capture(a, [LAST], BATCH)[LAST]
    head, norm = b.lm_head.weight, b.model.norm
    torch.testing.assert_close(lens(b, resid), norm(resid) @ head.T)
    assert not torch.allclose(lens(b, resid), lens(a, resid), atol=1e-2)


@pytest.mark.parametrize("name", ALL)
def test_direct_logits_add_up_to_the_logits(name: str) -> None:
    """Embedding, every attention and every MLP write: their direct effects and the biases are the logits."""
    module = build(name)
    if name.startswith("gemma"):
        module.config.final_logit_softcapping = None
    kinds = [Site("resid_pre", 0), *(Site(k, i) for i in range(LAYERS) for k in ("attn_out", "mlp_out"))]
    found = capture(module, [*kinds, LAST], BATCH, "last")
    parts = torch.stack([found[s] for s in kinds])
    logits = capture(module, [Site("logits")], BATCH)[Site("logits")].double()
    split = direct_logits(module, parts, found[LAST])
    assert split.parts.shape == (len(kinds), 3, VOCAB) and split.parts.dtype == torch.float64
    torch.testing.assert_close(split.total.expand_as(logits), logits, atol=2e-5, rtol=1e-5)
    few = direct_logits(module, parts, found[LAST], tokens=[7, 3])
    torch.testing.assert_close(few.parts, split.parts[..., [7, 3]])
    torch.testing.assert_close(few.total, split.total[..., [7, 3]])


def test_direct_logits_under_a_soft_cap_are_those_before_it() -> None:
    module = build("gemma2")
    assert module.config.final_logit_softcapping is not None
    resid = capture(module, [LAST], BATCH)[LAST]
    total = direct_logits(module, resid[None], resid).total
    torch.testing.assert_close(cap(module, total).float(), lens(module, resid), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_heads_add_up_to_what_attention_writes(name: str) -> None:
    module = build(name)
    found = capture(module, [Site("attn_z", 1), Site("attn_out", 1)], BATCH, "last")
    heads = head_writes(module, 1, found[Site("attn_z", 1)])
    assert heads.shape == (3, site_map(module).n_heads, WIDTH)
    rest = torch.zeros(WIDTH, dtype=torch.float64)
    ref = find(module, "attn_out", 1)
    bias = get_bias(module, ref)
    if bias is not None:
        assert ref.post_norm is None
        rest = bias.double()
    torch.testing.assert_close(heads.sum(1) + rest, found[Site("attn_out", 1)].double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in ALL if n != "mixtral"])
def test_neurons_add_up_to_what_the_mlp_writes(name: str) -> None:
    module = build(name)
    found = capture(module, [Site("mlp_post", 0), Site("mlp_out", 0)], BATCH, "last")
    width = site_map(module).mlp_width
    each = neuron_writes(module, 0, found[Site("mlp_post", 0)], range(width))
    bias = get_bias(module, find(module, "mlp_out", 0))
    rest = 0.0 if bias is None else bias.double()
    torch.testing.assert_close(each.sum(1) + rest, found[Site("mlp_out", 0)].double(), atol=1e-5, rtol=1e-5)
    chosen = neuron_writes(module, 0, found[Site("mlp_post", 0)], [4, 2])
    torch.testing.assert_close(chosen, each[:, [4, 2]])


def test_norm_gains_are_what_the_norm_does() -> None:
    for name, expected in (("llama", 0.0), ("gemma2", 1.0), ("olmo2", 0.0), ("gpt2", 0.0)):
        module = build(name)
        norm = module.get_submodule(site_map(module).anatomy.final_norm)
        torch.testing.assert_close(gain(norm), norm.weight.detach().double() + expected)
        x = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
        fixed = freeze(norm, x)
        torch.testing.assert_close((fixed.linear(x) + fixed.bias).float(), norm(x).detach(), atol=1e-6, rtol=1e-5)
        halves = fixed.linear(x / 2) + fixed.linear(x / 2)
        torch.testing.assert_close(halves, fixed.linear(x))  # linear, with the scale held


def test_gains_survive_low_precision_and_unknown_norms_are_refused() -> None:
    norm = build("gemma2").to(torch.bfloat16).model.norm
    torch.testing.assert_close(gain(norm), 1 + norm.weight.detach().double())

    class Strange(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(WIDTH) * 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.abs().sqrt() * self.weight

    with pytest.raises(SiteError, match="neither a LayerNorm nor an RMS norm"):
        gain(Strange())


def test_refusals() -> None:
    module = build("llama")
    with pytest.raises(UsageError, match="Components need shape"):
        direct_logits(module, torch.zeros(2, 4, WIDTH), torch.zeros(3, WIDTH))
    with pytest.raises(SiteError, match="batched experts"):
        neuron_writes(build("mixtral"), 0, torch.zeros(1, 48), [0])


def test_the_unembedding_reader_is_the_readout() -> None:
    module = build("phi")
    ref = find(module, "unembed")
    resid = capture(module, [LAST], BATCH)[LAST]
    norm = module.get_submodule(ref.norm or "")
    bias = get_bias(module, ref)
    assert bias is not None
    read = norm(resid) @ get_weight(module, ref).T + bias
    torch.testing.assert_close(read, lens(module, resid), atol=1e-5, rtol=1e-5)
