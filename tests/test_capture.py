"""Reading and writing activations: exact, selective, padded either way, and nothing left behind."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import ALL, VOCAB, WIDTH, build, sample_ids
from torch import Tensor, nn

from repforget.errors import NumericalError, SiteError, UsageError
from repforget.models.capture import Batch, capture, hooks, select, stream
from repforget.models.sites import site_map
from repforget.records import Site

SEQUENCES = sample_ids()
BATCH = Batch.pad(SEQUENCES)
POST = [Site("resid_post", 0), Site("resid_post", 1)]


def hook_count(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in module.modules())


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_both_padding_sides_equal_single_runs(name: str) -> None:
    module = build(name)
    sites = [s for s in site_map(module).sites if s.kind != "logits"]
    alone = [capture(module, sites, Batch.pad([s]), "last") for s in SEQUENCES]
    for side in ("right", "left"):
        together = capture(module, sites, Batch.pad(SEQUENCES, side=side), "last")
        mean = capture(module, sites, Batch.pad(SEQUENCES, side=side), "mean")
        for row, single in enumerate(alone):
            for site in sites:
                torch.testing.assert_close(together[site][row], single[site][0], atol=2e-5, rtol=1e-4)
        for site in sites[-3:]:
            everything = capture(module, [site], Batch.pad([SEQUENCES[0]]), "all")[site][0]
            torch.testing.assert_close(mean[site][0], everything[1:].mean(0), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_states_equal_the_models_own_hidden_states(name: str) -> None:
    """An independent witness: output_hidden_states of transformers (its last entry is after the final
    norm)."""
    module = build(name)
    with torch.no_grad():
        states = module(input_ids=BATCH.ids, attention_mask=BATCH.mask, output_hidden_states=True).hidden_states
    found = capture(module, [Site("resid_pre", 0), *POST, Site("final_norm")], BATCH, "all")
    real = BATCH.mask.bool()
    for site, k in ((Site("resid_pre", 0), 0), (Site("resid_post", 0), 1), (Site("final_norm"), 2)):
        torch.testing.assert_close(found[site][real], states[k][real])
    assert not torch.allclose(found[POST[1]][real], states[2][real], atol=1e-2)


def test_early_exit_reads_the_same_bits_and_runs_nothing_deeper(architecture: str) -> None:
    module = build(architecture)
    ran: list[str] = []
    root = site_map(module).anatomy.layers[1].path
    module.get_submodule(root).register_forward_hook(lambda *_: ran.append("layer 1"))
    module.get_output_embeddings().register_forward_hook(lambda *_: ran.append("vocabulary"))
    shallow = capture(module, [Site("resid_post", 0)], BATCH, "all")
    assert ran == []
    full = capture(module, [Site("resid_post", 0), Site("final_norm")], BATCH, "all")
    assert ran == ["layer 1"]
    assert torch.equal(shallow[Site("resid_post", 0)], full[Site("resid_post", 0)])
    capture(module, [Site("logits")], BATCH, "all")
    assert ran == ["layer 1", "layer 1", "vocabulary"]


@pytest.mark.parametrize("gather", ["last", "mean", "tokens", torch.tensor([1, 0, 2]), torch.tensor([[1, 2]] * 3)])
def test_a_gather_does_not_keep_the_whole_activation(architecture: str, gather: Any) -> None:
    module = build(architecture)
    for site, value in capture(module, list(site_map(module).sites), BATCH, gather).items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), site
        assert not value.requires_grad and not value.is_inference()


def test_gathers_select_what_they_say() -> None:
    x = torch.arange(3 * 7 * 2.0).view(3, 7, 2)
    for side in ("right", "left"):
        batch = Batch.pad(SEQUENCES, side=side)
        lengths = [len(s) for s in SEQUENCES]
        first = [0 if side == "right" else 7 - n for n in lengths]
        assert torch.equal(select(x, batch, "all"), x)
        last = [x[r, f + n - 1] for r, (f, n) in enumerate(zip(first, lengths, strict=True))]
        assert torch.equal(select(x, batch, "last"), torch.stack(last))
        tokens = [x[r, f + 1 : f + n] for r, (f, n) in enumerate(zip(first, lengths, strict=True))]
        assert torch.equal(select(x, batch, "tokens"), torch.cat(tokens))
        assert torch.equal(select(x, batch, "mean"), torch.stack([t.mean(0) for t in tokens]))
        where = torch.tensor([[f, f + 1] for f in first])
        assert torch.equal(select(x, batch, where), torch.stack([x[r, w] for r, w in enumerate(where)]))
        assert torch.equal(select(x, batch, where[:, 1]), torch.stack([x[r, w[1]] for r, w in enumerate(where)]))
    assert torch.equal(select(x.view(21, 2), BATCH, "last"), select(x, BATCH, "last"))


def test_the_mean_ignores_padding_even_where_it_is_not_finite() -> None:
    x = torch.ones(3, 7, 2)
    x[BATCH.mask == 0] = float("nan")
    assert torch.equal(select(x, BATCH, "mean"), torch.ones(3, 2))
    one = Batch.pad([[5], [6, 7]])
    assert torch.equal(select(torch.ones(2, 2, 2), one, "mean"), torch.ones(2, 2))  # a single token counts


def test_bad_batches_positions_and_ids_are_refused() -> None:
    module = build("llama")
    with pytest.raises(UsageError, match="real tokens"):
        capture(module, POST, BATCH, torch.tensor([0, 6, 0]))  # row 1 has five tokens
    with pytest.raises(UsageError, match="real tokens"):
        capture(module, POST, BATCH, torch.tensor([0, -1, 0]))
    with pytest.raises(UsageError, match=r"shape \[b\]"):
        capture(module, POST, BATCH, torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="choose last, mean"):
        capture(module, POST, BATCH, "first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="another model's tokenizer"):
        capture(module, POST, Batch.pad([[VOCAB]]))
    with pytest.raises(UsageError, match="at least one token"):
        Batch(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2))
    with pytest.raises(UsageError, match="same shape"):
        Batch(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 3))
    with pytest.raises(UsageError, match="Padding side"):
        Batch.pad([[1]], side="middle")
    with pytest.raises(UsageError, match="at least one site"):
        capture(module, [], BATCH)
    assert hook_count(module) == 0


def test_broken_activations_name_their_site() -> None:
    module = build("llama")
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match=r"mlp_out\.1"):
        capture(module, [Site("resid_post", 1), Site("mlp_out", 1), Site("resid_post", 0)], BATCH)
    capture(module, [Site("resid_post", 0)], BATCH)  # everything before it is still readable
    assert hook_count(module) == 0


def test_a_layer_that_is_skipped_is_an_error() -> None:
    module = build("llama")
    module.model.layers[1].mlp.forward = lambda x: x  # its projections never run
    with pytest.raises(SiteError, match=r"mlp_gate\.1.*not reached"):
        capture(module, [Site("mlp_gate", 1)], BATCH)


def test_duplicate_sites_and_order() -> None:
    found = capture(build("llama"), [POST[1], POST[0], POST[1]], BATCH)
    assert list(found) == [POST[1], POST[0]]


def test_gradients_flow_to_the_parameters(architecture: str) -> None:
    """The gradient through a capture equals the gradient through the model's own hidden states."""
    module = build(architecture)
    site = Site("resid_post", 0)
    capture(module, [site], BATCH, "last", grad=True)[site].square().sum().backward()
    weight = module.get_input_embeddings().weight
    ours, weight.grad = weight.grad.clone(), None
    state = module(input_ids=BATCH.ids, attention_mask=BATCH.mask, output_hidden_states=True).hidden_states[1]
    state[torch.arange(3), BATCH.last].square().sum().backward()
    torch.testing.assert_close(ours, weight.grad, rtol=1e-4, atol=1e-5)
    assert ours.abs().sum() > 0


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("site", [Site("resid_post", 1), Site("mlp_post", 1), Site("attn_out", 0)])
def test_gradient_checkpointing_keeps_gradients_exact(reentrant: bool, site: Site) -> None:
    gradients = []
    for checkpointing in (False, True):
        module = build("llama")
        if checkpointing:
            with warnings.catch_warnings():  # renamed in later versions of transformers
                warnings.simplefilter("ignore", FutureWarning)
                module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        module.enable_input_require_grads()
        module.train()
        capture(module, [site], BATCH, "tokens", grad=True)[site].square().mean().backward()
        gradients.append(module.model.layers[0].mlp.up_proj.weight.grad if site.layer else
                         module.model.layers[0].self_attn.v_proj.weight.grad)  # fmt: skip
        assert all(block.gradient_checkpointing is checkpointing for block in module.model.layers)
    torch.testing.assert_close(gradients[0], gradients[1])
    assert gradients[0].abs().sum() > 0


