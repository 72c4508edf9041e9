"""Readers and writers: every matrix is the one the model computes with, and writing it back is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ALL, WIDTH, build, sample_ids

from repforget.errors import SiteError, UsageError
from repforget.models.capture import Batch, capture, forward
from repforget.models.sites import site_map
from repforget.models.weights import (
    find,
    get_bias,
    get_weight,
    head_slice,
    is_tied,
    neuron_slice,
    readers,
    set_bias,
    set_weight,
    untie,
    writers,
)
from repforget.records import Site

BATCH = Batch.pad(sample_ids())
REAL = BATCH.mask.bool()


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_matrix_is_a_reader_or_writer_exactly_once(name: str) -> None:
    """Rows of all refs cover each matrix of the model once: nothing is forgotten, nothing counted twice."""
    module = build(name)
    covered: dict[str, int] = {}
    for ref in (*writers(module), *readers(module)):
        if not (ref.role == "unembed" and ref.tied):
            covered[ref.name] = covered.get(ref.name, 0) + get_weight(module, ref).numel()
    matrices = {n: p.numel() for n, p in module.named_parameters() if p.ndim >= 2}
    assert covered == matrices


@pytest.mark.parametrize("name", ALL)
def test_writers_reproduce_what_is_written(name: str) -> None:
    """post-norm(W z + b) is attn_out, and likewise for the MLP: orientation, bias and post-norm are right."""
    module = build(name)
    for ref in writers(module):
        if ref.layer < 0 or ref.batched:
            continue
        reads = "attn_z" if ref.role == "attn_out" else "mlp_post"
        found = capture(module, [Site(reads, ref.layer), Site(ref.role, ref.layer)], BATCH, "tokens")
        bias = get_bias(module, ref)
        written = found[Site(reads, ref.layer)] @ get_weight(module, ref).T + (0 if bias is None else bias)
        if ref.post_norm:
            written = module.get_submodule(ref.post_norm)(written)
        torch.testing.assert_close(written, found[Site(ref.role, ref.layer)], atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_embedding_writers_add_up_to_the_first_state(name: str) -> None:
    module = build(name)
    found = capture(module, [Site("embed"), Site("resid_pre", 0)], BATCH, "all")
    tables = {ref.role: get_weight(module, ref) for ref in writers(module) if ref.layer < 0}
    scale = WIDTH**0.5 if name.startswith("gemma") else 1.0
    tokens = tables["embed"][BATCH.ids] * scale
    torch.testing.assert_close(tokens, found[Site("embed")])
    offset = 2 if name == "opt" else 0
    positions = tables["position"][BATCH.position_ids + offset] if "position" in tables else 0.0
    torch.testing.assert_close((tokens + positions)[REAL], found[Site("resid_pre", 0)][REAL])
    assert ("position" in tables) == (name in ("gpt2", "opt"))


@pytest.mark.parametrize("name", ALL)
def test_a_norm_before_a_reader_is_the_one_the_model_uses(name: str) -> None:
    module = build(name)
    places = site_map(module)
    state = {"q": "resid_pre", "k": "resid_pre", "v": "resid_pre"}
    for ref in readers(module):
        if ref.role == "unembed":
            continue
        source = state.get(ref.role, "resid_pre" if places.parallel else "resid_mid")
        reads = "attn_in" if ref.role in state else "mlp_in"
        found = capture(module, [Site(source, ref.layer), Site(reads, ref.layer)], BATCH, "last")
        value = found[Site(source, ref.layer)]
        expected = module.get_submodule(ref.norm)(value) if ref.norm else value
        torch.testing.assert_close(expected, found[Site(reads, ref.layer)])
    assert (name == "olmo2") == any(ref.norm is None for ref in readers(module))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "falcon_new", "phi3", "mixtral", "llama"])
def test_writing_back_touches_only_that_part(name: str) -> None:
    module = build(name)
    before = {n: p.clone() for n, p in module.named_parameters()}
    for ref in (*writers(module), *readers(module)):
        set_weight(module, ref, get_weight(module, ref))
    assert all(torch.equal(before[n], p) for n, p in module.named_parameters())
    ref = find(module, "v", 1)
    others = {other: get_weight(module, other) for other in readers(module) if other != ref}
    set_weight(module, ref, get_weight(module, ref) * 2)
    assert all(torch.equal(kept, get_weight(module, other)) for other, kept in others.items())
    changed = capture(module, [Site("v", 1)], BATCH)[Site("v", 1)]
    bias = get_bias(module, ref)
    original = build(name)
    v = capture(original, [Site("v", 1)], BATCH)[Site("v", 1)]
    torch.testing.assert_close(changed, 2 * v - (0 if bias is None else bias), atol=1e-5, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(name=st.sampled_from(ALL), role=st.sampled_from(["q", "k", "v", "attn_out"]), data=st.data())
def test_heads_tile_their_matrix(name: str, role: Any, data: st.DataObject) -> None:
    module = build(name)
    ref = find(module, role, 0)
    count = site_map(module).heads_of("attn_z" if role == "attn_out" else role)
    axis = 1 if role == "attn_out" else 0
    parts = [get_weight(module, head_slice(module, ref, h)) for h in range(count)]
    assert torch.equal(torch.cat(parts, axis), get_weight(module, ref))
    head = data.draw(st.integers(0, count - 1))
    set_weight(module, head_slice(module, ref, head), torch.zeros_like(parts[head]))
    for h in range(count):
        now = get_weight(module, head_slice(module, ref, h))
        assert torch.equal(now, torch.zeros_like(now) if h == head else parts[h])


@pytest.mark.parametrize("name", [n for n in ALL if n != "mixtral"])
def test_a_neuron_is_its_rows_and_its_column(name: str) -> None:
    """Zeroing the value vector of neuron 5 removes exactly that neuron's write."""
    module = build(name)
    down = find(module, "mlp_out", 0)
    matrix = get_weight(module, down)
    part = neuron_slice(module, down, 5)
    assert torch.equal(get_weight(module, part), matrix[:, 5:6])
    for role in ("mlp_up", "mlp_gate"):
        if role in site_map(module).kinds:
            ref = find(module, role, 0)  # type: ignore[arg-type]
            assert torch.equal(get_weight(module, neuron_slice(module, ref, 5)), get_weight(module, ref)[5:6])
    set_weight(module, part, torch.zeros(WIDTH, 1))
    expected = matrix.clone()
    expected[:, 5] = 0
    assert torch.equal(get_weight(module, down), expected)


