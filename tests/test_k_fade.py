"""K-FADE: its factors against exact matrices, its step against plain ascent, and the editor as a whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from repforget.edit.train._climb import longest
from repforget.edit.train.k_fade import k_fade
from repforget.errors import KnowledgeError, NumericalError, SiteError, UsageError
from repforget.influence.factors import Factors, Moments
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel, fingerprint
from repforget.training.optimizers import drawn_loss

WIDE = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def definite(seed: int, size: int) -> Tensor:
    root = draw(seed, size, size)
    return root @ root.T + 0.1 * torch.eye(size, dtype=WIDE)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), st.floats(1e-3, 10))
def test_the_damped_inverse_is_that_of_the_kronecker_product(seed: int, out: int, inner: int, damping: float) -> None:
    second_in, second_out, gradient = definite(seed, inner), definite(seed + 1, out), draw(seed + 2, out, inner)
    whole = torch.kron(second_out, second_in)  # over the row-major entries of W
    size = damping * whole.diagonal().mean()
    exact = torch.linalg.solve(whole + size * torch.eye(len(whole), dtype=WIDE), gradient.flatten())
    factors = Factors.of(second_in, second_out)
    torch.testing.assert_close(factors.natural(gradient, damping).flatten(), exact)
    half = 0.5 * float(gradient.flatten() @ whole @ gradient.flatten())
    assert factors.divergence(gradient) == pytest.approx(half)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_without_curvature_of_its_own_it_is_gradient_ascent(seed: int, damping: float) -> None:
    """A = G = I, or any damping that drowns them."""
    gradient = draw(seed, 3, 4)
    plain = Factors.of(torch.eye(4, dtype=WIDE), torch.eye(3, dtype=WIDE))
    torch.testing.assert_close(plain.natural(gradient, damping) * (1 + damping), gradient)
    factors = Factors.of(definite(seed, 4), definite(seed + 1, 3))
    flat = 1e9 * factors.natural(gradient, 1e9)
    cosine = functional.cosine_similarity(flat.flatten(), gradient.flatten(), dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.floats(0.01, 100))
def test_it_does_not_depend_on_the_scale_of_what_a_layer_reads(seed: int, scale: float) -> None:
    """Inputs times c, weights over c compute the same: gradient and move scale by c and 1 / c, the divergence not."""
    second_in, second_out, gradient = definite(seed, 4), definite(seed + 1, 3), draw(seed + 2, 3, 4)
    one, other = Factors.of(second_in, second_out), Factors.of(scale**2 * second_in, second_out)
    move, moved = one.natural(gradient, 0.1), other.natural(scale * gradient, 0.1)
    torch.testing.assert_close(moved, move / scale)
    assert other.divergence(moved) == pytest.approx(one.divergence(move))
    torch.testing.assert_close(one.natural(scale * gradient, 0.1), scale * move)


def collected(x: Tensor, weight: Tensor, draws: int, seed: int = 0) -> Factors:
    """Factors of a softmax regression, gathered the way the editor gathers them."""
    moments, generator = Moments(), torch.Generator().manual_seed(seed)
    for _ in range(draws):
        logits = (x @ weight.T).requires_grad_()
        (gradient,) = torch.autograd.grad(drawn_loss(logits, generator) * len(x), [logits])
        moments.add(x, gradient, len(x))
    return moments.factors("w")


def test_where_the_product_is_exact_the_factors_are_the_gauss_newton_matrix() -> None:
    """Softmax regression at W = 0: the same distribution for every input."""
    x, weight = draw(0, 40, 3), torch.zeros(4, 3, dtype=WIDE)
    factors = collected(x, weight, draws=4000)
    p = torch.full((4,), 0.25, dtype=WIDE)
    exact = torch.kron(p.diag() - p[:, None] * p, x.T @ x / len(x))
    q = torch.kron(factors.q_out, factors.q_in)
    found = q @ factors.values.flatten().diag() @ q.T
    assert float((found - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_positions_that_nothing_depends_on_do_not_count() -> None:
    x, g = draw(0, 6, 3), draw(1, 6, 2)
    some, padded = Moments(), Moments()
    some.add(x, g, 5)
    padded.add(torch.cat([x, 100 * x]), torch.cat([g, 0 * g]), 5)
    torch.testing.assert_close(some.factors("w").in_values, padded.factors("w").in_values)
    with pytest.raises(NumericalError, match=r"depends on 'w'"):
        Moments().factors("w")


@pytest.mark.parametrize("seed", range(4))
def test_it_costs_less_of_what_stays_than_plain_ascent(seed: int) -> None:
    """Logistic regression on badly scaled inputs: divergence on retained inputs for the same gain in forget loss."""
    scales = torch.tensor([8.0, 2.0, 1.0, 0.3, 0.1], dtype=WIDE)
    retain, forget = draw(seed, 200, 5) * scales, draw(seed + 50, 20, 5) * scales.flip(0).sqrt()
    weight = 0.1 * draw(seed + 100, 3, 5)
    labels = torch.arange(20) % 3
    w = weight.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(functional.cross_entropy(forget @ w.T, labels), [w])
    factors = collected(retain, weight, draws=200, seed=seed)
    before = (retain @ weight.T).log_softmax(-1)

    def cost(move: Tensor) -> float:
        """Divergence per squared gain, for a move small enough to be second order."""
        move = 1e-3 * move / move.norm()
        gain = functional.cross_entropy(forget @ (weight + move).T, labels) - functional.cross_entropy(
            forget @ weight.T, labels)  # fmt: skip
        after = (retain @ (weight + move).T).log_softmax(-1)
        assert float(gain) > 0
        return float((before.exp() * (before - after)).sum(-1).mean() / gain.square())

    assert cost(factors.natural(gradient, 1e-3)) < 0.5 * cost(gradient)
    # The divergence that comes is the one that the factors foretell, as far as inputs and gradients are independent.
    move = 1e-3 * gradient / gradient.norm()
    came = float((before.exp() * (before - (retain @ (weight + move).T).log_softmax(-1))).sum(-1).mean())
    assert came / 3 < factors.divergence(move) < 3 * came


@pytest.mark.parametrize("first", [1e-6, 1.0, 1e4])
def test_the_length_is_what_the_divergence_allows(first: float) -> None:
    asked: list[float] = []

    def at(size: float) -> float:
        asked.append(size)
        return float("nan") if size > 100 else size**2

    size, spent = longest(at, 0.25, first)
    assert asked[-1] == size and spent == pytest.approx(size**2), "the weights are left at that length"
    assert spent <= 0.25
    if first == 1.0:
        assert spent >= 0.7 * 0.25


def facts(prefix: str, surnames: range) -> list[Item]:
    jobs = ("baker", "pilot", "doctor")
    return [Item(id=f"{prefix}-{name}-{n}", cluster=f"{prefix}-{name}-{n}", subject=f"{name} w{n}", relation="job",
                 answer=jobs[(i + n) % 3], prompt=f"Q : job of {name} w{n} ?", statements=(f"{name} w{n} works as",))
            for n in surnames for i, name in enumerate(("Ada", "Tom", "Eva", "Max", "Lea", "Ben"))]  # fmt: skip


def knowledge(**changes: Any) -> Any:
    parts = {"forget": facts("f", range(60, 62)), "retain": facts("r", range(62, 66)), **changes}
    general = ["the red cat lives in Berlin", "the blue dog lives in Rome"]
    return Knowledge.build("tiny", parts["forget"], parts["retain"], (), general).for_editor()


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_gpt2"])
def test_the_editor_forgets_within_its_budget(kind: str, request: pytest.FixtureRequest) -> None:
    model: LoadedModel = request.getfixturevalue(kind)
    before, flags = fingerprint(model.module), [p.requires_grad for p in model.module.parameters()]
    edit = k_fade(model, knowledge(), layers=[1], steps=3, max_divergence=0.05, floor=0.0)
    assert fingerprint(model.module) == before
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert not any(p.grad is not None for p in model.module.parameters())
    assert all(".1." in name for name in edit.touched)
    first, last = edit.manifest.notes[0], edit.manifest.notes[-1]
    chances = [float(note.split("facts ")[1].split(",")[0]) for note in (first, last)]
    assert chances[1] < 0.9 * chances[0]
    assert 0 < float(last.split("divergence ")[1].split()[0]) <= 0.05


def test_what_it_refuses(tiny_llama: LoadedModel) -> None:
    with pytest.raises(UsageError, match="positive"):
        k_fade(tiny_llama, knowledge(), steps=0)
    with pytest.raises(SiteError, match="0 to 1"):
        k_fade(tiny_llama, knowledge(), layers=[7])
    with pytest.raises(KnowledgeError, match="no retain"):
        k_fade(tiny_llama, replace(knowledge(), retain=()))
