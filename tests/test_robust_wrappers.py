"""Robust wrappers on a step of known losses: where they take gradients, and that every bit comes back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from contract_tools import tiny_data, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repforget.edit._dispatch import edit
from repforget.edit.train._data import Row
from repforget.edit.train._engine import Engine
from repforget.edit.train._objective import load_part
from repforget.edit.train.combine._flat import norm
from repforget.errors import UsageError
from repforget.models.load import fingerprint

Loss = Callable[[Sequence[Tensor]], Tensor]
WIDE = torch.float64


@dataclass(frozen=True)
class Pull:
    """A row about ``cluster``: the number that all parameters are pulled to."""

    cluster: str
    pull: float


@dataclass
class Step:
    """A step whose losses are given functions of its parameters; it notes where its gradients were taken."""

    parameters: list[Tensor]
    forget: Loss
    retain: Loss
    index: int = 0
    visited: list[tuple[str, list[Tensor]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.index)

    def gradients(
        self, sides: Sequence[str] = ("forget", "retain"), only: Callable[[Any], bool] | None = None
    ) -> dict[str, list[Tensor]]:
        out = {}
        self.taken = [] if only is None else [row.pull for row in self.rows("forget") if only(row)]
        for side in sides:
            self.visited.append((side, [p.detach().clone() for p in self.parameters]))
            leaves = [p.detach().to(WIDE).requires_grad_() for p in self.parameters]
            out[side] = list(torch.autograd.grad(getattr(self, side)(leaves), leaves))
        return out

    @contextmanager
    def restored(self) -> Iterator[None]:
        saved = [p.detach().clone() for p in self.parameters]
        try:
            yield
        finally:
            with torch.no_grad():
                for p, s in zip(self.parameters, saved, strict=True):
                    p.copy_(s)

    def rows(self, side: str) -> list[Pull]:
        pulls = [Pull("a", 3.0), Pull("b", -1.0), Pull("a", 5.0), Pull("b", -2.0), Pull("c", 1.0)]
        return pulls if side == "forget" else []

    def nll(self, rows: Sequence[Pull]) -> Tensor:
        return sum((p.to(WIDE) - r.pull).square().sum() for r in rows for p in self.parameters) / (2 * len(rows))


def draw(seed: int, dtype: torch.dtype = WIDE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=WIDE).to(dtype) for shape in ((4, 3), (5,))]


def quartic(parameters: Sequence[Tensor]) -> Tensor:
    return sum((p**4).sum() for p in parameters) / 4 + parameters[0].sum() * parameters[1].sum()


def square(parameters: Sequence[Tensor]) -> Tensor:
    return sum((p**2).sum() for p in parameters) / 2


def wrapper(name: str) -> Any:
    return load_part("robust", name)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(1e-3, 1.0))
def test_sam_steps_up_by_rho_over_all_parameters_together(seed: int, rho: float) -> None:
    step = Step(draw(seed), quartic, square)
    plain = step.gradients()
    step.visited.clear()
    found = wrapper("sam")(step, rho=rho)
    start, worst = (where for side, where in step.visited if side == "forget")
    moved = [b - a for a, b in zip(start, worst, strict=True)]
    assert norm(moved) == pytest.approx(rho)
    scaled = [rho * g / norm(plain["forget"]) for g in plain["forget"]]
    torch.testing.assert_close(moved, scaled)
    torch.testing.assert_close(found["forget"], Step(worst, quartic, square).gradients()["forget"])
    assert all(torch.equal(a, b) for a, b in zip(found["retain"], plain["retain"], strict=True))
    assert float(quartic(worst)) > float(quartic(start))


def test_sam_of_no_radius_is_the_plain_gradient() -> None:
    step = Step(draw(1), quartic, square)
    plain = step.gradients()
    for rho, tolerance in ((1e-9, 1e-6), (0.0, 0.0)):
        torch.testing.assert_close(wrapper("sam")(step, rho=rho), plain, rtol=tolerance, atol=tolerance)
    flat = Step(draw(1), lambda p: 0 * square(p), square)
    assert all(not g.any() for g in wrapper("sam")(flat)["forget"])
    with pytest.raises(UsageError, match="radius"):
        wrapper("sam")(step, rho=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sam", "smoothing"])
def test_every_bit_comes_back(name: str, dtype: torch.dtype) -> None:
    parameters = draw(2, dtype)
    before = [p.clone() for p in parameters]
    step = Step(parameters, quartic, square)
    first = wrapper(name)(step)
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))
    assert any(not torch.equal(w, b) for _, where in step.visited for w, b in zip(where, before, strict=True))
    again = wrapper(name)(Step(parameters, quartic, square))
    assert all(torch.equal(a, b) for a, b in zip(first["forget"], again["forget"], strict=True)), "by the step alone"

    def broken(p: Sequence[Tensor]) -> Tensor:
        if not torch.equal(p[0].to(dtype), before[0]):
            raise RuntimeError("no gradient here")
        return quartic(p)

    with pytest.raises(RuntimeError, match="no gradient here"):
        wrapper(name)(Step(parameters, broken, square))
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_half_precision_takes_moves_below_its_grid_in_the_mean() -> None:
    parameters = [torch.ones(20_000, dtype=torch.bfloat16)]
    step = Step(parameters, lambda p: -p[0].sum(), square)
    wrapper("sam")(step, rho=0.1)
    (moved,) = step.visited[1][1]
    expected = -0.1 / 20_000**0.5
    assert float((moved.double() - 1).mean()) == pytest.approx(expected, rel=0.35)
    assert torch.equal((parameters[0] + expected), parameters[0]), "rounded to the nearest, nothing would move"


def test_smoothing_is_the_gradient_of_the_mean_loss_under_noise() -> None:
    """E (p + s e)³ = p³ + 3 p s², s = sigma times the root mean square of the tensor."""
    parameters = [torch.tensor([1.0, -2.0, 0.5], dtype=WIDE), torch.zeros(2, dtype=WIDE)]
    cube = Step(parameters, lambda p: sum((x**4).sum() for x in p) / 4, square)
    found = wrapper("smoothing")(cube, sigma=0.3, samples=4000)["forget"]
    p = parameters[0]
    expected = p**3 + 3 * p * 0.09 * p.square().mean()
    assert float(((found[0] - expected) / expected).abs().max()) < 0.1
    assert float(((p**3 - expected) / expected).abs().max()) > 0.3, "the plain gradient is another one"
    assert torch.equal(found[1], torch.zeros(2, dtype=WIDE)), "a tensor of zeros has no scale"


def test_smoothing_without_noise_is_the_plain_gradient() -> None:
    step = Step(draw(3), quartic, square)
    torch.testing.assert_close(wrapper("smoothing")(step, sigma=0.0, samples=2), step.gradients())
    other = [wrapper("smoothing")(Step(draw(3), quartic, square, index)) for index in (0, 1)]
    assert not torch.equal(other[0]["forget"][0], other[1]["forget"][0]), "the next step draws other noise"
    with pytest.raises(UsageError, match="samples"):
        wrapper("smoothing")(step, samples=0)


def trained(dtype: torch.dtype = WIDE, forget: Loss = quartic, index: int = 0) -> Step:
    return Step([p.requires_grad_() for p in draw(4, dtype)], forget, square, index)


def test_an_attacker_relearns_every_other_cluster_and_forgetting_is_practised_on_the_rest() -> None:
    step = trained()
    plain = step.gradients()
    step.visited.clear()
    start = [p.detach().clone() for p in step.parameters]
    found = wrapper("tamper")(step, attack="sgd", inner_steps=1, inner_lr=0.01, scale=4.0)
    assert step.taken == [-1.0, -2.0]
    pull = [p - 3.0 for p in start]  # towards the mean of 3, 5 and 1
    down = [0.01 * g / max(1.0, norm(pull)) for g in pull]
    torch.testing.assert_close(step.visited[-1][1], [p - d for p, d in zip(start, down, strict=True)])
    there = Step(step.visited[-1][1], quartic, square).gradients()["forget"]
    expected = [a + 4.0 * b for a, b in zip(plain["forget"], there, strict=True)]
    torch.testing.assert_close(found["forget"], expected)
    torch.testing.assert_close(found["retain"], plain["retain"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attack", ["adam", "nesterov"])
def test_the_attack_leaves_no_trace(attack: str, dtype: torch.dtype) -> None:
    step = trained(dtype)
    before = [p.detach().clone() for p in step.parameters]
    wrapper("tamper")(step, attack=attack, inner_steps=3, inner_lr=1e-3)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(step.parameters, before, strict=True))
    moved = step.visited[-1][1]
    assert all(float((m.to(WIDE) - b.to(WIDE)).mean()) > 5e-4 for m, b in zip(moved, before, strict=True)), "relearned"


def test_no_attack_between_the_steps_that_have_one() -> None:
    for index, attacked in ((0, True), (1, False), (2, False), (3, True)):
        step = trained(index=index)
        plain, found = step.gradients(), wrapper("tamper")(step, every=3, inner_lr=0.1)
        assert torch.equal(found["forget"][0], plain["forget"][0]) != attacked
    step = trained()
    same = wrapper("tamper")(step, inner_steps=0, inner_lr=0.1)["forget"]
    torch.testing.assert_close(same, [2 * g for g in step.gradients()["forget"]])  # no attack: the plain one again
    with pytest.raises(UsageError, match="every"):
        wrapper("tamper")(step, every=0)


def test_what_an_attacker_has_seen_is_never_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two forget terms on the same facts, each of which would put other clusters into its halves."""
    model, data = tiny_model("llama"), tiny_data()
    relearned: set[str] = set()
    held: set[str] = set()
    nll, inner = Engine.nll, Engine.gradients

    def attacked(engine: Engine, rows: Sequence[Row]) -> Tensor:
        relearned.update(row.cluster for row in rows)
        return nll(engine, rows)

    def judged(engine: Engine, index: int, sides: Sequence[str], only: Any = None) -> Any:
        taken = [row for k, t in enumerate(engine.terms) if t.side == "forget" for row in engine.rows(index, k)[1]]
        held.update(row.cluster for row in taken if only is not None and only(row))
        return inner(engine, index, sides, only)

    monkeypatch.setattr(Engine, "nll", attacked)
    monkeypatch.setattr(Engine, "gradients", judged)
    terms = [{"objective": "npo", "data": "forget"}, {"objective": "simnpo", "data": "forget"}]
    edit(model, data, "trained", terms=terms, robust="tamper", steps=1, batch_size=5)
    assert relearned and held and not relearned & held
    alone = dataclasses.replace(data, forget=tuple(f for f in data.forget if f.cluster == data.forget[0].cluster))
    with pytest.raises(UsageError, match="clusters of forget facts back from its attack and there is only one"):
        edit(model, alone, "npo", robust="tamper", steps=1)


