"""UNDIAL: distillation from the untouched model with the logit of the true token lowered."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from repforget.edit.train._objective import objective
from repforget.edit.train.objectives._math import kl_divergence, log_odds
from repforget.errors import UsageError


@objective("token_mean")
def undial(
    logits: Tensor, labels: Tensor, teacher: Tensor, *, beta: float | Literal["auto"] = "auto",
    target_probability: float = 0.01,
) -> Tensor:  # fmt: skip
    """Keep the untouched model's distribution at the forget answers but for the true token, which becomes unlikely.

    ``KL(softmax(log p0 - beta one-hot(label)) | p)`` per token [m], nats: the published cross-entropy less a constant,
    so that 0 is the target itself.  Source: Dong et al. 2024, arXiv 2402.10052; published with beta 3, 10 (default) or
    30, LoRA of rank 8, learning rate 1e-4, 10 epochs and no retain term.  beta 0 changes nothing; an infinite one has
    at the start the gradient of :func:`unlikelihood`.  A fixed beta 10 leaves a token of p0 = 1 - 1e-6 at 0.978:
    "auto" takes logit(p0) - logit(``target_probability``) for each token, 0 where p0 is below it already.
    Cost: one forward and backward; teacher log-probabilities at the forget answers only, once.

    Weakness: the target keeps the untouched model's ranking of everything else, so that its second choice takes over;
    it does not show that later tokens of an answer are unknown, as each is read behind the true ones.
    """
    if not 0 < target_probability < 1:
        raise UsageError(f"The target_probability of UNDIAL is {target_probability}: give a number between 0 and 1.")
    odds, wanted = log_odds(teacher, labels), math.log(target_probability / (1 - target_probability))
    shift = (odds - wanted).clamp_min(0) if beta == "auto" else odds.new_full(odds.shape, beta)
    aim = teacher.scatter_add(-1, labels.unsqueeze(-1), -shift.unsqueeze(-1)).log_softmax(-1)
    return kl_divergence(aim, logits.log_softmax(-1))
