"""Forget and retain gradients that are each scaled by their own history."""

from __future__ import annotations

import torch
from torch import Tensor

from repforget.edit.train.combine._flat import Flat, mix
from repforget.errors import UsageError

SMALL = 1e-8


def dual_optim(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, retain_steps: int = 5, beta1: float = 0.9,
    beta2: float = 0.98,
) -> Flat:  # fmt: skip
    """Give each side an Adam of its own, and let a step forget or keep in turn.

    Each forget step is followed by ``retain_steps`` that keep (0: every step adds both up); a side's two moments take
    in its own gradients alone, so that the larger side does not set the scale of the other.  Source: 2025, arXiv
    2504.15827 (DualOptim).  The result is the finished step: it needs ``optimizer: descent`` and ``clip: 0``.
    Cost: both gradients at every step, whichever is used; memory: four copies of the gradients.
    Nothing keeps the sides from undoing each other, and only one step in ``retain_steps`` + 1 forgets: give more steps.
    A retain term at its minimum moves at full rate too, by what is rounding, so that facts known by heart can be lost.
    """
    if retain_steps < 0 or not 0 <= beta1 < 1 or not 0 <= beta2 < 1:
        raise UsageError(f"dual_optim was given {retain_steps} retain steps, beta1 {beta1} and beta2 {beta2}: give 0 "
                         "or more steps, and betas of at least 0 and below 1.")  # fmt: skip
    done = int(state.get("steps", 0))
    state["steps"] = torch.tensor(done + 1)
    if retain_steps == 0:
        ours, theirs = (_adam(*side, state, beta1, beta2) for side in (("forget", forget), ("retain", retain)))
        return mix(1.0, ours, 1.0, theirs)
    side, own = ("retain", retain) if done % (retain_steps + 1) else ("forget", forget)
    return _adam(side, own, state, beta1, beta2)


def _adam(side: str, gradient: Flat, state: dict[str, Tensor], beta1: float, beta2: float) -> Flat:
    """The direction of Adam for one side, whose moments it updates."""
    count = int(state.get(f"{side}.count", 0)) + 1
    state[f"{side}.count"] = torch.tensor(count)
    out = []
    for i, g in enumerate(gradient):
        mean = state.setdefault(f"{side}.mean.{i}", torch.zeros_like(g)).mul_(beta1).add_(g, alpha=1 - beta1)
        square = state.setdefault(f"{side}.square.{i}", torch.zeros_like(g)).mul_(beta2).addcmul_(g, g, value=1 - beta2)
        out.append(mean / (1 - beta1**count) / ((square / (1 - beta2**count)).sqrt() + SMALL))
    return out