@pytest.mark.parametrize("name", ALL)
def test_untying_changes_nothing_and_survives_saving(name: str, tmp_path: Any) -> None:
    from transformers import AutoModelForCausalLM

    module = build(name)
    before = forward(module, BATCH)
    was_tied = is_tied(module)
    assert was_tied == any(ref.tied for ref in writers(module))
    assert untie(module) is was_tied
    assert not is_tied(module) and not any(ref.tied for ref in (*writers(module), *readers(module)))
    assert torch.equal(before, forward(module, BATCH))
    if not was_tied:
        return
    set_weight(module, find(module, "embed"), get_weight(module, find(module, "embed")) * 1.5)
    edited = forward(module, BATCH)
    assert not torch.allclose(before[REAL], edited[REAL], atol=1e-3)
    module.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not is_tied(again)
    assert torch.equal(edited[REAL], forward(again.eval(), BATCH)[REAL])


def test_reading_is_a_float32_copy() -> None:
    module = build("llama").to(torch.bfloat16)
    ref = find(module, "mlp_out", 0)
    copy = get_weight(module, ref)
    assert copy.dtype == torch.float32
    copy.zero_()
    assert get_weight(module, ref).abs().sum() > 0
    set_weight(module, ref, get_weight(module, ref) + 1.0)
    assert module.get_parameter(ref.name).dtype == torch.bfloat16
    assert get_weight(build("llama").double(), ref).dtype == torch.float64


def test_biases() -> None:
    module = build("gpt_neox")
    ref = find(module, "k", 1)
    bias = get_bias(module, ref)
    assert bias is not None and bias.shape == (WIDTH,)
    set_bias(module, ref, bias + 1)
    assert torch.equal(get_bias(module, ref), bias + 1)  # type: ignore[arg-type]
    assert torch.equal(get_bias(module, find(module, "q", 1)), get_bias(build("gpt_neox"), find(module, "q", 1)))  # type: ignore[arg-type]
    with pytest.raises(SiteError, match="no bias"):
        set_bias(build("llama"), find(build("llama"), "mlp_out", 0), torch.zeros(WIDTH))


def test_refusals_name_the_remedy() -> None:
    module = build("llama")
    ref = find(module, "mlp_out", 0)
    with pytest.raises(UsageError, match="shape"):
        set_weight(module, ref, torch.zeros(3, 3))
    with pytest.raises(SiteError, match="numbered 0 to 3"):
        head_slice(module, find(module, "q", 0), 4)
    with pytest.raises(SiteError, match="no heads"):
        head_slice(module, ref, 0)
    with pytest.raises(SiteError, match="from 0 to 47"):
        neuron_slice(module, ref, 48)
    with pytest.raises(SiteError, match="no neurons"):
        neuron_slice(build("mixtral"), find(build("mixtral"), "mlp_out", 0), 0)
    with pytest.raises(SiteError, match="no weight with role 'position'"):
        find(module, "position")
    with pytest.raises(SiteError, match="no parameter"):
        get_weight(build("gpt2"), ref)


def test_adapters_and_packed_weights_are_refused() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    module = inject_adapter_in_model(LoraConfig(r=2, target_modules=["down_proj"]), build("llama"))
    with pytest.raises(SiteError, match="merge the adapter"):
        writers(module)
    assert site_map(module).mlp_width == 48  # sites are unaffected
    packed: Any = build("llama")
    packed.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(
        torch.zeros(32, 48, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(SiteError, match="dequantise"):
        writers(packed)
