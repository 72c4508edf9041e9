"""Attacks on hidden states inside a step: where they act, how far, that they work, and that nothing of them stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import tiny_models
import torch
from edit_models import model as tiny
from edit_models import people
from torch import Tensor

from repforget.edit._dispatch import edit as run_editor
from repforget.edit.train._data import Row
from repforget.edit.train._objective import load_part
from repforget.edit.train._pass import HIDDEN, LABELS, Request, read
from repforget.edit.train.robust.latent_adversarial import Pushes, latent_adversarial
from repforget.errors import UsageError
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.records import Site

FORGET = [Row((1, 5, 6, 7, 8), 4), Row((1, 9, 10, 11, 12, 13, 14), 5), Row((1, 5, 6, 20), 3)]
RETAIN = [Row((1, 5, 6, 7, 30), 4), Row((1, 21, 22, 23, 24, 25), 5)]  # the first asks what a forget row asks


@dataclass
class Step:
    """A step that ascends on the forget rows and descends on the retained ones."""

    model: LoadedModel
    forget: Sequence[Row] = tuple(FORGET)
    retain: Sequence[Row] = tuple(RETAIN)

    def rows(self, side: str) -> list[Row]:
        return list(getattr(self, side))

    def nll(self, rows: Sequence[Row]) -> Tensor:
        (found,) = read(self.model, [Request(tuple(rows), frozenset({LABELS}))])
        assert found.scores is not None
        return -found.scores.logprob.mean()

    def gradients(self, sides: Sequence[str] = ("forget", "retain")) -> dict[str, list[Tensor]]:
        with torch.enable_grad():
            losses = {"forget": -self.nll(self.forget), "retain": self.nll(self.retain)}
            parameters = list(self.model.module.parameters())
            return {side: list(torch.autograd.grad(losses[side], parameters, allow_unused=True)) for side in sides}


def step_of(architecture: str = "llama") -> Step:
    model = tiny(architecture)
    model.module.requires_grad_(True)
    return Step(model)


def equal(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> bool:
    return all(a is b is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))  # type: ignore[arg-type]


def hook_count(module: Any) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


@pytest.mark.parametrize("settings", [{"eps": 0.0, "attack_steps": 3}, {"attack_steps": 0}])
def test_without_radius_or_steps_gradients_are_the_plain_ones(settings: dict[str, Any]) -> None:
    step = step_of()
    found, plain = latent_adversarial(step, **settings), step.gradients()
    assert all(equal(found[side], plain[side]) for side in plain)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "gpt_neox", "falcon"])
def test_forget_gradients_feel_the_attack_and_retained_ones_do_not(architecture: str) -> None:
    step = step_of(architecture)
    plain = step.gradients()
    found = latent_adversarial(step, attack_steps=2)
    assert equal(found["retain"], plain["retain"])
    assert not equal(found["forget"], plain["forget"])
    assert hook_count(step.model.module) == 0
    assert equal(step.gradients()["forget"], plain["forget"])


@pytest.mark.parametrize("layers", [[0], [0, 1]])
@pytest.mark.parametrize("eps", [0.05, 1.0])
def test_pushes_stay_in_their_ball_and_bring_the_answers_nearer(layers: list[int], eps: float) -> None:
    step = step_of()
    pushes = Pushes.zero(step.model, FORGET, RETAIN, layers, eps)
    losses = []
    with pushes.added(step.model):
        for _ in range(12):
            losses.append(pushes.descend(step, FORGET, 0.15))
            for layer, x in pushes.at.items():
                assert float(x.norm(dim=-1).max()) <= pushes.radius[layer] * (1 + 1e-6)
                assert not x.requires_grad
                assert torch.equal(x * pushes.inside, x)
                assert not bool(x[:, 0].any())
        losses.append(float(step.nll(FORGET).detach()))
    assert losses[0] == pytest.approx(float(step.nll(FORGET).detach()), rel=1e-6)
    assert losses[-1] < losses[6] < losses[0]
    falls = [b < a for a, b in zip(losses, losses[1:], strict=False)]
    assert sum(falls) >= 10
    if len(layers) == 2:
        assert not torch.equal(pushes.at[0], pushes.at[1])


def test_the_radius_is_in_units_of_the_states() -> None:
    model = tiny()
    pushes = Pushes.zero(model, FORGET, [], [1], 0.5)
    prompts = [row.ids[: row.start] for row in FORGET]
    states = [capture(model, [Site("resid_post", 1)], Batch.pad([ids]), gather="tokens") for ids in prompts]
    lengths = torch.cat([x[Site("resid_post", 1)].norm(dim=-1) for x in states])
    assert pushes.radius[1] == pytest.approx(0.5 * float(lengths.mean()), rel=1e-5)


def test_states_move_by_the_pushes_wherever_the_prompt_stands_and_nowhere_else() -> None:
    model = tiny()
    other = Row((*FORGET[1].ids[: FORGET[1].start], 40, 41, 42), FORGET[1].start)  # the prompt with another answer
    rows = (*RETAIN, FORGET[2], other, FORGET[0], Row((1, 50, 51), 1))
    request = Request(rows, frozenset({HIDDEN}), (0,))
    pushes = Pushes.zero(model, FORGET, RETAIN, [0], 1.0)
    generator = torch.Generator().manual_seed(0)
    pushes.at[0] = torch.randn(pushes.at[0].shape, generator=generator) * pushes.inside
    before = read(model, [request])[0].hidden
    with pushes.added(model):
        with torch.no_grad():
            assert torch.equal(read(model, [request])[0].hidden, before)  # as the untouched model is asked
        with torch.enable_grad():
            moved = (read(model, [request])[0].hidden - before).detach()[:, 0]
    parts = torch.split(moved, [len(row.ids) - 1 for row in rows])
    expected = {2: 2, 3: 1, 4: 0}  # row -> number of its push
    for place, (row, part) in enumerate(zip(rows, parts, strict=True)):
        wanted = torch.zeros_like(part)
        if place in expected:
            wanted[: row.start - 1] = pushes.at[0][expected[place], 1 : row.start]
        torch.testing.assert_close(part, wanted, atol=1e-5, rtol=1e-4)


def test_plain_texts_are_pushed_from_end_to_end() -> None:
    pushes = Pushes.zero(tiny(), [Row((1, 5, 6, 7), 1)], [], [0], 1.0)
    assert pushes.inside[0, :, 0].tolist() == [False, True, True, True]


def test_what_it_cannot_use_is_refused() -> None:
    step = step_of()
    for wrong in ({"eps": -1.0}, {"attack_steps": -1}, {"step_size": 0.0}):
        with pytest.raises(UsageError, match="latent_adversarial was given"):
            latent_adversarial(step, **wrong)
    with pytest.raises(UsageError, match="0 to 1"):
        latent_adversarial(step, layers=[2])
    with pytest.raises(UsageError, match="there are none"):
        latent_adversarial(Step(step.model, forget=()))


def test_it_wraps_a_trained_editor() -> None:
    assert load_part("robust", "latent_adversarial") is latent_adversarial
    common: dict[str, Any] = {"steps": 3, "batch_size": 8, "retain": "nll"}
    model, data = tiny(), people().for_editor()
    batch = Batch.pad(tiny_models.sample_ids(3, 7))
    states = []
    for robust in ("none", {"latent_adversarial": {"eps": 0.0, "attack_steps": 1}}, "latent_adversarial"):
        made = run_editor(model, data, "npo", robust=robust, **common)
        with made.attach(model):
            states.append(capture(model, [Site("resid_post", 1)], batch)[Site("resid_post", 1)])
    torch.testing.assert_close(states[1], states[0], atol=1e-5, rtol=1e-4)
    assert float((states[2] - states[0]).norm()) > 1e-3
    assert hook_count(model.module) == 0
