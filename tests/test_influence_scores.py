"""Influence: EK-FAC and scores against exact matrices, exact retraining and plain gradients."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from influence_models import NAME, bigram, fisher, gradient, pair
from scipy.stats import spearmanr
from torch import Tensor

from repforget.errors import NumericalError, UsageError
from repforget.influence import curvature, linear_maps, scores, self_scores
from repforget.influence.factors import Factors, per_record
from repforget.influence.passes import drawn_labels, uniform
from repforget.models.load import LoadedModel, fingerprint, wrap
from repforget.training import Example

WIDE = torch.float64


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=WIDE)


def evenly(draws: int) -> Any:
    """In the place of random numbers: every draw takes another of ``draws`` equal parts of [0, 1)."""
    return lambda examples, seed: torch.full_like(uniform(examples, 0), (seed % draws + 0.5) / draws)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(6, 12), st.floats(0.02, 2))
def test_on_ridge_regression_it_is_leaving_one_out(seed: int, n: int, damping: float) -> None:
    """One output: A ⊗ 1 is the Hessian.  The first-order change over (1 - leverage) is the exact one."""
    x, y, asked = draw(seed, n, 3), draw(seed + 1, n), draw(seed + 2, 3)
    factors = Factors.of(x.T @ x / n, torch.ones(1, 1, dtype=WIDE))
    ridge = damping * factors.values.mean()
    whole = x.T @ x + n * ridge * torch.eye(3, dtype=WIDE)
    w = torch.linalg.solve(whole, x.T @ y)
    for k in range(n):
        # the model trained without k, with the penalty that all n had
        others = [j for j in range(n) if j != k]
        without = torch.linalg.solve(whole - x[k, :, None] * x[k], x[others].T @ y[others])
        slope = (x[k] @ w - y[k]) * x[k]
        foretold = asked @ factors.natural(slope[None], damping)[0] / n
        leverage = x[k] @ torch.linalg.solve(whole, x[k])
        torch.testing.assert_close(foretold / (1 - leverage), asked @ (without - w))


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A softmax regression that predicts every label alike, where the Kronecker product is exact."""
    features, weight = draw(0, 5, 3), torch.zeros(5, 3, dtype=WIDE)
    draws = 60  # a multiple of the five labels
    monkeypatch.setattr("repforget.influence.ekfac.uniform", evenly(draws))
    train = [pair(first, second) for first in range(5) for second in range(5)]
    return bigram(weight, features), train, features, weight, draws


