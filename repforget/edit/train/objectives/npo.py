"""Negative preference optimisation: the forget answer as the losing side of a preference without a winner."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from repforget.edit.train._objective import Scores, objective


@objective("seq_sum_batch_mean")
def npo(own: Scores, reference: Scores, *, beta: float = 0.1) -> Tensor:
    """Push each forget answer below its probability under the untouched model, ever more gently as it falls.

    ``-(2 / beta) log sigmoid(-beta (log p - log p0))`` per sequence [n], sums over answer tokens, nats.
    Source: Zhang et al. 2024, arXiv 2404.05868, eq. 3.  At the start it is the gradient of ascent on the sequence sum
    for every ``beta``; the weight 2 sigmoid(beta (log p - log p0)) then falls, so that the loss grows like log t.
    Cost: one forward and backward; the reference is one cached number per sequence.

    Weakness: sums favour long and weakly memorised answers; needs a retain term; what it hides comes back under
    relearning and quantisation more easily than in a model that never knew.
    """
    return -(2 / beta) * functional.logsigmoid(-beta * (own.sums - reference.sums))
