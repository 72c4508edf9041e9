"""Maximum entropy: every token equally likely where a forget answer stood."""

from __future__ import annotations

import math

from torch import Tensor

from repforget.edit.train._objective import objective


@objective("token_mean")
def max_entropy(logits: Tensor) -> Tensor:
    """Flatten the distribution at the positions of the forget answers.

    ``KL(uniform | p) = -log V - mean_v log p`` per token [m], nats; 0 exactly where all logits are equal; the gradient
    softmax - 1 / V is at most sqrt 2 long.  Source: Yuan et al. 2024, arXiv 2410.08109.
    Cost: one forward and backward over the full vocabulary.

    Weakness: a uniform distribution is what no model has that never knew, so the edit is easy to detect; it destroys
    grammar at these positions first.  It does not show that the answer is not still the most likely token.
    """
    return -math.log(logits.shape[-1]) - logits.log_softmax(-1).mean(-1)
