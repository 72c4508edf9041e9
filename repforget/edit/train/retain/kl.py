"""Divergence of the model from the untouched one on retained data."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import objective
from repforget.edit.train.objectives._math import kl_divergence


@objective("token_mean", role="retain")
def kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """Hold the whole distribution of the untouched model at the retained answers, all that it finds likely.

    ``sum_v p0 log(p0 / p)`` per token [m], nats: teacher first, answer tokens only, 0 with zero gradient at the start.
    Source: Maini et al. 2024, arXiv 2401.06121.
    Cost: a forward and backward on the retain rows and their teacher log-probabilities (cached, or one more forward).

    Weakness: at the first step it holds nothing, and it also preserves what the untouched model gets wrong.
    """
    return kl_divergence(teacher, logits.log_softmax(-1))
