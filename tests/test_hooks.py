"""Writing activations: exact, only where asked, the same for either padding, and bit-equal afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import ALL, WIDTH, build, sample_ids
from torch import Tensor, nn

from repforget.errors import SiteError, UsageError
from repforget.models.capture import Batch, capture, forward, hooks
from repforget.models.sites import site_map
from repforget.records import Site

SEQUENCES = sample_ids()
BATCH = Batch.pad(SEQUENCES)


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules())


@pytest.mark.parametrize("name", ALL)
def test_every_site_can_be_written_and_is_bit_equal_afterwards(name: str) -> None:
    module = build(name)
    before = forward(module, BATCH)
    for site in site_map(module).sites:
        with hooks(module, {site: lambda x: x.clone()}):
            assert torch.equal(forward(module, BATCH), before), f"identity at {site}"
        with hooks(module, {site: lambda x: x * 0.5 + 0.1}):
            changed = forward(module, BATCH)
        assert not torch.allclose(changed, before, atol=1e-5), f"nothing happens at {site}"
        assert torch.equal(forward(module, BATCH), before)
    assert hook_count(module) == 0


@pytest.mark.parametrize("name", ALL)
def test_a_written_value_is_what_a_capture_then_reads(name: str) -> None:
    module = build(name)
    for site in site_map(module).sites:
        with hooks(module, {site: lambda x: torch.full_like(x, 0.25)}):
            found = capture(module, [site], BATCH, "last")[site]
        torch.testing.assert_close(found, torch.full_like(found, 0.25), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_writing_the_residual_stream_moves_skip_path_and_readers(name: str) -> None:
    """The same change at resid_mid, at attn_out and (in the layer before) at resid_post has the same
    effect."""
    module = build(name)
    push = torch.linspace(-1, 1, WIDTH)
    with hooks(module, {Site("resid_post", 0): lambda x: x + push}):
        as_post = forward(module, BATCH)
    with hooks(module, {Site("resid_pre", 1): lambda x: x + push}):
        as_pre = forward(module, BATCH)
    assert torch.equal(as_post, as_pre)
    with hooks(module, {Site("attn_out", 1): lambda x: x + push}):
        as_attention = forward(module, BATCH)
    if "resid_mid" not in site_map(module).kinds:
        return
    with hooks(module, {Site("resid_mid", 1): lambda x: x + push}):
        as_mid = forward(module, BATCH)
    torch.testing.assert_close(as_mid, as_attention, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("kind", ["q", "k", "v", "attn_z"])
def test_writing_a_head_touches_only_its_slice(name: str, kind: str) -> None:
    module = build(name)
    head = site_map(module).heads_of(kind) - 1
    everything = [s for s in site_map(module).heads(kind) if s.layer == 1]
    before = capture(module, everything, BATCH, "all")
    shapes: list[tuple[int, ...]] = []

    def edit(x: Tensor) -> Tensor:
        shapes.append(tuple(x.shape))
        return x + 1.0

    with hooks(module, {Site(kind, 1, head): edit}):
        after = capture(module, everything, BATCH, "all")
    assert shapes == [(3, 7, site_map(module).head_dim)]
    for site in everything:
        assert torch.equal(after[site], before[site] + 1.0 if site.head == head else before[site])


@pytest.mark.parametrize("name", ALL)
def test_edits_do_not_depend_on_the_padding_side(name: str) -> None:
    module = build(name)
    edits = {Site("mlp_in", 0): lambda x: x * 0.5, Site("attn_z", 1, 1): lambda x: x * 0.0,
             Site("mlp_out", 1): lambda x: x + 0.3}  # fmt: skip
    outputs = []
    for side in ("right", "left"):
        with hooks(module, edits):
            outputs.append(capture(module, [Site("logits")], Batch.pad(SEQUENCES, side=side), "last")[Site("logits")])
    torch.testing.assert_close(outputs[0], outputs[1], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_edits_hold_while_decoding_with_a_cache(name: str) -> None:
    """Greedy decoding under hooks gives the tokens that full forward passes under the same hooks give."""
    module = build(name)
    module.generation_config.eos_token_id = None
    kinds = [k for k in ("resid_mid", "mlp_out", "mlp_up") if k in site_map(module).kinds]
    edits = {Site(kind, 1): lambda x: -x for kind in kinds}
    ids = torch.tensor([SEQUENCES[0]])
    with hooks(module, edits):
        ones = torch.ones_like(ids)
        fast = module.generate(ids, attention_mask=ones, max_new_tokens=4, do_sample=False, pad_token_id=0)
        slow = ids
        for _ in range(4):
            step = forward(module, Batch(slow, torch.ones_like(slow)))[:, -1].argmax(-1)
            slow = torch.cat([slow, step[:, None]], 1)
    assert torch.equal(fast, slow)
    assert hook_count(module) == 0


def test_edits_of_one_tensor_act_in_order_and_reading_sees_them() -> None:
    module = build("llama")
    read: list[Tensor] = []
    site, head = Site("attn_z", 0), Site("attn_z", 0, 1)
    with hooks(module, {site: lambda x: torch.ones_like(x), head: lambda x: x * 3}):
        found = capture(module, [site], BATCH)[site]
    size = site_map(module).head_dim
    expected = torch.ones(3, 4 * size)
    expected[:, size : 2 * size] = 3
    assert torch.equal(found, expected)
    with hooks(module, {site: lambda x: read.append(x)}):  # None: read only
        forward(module, BATCH)
    assert torch.equal(read[0][torch.arange(3), BATCH.last], capture(module, [site], BATCH)[site])


def test_resid_mid_comes_after_other_edits_of_the_same_write() -> None:
    module = build("llama")
    seen: list[Tensor] = []
    edits = {Site("resid_mid", 0): lambda x: seen.append(x), Site("attn_out", 0): torch.zeros_like}
    with hooks(module, edits):
        before = capture(module, [Site("resid_pre", 0)], BATCH, "all")[Site("resid_pre", 0)]
    assert not seen  # the capture ended before it
    with hooks(module, edits):
        forward(module, BATCH)
    assert torch.equal(seen[0], before)


@pytest.mark.parametrize(
    ("edits", "error"),
    [
        ({Site("resid_post", 9): torch.zeros_like}, SiteError),
        ({Site("resid_post", 0): torch.zeros_like, Site("mlp_gate", 5): torch.zeros_like}, SiteError),
        ({Site("mlp_out", 0): lambda x: x[:, :1]}, UsageError),
        ({Site("resid_mid", 0): lambda x: x[..., :3]}, UsageError),
        ({Site("mlp_out", 0): lambda x: 1 / 0}, ZeroDivisionError),
    ],
)
def test_failing_edits_leave_no_hook(edits: Any, error: type[Exception]) -> None:
    module = build("llama")
    with pytest.raises(error), hooks(module, edits):
        forward(module, BATCH)
    assert hook_count(module) == 0


def test_edits_keep_the_models_dtype() -> None:
    module = build("llama").to(torch.bfloat16)
    with hooks(module, {Site("resid_post", 0): lambda x: x.double() + 1, Site("resid_mid", 1): lambda x: x.float()}):
        assert forward(module, BATCH).dtype == torch.bfloat16


def test_gradients_pass_through_edits() -> None:
    module = build("llama")
    push = torch.zeros(WIDTH, requires_grad=True)
    with hooks(module, {Site("resid_post", 0): lambda x: x + push, Site("attn_z", 1, 0): lambda x: x + push[:8]}):
        forward(module, BATCH, grad=True).square().sum().backward()
    assert push.grad is not None and push.grad.abs().min() > 0
