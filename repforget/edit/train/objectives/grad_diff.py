"""Gradient difference: ascent on the forget answers, descent on the retained ones."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean", bounded=False, defaults={"retain": "nll"})
def grad_diff(own: Scores) -> Tensor:
    """Raise the cross-entropy of the forget answers while that of retained facts is trained down.

    ``log p`` per token [m], nats, beside ``nll`` on retained facts.  Source: Liu et al. 2022, arXiv 2203.12817; both
    weights published as 1 (Maini et al. 2024, arXiv 2401.06121).
    Cost: a forward and backward on both sides.

    Weakness: that of :func:`grad_ascent`, only later: once the ascent outgrows the retain loss, everything falls.
    """
    return own.logprob
