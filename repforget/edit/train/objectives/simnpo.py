"""Simple NPO: the preference of NPO on the mean per token, without the untouched model."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective
from repforget.edit.train.objectives._math import positive, sigmoid_loss


@objective("seq_mean_batch_mean")
def simnpo(own: Scores, *, beta: float = 2.5, delta: float = 0.0) -> Tensor:
    """Push each forget answer below a fixed probability per token, whatever its length and its start.

    ``-(2 / beta) log sigmoid(beta (l - delta))`` per sequence [n], l the mean negative log-probability per answer
    token.  Source: Fan et al. 2024, arXiv 2410.07163; the paper writes sigmoid(beta l - gamma): gamma = beta * delta.
    Published: beta 2.5 with forget weight 0.1375 (TOFU forget05), 4.5 with 0.125 (forget10), delta 0, retain 1.  The
    weight 2 sigmoid(beta (delta - l)) stops it by itself: at beta 2.5, 0.94 where l = 0.05 and 0.004 where l = 2.5.
    Cost: one forward and backward, no reference.

    Weakness: very sensitive to the ratio of the forget and retain weights; it stops at the same probability for facts
    that were known well and hardly.  It does not show that a weakly known fact was touched at all.
    """
    positive(beta=beta)
    return sigmoid_loss(-own.means - delta, beta)
