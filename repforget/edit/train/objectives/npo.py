"""Negative preference optimisation: the forget answer as the losing side of a preference without a winner."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective
from repforget.edit.train.objectives._math import positive, sigmoid_loss


@objective("seq_sum_batch_mean")
def npo(own: Scores, reference: Scores, *, beta: float = 0.1) -> Tensor:
    """Push each forget answer below its probability under the untouched model, ever more gently as it falls.

    ``-(2 / beta) log sigmoid(-beta (log p - log p0))`` per sequence [n], sums over answer tokens, nats.
    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3; published with beta 0.1 and a retain loss of weight 1.  At the
    start it is the gradient of ascent on the sequence sum for every ``beta``; the weight 2 sigmoid(beta (log p -
    log p0)) then falls, so that the forget loss grows like log t, not t.
    Cost: one forward and backward; the reference is one cached number per sequence.

    Weakness: sums favour long and weakly memorised answers; needs a retain term; what it hides comes back under
    relearning and quantisation more easily than in a model that never knew.  A low probability of one wording does
    not show that other wordings are gone.
    """
    positive(beta=beta)
    return sigmoid_loss(reference.sums - own.sums, beta)
