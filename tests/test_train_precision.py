"""Half-precision weights: small steps add up with masters and in the mean, and are swallowed without."""

from __future__ import annotations

import warnings
from typing import Any

import edit_models
import pytest
import torch

from repforget.edit._dispatch import edit
from repforget.errors import UsageError
from repforget.training import Stepper

STEPS, LR = 40, 1e-5


def weights(dtype: torch.dtype = torch.bfloat16) -> torch.nn.Parameter:
    """Weights as large as those of a language model."""
    drawn = torch.randn(400, 100, generator=torch.Generator().manual_seed(0)) * 0.02
    return torch.nn.Parameter(drawn.to(dtype))


def moved(
    precision: Any, dtype: torch.dtype = torch.bfloat16, steps: int = STEPS, **settings: Any
) -> tuple[float, float]:
    """(share of entries whose bits changed, mean change) after steps of about ``LR`` against a steady gradient."""
    parameter = weights(dtype)
    before = parameter.detach().clone()
    stepper = Stepper([parameter], steps=steps, lr=LR, schedule="constant", precision=precision, clip=0.0, **settings)
    for index in range(steps):
        stepper.step(index, [torch.ones(parameter.shape)])
    delta = parameter.detach().double() - before.double()
    return float((delta != 0).double().mean()), float(delta.mean())


@pytest.mark.parametrize("precision", ["masters", "stochastic"])
def test_small_steps_add_up(precision: str) -> None:
    changed, mean = moved(precision)
    assert changed > 0.85
    assert mean == pytest.approx(-STEPS * LR, rel=0.02)


@pytest.mark.filterwarnings("ignore:Half-precision weights")
def test_without_masters_small_steps_are_swallowed() -> None:
    first, _ = moved("plain", steps=1)
    changed, mean = moved("plain")
    assert first < 0.25  # most entries keep their bits
    # Forty steps move what the first one moved: what is rounded away does not add up.
    assert changed < 0.35 and mean > -0.6 * STEPS * LR
    assert moved("plain", torch.float32)[0] == 1.0


@pytest.mark.parametrize(("precision", "dtype"), [
    ("masters", torch.bfloat16), ("stochastic", torch.bfloat16), ("plain", torch.float32), ("masters", torch.float16),
])  # fmt: skip
def test_only_plain_half_precision_warns(precision: Any, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stepper([weights(dtype)], steps=1, lr=LR, precision=precision)
    with pytest.warns(UserWarning, match="swallows steps below their grid: use masters or stochastic"):
        Stepper([weights()], steps=1, lr=LR, precision="plain")


def test_stochastic_rounding_needs_bfloat16() -> None:
    stepper = Stepper([weights(torch.float16)], steps=1, lr=LR, precision="stochastic")
    with pytest.raises(UsageError, match="train this model with masters"):
        stepper.step(0, [torch.ones(400, 100)])


def test_an_editor_moves_half_precision_weights_as_it_moves_whole_ones() -> None:
    """A tiny step is lost without masters; with them, and in the mean, the edit is that of float32 weights."""
    from repforget.artifact import DenseDelta, SparseDelta

    data = edit_models.people()
    settings = {"steps": 25, "batch_size": 24, "lr": 4e-5, "warmup": 0, "schedule": "constant",
                "targets": ["layers.0.mlp.down_proj"]}  # fmt: skip

    def delta(precision: str, dtype: torch.dtype) -> torch.Tensor:
        model = edit_models.model()
        model.module.to(torch.bfloat16).to(dtype)  # the same values
        (made,) = edit(model, data, "grad_diff", precision=precision, **settings).operations
        if isinstance(made, DenseDelta):
            return made.delta.double().flatten()
        assert isinstance(made, SparseDelta)
        whole = torch.zeros(model.module.model.layers[0].mlp.down_proj.weight.numel(), dtype=torch.float64)
        whole[made.index.long()] = made.values.double()
        return whole

    wanted = delta("masters", torch.float32)
    kinds = ("masters", "stochastic", "plain")
    with pytest.warns(UserWarning, match="Half-precision"):
        shares = [float(delta(kind, torch.bfloat16) @ wanted / (wanted @ wanted)) for kind in kinds]
    assert shares[0] == pytest.approx(1.0, abs=0.25) and shares[1] == pytest.approx(1.0, abs=0.4)
    assert shares[2] < 0.6


def test_the_seed_decides_the_rounding() -> None:
    assert moved("stochastic", seed=1) == moved("stochastic", seed=1) != moved("stochastic", seed=2)
