"""Representation misdirection: early states of the forget texts become one random vector."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from repforget.edit.train._depth import at_depth
from repforget.edit.train._objective import objective

DEPTH = 7 / 32
RATE = 10.0  # few matrices have to move far
DEFAULTS = {"retain": {"hidden_state": {}}, "retain_weight": 100.0, "steps": 300}


@objective("token_mean", layers=at_depth(DEPTH), targets="mlp_down", span=3, rate=RATE, defaults=DEFAULTS)
def rmu(
    hidden: Tensor, *, layers: Literal["auto"] | list[int] = "auto", coefficient: float = 20.0,
    u_dist: Literal["normal", "uniform01"] = "normal", seed: int = 0,
) -> Tensor:  # fmt: skip
    """Pull the states of the forget texts at ``layers`` towards one random vector of length ``coefficient``.

    ``|h - coefficient u|² / d`` per token [m], mean over layers; u a unit vector drawn once per ``seed``; ``u_dist``:
    symmetric, or non-negative ("uniform01", as released), where any two draws share a direction (cosine 0.75).
    Source: Li et al. 2024, arXiv 2403.03218.  ``coefficient`` is absolute and has to exceed the usual norm of
    the states by far; :func:`adaptive_rmu` measures it instead.  By default it trains the MLP output projections of
    the last three layers up to the one read, at ten times the usual rate, against :func:`hidden_state` at the same
    layers with weight 100.
    Cost: a forward and a backward up to the deepest layer read.

    Weakness: near texts become gibberish too, and the direction it adds is one: who finds and removes it, or
    fine-tunes on a few unrelated texts, gets most of the knowledge back.  It does not show that later layers could
    not read the answer from what is left.
    """
    return (hidden.float() - coefficient * direction(hidden, u_dist, seed)).square().mean((1, 2))


def direction(hidden: Tensor, u_dist: Literal["normal", "uniform01"], seed: int) -> Tensor:
    """The random unit vector u [d] of a seed, on the device of ``hidden`` [.., d]."""
    draw = torch.randn if u_dist == "normal" else torch.rand
    u = draw(hidden.shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    unit: Tensor = u / u.norm()
    return unit.to(hidden.device, torch.float32)
