"""Gates and positions: what they depend on (earlier tokens), and what they must not (padding, cache, batch)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny_models
import torch
from artifact_tools import build, draw, hook_count, logits
from torch import Tensor

from repforget.artifact import AddVector, Affine, Gate, Operation
from repforget.errors import ArtifactError, SiteError
from repforget.models.capture import Batch, capture, forward
from repforget.models.load import LoadedModel
from repforget.records import Site

HERE, LATER = Site("resid_post", 0), Site("resid_post", 1)


def marker(model: LoadedModel, token: int) -> tuple[Tensor, float]:
    """A direction and threshold that single out one token at the embedding."""
    table = model.module.get_input_embeddings().weight.detach()
    direction = torch.linalg.lstsq(table, torch.eye(len(table))[:, token]).solution
    scores = table @ direction
    assert scores.argmax() == token
    return direction, float(scores.topk(2).values.mean())


def gated(model: LoadedModel, token: int = 7, **choices: Any) -> Operation:
    direction, threshold = marker(model, token)
    gate = Gate(direction, threshold, site=Site("embed"), **choices)
    return AddVector(HERE, draw(32, seed=3), gate=gate)


def changed(model: LoadedModel, operation: Operation, ids: list[int]) -> list[bool]:
    """Which positions of one text the operation changes at its own site."""
    batch = Batch.pad([ids])
    base = capture(model, [HERE], batch, "all")[HERE][0]
    with build(model, operation).attach(model):
        edited = capture(model, [HERE], batch, "all")[HERE][0]
    return (base != edited).any(-1).tolist()


def test_token_gate_opens_at_its_token_only(tiny_llama: Any) -> None:
    assert changed(tiny_llama, gated(tiny_llama), [4, 5, 7, 6, 7, 8]) == [False, False, True, False, True, False]
    assert changed(tiny_llama, gated(tiny_llama, above=False), [4, 5, 7, 6]) == [False, True, False, True]


def test_prefix_gate_stays_open(tiny_llama: Any) -> None:
    expected = [False, False, True, True, True]
    assert changed(tiny_llama, gated(tiny_llama, scope="prefix"), [4, 5, 7, 6, 8]) == expected


def test_first_token_opens_only_if_asked(tiny_llama: Any) -> None:
    assert changed(tiny_llama, gated(tiny_llama), [7, 5]) == [False, False]
    assert changed(tiny_llama, gated(tiny_llama, first=True), [7, 5]) == [True, False]


def test_gated_affine_is_the_affine_where_open_and_nothing_elsewhere(tiny_llama: Any) -> None:
    direction, threshold = marker(tiny_llama, 7)
    basis = torch.linalg.qr(draw(32, 2)).Q
    plain = Affine(HERE, basis, basis.T)
    held = Affine(HERE, basis, basis.T, gate=Gate(direction, threshold, site=Site("embed")))
    batch = Batch.pad([[4, 5, 7, 6]])
    values = []
    for operation in (plain, held):
        with build(tiny_llama, operation).attach(tiny_llama):
            values.append(capture(tiny_llama, [HERE], batch, "all")[HERE][0])
    assert torch.equal(values[0][2], values[1][2])
    assert torch.equal(values[1][[0, 1, 3]], capture(tiny_llama, [HERE], batch, "all")[HERE][0][[0, 1, 3]])
    assert build(tiny_llama, held).artifact == "weights+hook"


OPERATIONS = {
    "affine": lambda m: Affine(HERE, torch.linalg.qr(draw(32, 2)).Q, torch.linalg.qr(draw(32, 2)).Q.T, draw(32)),
    "vector": lambda m: AddVector(HERE, draw(32)),
    "last": lambda m: AddVector(HERE, draw(32), positions="last"),
    "prompt": lambda m: AddVector(HERE, draw(32), positions="prompt"),
    "generated": lambda m: AddVector(HERE, 3 * draw(32), positions="generated"),
    "token gate": lambda m: gated(m, 9),
    "prefix gate": lambda m: gated(m, 9, scope="prefix"),
    "cosine gate": lambda m: AddVector(LATER, draw(32), gate=Gate(draw(32, seed=8), -0.11, cosine=True, site=HERE)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt"])
def test_padding_and_batch_do_not_matter(architecture: str, name: str, tokenizer: Any) -> None:
    from repforget.models.load import wrap

    model = wrap(tiny_models.build(architecture), tokenizer)
    rows = [[4, 9, 6, 7, 11], [5, 9], [8, 4, 9]]
    with build(model, OPERATIONS[name](model)).attach(model):
        alone = [forward(model, Batch.pad([row]))[0] for row in rows]
        for side in ("left", "right"):
            batch = Batch.pad(rows, side=side)
            together = forward(model, batch)
            for row, single in zip(range(3), alone, strict=True):
                torch.testing.assert_close(together[row][batch.mask[row].bool()], single, atol=1e-5, rtol=1e-4)
    base = forward(model, Batch.pad([rows[0]]))[0]
    assert (name == "generated") == torch.allclose(alone[0], base, atol=1e-4)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_cache_does_not_matter(architecture: str, name: str, tokenizer: Any) -> None:
    from repforget.models.load import wrap

    model = wrap(tiny_models.build(architecture), tokenizer)
    batch = Batch.pad([[4, 9, 6, 7], [9, 5]], side="left")
    base = generate(model, batch, use_cache=True)
    with build(model, OPERATIONS[name](model)).attach(model):
        cached, fresh = generate(model, batch, use_cache=True), generate(model, batch, use_cache=False)
    torch.testing.assert_close(cached, fresh, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(cached, base, atol=1e-3)
    assert torch.equal(generate(model, batch, use_cache=True), base)


def generate(model: LoadedModel, batch: Batch, *, use_cache: bool) -> Tensor:
    """Logits of six greedy steps [steps, rows, V]."""
    out = model.module.generate(
        input_ids=batch.ids, attention_mask=batch.mask, max_new_tokens=6, min_new_tokens=6, do_sample=False,
        use_cache=use_cache, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


def test_positions_inside_generate(tiny_llama: Any) -> None:
    """``generated`` leaves the first step alone; ``prompt`` and ``last`` change it."""
    batch = Batch.pad([[4, 9, 6, 7]])
    base = generate(tiny_llama, batch, use_cache=True)
    for positions, first_step_same in (("generated", True), ("prompt", False), ("last", False)):
        operation = AddVector(HERE, 3 * draw(32), positions=positions)  # type: ignore[arg-type]
        with build(tiny_llama, operation).attach(tiny_llama):
            steps = generate(tiny_llama, batch, use_cache=True)
        assert torch.equal(steps[0], base[0]) == first_step_same
        assert not torch.equal(steps[1], base[1])


def test_a_cached_prompt_serves_several_continuations(tiny_llama: Any) -> None:
    """The gate's state belongs to the cached columns: what one continuation opened does not leak into the next."""
    module = tiny_llama.module
    prompt, continuations = [4, 5, 6], [[9, 8], [10, 8]]
    with build(tiny_llama, gated(tiny_llama, 9, scope="prefix")).attach(tiny_llama), torch.no_grad():
        whole = [forward(tiny_llama, Batch.pad([prompt + c]))[0, 3:] for c in continuations]
        cache = module(input_ids=torch.tensor([prompt]), use_cache=True).past_key_values
        for continuation, expected in zip(continuations, whole, strict=True):
            out = module(input_ids=torch.tensor([continuation]), past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits[0], expected, atol=1e-5, rtol=1e-4)
            cache.crop(-len(continuation))
        both = copy.deepcopy(cache)
        both.batch_repeat_interleave(2)
        out = module(input_ids=torch.tensor(continuations), past_key_values=both, use_cache=True)
        torch.testing.assert_close(out.logits, torch.stack(whole), atol=1e-5, rtol=1e-4)


