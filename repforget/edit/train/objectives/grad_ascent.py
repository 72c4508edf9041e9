"""Gradient ascent on the forget answers: the baseline that collapses."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean", bounded=False, defaults={"retain": "none"})
def grad_ascent(own: Scores) -> Tensor:
    """Raise the cross-entropy of the forget answers without end and without regard for the rest: a baseline.

    ``log p`` per token [m], nats, to be minimised.  Source: Jang et al. 2022, arXiv 2210.01504; published with a
    learning rate of 1e-5 for 5 epochs (TOFU) or one (MUSE), stopped early.
    Cost: one forward and backward.

    Weakness: unbounded below; the gradient is strongest on tokens that are already gone (1 - p on the label's logit),
    so the loss grows linearly in steps and the model collapses.  Near-zero probabilities show damage, not forgetting.
    """
    return own.logprob
