"""Representation misdirection whose random vector is as long as the model's own states ask for."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from repforget.edit.train._depth import at_depth
from repforget.edit.train._objective import objective
from repforget.edit.train.objectives.rmu import DEFAULTS, DEPTH, RATE, direction


@objective("token_mean", layers=at_depth(DEPTH), targets="mlp_down", span=3, rate=RATE, defaults=DEFAULTS)
def adaptive_rmu(
    hidden: Tensor, *, layers: Literal["auto"] | list[int] = "auto", scale: float = 5.0,
    u_dist: Literal["normal", "uniform01"] = "normal", norms: Tensor, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Pull the states of the forget texts at ``layers`` towards a random vector ``scale`` times their usual length.

    ``|h - scale · norm_l u|² / d`` per token [m], mean over layers; norm_l is the mean length of the untouched
    model's states at that layer over many forget texts, without first tokens; u and ``u_dist`` as in :func:`rmu`.
    Source: Huu-Tien et al. 2024, arXiv 2408.06223; there the length comes from the first batch of each topic.
    Multiplying all states by k multiplies the target by k.  Trained and kept by default: as in :func:`rmu`.
    Cost: that of :func:`rmu` and one forward over at most a few hundred forget texts.

    Weakness: that of :func:`rmu`; late layers give way only to a large ``scale``.  It does not show that the answer
    cannot be read from what is left.
    """
    target = scale * norms.float()[:, None] * direction(hidden, u_dist, seed)
    return (hidden.float() - target).square().mean((1, 2))