def test_a_learning_rate_that_is_far_too_small_is_found_to_be_so() -> None:
    model, data = tiny_model("llama"), tiny_data()

    def moved(rate: str) -> float:
        made = edit(model, data, "npo", optimizer="sgd", lr=1e-5, schedule="constant", warmup=0, steps=8, batch_size=4,
                    retain_batch=8, clip=0.0, combine={"ngdiff": {"rate": rate, "every": 1}})  # fmt: skip
        assert fingerprint(model.module) == model.fingerprint
        changed = dict(made.applied_to(model).module.named_parameters())
        return norm([changed[name] - p for name, p in model.module.named_parameters()])

    assert moved("auto") > 5 * moved("given")


PARTS: dict[str, dict[str, Any]] = {
    "plain": {}, "sam": {"robust": {"sam": {"rho": 0.5}}}, "smoothing": {"robust": {"smoothing": {"sigma": 0.2}}},
    "tamper": {"robust": "tamper"}, "nested": {"robust": ["tamper", {"sam": {"rho": 0.5}}, "smoothing"]},
    "ngdiff": {"combine": "ngdiff"}, "pcgrad": {"combine": "pcgrad"}, "mgda": {"combine": "mgda"},
    "its own rate": {"combine": {"ngdiff": {"rate": "auto", "every": 1}}},
    "two Adams": {"combine": "dual_optim", "optimizer": "descent", "clip": 0.0}, "descent": {"optimizer": "descent"},
    "gru": {"combine": "gru"}, "gru of the optimiser": {"combine": {"gru": {"space": "preconditioned"}}},
    "blur": {"combine": "blur"}, "constraint": {"combine": {"constraint": {"start": 3.0}}},
    "sign": {"optimizer": "sign", "lr": 1e-3}, "sophia": {"optimizer": "sophia", "lr": 1e-3},
    "wrapped and combined": {"robust": "sam", "combine": "constraint", "optimizer": "sophia", "lr": 1e-3},
}  # fmt: skip


def test_every_part_works_in_a_trained_editor_and_changes_what_comes_out() -> None:
    model, data = tiny_model("llama"), tiny_data()

    def made(name: str) -> str:
        return edit(model, data, "npo", seed=1, **{"steps": 2, "batch_size": 4, "warmup": 0, **PARTS[name]}).digest

    digests = {name: made(name) for name in PARTS}
    assert all(made(name) == digests[name] for name in ("nested", "gru", "sophia")), "by the seed alone"
    assert fingerprint(model.module) == model.fingerprint
    assert not any(p.grad is not None for p in model.module.parameters())
    assert len(set(digests.values())) == len(PARTS), "each of them does something of its own"
