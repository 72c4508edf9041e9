"""Divergence of the untouched model from the trained one on retained data."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import objective
from repforget.edit.train.objectives._math import kl_divergence


@objective("token_mean", role="retain")
def rkl(logits: Tensor, teacher: Tensor) -> Tensor:
    """Keep the model from saying at the retained answers what the untouched one would not.

    ``sum_v p log(p / p0)`` per token [m], nats: student first, 0 with zero gradient at the start.
    Cost: that of ``kl``.

    Weakness: mode-seeking: it may drop likely answers of the untouched model so long as it adds no unlikely ones.
    """
    return kl_divergence(logits.log_softmax(-1), teacher)
