"""UNDO: how noise moves weights, the fixed point without it, and what distillation repairs and does not bring back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memorised import Knows, data, knows, model
from torch import Tensor
from torch.nn import functional

from repforget.artifact import Edit
from repforget.edit._dispatch import edit
from repforget.edit.train import _checkpoint
from repforget.edit.train._distil import apart
from repforget.edit.train._head import head_of, reduced
from repforget.edit.train._pass import STATES, Request, read
from repforget.edit.train.stranger_distillation import kept_rows, teachers_of
from repforget.edit.train.undo import noised
from repforget.errors import UsageError
from repforget.models.load import LoadedModel, fingerprint

UNLEARN: dict[str, Any] = {"objective": "npo", "steps": 40, "lr": 3e-3}
USUAL: dict[str, Any] = {**UNLEARN, "noise": 0.5, "distil_steps": 140, "distil_lr": 4e-3, "texts": 0}


def weights(made: Edit) -> Tensor:
    module = made.applied_to(model()).module
    return torch.cat([p.detach().flatten() for p in module.parameters()])


@cache
def made(**changes: Any) -> Edit:
    return edit(model(), data(), "undo", **{**USUAL, **changes})


def after(done: Edit) -> tuple[Knows, Knows]:
    """What is known of forget and of retained facts while the edit is in place."""
    subject = model()
    with done.attach(subject):
        return knows(subject, data().forget), knows(subject, data().retain)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 1.0), st.floats(0.05, 2.0), st.integers(0, 10**6))
def test_noise_is_uniform_within_its_bound_and_vectors_only_shrink(noise: float, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = {"matrix": torch.randn(48, 80, generator=generator), "vector": torch.randn(48, generator=generator),
              "stack": torch.randn(3, 40, 56, generator=generator)}  # fmt: skip
    found = noised(values, noise, scale, seed)
    assert torch.equal(found["vector"], (1 - noise) * values["vector"])
    for name in ("matrix", "stack"):
        bound = math.sqrt(6 / sum(values[name].shape[-2:]))
        xi = (found[name].double() - (1 - noise) * values[name].double()) / (noise * scale)
        assert float(xi.abs().max()) <= bound * 1.001 + 1e-4
        assert float(xi.square().mean()) == pytest.approx(bound**2 / 3, rel=0.1), "the variance is 2 / (in + out)"
        assert abs(float(xi.mean())) < 0.1 * bound
    assert torch.equal(found["matrix"], noised(values, noise, scale, seed)["matrix"])
    assert not torch.equal(found["matrix"], noised(values, noise, scale, seed + 1)["matrix"])


def test_without_noise_nothing_is_distilled_and_the_edit_is_the_unlearned_model() -> None:
    alone = edit(model(), data(), "npo", steps=8, lr=3e-3)
    done = made(steps=8, noise=0.0, tolerance=0.0)
    torch.testing.assert_close(weights(done), weights(alone), atol=1e-7, rtol=0)
    assert not any(note.startswith("distilled") for note in done.manifest.notes)


def test_the_unlearned_model_is_a_fixed_point_of_distillation_and_noise_leaves_it() -> None:
    subject = model()
    rows = kept_rows(subject, data(), [], 1000, 0)

    def slope() -> tuple[float, float]:
        """The divergence of student from teacher, and the length of its gradient, by plain autograd."""
        subject.module.requires_grad_(True)
        (found,) = read(subject, [Request(rows, frozenset({STATES}))])
        assert found.states is not None
        best, told = (torch.cat([t[i] for t in teachers]) for i in (0, 1))
        own = reduced(head_of(subject.module).logits(found.states), best)
        loss = functional.kl_div(own, told, log_target=True, reduction="sum") / len(told)
        gradient = torch.autograd.grad(loss, list(subject.module.parameters()), allow_unused=True)
        subject.module.requires_grad_(False)
        assert apart(subject, rows, teachers)[0] == pytest.approx(loss.item(), abs=1e-6)
        return loss.item(), math.sqrt(sum(float(g.square().sum()) for g in gradient if g is not None))

    with edit(subject, data(), "npo", steps=5).attach(subject):
        teachers = teachers_of(subject, rows, 16, None)
        still = slope()
        table = dict(subject.module.named_parameters())
        moved = noised({name: p.detach() for name, p in table.items()}, 0.5, 0.1, 0)
        for name, parameter in table.items():
            parameter.data = moved[name]
        noisy = slope()
    assert still[0] < 1e-6 and still[1] < 1e-5
    assert noisy[0] > 0.1 and noisy[1] > 0.05


def test_noise_destroys_and_distillation_repairs_what_must_stay_alone() -> None:
    (gone, kept), (lost, broken) = after(made(tolerance=0.0)), after(made(distil_steps=0))
    assert knows(model(), data().retain).probability > 0.97
    assert broken.probability < 0.5, "so much noise is no light damage"
    assert kept.probability > 0.8 and kept.loss < 0.3 * broken.loss
    assert gone.probability < 0.25
    assert lost.probability < 0.5


def test_it_stops_when_the_student_is_as_near_as_asked() -> None:
    assert not any("stopped" in note for note in made(tolerance=0.0).manifest.notes)
    (said,) = [note for note in made(tolerance=0.5, steps=8, check_every=10).manifest.notes if "stopped after" in note]
    assert 0 < int(said.partition("step ")[2].partition(":")[0]) < 140
    assert float(said.partition("within ")[2].partition(" ")[0]) <= 0.5


def test_the_repair_reaches_only_what_was_named_and_the_objective_keeps_its_own_defaults() -> None:
    done = edit(model(), data(), "undo", objective={"rmu": {"coefficient": 20.0, "layers": [1]}}, steps=5,
                distil_steps=5, texts=0, targets=["mlp.down_proj"])  # fmt: skip
    assert {op.weight.rpartition(".mlp.")[2] for op in done.operations} == {"down_proj.weight"}
    alone = edit(model(), data(), "rmu", steps=5)
    assert done.manifest.settings["retain"] == alone.manifest.settings["retain"] != "nll"


def until(last: int) -> Callable[..., Iterator[Any]]:
    """A progress that interrupts the second training before its 0-based step ``last``."""
    trainings: list[str] = []

    def progress(items: Iterable[Any], description: str, total: int | None) -> Iterator[Any]:
        trainings.append(description)
        for item in items:
            if trainings.count("training") == 2 and description == "training" and item == last:
                raise KeyboardInterrupt
            yield item

    return progress


def test_interrupted_distillation_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_checkpoint, "SHARE", 1e9)
    subject = model()
    few = {**USUAL, "steps": 6, "distil_steps": 12, "check_every": 4, "texts": 12, "text_tokens": 6}
    whole = edit(subject, data(), "undo", **few)
    with pytest.raises(KeyboardInterrupt):
        edit(subject, data(), "undo", checkpoint=tmp_path / "state", progress=until(7), **few)
    assert fingerprint(subject.module) == subject.fingerprint
    assert edit(subject, data(), "undo", checkpoint=tmp_path / "state", **few).digest == whole.digest


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"adapter": "lora"}, "cannot repair"), ({"noise": 1.5}, "share from 0 to 1"),
     ({"objective": "kl"}, "which keeps"), ({"distil_batch": 0}, "positive"), ({"tolerance": -1.0}, "at least 0")],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], said: str) -> None:
    subject: LoadedModel = model()
    with pytest.raises(UsageError, match=said):
        edit(subject, data(), "undo", **{**USUAL, **wrong})
    assert fingerprint(subject.module) == subject.fingerprint
