"""Ways of combining forget and retain gradients: what each guarantees, in the raw space and in the optimiser's."""

from __future__ import annotations

import math
import re
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from repforget.edit.train._objective import load_part, part_names
from repforget.edit.train._pareto import front, lines
from repforget.edit.train._watch import Look
from repforget.edit.train.combine._flat import Flat, dot, min_norm, mix
from repforget.edit.train.combine.mgda import shortest
from repforget.errors import MissingExtraError, UnknownNameError, UsageError

SHAPES = ((3, 4), (5,), (2, 2, 2))
Combine = Callable[..., Flat]
PROJECTING = ("ngdiff", "pcgrad", "mgda", "gru", "blur")
seeds = st.integers(0, 10**6)


def flat(seed: int, scale: float = 1.0) -> Flat:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]


def positive(seed: int) -> Flat:
    return [x.exp() for x in flat(seed)]


def pair(seed: int, conflict: bool | None = None, metric: Flat | None = None) -> tuple[Flat, Flat]:
    """Two gradients of very different length; ``conflict`` fixes the sign of their dot product."""
    forget, retain = flat(seed, 3.0), flat(seed + 1, 0.2)
    if conflict is not None and (dot(forget, retain, metric) < 0) != conflict:
        forget = [-x for x in forget]
    return forget, retain


def way(name: str) -> Combine:
    found: Combine = load_part("combine", name)
    return found


def scale_of(*sides: Flat, metric: Flat | None = None) -> float:
    return math.prod(math.sqrt(dot(side, side, metric)) for side in sides)


def test_every_way_is_found_and_linear_needs_none() -> None:
    assert set(part_names("combine")) == {*PROJECTING, "constraint", "dual_optim", "flood", "torchjd"}


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_dot_products_are_global(seed: int) -> None:
    a, b, metric = flat(seed), flat(seed + 1), positive(seed + 2)
    joined = [torch.cat([x.flatten() for x in side]) for side in (a, b, metric)]
    assert dot(a, b) == pytest.approx(float(joined[0] @ joined[1]), abs=1e-12)
    assert dot(a, b, metric) == pytest.approx(float((joined[0] * joined[2]) @ joined[1]), abs=1e-11)


def test_dot_products_of_half_precision_are_exact() -> None:
    """Many small products added to a large one: float32 would lose them all."""
    a = [torch.tensor([4096.0]).bfloat16(), torch.full((1000,), 2.0**-10).bfloat16()]
    assert dot(a, a) == 4096.0**2 + 1000 * 2.0**-20


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans())
def test_equal_lengths_raise_neither_loss(seed: int, own_space: bool) -> None:
    metric = positive(seed + 9)
    inner = metric if own_space else None
    forget, retain = pair(seed)
    step = way("ngdiff")(forget, retain, {}, space="preconditioned" if own_space else "raw", metric=metric)
    for side in (forget, retain):
        assert dot(step, side, inner) >= -1e-12 * scale_of(side, metric=inner)
    louder = way("ngdiff")([1000 * x for x in forget], retain, {})
    torch.testing.assert_close(louder, way("ngdiff")(forget, retain, {}))


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0.6, 1.9))
def test_the_automatic_rate_is_the_lowest_point_of_a_parabola(seed: int, target: float) -> None:
    """A retain loss that is quadratic along the step, at its lowest ``target`` steps ahead; found only when asked."""
    forget, retain = pair(seed)
    asked: list[float] = []

    def probe(direction: Flat, steps: float) -> float:
        asked.append(steps)
        return 5.0 + 0.3 * (steps - target) ** 2

    state: dict[str, Tensor] = {}
    given = way("ngdiff")(forget, retain, {})
    for step in range(1, 7):
        found = way("ngdiff")(forget, retain, state, rate="auto", every=3, probe=probe)
        torch.testing.assert_close(found, given)
        assert ("rate" in state) == (step >= 3)
    assert float(state["rate"]) == pytest.approx(target)
    assert len(asked) == 6 and asked[:3] == [-1.0, 0.0, 1.0]
    far = {"rate": torch.tensor(1.0)}
    way("ngdiff")(forget, retain, far, rate="auto", every=1, probe=lambda d, steps: (steps - 50.0) ** 2)
    assert float(far["rate"]) == 2.0, "at most twice at a time"
    way("ngdiff")(forget, retain, far, rate="auto", every=1, probe=lambda d, steps: steps)
    assert float(far["rate"]) == 1.0, "a loss that rises ahead halves it"
    with pytest.raises(UsageError, match="every 0 steps"):
        way("ngdiff")(forget, retain, {}, every=0)