def test_capture_inside_inference_mode_gives_ordinary_tensors() -> None:
    module = build("llama")
    with torch.inference_mode():
        value = capture(module, POST, BATCH)[POST[0]]
    assert not value.is_inference()
    layer = nn.Linear(WIDTH, 1)
    layer(value).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("how", ["wrapper", "in place", "per block"])
def test_compiled_models_are_read_and_written(how: str) -> None:
    module: Any = build("llama")
    expected = capture(module, POST, BATCH)
    compiled = torch.compile(module, backend="eager") if how == "wrapper" else module
    if how == "in place":
        module.compile(backend="eager")
    if how == "per block":
        for block in module.model.layers:
            block.compile(backend="eager")
    plain = compiled(input_ids=BATCH.ids, attention_mask=BATCH.mask).logits.detach()
    assert torch.equal(capture(compiled, POST, BATCH)[POST[1]], expected[POST[1]])
    with hooks(compiled, {POST[0]: torch.zeros_like}):
        edited = compiled(input_ids=BATCH.ids, attention_mask=BATCH.mask).logits.detach()
    assert not torch.allclose(edited, plain, atol=1e-3)
    assert torch.equal(compiled(input_ids=BATCH.ids, attention_mask=BATCH.mask).logits.detach(), plain)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # peft's own use of it
