"""Properties of the vocabulary projection: equal to the plain form, chunked or not, for every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import tiny_models
import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.edit.train import _head
from repforget.edit.train._head import distribution, head_of, label_logprobs, reduced, select_head, summed, topk_teacher
from repforget.errors import NumericalError, SiteError

M, D, V = 9, 5, 23
CAPS = [(1.0, None), (0.7, None), (1.0, 3.0), (1.3, 2.0)]


def problem(kind: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    states, weight, bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((M, D), (V, D), (V,)))
    labels = torch.randint(V, (M,), generator=g)
    return *(x.to(kind).requires_grad_() for x in (states, weight, bias)), labels


def plain(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: float, limit: float | None
          ) -> Tensor:  # fmt: skip
    z = functional.linear(states, weight, bias) * scale
    z = z if limit is None else limit * torch.tanh(z / limit)
    return z.log_softmax(-1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize(("scale", "limit"), CAPS)
@pytest.mark.parametrize(("chunk", "kept"), [(1, 0), (4 * M, 0), (4 * M, 10**6), (7 * M, 10**6), (10**6, 0), (None, 0)])
def test_values_and_gradients_are_those_of_log_softmax(
    scale: float, limit: float | None, chunk: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_head, "KEPT", kept)
    states, weight, bias, labels = problem()
    upstream = torch.linspace(-2, 2, M, dtype=torch.float64)
    want = plain(states, weight, bias, labels, scale, limit)
    wanted = torch.autograd.grad(want, (states, weight, bias), upstream)
    got = label_logprobs(states, weight, bias, labels, chunk=chunk, scale=scale, limit=limit)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, (states, weight, bias), upstream), wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kept", [0, 10**6])
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_gradients_of_heads_add_up_where_they_belong(
    kind: torch.dtype, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_head, "KEPT", kept)
    states, weight, bias, labels = problem(kind)
    head = Fixed(weight, bias, 1.0, None)
    trained = [bias, head.weight]

    def losses() -> list[Tensor]:
        return [label_logprobs(states, head.weight, bias, labels, chunk=4 * M).sum(),
                distribution(states, head, entropy, chunk=2 * V).sum()]  # fmt: skip

    want = torch.autograd.grad(sum(losses()), head.weight)[0]
    totals: list[Tensor | None] = [None, None]
    for loss in losses():
        with summed(trained, totals):
            loss.backward(inputs=trained)
        assert head.weight.grad is None
    (none, total) = totals
    assert none is None and total is not None and total.dtype == (kind if kind == torch.float64 else torch.float32)
    torch.testing.assert_close(total.to(kind), want, rtol=0, atol=1e-11 if kind == torch.float64 else 0.3)
    assert float(want.abs().max()) > 1


@pytest.mark.parametrize(("scale", "limit"), CAPS)
def test_gradients_pass_gradcheck(scale: float, limit: float | None) -> None:
    states, weight, bias, labels = problem()
    head = Fixed(weight, bias, scale, limit)
    assert torch.autograd.gradcheck(
        lambda s, w, b: label_logprobs(s, w, b, labels, chunk=5 * M, scale=scale, limit=limit), (states, weight, bias)
    )
    assert torch.autograd.gradcheck(lambda s: distribution(s, head, entropy, chunk=3 * V), (states,))


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_what_is_trained_gets_a_gradient(trained: tuple[bool, bool]) -> None:
    states, weight, _, labels = problem()
    states.requires_grad_(trained[0])
    weight.requires_grad_(trained[1])
    got = label_logprobs(states, weight, None, labels, chunk=4 * M)
    assert got.requires_grad == any(trained)
    if any(trained):
        got.sum().backward()
    assert (states.grad is not None, weight.grad is not None) == trained


@pytest.mark.parametrize("chunk", [4 * M, None])
def test_a_label_of_weight_zero_moves_nothing(chunk: int | None) -> None:
    states, weight, bias, labels = problem()
    upstream = torch.ones(M, dtype=torch.float64)
    upstream[[2, 5]] = 0
    label_logprobs(states, weight, bias, labels, chunk=chunk).backward(upstream)
    assert states.grad is not None and states.grad[[2, 5]].count_nonzero() == 0
    assert states.grad[[0, 1, 3, 4]].abs().sum(1).gt(0).all()


def test_a_matrix_used_twice_gathers_both_gradients() -> None:
    states, weight, _, labels = problem()

    def loss(logprob: Any) -> Tensor:
        first = weight[labels] * states.detach()  # the tied input embedding
        return logprob(states + first).sum() + 2 * logprob(first).square().sum()

    wanted = torch.autograd.grad(loss(lambda s: plain(s, weight, None, labels, 1.0, None)), (states, weight))
    got = torch.autograd.grad(loss(lambda s: label_logprobs(s, weight, None, labels, chunk=3 * M)), (states, weight))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_kept_graph_can_be_walked_twice() -> None:
    states, weight, bias, labels = problem()
    got = label_logprobs(states, weight, bias, labels, chunk=3 * M)
    first = torch.autograd.grad(got[:4].sum(), (states, weight), retain_graph=True)
    again = torch.autograd.grad(got[:4].sum(), (states, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(("kind", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_half_precision_is_scored_in_float32(kind: torch.dtype, tolerance: float) -> None:
    states, weight, bias, labels = problem(kind)
    exact = [x.detach().double().requires_grad_() for x in (states, weight, bias)]
    got = label_logprobs(states, weight, bias, labels, chunk=6 * M)
    want = plain(exact[0], exact[1], exact[2], labels, 1.0, None)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)
    for a, b in zip(torch.autograd.grad(got.sum(), (states, weight, bias)),
                    torch.autograd.grad(want.sum(), exact), strict=True):  # fmt: skip
        assert a.dtype == kind
        torch.testing.assert_close(a.double(), b, rtol=0, atol=4 * tolerance)


@pytest.mark.parametrize("kept", [0, 10**6])
def test_a_label_that_is_nearly_certain_keeps_its_gradient_in_half_precision(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_head, "KEPT", kept)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(V, 64, generator=generator).bfloat16().requires_grad_()
    labels = torch.arange(M)
    states = (weight[labels].detach().float() * 0.3).bfloat16().requires_grad_()
    exact = states.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    want = plain(*exact, None, labels, 1.0, None)
    assert want.median().exp() > 0.999
    got = label_logprobs(states, weight, None, labels, chunk=6 * M)
    for a, b in zip(torch.autograd.grad(got.sum(), (states, weight)), torch.autograd.grad(want.sum(), exact),
                    strict=True):  # fmt: skip
        assert (a.double() - b).norm() < 0.05 * b.norm()


def test_extreme_logits_stay_finite_and_a_label_outside_shows() -> None:
    states, weight, _, labels = problem(torch.float32)
    with torch.no_grad():
        states.mul_(1e4)
    got = label_logprobs(states, weight, None, labels, chunk=4 * M)
    torch.testing.assert_close(got, plain(states, weight, None, labels, 1.0, None), rtol=1e-5, atol=1e-2)
    (of_states,) = torch.autograd.grad(got.sum(), states)
    assert of_states.isfinite().all()
    assert label_logprobs(states.detach(), weight, None, torch.full((M,), -100), chunk=4 * M).isnan().all()


class Fixed(_head.Head):
    """A head of given tensors, with a cap of its own."""

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float = 1.0, limit: float | None = None) -> None:
        linear = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, dtype=weight.dtype)
        linear.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        linear.config = type("Config", (), {"logit_scale": scale, "final_logit_softcapping": limit})()  # type: ignore[assignment]
        super().__init__(linear, linear)


def entropy(z: Tensor, _: slice) -> Tensor:
    logp = z.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize(("scale", "limit"), CAPS)
@pytest.mark.parametrize("kept", [0, 10**6])
def test_a_function_of_the_distribution_is_the_same_in_chunks(
    scale: float, limit: float | None, hooked: bool, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_head, "KEPT", kept)
    states, weight, bias, labels = problem()
    head = Fixed(weight, bias, scale, limit)
    if hooked:
        head.module.register_forward_hook(lambda *args: args[-1] * 1.5)
    assert head.plain != hooked

    def function(z: Tensor, part: slice) -> Tensor:
        return entropy(z, part) * z.gather(1, labels[part, None])[:, 0]

    found = []
    for chunk in (None, V, 4 * V):
        got = distribution(states, head, function, chunk=chunk)
        grads = torch.autograd.grad(got @ torch.linspace(-1, 3, M, dtype=torch.float64),
                                    (states, head.weight, head.module.bias))  # fmt: skip
        found.append((got, *grads))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", tiny_models.ALL)
def test_every_architecture_scores_as_its_own_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_models.build(name)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, tiny_models.VOCAB, (3, 7), generator=generator)
    rows, columns = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([1, 5, 3, 0, 5])
    labels = ids[rows, columns + 1]
    parameters = list(model.parameters())
    want = model(ids, use_cache=False).logits.float()[rows, columns].log_softmax(-1).gather(1, labels[:, None])[:, 0]
    wanted = torch.autograd.grad(want.sum(), parameters, allow_unused=True)
    for direct in (_head.DIRECT, 0):
        monkeypatch.setattr(_head, "DIRECT", direct)
        monkeypatch.setattr(_head, "CHUNK", 150)
        monkeypatch.setattr(_head, "WHOLE", 150)
        with select_head(model) as selected:
            empty = model(ids, use_cache=False).logits
        assert empty.numel() == 0
        got = selected.head.label_logprobs(selected.states[rows, columns], labels)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)
        for a, b in zip(torch.autograd.grad(got.sum(), parameters, allow_unused=True), wanted, strict=True):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert model(ids, use_cache=False).logits.shape == (3, 7, tiny_models.VOCAB)


def test_states_need_a_forward_pass() -> None:
    model = tiny_models.build("llama")
    with select_head(model) as selected, pytest.raises(SiteError, match="never reached"):
        _ = selected.states


@pytest.mark.parametrize("chunk", [None, 2 * V])
def test_a_teacher_keeps_the_label_and_all_probability(chunk: int | None) -> None:
    states, weight, bias, labels = problem()
    head = Fixed(weight * 4, bias)
    logp = head.logits(states).log_softmax(-1)
    unlikely = logp.argmin(-1)
    unlikely[0] = labels[0]
    teacher = topk_teacher(states, head, unlikely, 12, chunk=chunk)
    assert (teacher.indices == unlikely[:, None]).any(1).all()
    assert teacher.indices.shape == (M, 12) and all(len(set(row)) == 12 for row in teacher.indices.tolist())
    torch.testing.assert_close(teacher.logp[:, :-1], logp.gather(1, teacher.indices), rtol=0, atol=1e-12)
    torch.testing.assert_close(teacher.logp.exp().sum(1), torch.ones(M, dtype=torch.float64), rtol=0, atol=1e-12)
    assert teacher.tail == pytest.approx(teacher.logp[:, -1].exp().mean().item())


def test_divergence_from_a_reduced_teacher_is_a_lower_bound_and_null_at_the_start() -> None:
    states, weight, bias, labels = problem()
    head = Fixed(weight, bias)
    own = states.detach() + 0.3
    full = functional.kl_div(head.logits(own).log_softmax(-1), head.logits(states).log_softmax(-1), log_target=True,
                             reduction="none").sum(-1)  # fmt: skip
    before = torch.zeros(M, dtype=torch.float64)
    for k in (20, 22, V):  # more and more of it
        teacher = topk_teacher(states, head, labels, k)

        def divergence(x: Tensor, teacher: _head.Teacher = teacher) -> Tensor:
            q = reduced(head.logits(x), teacher.indices)
            return (teacher.logp.exp() * (teacher.logp - q)).sum(-1)

        found = divergence(own)
        assert (found <= full + 1e-12).all() and (found > 0).all()
        same = states.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(divergence(same).sum(), same)
        assert gradient.abs().max() < 1e-12
        before = found
    torch.testing.assert_close(before, full, rtol=0, atol=1e-12)  # all but one outcome by name: nothing is lost


def test_a_teacher_that_leaves_too_much_outside_is_refused() -> None:
    states, weight, _, labels = problem()
    with pytest.raises(NumericalError, match="set teacher to 'live'"):
        topk_teacher(states, Fixed(0.01 * weight, None), labels, 3)


def test_the_head_of_a_model_is_found_and_plain() -> None:
    head = head_of(tiny_models.build("gemma2"))
    assert head.plain and head.size == tiny_models.VOCAB
