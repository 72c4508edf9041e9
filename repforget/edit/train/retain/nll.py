"""Cross-entropy on retained data."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean", role="retain")
def nll(own: Scores) -> Tensor:
    """Train the retained answers as they are.

    ``-log p`` per token [m], nats.  Source: gradient descent on retained data as in Liu et al. 2022, arXiv 2203.12817.
    Cost: a forward and backward on the retain rows, no reference.

    Weakness: not zero at the start, so it also teaches (and may overfit) the retained facts that are in the batch; says
    nothing about the alternatives to the true answer.
    """
    return -own.logprob
