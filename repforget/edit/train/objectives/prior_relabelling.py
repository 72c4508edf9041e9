"""Relabelling by the prior: another answer of the relation at every step, as often as it occurs."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean", instead="fresh")
def prior_relabelling(instead: Scores) -> Tensor:
    """Train each forget prompt towards the distribution of answers that its relation has among other subjects.

    ``-log p(answer drawn)`` per token [k], nats; a fresh answer is drawn at every step from the pool of the relation,
    in proportion to its frequency, the true one included.  A method of this project: the expected loss has its minimum
    where the model answers as one that knows the relation but not the subject, which is what a model that never saw
    the fact comes nearest to; one fixed wrong answer would teach a new false fact instead.
    Cost: one forward and backward; the true answers are not read.

    Weakness: the draws are noisy, so it needs small steps at the end; pools of few answers leave the true one likely;
    it does not show that the path from the subject to the answer is gone rather than drowned in noise.
    """
    return -instead.logprob