def test_where_the_product_is_exact_scores_are_those_of_the_whole_matrix(exact: Any) -> None:
    model, train, features, weight, draws = exact
    made = curvature(model, train, [NAME], draws=draws)
    whole = fisher(weight, features, [e.tokens[0] for e in train])
    lam = 0.1 * whole.diagonal().mean()
    inverse = torch.linalg.inv(whole + lam * torch.eye(len(whole), dtype=WIDE))
    queries = train[3:9]
    g, q = (torch.stack([gradient(weight, features, e) for e in some]) for some in (train, queries))
    found = scores(model, queries, train, [NAME], made, damping=0.1)
    np.testing.assert_allclose(found, (q @ inverse @ g.T).numpy() / len(train), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(made.factors[NAME].values.sum(), whole.trace())


def test_refitted_eigenvalues_are_the_exact_ones_of_that_basis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where inputs and gradients go together the product of eigenvalues is wrong, the refitted ones are not."""
    features, weight = draw(1, 6, 3), 1.5 * draw(2, 6, 3)
    draws = 400
    monkeypatch.setattr("repforget.influence.ekfac.uniform", evenly(draws))
    contexts = [0, 1, 1, 2, 3, 4, 5, 5]
    made = curvature(bigram(weight, features), [pair(c, 0) for c in contexts], [NAME], draws=draws).factors[NAME]
    q = torch.kron(made.q_out, made.q_in)
    whole = q.T @ fisher(weight, features, contexts) @ q
    np.testing.assert_allclose(made.values.flatten(), whole.diagonal(), rtol=0.03, atol=5e-3 * float(whole.max()))
    products = (made.out_values[:, None] * made.in_values).flatten()
    assert float((products - whole.diagonal()).abs().max()) > 0.1 * float(whole.diagonal().max())


def test_it_orders_what_retraining_without_an_example_does() -> None:
    """A convex model trained to its optimum, again without each example, by Newton's method."""
    features = draw(3, 6, 4)
    pairs = torch.randint(0, 6, (40, 2), generator=torch.Generator().manual_seed(4)).tolist()
    train = [pair(*p) for p in pairs]
    penalty = 0.05

    def optimum(examples: list[Example]) -> Tensor:
        w = torch.zeros(6, 4, dtype=WIDE)
        for _ in range(12):
            slope = sum((gradient(w, features, e) for e in examples), 40 * penalty * w.flatten())
            bend = len(examples) * fisher(w, features, [e.tokens[0] for e in examples])
            w = w - torch.linalg.solve(bend + 40 * penalty * torch.eye(24, dtype=WIDE), slope).reshape(6, 4)
        return w

    best = optimum(train)
    model, queries = bigram(best, features), [pair(k, (k + 1) % 6) for k in range(6)]
    made = curvature(model, train, [NAME], draws=60)
    found = scores(model, queries, train, [NAME], made, damping=penalty / float(made.factors[NAME].values.mean()))

    def logprob(w: Tensor) -> np.ndarray:
        return np.array([float((w @ features[e.tokens[0]]).log_softmax(0)[e.tokens[1]]) for e in queries])

    came = np.stack([logprob(best) - logprob(optimum(train[:k] + train[k + 1 :])) for k in range(40)], 1)
    orders = [spearmanr(told, actual).statistic for told, actual in zip(found, came, strict=True)]
    assert np.mean(orders) > 0.85 and min(orders) > 0.7
    assert 0.7 < (found * came).sum() / (found * found).sum() < 1.4, "in nats"


def examples(count: int, seed: int = 0, longest: int = 9) -> list[Example]:
    generator = torch.Generator().manual_seed(seed)
    found = []
    for k in range(count):
        size = 3 + (k * 5) % (longest - 2)
        tokens = torch.randint(3, 90, (size,), generator=generator).tolist()
        found.append(Example(tuple(tokens), tuple(at >= size - 1 - k % 2 for at in range(size))))
    return found


@pytest.fixture(params=["tiny_llama", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> LoadedModel:
    found: LoadedModel = request.getfixturevalue(request.param)
    found.module.double()
    return found


def plain(model: LoadedModel, example: Example, names: tuple[str, ...]) -> Tensor:
    """The gradient of one example's loss by autograd, all weights in one vector."""
    weights = [model.module.get_parameter(name) for name in names]
    for weight in weights:
        weight.requires_grad_(True)
    logits = model.module(input_ids=torch.tensor([example.tokens])).logits[0].log_softmax(-1)
    loss = -sum(logits[at - 1, example.tokens[at]] for at in range(1, len(example.tokens)) if example.labelled[at])
    found = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return torch.cat([g.flatten() for g in found])


def test_without_curvature_it_is_the_product_of_gradients(model: LoadedModel) -> None:
    names, train, queries = linear_maps(model), examples(7), examples(3, seed=1)
    g, q = (torch.stack([plain(model, e, names) for e in some]) for some in (train, queries))
    labels = sum(sum(e.labelled) for e in train)
    np.testing.assert_allclose(scores(model, queries, train, names), (q @ g.T).numpy() / labels, rtol=1e-6, atol=1e-9)


def test_rows_that_an_architecture_joins_are_told_apart(tokenizer: Any) -> None:
    """OPT reads [b * s, width] in its MLP."""
    model = wrap(tiny_models.build("opt").double(), tokenizer, "opt")
    test_without_curvature_it_is_the_product_of_gradients(model)


def test_damping_without_end_is_the_product_of_gradients(model: LoadedModel) -> None:
    name = (linear_maps(model)[3],)
    train, queries = examples(7), examples(3, seed=1)
    made = curvature(model, train, name)
    scaled = 1e9 * float(made.factors[name[0]].values.mean())
    found = scores(model, queries, train, name, made, damping=1e9)
    np.testing.assert_allclose(scaled * found, scores(model, queries, train, name), rtol=1e-4)
    assert not np.allclose(scaled * found / 1e9 * 0.1, scores(model, queries, train, name, made, damping=0.1), rtol=0.1)


def test_it_is_symmetric_and_never_negative_on_itself(model: LoadedModel) -> None:
    names, train = linear_maps(model), examples(8)
    before, flags = fingerprint(model.module), [p.requires_grad for p in model.module.parameters()]
    made = curvature(model, train, names)
    found = scores(model, train, train, names, made)
    np.testing.assert_allclose(found, found.T, rtol=1e-7, atol=1e-9)
    own = self_scores(model, train, names, made)
    np.testing.assert_allclose(own, np.diag(found), rtol=1e-7)
    assert (own > 0).all()
    assert float(np.linalg.eigvalsh(found).min()) > -1e-9
    assert fingerprint(model.module) == before
    assert [p.requires_grad for p in model.module.parameters()] == flags
    assert not any(p.grad is not None for p in model.module.parameters())
    assert not any(m._forward_hooks for m in model.module.modules())


def test_batches_and_padding_do_not_matter(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    names, train, queries = linear_maps(model), examples(9), examples(4, seed=1)

    def both() -> tuple[Any, np.ndarray, np.ndarray]:
        made = curvature(model, train, names, seed=3)
        groups = [[0, 1], [2], [3, 0, 1]]
        return made, scores(model, queries, train, names, made), scores(model, queries, train, names, made,
                                                                        groups=groups)  # fmt: skip

    made, found, grouped = both()
    monkeypatch.setattr("repforget.influence.passes.TOKENS", 1)  # one by one, without padding
    monkeypatch.setattr("repforget.influence.passes.DRAWN", 1)
    alone, again, again_grouped = both()
    for name in names:
        torch.testing.assert_close(made.factors[name].values, alone.factors[name].values)
    np.testing.assert_allclose(found, again, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(grouped, again_grouped, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(grouped, [found[:2].mean(0), found[2], found[[3, 0, 1]].mean(0)], rtol=1e-6, atol=1e-9)
    small = scores(model, queries, train, names, made, memory=1)
    np.testing.assert_allclose(found, small, rtol=1e-6, atol=1e-9)


def test_seeds_and_draws_change_the_labels_and_nothing_else_does(model: LoadedModel) -> None:
    names, train = linear_maps(model)[-2:], examples(9)
    state = torch.random.get_rng_state()
    one, same, other = (curvature(model, train, names, seed=s).factors[names[0]].values for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)
    assert torch.equal(torch.random.get_rng_state(), state)
    many = curvature(model, train, names, draws=4)
    assert many.predictions == sum(sum(e.labelled) for e in train)
    torch.testing.assert_close(many.factors[names[0]].values.sum(), one.sum(), rtol=0.5, atol=0)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 10**6), st.integers(2, 9))
def test_labels_are_drawn_as_often_as_the_model_says(seed: int, size: int) -> None:
    logits, many = 2 * draw(seed, 1, size), 4000
    numbers = (torch.arange(many, dtype=WIDE) + 0.5) / many
    shares = torch.bincount(drawn_labels(logits.expand(many, -1), numbers), minlength=size) / many
    np.testing.assert_allclose(shares, logits[0].softmax(0), atol=1 / many)


def test_half_precision_gradients_are_summed_in_single() -> None:
    a, g = draw(0, 2, 5, 3), draw(1, 2, 5, 4)
    found = per_record(a.bfloat16(), g.bfloat16(), None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.einsum("bto,bti->boi", g, a), atol=0.1, rtol=0.1)


def test_kept_factors_are_read_again_and_belong_to_their_content(
    model: LoadedModel, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, train = linear_maps(model)[-2:], examples(5)
    first = curvature(model, train, names, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("repforget.influence.ekfac.passes", lambda *a, **k: pytest.fail("fitted again"))
        second = curvature(model, train, names, folder=tmp_path)
    assert second.predictions == first.predictions and second.bytes == first.bytes > 0
    for name in names:
        assert all(torch.equal(a, b) for a, b in zip(vars(first.factors[name]).values(),
                                                     vars(second.factors[name]).values(), strict=True))  # fmt: skip
    curvature(model, train[:4], names, folder=tmp_path)
    for other in ({"draws": 2}, {"seed": 1}):
        drawn = curvature(model, train, names, folder=tmp_path, **other)
        assert not torch.equal(drawn.factors[names[0]].values, first.factors[names[0]].values)
    with torch.no_grad():
        model.module.get_parameter(names[0]).mul_(1.01)
    changed = curvature(model, train, names, folder=tmp_path)
    assert not torch.equal(changed.factors[names[0]].values, first.factors[names[0]].values)
    assert len(list(tmp_path.glob("ekfac-*"))) == 5


def test_what_it_refuses(tiny_llama: LoadedModel) -> None:
    names, train = linear_maps(tiny_llama)[:1], examples(3)
    made = curvature(tiny_llama, train, names)
    for damping in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="damping"):
            scores(tiny_llama, train, train, names, made, damping=damping)
    with pytest.raises(UsageError, match="empty"):
        scores(tiny_llama, train, train, names, made, groups=[[]])
    with pytest.raises(UsageError, match="draws"):
        curvature(tiny_llama, train, names, draws=0)
    with pytest.raises(UsageError, match="at least one"):
        curvature(tiny_llama, [], names)
    with torch.no_grad():
        tiny_llama.module.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        scores(tiny_llama, train, train, names)
