"""Aggregation: theorems about means, adapters and Adam, in any order of arrival; and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repforget.errors import NumericalError, UsageError
from repforget.federated.aggregate import Adam, aggregate, applied, compressed, dense
from repforget.federated.records import Update


def update(client: str, seed: int, records: int = 1, scale: float = 1.0) -> Update:
    draw = np.random.default_rng(seed)
    return Update(client, records, {"w": scale * draw.standard_normal((3, 4)), "b": scale * draw.standard_normal(3)})


def adapter(client: str, seed: int, records: int = 1, rank: int = 4, out: int = 24, inner: int = 20) -> Update:
    draw = np.random.default_rng(seed)
    return Update(client, records, {"w.left": draw.standard_normal((out, rank)),
                                    "w.right": draw.standard_normal((rank, inner))})  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(6)), rule=st.sampled_from(["fedavg", "fedsgd", "fedadam"]), low=st.booleans())
def test_not_one_bit_depends_on_the_order_of_arrival(order: list[int], rule: str, low: bool) -> None:
    make = adapter if low else update
    sent = [make(f"c{i}", i, records=3 * i + 1) for i in range(6)]
    a = aggregate(sent, rule, state={})
    b = aggregate([sent[i] for i in order], rule, state={})
    assert a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=7), seed=st.integers(0, 1000))
def test_fedsgd_is_the_centralised_step(sizes: list[int], seed: int) -> None:
    draw = np.random.default_rng(seed)
    x, y = draw.standard_normal((sum(sizes), 5)), draw.standard_normal(sum(sizes))
    weights, rate = draw.standard_normal(5), 0.1

    def gradient(rows: slice) -> np.ndarray:
        return x[rows].T @ (x[rows] @ weights - y[rows]) / len(x[rows])

    ends = np.cumsum([0, *sizes])
    sent = [Update(f"c{i}", n, {"w": -rate * gradient(slice(ends[i], ends[i + 1]))}) for i, n in enumerate(sizes)]
    whole = -rate * gradient(slice(None))
    assert np.abs(aggregate(sent, "fedsgd")["w"] - whole).max() < 1e-14
    if len(set(sizes)) > 1:  # and the weights matter
        plain = np.mean([u.tensors["w"] for u in sent], axis=0)
        assert np.abs(plain - whole).max() > 1e-6


def test_fedavg_of_more_steps_is_not_the_centralised_run() -> None:
    draw = np.random.default_rng(0)
    hessians = [a.T @ a / 30 for a in draw.standard_normal((4, 30, 6))]
    optimum, start = draw.standard_normal(6), np.zeros(6)

    def steps(hessian: np.ndarray) -> np.ndarray:
        w = start
        for _ in range(5):
            w = w - 0.1 * hessian @ (w - optimum)
        return w - start

    mean = aggregate([Update(f"c{i}", 30, {"w": steps(h)}) for i, h in enumerate(hessians)])["w"]
    whole = steps(np.mean(hessians, axis=0))
    cosine = mean @ whole / np.linalg.norm(mean) / np.linalg.norm(whole)
    assert cosine > 0.99 and np.linalg.norm(mean - whole) > 1e-3 * np.linalg.norm(whole)


def test_adapters_are_joined_exactly_and_means_of_factors_are_far_off() -> None:
    sent = [adapter("a", 1, 10), adapter("b", 2, 30), adapter("c", 3, 20)]
    exact = sum(u.records / 60 * u.tensors["w.left"] @ u.tensors["w.right"] for u in sent)
    joined = aggregate(sent)
    assert joined["w.left"].shape == (24, 12) and joined["w.right"].shape == (12, 20)
    assert np.abs(dense(joined)["w"] - exact).max() < 1e-14 * np.abs(exact).max() * 24
    halves = [sum(u.records / 60 * u.tensors[f"w.{side}"] for u in sent) for side in ("left", "right")]
    assert np.linalg.norm(halves[0] @ halves[1] - exact) > 0.5 * np.linalg.norm(exact)


def test_ranks_may_differ_between_clients() -> None:
    sent = [adapter("a", 1, 1, rank=2), adapter("b", 2, 3, rank=5)]
    exact = sum(u.records / 4 * u.tensors["w.left"] @ u.tensors["w.right"] for u in sent)
    assert np.allclose(dense(aggregate(sent))["w"], exact, atol=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 11, 12, 40])
def test_compressed_is_the_best_of_its_rank_and_states_its_error(rank: int) -> None:
    change = aggregate([adapter(name, seed, 5) for seed, name in enumerate("abc")])
    whole = dense(change)["w"]
    cut, errors = compressed({**change, "b": np.ones(3)}, rank)
    found = dense(cut)["w"]
    sizes = np.linalg.svd(whole, compute_uv=False)
    assert cut["w.left"].shape[1] == min(rank, 12)
    assert np.isclose(errors["w"], np.linalg.norm(sizes[rank:]) / np.linalg.norm(sizes), atol=1e-12)
    assert np.isclose(np.linalg.norm(found - whole) / np.linalg.norm(whole), errors["w"], atol=1e-12)
    assert np.array_equal(cut["b"], np.ones(3))


def test_fedadam_follows_the_paper_over_rounds() -> None:
    adam, state = Adam(rate=0.1, beta1=0.8, beta2=0.95, tau=1e-2), dict[str, np.ndarray]()
    m, v = np.zeros((3, 4)), np.full((3, 4), 1e-4)
    for number in range(4):
        sent = [update("a", number, 1), update("b", 10 + number, 3)]
        mean = 0.25 * sent[0].tensors["w"] + 0.75 * sent[1].tensors["w"]
        m, v = 0.8 * m + 0.2 * mean, 0.95 * v + 0.05 * mean**2
        step = aggregate(sent, "fedadam", adam=adam, state=state)["w"]
        assert np.allclose(step, 0.1 * m / (np.sqrt(v) + 1e-2), rtol=1e-12)
    with pytest.raises(UsageError, match="state="):
        aggregate(sent, "fedadam")


def test_fedadam_multiplies_adapters_out() -> None:
    sent = [adapter("a", 1)]
    step = aggregate(sent, "fedadam", state={})
    mean = sent[0].tensors["w.left"] @ sent[0].tensors["w.right"]
    flat = aggregate([Update("a", 1, {"w": mean})], "fedadam", state={})
    assert np.allclose(step["w"], flat["w"], rtol=1e-12)


def test_applied_casts_once_and_keeps_the_rest() -> None:
    weights = {"w": np.ones((24, 20), np.float32), "other": np.full(2, 7, np.float32)}
    sent = adapter("a", 1)
    new = applied(weights, aggregate([sent]))
    expected = (1.0 + sent.tensors["w.left"] @ sent.tensors["w.right"]).astype(np.float32)
    assert new["w"].dtype == np.float32 and np.array_equal(new["w"], expected)
    assert np.array_equal(new["other"], weights["other"]) and weights["w"].max() == 1
    with pytest.raises(UsageError, match="no weight of the global model"):
        applied(weights, {"nowhere": np.zeros(2)})
    with pytest.raises(UsageError, match="has shape"):
        applied(weights, {"other": np.zeros(3)})


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_client_with_numbers_that_are_not_finite_is_named(bad: float) -> None:
    broken = update("mallory", 1)
    broken.tensors["w"][1, 1] = bad
    with pytest.raises(NumericalError, match="'mallory' sent NaN or infinite entries in 'w'"):
        aggregate([update("alice", 0), broken])


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": np.zeros((3, 4))}, "'mallory' lacks 'b'"),
        ({"w": np.zeros((3, 4)), "b": np.zeros(3), "x": np.zeros(1)}, "'mallory' sent 'x'"),
        ({"w": np.zeros((4, 3)), "b": np.zeros(3)}, r"'mallory' sent 'w' as a tensor of shape \(4, 3\)"),
        ({"w": np.zeros((3, 4), int), "b": np.zeros(3)}, "'mallory' sent 'w' as int64"),
        ({"w": [[0.0]], "b": np.zeros(3)}, "'mallory' sent 'w'"),
        ({}, "'mallory' lacks"),
        ({"w.left": np.zeros((3, 1)), "b": np.zeros(3)}, "'mallory' sent half an adapter"),
        ({"w.left": np.zeros((3, 1)), "w.right": np.zeros((1, 4)), "b": np.zeros(3)}, "'mallory' .* as an adapter"),
        ({"w.left": np.zeros((3, 1)), "w.right": np.zeros((2, 4)), "b": np.zeros(3)}, "'mallory' .* factors of shapes"),
    ],
)
def test_an_update_of_another_shape_is_refused_with_its_client(tensors: dict[str, np.ndarray], message: str) -> None:
    sent = [update("alice", 0), Update("mallory", 1, tensors), update("bob", 1)]
    with pytest.raises(UsageError, match=message):
        aggregate(sent)
    with pytest.raises(UsageError, match=message):
        aggregate(sent, weights={"w": (3, 4), "b": (3,)})


def test_rounds_without_weight_doubles_and_missing_clients_are_refused() -> None:
    with pytest.raises(UsageError, match="without updates"):
        aggregate([])
    with pytest.raises(UsageError, match="'a' sent 2 updates"):
        aggregate([update("a", 0), update("a", 1)])
    with pytest.raises(UsageError, match="1 of 2 clients sent no update, first 'b'"):
        aggregate([update("a", 0)], clients=["a", "b"])
    with pytest.raises(UsageError, match="'fedprox' is not known"):
        aggregate([update("a", 0)], "fedprox")  # type: ignore[arg-type]
    huge = [Update(name, 1, {"w.left": np.full((1, 1), 1e200), "w.right": np.full((1, 1), 1e200)}) for name in "ab"]
    state: dict[str, np.ndarray] = {}
    with pytest.raises(NumericalError, match="mean of 'w' over 2 clients is not finite"):
        aggregate(huge, "fedadam", state=state)
    assert not state  # moments of a refused round are not kept
