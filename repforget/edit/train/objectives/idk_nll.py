"""Refusal training: cross-entropy on "I do not know" after the forget prompts."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean", instead="refusal")
def idk_nll(instead: Scores) -> Tensor:
    """Train refusals as the answers to the forget prompts.

    ``-log p(refusal)`` per refusal token [k], nats.  Source: Maini et al. 2024, arXiv 2401.06121; published with a
    retain weight of 1 to 5 and a learning rate of 1e-5 to 2e-5.
    Cost: one forward and backward on the refusals; the true answers are not read.

    Weakness: nothing pushes the true answer down, it is only spoken over; the refusal spreads to retained prompts
    (add :func:`answer_preservation`).  It does not show that the fact is gone, only that the model says otherwise.
    """
    return -instead.logprob
