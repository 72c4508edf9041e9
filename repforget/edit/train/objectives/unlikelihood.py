"""Unlikelihood of the forget tokens, the gradient of CE-U (cross-entropy unlearning)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from repforget.edit.train._objective import objective
from repforget.edit.train.objectives._math import log_odds


@objective("token_mean")
def unlikelihood(logits: Tensor, labels: Tensor, place: Tensor, *, skip: int = 0) -> Tensor:
    """Lower the probability of the forget tokens, hardest where it is highest, and leave the others in proportion.

    ``-log(1 - p)`` per token [m], nats; 0 for the first ``skip`` tokens of each answer.  Source: Welleck et al. 2019,
    arXiv 1908.04319; its gradient is exactly that of CE-U (Yang 2025, arXiv 2503.01224), the cross-entropy to the
    model's own distribution without the true token: p on the label's logit, at most sqrt 2 in all.  CE-U skips one
    token and has no retain term.
    Cost: one forward and backward; read from logits, as 1 - p of a memorised token is lost in log p.

    Weakness: strong at once on what is memorised, so it needs a retain term or few steps; what is left is the
    model's second choice, which may be nearly right.  Skipped tokens count in the mean.
    """
    loss = -functional.logsigmoid(-log_odds(logits, labels))
    return torch.where(place < skip, torch.zeros_like(loss), loss)
