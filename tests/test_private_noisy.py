"""Noisy retain fine-tuning: its formulas against densities on a grid, and the editor against its own bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from test_private_train import records  # the same small world

from repforget.artifact import Edit, LowRankDelta, load_edit
from repforget.edit._dispatch import edit as run_editor
from repforget.edit.exact.noisy_finetuning import _balanced
from repforget.errors import UsageError
from repforget.gaussian import hockey_stick
from repforget.guarantee import unearned
from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel, wrap
from repforget.private import noisy as theory
from repforget.private import run
from repforget.private.units import Randomness


def approximate(rho: float, delta: float) -> float:
    """Epsilon at delta of a rho-zero-concentrated mechanism (Bun and Steinke 2016, Proposition 1.3)."""
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


GRID = np.linspace(-12, 12, 2401)
STEP = GRID[1] - GRID[0]


def spread(density: np.ndarray, image: np.ndarray, deviation: float) -> np.ndarray:
    """The density after x -> image(x) + N(0, deviation^2)."""
    return (density * STEP) @ stats.norm.pdf(GRID[None, :], image[:, None], deviation)


def ends(starts: tuple[float, float], move: Callable[[np.ndarray], np.ndarray], deviation: float, steps: int) -> Any:
    found = []
    for start in starts:
        density = stats.norm.pdf(GRID, float(move(np.array([start]))[0]), deviation)
        for _ in range(steps - 1):
            density = spread(density, move(GRID), deviation)
        found.append(density)
    return found


def test_contraction_of_a_clipped_noisy_step() -> None:
    assert theory.contraction(1.0, 0.5, 0.5) == pytest.approx(0.50986, abs=1e-5)
    assert theory.contraction(1.0, 0.5, 0.5) ** 18 <= 1e-5 < theory.contraction(1.0, 0.5, 0.5) ** 17
    assert theory.contracting_deviation(1.0, 1e-5, 0.5, 18) < 0.5 < theory.contracting_deviation(1.0, 1e-5, 0.5, 17)
    noise = theory.contracting_deviation(1.0, 1e-5, 0.5, 18)
    assert theory.contraction(1.0, 0.5, noise) ** 18 == pytest.approx(1e-5, rel=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_two_clipped_runs_are_as_close_as_is_said(steps: int) -> None:
    radius, deviation, epsilon = 1.0, 0.8, 0.7
    # maps that pull two runs apart as far as the clipping lets them, and then a gentle one
    for move in (lambda x: np.clip(40 * x, -radius, radius), lambda x: np.clip(0.9 * x + 0.1, -radius, radius)):
        p, q = ends((1.0, -1.0), move, deviation, steps)
        found = float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * STEP)
        assert found <= theory.contraction(epsilon, radius, deviation) ** steps + 1e-5
    if steps == 1:
        p, q = ends((1.0, -1.0), lambda x: np.clip(x, -radius, radius), deviation, 1)
        exact = float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * STEP)
        assert exact == pytest.approx(theory.contraction(epsilon, radius, deviation), abs=1e-4)


def test_rho_is_the_published_formula_and_continuous_in_the_decay() -> None:
    c0, c1, lr, decay, steps, noise = 0.7, 1.3, 0.05, 2.0, 11, 0.4
    a = 1 - lr * decay
    d = 2 * c0 * a**steps + 2 * c1 / decay * (1 - a**steps)
    expected = d**2 * (1 - a**2) / (2 * noise**2 * (1 - a ** (2 * steps)))
    assert theory.Descent(c0, c1, lr, steps, decay).rho(noise) == pytest.approx(expected, rel=1e-12)
    flat = theory.Descent(c0, c1, lr, steps)
    assert flat.rho(noise) == pytest.approx((2 * c0 + 2 * lr * c1 * steps) ** 2 / (2 * noise**2 * steps), rel=1e-12)
    assert theory.Descent(c0, c1, lr, steps, 1e-7).rho(noise) == pytest.approx(flat.rho(noise), rel=1e-5)


@given(st.floats(0.1, 5), st.floats(0.1, 3), st.floats(0.01, 0.5))
@settings(max_examples=50, deadline=None)
def test_the_best_number_of_steps(c0: float, c1: float, lr: float) -> None:
    exact = c0 / (lr * c1)  # what the rate "auto" inverts
    best = min({max(1, math.floor(exact)), math.ceil(exact)}, key=lambda t: theory.Descent(c0, c1, lr, t).rho(1.0))
    least = theory.Descent(c0, c1, lr, best).rho(1.0)
    assert all(least <= theory.Descent(c0, c1, lr, t).rho(1.0) + 1e-12 for t in (best - 1, best + 1, 3 * best) if t)


def test_without_gradients_it_is_the_divergence_of_two_gaussians() -> None:
    c0, lr, decay, steps, noise = 1.5, 0.1, 3.0, 6, 0.3
    a = 1 - lr * decay
    variance = noise**2 * sum(a ** (2 * i) for i in range(steps))
    kl = (2 * c0 * a**steps) ** 2 / (2 * variance)
    assert theory.Descent(c0, 0.0, lr, steps, decay).rho(noise) == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_two_descents_are_as_close_as_is_said(decay: float) -> None:
    c0, c1, lr, steps, noise = 1.0, 1.0, 0.3, 4, 0.9
    plan = theory.Descent(c0, c1, lr, steps, decay)
    # the gradient that drives two runs apart, clipped
    p, q = ends((c0, -c0), lambda x: x - lr * (np.clip(-30 * x, -c1, c1) + decay * x), noise, steps)
    renyi = math.log(float((p**2 / np.maximum(q, 1e-300)).sum() * STEP))  # of order 2: at most 2 rho
    assert 0.2 * 2 * plan.rho(noise) < renyi <= 2 * plan.rho(noise) + 1e-6


@given(st.floats(0.05, 20), st.floats(1e-9, 0.1))
@settings(max_examples=50, deadline=None)
def test_budgets_are_met_exactly(epsilon: float, delta: float) -> None:
    assert approximate(theory.concentrated(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-6)
    plan = theory.Descent(0.3, 1.0, 0.1, 5)
    assert approximate(plan.rho(plan.deviation(epsilon, delta)), delta) == pytest.approx(epsilon, rel=1e-6)
    noise = theory.output_deviation(epsilon, delta, 0.3)
    assert hockey_stick(epsilon, 0.6 / noise) == pytest.approx(delta, rel=1e-3)
    if epsilon < 1:
        assert noise <= math.sqrt(8 * math.log(1.25 / delta)) * 0.3 / epsilon


# --- the editor -------------------------------------------------------------------------------------------------------


def world() -> Knowledge:
    def items(prefix: str, names: list[str]) -> list[Item]:
        return [Item(id=f"{prefix}-{n}", cluster=f"{prefix}-{n}", relation="born in", answer=city,
                     prompt=f"where was {n} born ?", statements=(f"{n} was born in",))
                for n, city in zip(names, ("Berlin", "Paris", "Rome", "Oslo") * 2, strict=True)]  # fmt: skip

    people = ["Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon"]
    return Knowledge.build("small", items("f", people), items("r", [f"w{n}" for n in range(40, 48)]))


def base(name: str = "llama") -> LoadedModel:
    return wrap(tiny_models.build(name), tiny_models.tiny_tokenizer(), name)


def vector(edit: Edit, model: LoadedModel) -> torch.Tensor:
    """All weights after the edit, as one vector."""
    return torch.cat([p.detach().flatten() for p in edit.applied_to(model).module.parameters()]).double()


@pytest.mark.parametrize("rank", [2, None])
def test_runs_from_two_trainings_end_as_near_as_the_theorem_assumes(rank: int | None, tmp_path: Path) -> None:
    model, k = base(), world()
    first = run(model, records(), tmp_path / "a", rank=rank, epochs=4, lr=1e-2)
    run(model, records()[::-1][:4], tmp_path / "b", rank=rank, epochs=2, lr=1e-2, seed=7)
    for bounded in ("gradient", "model", "output"):
        own = {"bounded": bounded, "start": 0.05, "steps": 3, "repair": 0, "epsilon": 50.0, "secret": False}
        one, two = (run_editor(model, k, "noisy_finetuning", training=str(tmp_path / n), **own) for n in "ab")
        assert one.manifest.guarantee is not None and one.manifest.guarantee.numbers["start"] == 0.05
        if rank is None:  # weights are the coordinates
            far = float((vector(one, model) - vector(two, model)).norm())
            bound = theory.Descent(0.05, 1.0, one.manifest.settings["lr"], 3).distance if bounded == "gradient" else 0.1
            assert far <= bound + 1e-4
            assert float((vector(first, model) - vector(one, model)).norm()) > bound, "the trainings lie further apart"
        assert one.digest != two.digest


def test_no_step_goes_further_than_its_clipping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Randomness, "add_noise", lambda self, step, sums, deviation: list(sums))
    model, k = base(), world()
    run(model, records(), tmp_path / "a", rank=None, epochs=2, lr=1e-2)
    here = torch.cat([p.detach().flatten() for p in model.module.parameters()]).double()
    for bounded, most in (("gradient", 0.05 + 3 * 0.01), ("model", 0.05)):
        own = {"bounded": bounded, "start": 0.05, "gradient": 0.01, "lr": 1.0, "steps": 3, "repair": 0}
        made = run_editor(model, k, "noisy_finetuning", training=str(tmp_path / "a"), **own)
        assert 0.04 < float((vector(made, model) - here).norm()) <= most + 1e-4


def test_noise_is_what_the_budget_asks_for(tmp_path: Path) -> None:
    model, k = base(), world()
    run(model, records(), tmp_path / "a", rank=None, epochs=1)
    own = {"training": str(tmp_path / "a"), "repair": 0}
    made = run_editor(model, k, "noisy_finetuning", **own, bounded="output", secret=False, seed=3)
    moved = vector(made, model) - torch.cat([p.detach().flatten() for p in model.module.parameters()]).double()
    assert float(moved.std()) == pytest.approx(theory.output_deviation(8.0, 1e-5, 0.01), rel=0.02)
    again = run_editor(model, k, "noisy_finetuning", **own, bounded="output", secret=False, seed=4)
    assert again.digest != made.digest and "edit.json and train.json hold it" in str(made.manifest.guarantee)
    one, two = (run_editor(model, k, "noisy_finetuning", **own) for _ in "ab")
    assert one.digest != two.digest, "without being asked to, nobody can draw the noise again"
    assert "operating system" in str(one.manifest.guarantee)


@pytest.mark.parametrize("rank", [2, None])
def test_on_the_trained_model_it_leads_to_the_same_weights(rank: int | None, tmp_path: Path) -> None:
    model, k = base(), world()
    trained = run(model, records(), tmp_path / "a", rank=rank, epochs=2, lr=1e-2).applied_to(model)
    own = {"training": str(tmp_path / "a"), "steps": 2, "repair": 2, "secret": False}
    assert trained.fingerprint != model.fingerprint
    here, there = (run_editor(m, k, "noisy_finetuning", **own) for m in (model, trained))
    assert float((vector(here, model) - vector(there, trained)).abs().max()) < 1e-4


def test_a_trained_model_in_half_precision_is_refused(tmp_path: Path) -> None:
    own = base()
    model = wrap(own.module.to(torch.bfloat16), own.tokenizer, "half")
    trained = run(model, records(), tmp_path / "a", rank=2, epochs=2, lr=1e-2).applied_to(model)
    with pytest.raises(UsageError, match="give the model before the training"):
        run_editor(trained, world(), "noisy_finetuning", training=str(tmp_path / "a"))
    made = run_editor(model, world(), "noisy_finetuning", training=str(tmp_path / "a"), steps=1, repair=0)
    assert made.manifest.guarantee is not None


@pytest.mark.parametrize("out,width", [(4, 12), (12, 4), (6, 7)])
def test_balanced_factors_are_the_same_product_of_the_least_norm(out: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for rank in (2, 8):  # 8 is more than some of these matrices have
        u, v = (torch.randn(*shape, generator=generator) for shape in ((out, rank), (rank, width)))
        op = LowRankDelta("w", u, v)
        left, right = _balanced(op)
        torch.testing.assert_close(left @ right, op.u @ op.v, atol=1e-5, rtol=1e-5)
        squares = float(left.square().sum() + right.square().sum())
        assert squares == pytest.approx(2 * float(torch.linalg.matrix_norm(op.u @ op.v, "nuc")), rel=1e-5)


def test_what_it_says_is_earned_saved_and_lost_when_scaled(tmp_path: Path) -> None:
    model, k = base("gpt2"), world()
    run(model, records(), tmp_path / "a", rank=2, epochs=1)
    made = run_editor(model, k, "noisy_finetuning", training=str(tmp_path / "a"), steps=2, repair=3)
    held = load_edit(made.save(tmp_path / "edit")).manifest.guarantee
    assert held == made.manifest.guarantee and held is not None and held.kind == "certified"
    assert not unearned(" ".join(text for _, text in held.lines()), [held])
    assert not unearned(" ".join(made.manifest.notes))
    assert made.scaled(0.5).manifest.guarantee is None
    run(model, records(), tmp_path / "b", rank=None, epochs=1)
    ruined = run_editor(model, k, "noisy_finetuning", training=str(tmp_path / "b"), start=50.0, steps=2, repair=0)
    assert "ruins the model" in ruined.manifest.notes[0] and "ruins" not in made.manifest.notes[0]


def test_refusals(tmp_path: Path) -> None:
    model, k = base(), world()
    made = run(model, records(), tmp_path / "a", rank=2, epochs=1)
    made_elsewhere = run_editor(model, k, "noisy_finetuning", training=str(tmp_path / "a"), steps=1, repair=0)
    made_elsewhere.save(tmp_path / "other")

    def ask(m: LoadedModel = model, folder: str = "a", **own: Any) -> Edit:
        return run_editor(m, k, "noisy_finetuning", training=str(tmp_path / folder), **own)

    with pytest.raises(UsageError, match="neither that model nor"):
        ask(made.scaled(2.0).applied_to(model))
    with pytest.raises(UsageError, match="repforget train"):
        ask(folder="other")
    with pytest.raises(UsageError, match="no budget"):
        ask(delta=1.5)
    with pytest.raises(UsageError, match="no budget"):
        ask(epsilon=1e6)
    with pytest.raises(UsageError, match="oversteps"):
        ask(lr=1.0, decay=2.0)
    with pytest.raises(UsageError, match="above 0"):
        ask(start=0.0)


def test_steps_have_noise_of_their_own() -> None:
    source = Randomness(0)
    zero = [torch.zeros(50)]
    assert not torch.equal(source.add_noise(0, zero, 1.0)[0], source.add_noise(1, zero, 1.0)[0])