@settings(deadline=None, max_examples=20)
@given(seeds, st.integers(0, 3))
def test_each_side_has_an_adam_of_its_own(seed: int, retain_steps: int) -> None:
    """Against PyTorch's Adam, run on the gradients of one side alone."""
    state: dict[str, Tensor] = {}
    start = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in SHAPES]
    own = {side: [p.detach().clone().requires_grad_() for p in start] for side in ("forget", "retain")}
    adams = {side: torch.optim.Adam(own[side], lr=0.1, betas=(0.9, 0.98)) for side in own}
    there = [p.detach().clone() for p in start]
    for step in range(9):
        given = dict(zip(own, pair(seed + 7 * step), strict=True))
        found = way("dual_optim")(given["forget"], given["retain"], state, retain_steps=retain_steps)
        there = mix(1.0, there, -0.1, found)
        turn = tuple(own) if retain_steps == 0 else ("retain" if step % (retain_steps + 1) else "forget",)
        for side in turn:
            for p, g in zip(own[side], given[side], strict=True):
                p.grad = g.clone()
            adams[side].step()
    torch.testing.assert_close(there, mix(1.0, own["forget"], 1.0, own["retain"]))
    for wrong in ({"retain_steps": -1}, {"beta2": 1.0}):
        with pytest.raises(UsageError, match="dual_optim was given"):
            way("dual_optim")(flat(0), flat(1), {}, **wrong)


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans())
def test_pcgrad_removes_the_conflict_and_nothing_else(seed: int, own_space: bool) -> None:
    metric = positive(seed + 9)
    inner, space = (metric, "preconditioned") if own_space else (None, "raw")
    forget, retain = pair(seed, conflict=True, metric=inner)
    step = way("pcgrad")(forget, retain, {}, space=space, metric=metric)
    for side in (forget, retain):
        assert dot(step, side, inner) >= -1e-10 * scale_of(side, side, metric=inner)
    # Half of the result is the forget gradient across the retain gradient, half the other way round.
    across = mix(1.0, forget, -dot(forget, retain, inner) / dot(retain, retain, inner), retain)
    assert dot(across, retain, inner) == pytest.approx(0, abs=1e-10 * scale_of(forget, retain, metric=inner))
    rest = mix(1.0, step, -1.0, across)
    assert dot(rest, forget, inner) == pytest.approx(0, abs=1e-10 * scale_of(forget, forget, metric=inner))
    forget, retain = pair(seed, conflict=False, metric=inner)
    free = way("pcgrad")(forget, retain, {}, space=space, metric=metric)
    torch.testing.assert_close(free, mix(1, forget, 1, retain))


@settings(deadline=None, max_examples=40)
@given(seeds)
def test_mgda_is_the_closed_form_for_two(seed: int) -> None:
    forget, retain = pair(seed)
    apart = mix(1.0, forget, -1.0, retain)
    t = min(1.0, max(0.0, -dot(apart, retain) / dot(apart, apart)))
    step = way("mgda")(forget, retain, {})
    torch.testing.assert_close(step, mix(t, forget, 1 - t, retain))
    if 0 < t < 1:
        for side in (forget, retain):
            assert dot(step, side) == pytest.approx(dot(step, step), rel=1e-8)


