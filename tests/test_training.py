"""The training loop: what it learns, what it leaves alone, and that it depends on its seed alone."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from repforget.errors import NumericalError, UsageError
from repforget.training import (
    ADAPTER,
    NO_LABEL,
    Example,
    batches,
    collate,
    finetune,
    label_loss,
    learning_rate,
    low_rank_adapters,
)


def _model(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def _examples(count: int = 12) -> list[Example]:
    generator = torch.Generator().manual_seed(3)
    out = []
    for i in range(count):
        tokens = torch.randint(1, 31, (4 + i % 4,), generator=generator).tolist()
        out.append(Example(tuple(tokens), (False,) * (len(tokens) - 2) + (True, True)))
    return out


def _state(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_training_learns_the_labelled_tokens_and_only_them() -> None:
    module, examples = _model(), _examples()
    losses = finetune(module, examples, steps=120, lr=1e-2, seed=0, batch_size=6)
    assert len(losses) == 120
    assert sum(losses[-5:]) / 5 < 0.1 < losses[0]
    for example in examples:
        logits = module(torch.tensor([example.tokens])).logits[0]
        assert logits[-3].argmax() == example.tokens[-2]
        assert logits[-2].argmax() == example.tokens[-1]


def test_zero_learning_rate_changes_nothing() -> None:
    module = _model()
    before = _state(module)
    finetune(module, _examples(), steps=3, lr=0.0, seed=0, weight_decay=0.5)
    assert all(torch.equal(before[name], p) for name, p in module.named_parameters())


def test_equal_seeds_give_equal_bits_whatever_the_global_generator_holds() -> None:
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        module = _model()
        state = torch.get_rng_state()
        finetune(module, _examples(), steps=5, lr=1e-2, seed=4, batch_size=5)
        assert torch.equal(state, torch.get_rng_state())
        runs.append(_state(module))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    other = _model()
    finetune(other, _examples(), steps=5, lr=1e-2, seed=5, batch_size=5)
    assert not all(torch.equal(runs[0][name], p) for name, p in other.named_parameters())


def test_filter_trains_one_mlp_and_leaves_every_other_bit() -> None:
    module = _model()
    module.lm_head.weight.requires_grad_(False)
    before, wanted = _state(module), {n: p.requires_grad for n, p in module.named_parameters()}
    finetune(module, _examples(), steps=4, lr=1e-2, seed=0, trainable=lambda name: ".1.mlp." in name)
    changed = {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}
    assert changed == {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert wanted == {n: p.requires_grad for n, p in module.named_parameters()}
    assert all(p.grad is None for p in module.parameters())


def test_filter_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match="matches none of the model's parameters"):
        finetune(_model(), _examples(), steps=1, lr=1e-3, seed=0, trainable=lambda name: "layers.9" in name)


def test_examples_must_label_something_and_agree_in_length() -> None:
    with pytest.raises(UsageError, match="labels no token"):
        Example((1, 2, 3), (True, False, False))
    with pytest.raises(UsageError, match="one mark per token"):
        Example((1, 2, 3), (True, False))


def test_loss_equals_the_mean_over_single_unpadded_texts() -> None:
    """Oracle: each text alone, no padding, summed by hand in float64."""
    module, examples = _model().double(), _examples(5)
    total, count = 0.0, 0
    for example in examples:
        logits = module(torch.tensor([example.tokens])).logits[0, :-1].log_softmax(-1).detach()
        for position, marked in enumerate(example.labelled[1:]):
            if marked:
                total -= float(logits[position, example.tokens[position + 1]])
                count += 1
    assert label_loss(module, collate(examples)).item() == pytest.approx(total / count, rel=1e-5)


def test_gradient_of_a_padded_batch_equals_the_unpadded_gradient() -> None:
    short, long = _examples(4)[0], _examples(4)[3]
    module = _model()
    label_loss(module, collate([short, long])).backward()
    padded = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    parts = [functional.cross_entropy(
        module(torch.tensor([e.tokens])).logits[0, -3:-1], torch.tensor(e.tokens[-2:])) for e in (short, long)
    ]  # fmt: skip
    (sum(parts) / 2).backward()
    for name, parameter in module.named_parameters():
        assert torch.allclose(padded[name], parameter.grad, atol=1e-6), name


@given(st.lists(st.integers(2, 9), min_size=1, max_size=40), st.integers(1, 7), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_one_pass_of_batches_uses_each_example_once(lengths: list[int], size: int, seed: int) -> None:
    examples = [Example((i,) * n, (True,) * n) for i, n in enumerate(lengths)]
    passes = -(-len(examples) // size)
    seen = [e for batch in itertools.islice(batches(examples, size, seed), passes) for e in batch]
    assert sorted(e.tokens for e in seen) == sorted(e.tokens for e in examples)


def test_collate_pads_right_and_never_labels_the_first_token() -> None:
    batch = collate([Example((5, 6), (True, True)), Example((7, 8, 9), (True, False, True))])
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert batch["labels"].tolist() == [[NO_LABEL, 6, NO_LABEL], [NO_LABEL, NO_LABEL, 9]]


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_warm_up_to_the_peak(schedule: Any) -> None:
    rates = [learning_rate(s, 50, 2.0, 10, schedule) for s in range(50)]
    assert rates[:10] == pytest.approx([0.2 * (s + 1) for s in range(10)])
    assert max(rates) == pytest.approx(2.0)
    assert rates[-1] == 2.0 if schedule == "constant" else rates[-1] < 0.1
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(rates[10:]))


def test_callback_sees_every_step_and_may_stop_the_run() -> None:
    module, seen = _model(), []

    class Enough(Exception):
        pass

    def stop(step: Any) -> None:
        seen.append((step.index, step.total))
        if step.index == 2:
            raise Enough

    with pytest.raises(Enough):
        finetune(module, _examples(), steps=9, lr=1e-3, seed=0, on_step=stop)
    assert seen == [(1, 9), (2, 9)]
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_extra_loss_is_added() -> None:
    plain, held = _model(), _model()
    start = copy.deepcopy(plain.lm_head.weight.detach())
    finetune(plain, _examples(), steps=10, lr=1e-2, seed=0)
    finetune(
        held,
        _examples(),
        steps=10,
        lr=1e-2,
        seed=0,
        extra_loss=lambda m: 1e3 * (m.lm_head.weight - start).square().sum(),
    )
    moved, kept = ((m.lm_head.weight - start).norm() for m in (plain, held))
    assert kept < 0.7 * moved


def test_half_precision_weights_add_up_steps_that_their_own_grid_would_swallow() -> None:
    """At lr 1e-4 a step is far below half a bfloat16 spacing of 1.0; sixty of them are not."""
    module = _model().to(torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.constant_(parameter, 1.0)
    one = copy.deepcopy(module)
    finetune(one, _examples(), steps=1, lr=1e-4, seed=0, schedule="constant")
    many = copy.deepcopy(module)
    finetune(many, _examples(), steps=60, lr=1e-4, seed=0, schedule="constant")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), module.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(many.parameters(), module.parameters(), strict=True))
    assert {p.dtype for p in many.parameters()} == {torch.bfloat16}


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    module = _model()
    with torch.no_grad():
        module.lm_head.weight[3] = float("nan")
    with pytest.raises(NumericalError, match="at step 1: lower the learning rate"):
        finetune(module, _examples(), steps=2, lr=1e-3, seed=0)


def test_batches_that_end_early_are_an_error() -> None:
    with pytest.raises(UsageError, match="ended after 2 of 5 steps"):
        finetune(_model(), iter([_examples(), _examples()]), steps=5, lr=1e-3, seed=0)


def test_training_works_inside_no_grad() -> None:
    module = _model()
    with torch.no_grad():
        losses = finetune(module, _examples(), steps=30, lr=1e-2, seed=0)
    assert losses[-1] < 0.8 * losses[0]


TORCH = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.98), weight_decay=0.0),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.9, 0.98)),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1e-2),
}


@pytest.mark.parametrize("name", list(TORCH))
def test_an_optimiser_takes_the_steps_of_the_one_it_names(name: Any) -> None:
    ours, theirs, examples = _model(), _model(), _examples(5)
    finetune(ours, itertools.repeat(examples), steps=3, lr=1e-2, seed=0, schedule="constant", clip=1e9, optimizer=name)
    optimizer = TORCH[name](theirs.parameters())
    for _ in range(3):
        optimizer.zero_grad()
        label_loss(theirs, collate(examples)).backward()
        optimizer.step()
    assert all(torch.allclose(p, q, atol=1e-7) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert not torch.equal(ours.lm_head.weight, _model().lm_head.weight)


def _adapted(name: str) -> bool:
    return ADAPTER in name and not name.endswith(".original")


def test_adapters_start_from_nothing_and_stay_low_rank_when_merged() -> None:
    module = _model()
    before = _state(module)
    chosen = [name for name in before if "mlp" in name]
    ids = torch.tensor([[3, 4, 5]])
    plain = module(ids).logits
    with low_rank_adapters(module, chosen, rank=2, alpha=4.0, seed=0):
        assert torch.equal(module(ids).logits, plain)
        losses = finetune(module, _examples(), steps=60, lr=5e-2, seed=0, batch_size=12, trainable=_adapted)
        trained = module(ids).logits
    assert losses[-1] < losses[0] - 0.1
    assert torch.allclose(module(ids).logits, trained, atol=1e-5)
    assert [name for name, _ in module.named_parameters()] == list(before)
    for name, parameter in module.named_parameters():
        change = (parameter - before[name]).detach()
        assert bool(change.any()) == (name in chosen)
        if name in chosen:
            assert int(torch.linalg.matrix_rank(change.double(), atol=1e-5)) == 2


def test_adapters_train_as_those_of_peft_do() -> None:
    """Second opinion: the same first matrices, the same steps, the same weights after merging."""
    from peft import LoraConfig, get_peft_model

    ours, base = _model(), _model()
    wanted = [name for name, _ in ours.named_parameters() if name.endswith("_proj.weight")]
    config = LoraConfig(r=3, lora_alpha=6, lora_dropout=0.0, target_modules=[n.split(".")[-2] for n in wanted])
    wrapped: Any = get_peft_model(base, config)
    with low_rank_adapters(ours, wanted, rank=3, alpha=6.0, seed=1):
        for name in wanted:
            path = name.removesuffix(".weight")
            added: Any = ours.get_submodule(f"{path}.parametrizations.weight.0")
            theirs: Any = base.get_submodule(path)
            with torch.no_grad():
                theirs.lora_A["default"].weight.copy_(added.right)
                assert torch.equal(theirs.lora_B["default"].weight, added.left)
        for module, own in ((ours, _adapted), (wrapped, lambda name: "lora_" in name)):
            finetune(module, _examples(), steps=5, lr=1e-2, seed=0, trainable=own)
    merged = _state(wrapped.merge_and_unload())
    assert all(torch.allclose(p, merged[name], atol=1e-6) for name, p in ours.named_parameters())


def test_adapters_zero_the_side_of_the_outputs_in_transposed_and_stacked_weights() -> None:
    from transformers.pytorch_utils import Conv1D

    class Parts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.turned = Conv1D(5, 7)  # 7 inputs, 5 outputs, weight [7, 5]
            self.stack = torch.nn.Parameter(torch.ones(2, 4, 3))

    module = Parts()
    with low_rank_adapters(module, ["turned.weight", "stack"], rank=2, alpha=2.0, seed=0):
        found = {name: tuple(p.shape) for name, p in module.named_parameters() if _adapted(name)}
        turned: Any = module.turned.get_submodule("parametrizations.weight.0")
        stack: Any = module.get_submodule("parametrizations.stack.0")
        assert not turned.right.any() and bool(turned.left.any())
        assert not stack.left.any() and bool(stack.right.any())
    assert sorted(found.values()) == [(2, 2, 3), (2, 4, 2), (2, 5), (7, 2)]
