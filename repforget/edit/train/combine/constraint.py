"""Forgetting under a bound on the retain loss, by a multiplier that learns its price."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from repforget.edit.train.combine._flat import Flat, mix
from repforget.errors import UsageError


def constraint(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, losses: Mapping[str, float], start: float = 1.0,
    rate: float = 1.0, epsilon: float | Literal["auto"] = "auto", slack: float = 0.05, warmup: int = 0,
) -> Flat:  # fmt: skip
    """Minimise the forget loss subject to a retain loss of at most ``epsilon``, by primal-dual steps.

    ``d = g_F + λ g_R`` with ``λ <- max(0, λ + rate (L_R - epsilon))`` once per optimiser step, from the loss over the
    whole step, ``retain_weight`` included; λ begins at ``start`` and stays there for ``warmup`` steps.  ``epsilon``
    "auto" is the first step's retain loss plus ``slack`` (nats).  Source: Entesari et al. 2025, arXiv 2506.05314
    (PDU), with any forget objective.  At its solution ``λ (L_R - epsilon) = 0``; on the way there the bound is
    overstepped.
    """
    if start < 0 or rate < 0:
        raise UsageError(f"The multiplier of a constraint starts at {start} and moves at {rate}: give 0 or more.")
    loss = torch.tensor(float(losses["retain"]), dtype=torch.float64)
    if not state:
        bound = loss + slack if epsilon == "auto" else torch.full_like(loss, epsilon)
        state.update(multiplier=torch.full_like(loss, start), bound=bound, steps=torch.zeros((), dtype=torch.long))
    if int(state["steps"]) >= warmup:
        state["multiplier"] = (state["multiplier"] + rate * (loss - state["bound"])).clamp(min=0)
    state["steps"] = state["steps"] + 1
    return mix(1.0, forget, float(state["multiplier"]), retain)