def test_generate_is_what_it_was_afterwards(tiny_llama: Any) -> None:
    module = tiny_llama.module
    before = dict(module.__dict__)
    edit = build(tiny_llama, AddVector(HERE, draw(32), positions="prompt"))
    with edit.attach(tiny_llama):
        with edit.scaled(2.0).attach(tiny_llama):
            assert "generate" in module.__dict__
        assert "generate" in module.__dict__
    assert module.__dict__ == before
    assert hook_count(module) == 0


def test_a_copied_module_follows_its_own_generate(tiny_llama: Any) -> None:
    edit = build(tiny_llama, AddVector(HERE, 3 * draw(32), positions="generated"))
    batch = Batch.pad([[4, 9, 6, 7]])
    with edit.attach(tiny_llama):
        expected = generate(tiny_llama, batch, use_cache=False)
    twice = copy.deepcopy(edit.applied_to(tiny_llama).module)
    copied = LoadedModel("copy", twice, None, "")
    assert torch.equal(generate(copied, batch, use_cache=False), expected)
    assert twice.generate.__self__ is twice


def test_refusals(tiny_llama: Any) -> None:
    with pytest.raises(SiteError, match="lies after"):
        build(tiny_llama, AddVector(HERE, draw(32), gate=Gate(draw(32), 0.0, site=LATER)))
    with pytest.raises(ArtifactError, match=r"gate\.direction"):
        build(tiny_llama, AddVector(HERE, draw(32), gate=Gate(draw(31), 0.0)))
    edit = build(tiny_llama, gated(tiny_llama))
    with pytest.raises(ArtifactError, match="2-D mask"), edit.attach(tiny_llama):
        tiny_llama.module(input_ids=torch.tensor([[4, 5]]), attention_mask=torch.ones(1, 1, 2, 2))
    with pytest.raises(ArtifactError, match="no exact inverse|no inverse"):
        edit.inverse()


def test_gradients_flow_through_a_kept_edit(tiny_llama: Any) -> None:
    """Attacks fine-tune an edited copy: its hooks must not cut the graph."""
    basis = torch.linalg.qr(draw(32, 2)).Q
    edited = build(tiny_llama, Affine(HERE, basis, basis.T)).applied_to(tiny_llama).module
    weight = edited.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    edited(input_ids=torch.tensor([[4, 5, 6]])).logits.sum().backward()
    gradient = weight.grad
    assert gradient is not None
    assert float(gradient.norm()) > 0
    torch.testing.assert_close(basis.T @ gradient, torch.zeros(2, 48), atol=1e-4, rtol=0)


def test_logits_helper_sees_the_edit(tiny_llama: Any) -> None:
    base = logits(tiny_llama)
    with build(tiny_llama, AddVector(HERE, draw(32))).attach(tiny_llama):
        assert not torch.allclose(logits(tiny_llama), base)
        torch.testing.assert_close(logits(tiny_llama, "left"), logits(tiny_llama, "right"), atol=1e-5, rtol=1e-4)