@settings(deadline=None, max_examples=40)
@given(seeds, st.integers(2, 5), st.integers(1, 6))
def test_the_shortest_of_k_is_what_a_solver_finds(seed: int, k: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(k, rank, generator=generator, dtype=torch.float64) + 0.5
    gram = rows @ rows.T
    weights = min_norm(gram)
    assert float(weights.sum()) == pytest.approx(1) and float(weights.min()) >= 0
    found = minimize(lambda w: w @ gram.numpy() @ w, [1 / k] * k, jac=lambda w: 2 * gram.numpy() @ w,
                     bounds=[(0, 1)] * k, constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
                     method="SLSQP", options={"ftol": 1e-14, "maxiter": 500})  # fmt: skip
    assert float(weights @ gram @ weights) <= found.fun + 1e-7 * float(gram.diagonal().max())
    step = rows.T @ weights
    assert float((rows @ step).min()) >= float(step @ step) - 1e-7 * float(gram.diagonal().max()), "all losses fall"


def test_the_shortest_of_opposite_gradients_is_none() -> None:
    one = flat(0)
    step = shortest([one, [-3 * x for x in one]])
    assert dot(step, step) == pytest.approx(0, abs=1e-24 * dot(one, one))
    with pytest.raises(UsageError, match="at most 12"):
        min_norm(torch.eye(13, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(seeds, st.booleans())
def test_gru_projects_off_a_running_mean(seed: int, own_space: bool) -> None:
    metric = positive(seed + 9)
    inner, context = (metric, {"space": "preconditioned", "metric": metric}) if own_space else (None, {})
    state: dict[str, Tensor] = {}
    first = flat(seed + 5)
    way("gru")(flat(seed), first, state, **context)
    forget, retain = pair(seed + 10)
    mean = mix(0.8, retain, 0.2, first)
    if dot(forget, mean, inner) > 0:
        forget = [-x for x in forget]
    step = way("gru")(forget, retain, state, **context)
    torch.testing.assert_close([state[f"mean.{i}"] for i in range(len(mean))], mean)
    assert dot(step, mean, inner) == pytest.approx(0, abs=1e-10 * scale_of(forget, mean, metric=inner))
    free, kept = pair(seed + 20, conflict=False, metric=inner)
    torch.testing.assert_close(way("gru")(free, kept, {}, **context), free)
    repaired = way("gru")(forget, retain, {}, add_retain=True)
    torch.testing.assert_close(repaired, mix(1, way("gru")(forget, retain, {}), 1, retain))


@settings(deadline=None, max_examples=40)
@given(seeds, st.floats(0.1, 3), st.booleans())
def test_blur_forgets_at_the_rate_asked_for(seed: int, gamma: float, own_space: bool) -> None:
    metric = positive(seed + 9)
    inner, space = (metric, "preconditioned") if own_space else (None, "raw")
    forget, retain = pair(seed)
    step = way("blur")(forget, retain, {}, gamma=gamma, space=space, metric=metric)
    size = scale_of(forget, metric=inner)
    assert dot(step, forget, inner) / size == pytest.approx(gamma * size, rel=1e-9)


@pytest.mark.parametrize("name", PROJECTING)
def test_a_gradient_that_vanishes_leaves_the_other(name: str) -> None:
    some, none = flat(1), [torch.zeros_like(x) for x in flat(1)]
    for forget, retain in ((some, none), (none, some)):
        step = way(name)(forget, retain, {})
        assert all(bool(torch.isfinite(x).all()) for x in step)
        if name != "mgda" and not (name == "gru" and forget is none):
            cosine = dot(step, some) / math.sqrt(dot(step, step) * dot(some, some))
            assert cosine == pytest.approx(1)


@pytest.mark.parametrize("name", PROJECTING)
@settings(deadline=None, max_examples=40)
@given(seed=seeds)
def test_inputs_stay_as_they_are(name: str, seed: int) -> None:
    forget, retain = pair(seed)
    copies = [x.clone() for x in (*forget, *retain)]
    state: dict[str, Tensor] = {}
    for _ in range(2):
        way(name)(forget, retain, state)
    assert all(torch.equal(x, y) for x, y in zip((*forget, *retain), copies, strict=True))
    assert all(isinstance(t, Tensor) for t in state.values())


def test_projection_in_the_raw_space_does_not_survive_a_preconditioner() -> None:
    """The projected step, scaled as an optimiser scales it, raises the retain loss again in a large share of draws;
    projected in the optimiser's metric it never does."""
    trials, again, own = 600, 0, 0
    for seed in range(trials):
        metric = positive(10 * seed + 2)
        forget, retain = pair(10 * seed, conflict=True)
        raw = way("gru")(forget, retain, {})
        again += dot(raw, retain, metric) < -1e-9 * scale_of(raw, retain, metric=metric)
        right = way("gru")(forget, retain, {}, space="preconditioned", metric=metric)
        own += dot(right, retain, metric) < -1e-9 * scale_of(forget, retain, metric=metric)
    assert own == 0
    assert 0.35 < again / trials < 0.65


def test_preconditioned_without_denominators_is_raw() -> None:
    forget, retain = pair(3, conflict=True)
    for name in PROJECTING:
        found = way(name)(forget, retain, {}, space="preconditioned")
        torch.testing.assert_close(found, way(name)(forget, retain, {}))


def test_the_multiplier_is_the_price_of_the_constraint() -> None:
    """min (x - 3)² subject to x² <= 1: x = 1 at a multiplier of 2."""
    x, state = torch.tensor([0.5], dtype=torch.float64), {}
    prices = []
    for _ in range(4000):
        loss = float(x**2)
        step = way("constraint")([2 * (x - 3)], [2 * x], state, losses={"forget": 0.0, "retain": loss}, epsilon=1.0,
                                 rate=0.05)  # fmt: skip
        x = x - 0.02 * step[0]
        prices.append(float(state["multiplier"]))
    assert min(prices) >= 0
    assert float(x) == pytest.approx(1, abs=1e-3) and prices[-1] == pytest.approx(2, abs=1e-2)
    assert prices[-1] * (float(x**2) - 1) == pytest.approx(0, abs=1e-3)


def test_the_multiplier_moves_once_per_step_after_its_warmup() -> None:
    state: dict[str, Tensor] = {}
    seen = []
    for loss in (0.2, 0.5, 0.5, 0.1):
        way("constraint")(flat(0), flat(1), state, losses={"forget": 1.0, "retain": loss}, start=2.0, rate=1.0,
                          slack=0.05, warmup=2)  # fmt: skip
        seen.append(float(state["multiplier"]))
    assert seen == pytest.approx([2.0, 2.0, 2.25, 2.10]), "bound 0.25: up while it is overstepped, then down"
    step = way("constraint")(flat(0), flat(1), {}, losses={"forget": 1.0, "retain": 9.0}, epsilon=9.5, start=0.25)
    torch.testing.assert_close(step, flat(0))  # 0.25 - 0.5 is clipped to 0
    with pytest.raises(UsageError, match="0 or more"):
        way("constraint")(flat(0), flat(1), {}, losses={"retain": 1.0}, rate=-1.0)


class Mean(torch.nn.Module):
    """What an aggregator of TorchJD looks like: a module from a matrix to a vector."""

    def __init__(self, weight: float = 0.5) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, matrix: Tensor) -> Tensor:
        return self.weight * matrix[0] + (1 - self.weight) * matrix[1] + 0 * torch.rand(())


def test_torchjd_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {name: ModuleType(name) for name in ("torchjd", "torchjd.aggregation")}
    fake: Any = parts["torchjd.aggregation"]
    fake.Aggregator, fake.Mean = torch.nn.Module, Mean
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    forget, retain = pair(1)
    before = torch.random.get_rng_state()
    for space in ("raw", "preconditioned"):
        step = way("torchjd")(forget, retain, {}, aggregator="Mean", options={"weight": 0.25}, space=space,
                              metric=positive(2))  # fmt: skip
        torch.testing.assert_close(step, mix(0.25, forget, 0.75, retain))
    assert torch.equal(torch.random.get_rng_state(), before)
    with pytest.raises(UnknownNameError, match="Mean"):
        way("torchjd")(forget, retain, {}, aggregator="Meen")


def test_torchjd_agrees_where_it_is_installed() -> None:
    pytest.importorskip("torchjd")
    forget, retain = pair(1, conflict=True)
    metric = positive(3)
    for context in ({}, {"space": "preconditioned", "metric": metric}):
        torch.testing.assert_close(way("torchjd")(forget, retain, {}, aggregator="PCGrad", **context),
                                   way("pcgrad")(forget, retain, {}, **context))  # fmt: skip


def test_without_torchjd_one_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchjd.aggregation", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repforget\[multi\]'"):
        way("torchjd")(flat(0), flat(1), {})


def test_every_extra_that_a_sentence_names_is_there() -> None:
    root = Path(__file__).parents[1]
    offered = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for path in (root / "repforget").rglob("*.py")
             for name in re.findall(r"repforget\[(\w+)\]", path.read_text())}  # fmt: skip
    assert "multi" in named and named <= set(offered)
    assert any(requirement.startswith("torchjd") for requirement in offered["multi"])


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(values: list[tuple[int, int]]) -> None:
    points = [Look(step, float(f), float(r)) for step, (f, r) in enumerate(values)]
    found = front([*points, Look(99, math.nan, -1.0)])

    def beats(a: Look, b: Look) -> bool:
        return a.forget <= b.forget and a.retain <= b.retain and (a.forget, a.retain) != (b.forget, b.retain)

    kept = {(p.forget, p.retain) for p in found}
    assert kept == {(p.forget, p.retain) for p in points if not any(beats(q, p) for q in points)}
    assert len(found) == len(kept), "each trade-off once, at its first step"
    assert all(a.forget < b.forget and a.retain > b.retain for a, b in zip(found, found[1:], strict=False))
    assert len(lines(found)) == len(found)
