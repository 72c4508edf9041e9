"""Memory of training: activations computed again, what to say where it does not fit, and what a plan foresees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import edit_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from repforget.edit._dispatch import edit
from repforget.edit.train._cost import Size, Work, advice, memory, operations
from repforget.edit.train._memory import recomputed
from repforget.edit.train._settings import Settings
from repforget.errors import ResourceError
from repforget.models.capture import hooks
from repforget.models.load import LoadedModel, fingerprint
from repforget.records import Site

SETTINGS: dict[str, Any] = {"steps": 2, "batch_size": 8, "lr": 1e-3}
BILLION = Size(parameters=1_235_814_400, trained=1_235_814_400, low_rank=11_272_192, layers=16, width=2048,
               vocab_size=128_256, itemsize=2)  # fmt: skip
STEP = Work(rows=64, longest=120, tokens=60.0, labels=30.0, budget=16384)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt", "mixtral"])
def test_recomputed_layers_give_the_same_gradients_and_keep_less(architecture: str) -> None:
    model = edit_models.model(architecture)
    parameters = [p.requires_grad_() for p in model.module.parameters()]
    ids = torch.arange(40).reshape(4, 10) + 5
    found, kept, before = [], [], vars_of(model)
    for wanted in (False, True):
        size, states = [0], list[torch.Tensor]()

        def pack(x: torch.Tensor, size: list[int] = size) -> torch.Tensor:
            size[0] += x.numel()
            return x

        with recomputed(model, wanted), hooks(model, {Site("resid_post", 0): states.append}):
            assert not model.module.training
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                logits = model.module(input_ids=ids, use_cache=False).logits
                loss = logits.float().log_softmax(-1)[..., 3].sum() + states[0].float().square().sum()
            first = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            second = torch.autograd.grad(states[0].sum(), parameters, allow_unused=True)  # two sides, one graph
            assert len(states) == 1
        found.append([g for g in (*first, *second) if g is not None])
        kept.append(size[0])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-6, atol=1e-6 * float(plain.abs().max()))
    assert kept[1] < kept[0] / 2
    assert vars_of(model) == before


def vars_of(model: LoadedModel) -> list[tuple[bool, Any]]:
    return [(part.training, vars(part).get("forward")) for part in model.module.modules()]


def test_a_layer_that_someone_wrapped_is_wrapped_afterwards() -> None:
    model = edit_models.model()
    layer = model.module.model.layers[0]
    inner, calls = layer.forward, []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return inner(*args, **kwargs)

    layer.forward = wrapped
    with recomputed(model, True):
        model.module(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert layer.forward is wrapped and calls == [1]


@pytest.mark.parametrize("settings", [{}, {"method": "rmu", "layers": [1]}, {"adapter": "lora", "rank": 2},
                                      {"robust": {"sam": {}}, "combine": "gru"}])  # fmt: skip
def test_a_training_that_computes_again_ends_in_the_same_weights(settings: dict[str, Any]) -> None:
    given = {"method": "npo", **settings}
    method = given.pop("method")
    model, data = edit_models.model(), edit_models.people()
    plain = edit(model, data, method, **SETTINGS, **given)
    again = edit(model, data, method, **SETTINGS, **given, checkpointing=True)
    for one, two in zip(plain.operations, again.operations, strict=True):
        for name, value in vars(one).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(two, name), value, rtol=1e-5, atol=1e-7)
    assert fingerprint(model.module) == model.fingerprint and not model.module.training


FAULTS: dict[str, Callable[[], Exception]] = {
    "accelerator": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": lambda: RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory"),
    "python": MemoryError,
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS.values(), ids=list(FAULTS))
def test_out_of_memory_says_what_would_fit(fault: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.edit.train import _memory
    from repforget.edit.train._engine import Engine

    def fails(*_: Any, **__: Any) -> Any:
        raise fault()

    model = edit_models.model()
    monkeypatch.setattr(Engine, "gradients", fails)
    monkeypatch.setattr(_memory, "memory_of", lambda _device: 10**6)
    with pytest.raises(ResourceError, match=r"does not fit into the memory of cpu: it needs about .* GiB") as caught:
        edit(model, edit_models.people(), "npo", **SETTINGS)
    assert str(caught.value).count(".") >= 1 and "\n" not in str(caught.value)
    assert fingerprint(model.module) == model.fingerprint


def test_other_errors_of_a_step_stay_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from repforget.edit.train._engine import Engine

    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(Engine, "gradients", fails)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        edit(edit_models.model(), edit_models.people(), "npo", **SETTINGS)


def test_advice_names_what_the_estimate_allows() -> None:
    settings = Settings(batch_size=32)
    need = memory(BILLION, settings, STEP, adapter=False)
    said = advice(BILLION, settings, STEP, adapter=False, available=need.total - 1, device="cuda:0")
    assert "adapter: lora" in said and "checkpointing" not in said  # the weights' own copies are most of it
    long = replace(STEP, longest=32768, tokens=32768.0, labels=3.0)
    said = advice(BILLION, Settings(adapter="lora"), long, adapter=True, available=40 * 2**30, device="cuda:0")
    assert "checkpointing: true" in said and "texts of at most 16384 tokens" in said and "lora" not in said
    many = replace(STEP, rows=32, tokens=120.0)
    said = advice(BILLION, Settings(adapter="lora"), many, adapter=True, available=6 * 2**30, device="cuda:0")
    assert "accumulate: 2 " in said and "accumulate: 4" not in said
    said = advice(BILLION, Settings(adapter="lora", checkpointing=True, batch_size=1), replace(STEP, rows=1),
                  adapter=True, available=2**30, device="cuda:0")  # fmt: skip
    assert "take a smaller model" in said


def test_what_is_cheaper_by_design_is_cheaper_in_the_estimate() -> None:
    def total(adapter: bool = False, **changes: Any) -> int:
        return memory(BILLION, Settings(**changes), STEP, adapter=adapter).total

    whole = total()
    assert total(adapter=True) < whole / 3
    assert total(checkpointing=True) < whole and total(accumulate=8) < whole
    assert total(precision="stochastic") == whole - 4 * BILLION.trained
    assert total(optimizer="sgd") == whole - 4 * BILLION.trained
    assert total(combine="gru") > whole


@given(st.integers(1, 64), st.integers(2, 4096), st.sampled_from(["linear", "gru"]), st.booleans())
def test_estimates_grow_with_the_work(rows: int, longest: int, combine: str, checkpointing: bool) -> None:
    settings = Settings(combine=combine, checkpointing=checkpointing)
    work = Work(rows, longest, longest / 2, 1.0, 16384)
    more = replace(work, rows=2 * rows)
    assert memory(BILLION, settings, more, adapter=False).total >= memory(BILLION, settings, work, adapter=False).total
    assert operations(BILLION, settings, more, adapter=False) > operations(BILLION, settings, work, adapter=False)
    # At least the forward and both ways back of every step.
    least = settings.steps * 6 * BILLION.parameters * work.rows * work.tokens
    assert operations(BILLION, settings, work, adapter=False) >= least


def test_activations_are_those_that_autograd_keeps() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    def kept(layers: int) -> int:
        module: nn.Module = LlamaForCausalLM(LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=352, num_hidden_layers=layers, num_attention_heads=4,
        ))  # fmt: skip
        own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, dict[int, int]()
        alive: list[torch.Tensor] = []

        def pack(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() not in own:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
                alive.append(x)  # an address must not be given out twice
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            module.eval()(input_ids=torch.ones(4, 32, dtype=torch.long), use_cache=False)
        return sum(seen.values())

    measured = kept(4) - kept(2)
    size = Size(0, 0, 0, 2, 128, 64, 4)
    estimated = memory(size, Settings(), Work(4, 32, 32.0, 0.0, 10**6), adapter=True).activations
    assert 0.5 < estimated / measured < 2.0


def test_a_plan_tells_memory_and_time_of_a_training(tmp_path: Any) -> None:
    from repforget import loop
    from repforget.recipe import Recipe

    recipe = Recipe.model_validate({"model": "organism:bios", "knowledge": "bios-people", "locate": [], "device": "cpu",
                                    "ladder": [{"npo": {"steps": 10}}, {"npo": {"adapter": "lora"}}, "leace"]})
    steps = [step.cost for step in loop.plan(recipe).steps if step.stage == "edit"]
    assert "10 steps of 64 rows" in steps[0] and "GiB (weights" in steps[0] and "TFLOP/s" in steps[0]
    assert "in an adapter on 1.06 M" in steps[1] and "GiB" not in steps[2]