def test_adapters_are_read_through() -> None:
    from peft import LoraConfig, get_peft_model

    plain = capture(build("llama"), [Site("mlp_out", 1), Site("attn_z", 0, 1)], BATCH)
    wrapped: Any = get_peft_model(build("llama"), LoraConfig(r=2, target_modules=["down_proj", "o_proj"]))
    found = capture(wrapped, list(plain), BATCH)
    assert all(torch.equal(plain[s], found[s]) for s in plain)  # a fresh adapter adds nothing
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n:
                p.fill_(0.1)
    assert not torch.allclose(capture(wrapped, list(plain), BATCH)[Site("mlp_out", 1)], plain[Site("mlp_out", 1)])


def test_a_hundred_captures_leave_nothing_behind() -> None:
    module = build("llama")
    sites = [Site("resid_post", 0), Site("attn_z", 1, 2), Site("mlp_post", 1)]

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    capture(module, sites, BATCH)
    before = alive()
    for k in range(100):
        gather = ("last", "mean", "all", "tokens")[k % 4]
        capture(module, sites, BATCH, gather)  # type: ignore[arg-type]
        if k % 10 == 0:
            with pytest.raises(UsageError):
                capture(module, sites, BATCH, "nowhere")  # type: ignore[arg-type]
    assert hook_count(module) == 0
    assert alive() <= before  # cycles of earlier tests may still go


# --- streaming ---------------------------------------------------------------------------------------------


def test_streaming_keeps_nothing_and_equals_single_captures() -> None:
    module = build("gpt2")
    total = torch.zeros(WIDTH, dtype=torch.float64)
    batches = [Batch.pad(sample_ids(seed=k), side=("left", "right")[k % 2]) for k in range(12)]
    kept: list[weakref.ref[Tensor]] = []

    def consume(values: dict[Site, Tensor], index: int) -> None:
        nonlocal total
        total = total + values[POST[0]].double().sum(0)
        assert index == len(kept) and all(ref() is None for ref in kept)  # earlier batches are gone
        kept.append(weakref.ref(values[POST[0]]))
        assert hook_count(module) == 1

    stream(module, [POST[0]], iter(batches), "tokens", consume)
    assert hook_count(module) == 0
    expected = sum(capture(module, [POST[0]], b, "tokens")[POST[0]].double().sum(0) for b in batches)
    torch.testing.assert_close(total, expected)
    assert len(kept) == 12


def test_streaming_takes_positions_per_batch_and_cleans_up_after_an_error() -> None:
    module = build("llama")
    seen: list[Tensor] = []
    batches = [BATCH, Batch.pad(sample_ids(rows=2))]
    wheres = [torch.tensor([0, 1, 2]), torch.tensor([3, 4])]
    stream(module, POST, batches, lambda k: wheres[k], lambda values, _: seen.append(values[POST[0]]))
    assert torch.equal(seen[1], capture(module, POST, batches[1], wheres[1])[POST[0]])

    def fails(_values: dict[Site, Tensor], _index: int) -> None:
        raise KeyError("consumer")

    with pytest.raises(KeyError, match="consumer"):
        stream(module, POST, batches, "last", fails)
    assert hook_count(module) == 0


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    import sys

    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
