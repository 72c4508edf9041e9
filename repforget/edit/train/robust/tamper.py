"""Forgetting that is practised on weights which an attacker has already trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from repforget.edit.train.combine._flat import mix
from repforget.errors import UsageError
from repforget.training import Optimizer, Stepper

if TYPE_CHECKING:
    from repforget.edit.train._data import Row
    from repforget.edit.train._engine import Gradients, StepContext

RATE_TIMES_WIDTH = 0.04  # the learning rate of the attack, times the width of the model


def tamper(
    step: StepContext, *, inner_steps: int = 4, inner_lr: float | Literal["auto"] = "auto",
    attack: Optimizer = "adam", scale: float = 1.0, every: int = 1,
) -> Gradients:  # fmt: skip
    """Let an attacker relearn half of the step's forget rows and add the forget gradient of the other half from there.

    From the current weights ``inner_steps`` steps down the negative log-probability of every other cluster, over all
    forget terms together, give θ'; the weights come back bit for bit, and the plain gradients take ``scale`` times
    g_F(θ') of the other clusters, which passes through the attack as if that were the identity (first-order MAML).
    Source: Tamirisa et al. 2024, arXiv 2408.00761 (TAR), with the forget objective at hand in place of theirs.
    ``inner_lr`` "auto" is 0.04 / width.  Only every ``every``-th step is attacked, and none whose rows are of one
    cluster.  Cost there: ``inner_steps`` + 1 forwards and backwards, a copy of the trained parameters and two
    moments.  It practises against one short attack: other data, longer training or adapters may well get through.
    """
    if inner_steps < 0 or every < 1 or (inner_lr != "auto" and inner_lr <= 0):
        raise UsageError(f"tamper was given {inner_steps} inner steps at {inner_lr}, every {every} steps: give 0 or "
                         "more steps at a positive rate, every 1 or more.")  # fmt: skip
    found = step.gradients()
    rows = step.rows("forget")
    held = set(list(dict.fromkeys(map(_cluster, rows)))[1::2])  # of all terms: what one has seen, none is judged by
    if not held and len({_cluster(r) for t in step.engine.terms if t.side == "forget" for r in t.data.own}) < 2:
        raise UsageError("tamper holds clusters of forget facts back from its attack and there is only one: leave it "
                         "out, or forget more.")  # fmt: skip
    if step.index % every or not held:
        return found
    rate = RATE_TIMES_WIDTH / step.model.width if inner_lr == "auto" else inner_lr
    attacked = [row for row in rows if _cluster(row) not in held]
    half = any(p.dtype == torch.bfloat16 for p in step.parameters)
    attacker = Stepper(step.parameters, steps=max(1, inner_steps), lr=rate, optimizer=attack, schedule="constant",
                       precision="stochastic" if half else "masters", seed=step.index)  # fmt: skip
    with step.restored():
        for number in range(inner_steps):
            attacker.step(number, torch.autograd.grad(step.nll(attacked), step.parameters, allow_unused=True))
        there = step.gradients(("forget",), only=lambda row: _cluster(row) in held)["forget"]
    return {**found, "forget": mix(1.0, found["forget"], scale, there)}


def _cluster(row: Row) -> object:
    """What a row is about; one that says nothing of it stands for itself."""
    return row.cluster or row.ids
