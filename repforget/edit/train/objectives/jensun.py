"""JensUn: the Jensen-Shannon divergence to a short refusal, on both sides bounded."""

from __future__ import annotations

import math

from torch import Tensor

from repforget.edit.train._objective import objective


@objective("token_mean", instead="refusal", defaults={"retain": "js"})
def jensun(logits: Tensor, pattern: Tensor) -> Tensor:
    """Move each position of a forget answer towards the token that a refusal, repeated along it, has there.

    ``JS(one-hot(pattern) | q) = log 2 - ((1 + p) log(1 + p) - p log p) / 2`` per token [m], in 0 to log 2, p the
    probability of the ``pattern`` token [m].  Source: Singh et al. 2025, arXiv 2509.02820; published with one pattern
    ("No idea"), js to the untouched model on retained data, both weights 1, learning rate 8e-6, 10 epochs.
    Cost: one forward and backward, and a teacher on retained data.

    Weakness: the gradient falls to zero with p log(1 / p): a refusal that the model finds impossible is not learned.
    The true answer is pushed down only through the refusal, and the pattern is read behind the true answer's tokens.
    """
    logp = logits.log_softmax(-1).gather(-1, pattern.unsqueeze(-1)).squeeze(-1)
    p = logp.exp()
    return math.log(2) - ((1 + p) * p.log1p() - p * logp) / 2
