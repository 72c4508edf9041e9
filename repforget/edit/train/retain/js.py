"""Bounded divergence from the untouched model on retained data."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import objective
from repforget.edit.train.objectives._math import js_divergence


@objective("token_mean", role="retain")
def js(logits: Tensor, teacher: Tensor) -> Tensor:
    """Hold the distribution of the untouched model at the retained answers, no token worth more than log 2.

    ``JS(p0 | p)`` per token [m], in 0 to log 2 nats, 0 with zero gradient at the start.  Source: Singh et al. 2025,
    arXiv 2509.02820.  Cost: that of ``kl``.

    Weakness: near the start a quarter of the pull of ``kl``, and a token that is lost altogether pulls hardly at all.
    """
    return js_divergence(teacher, logits.log_softmax(-1))
