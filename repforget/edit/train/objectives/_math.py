"""What several objectives compute, in log space: preferences, odds, weights and divergences."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from repforget.edit.train._objective import Scores
from repforget.errors import UsageError

FLOOR = -1e30  # stands for log 0: times a probability of zero it is zero, where -inf would be no number


def positive(**settings: float) -> None:
    """Raise UsageError for a setting that is not above zero."""
    for name, value in settings.items():
        if not value > 0:
            raise UsageError(f"The setting '{name}' of this objective is {value} and must be positive: give another.")


def sigmoid_loss(margin: Tensor, beta: float) -> Tensor:
    """``-(2 / beta) log sigmoid(beta margin)``: slope -1 at margin zero, for every beta."""
    return -(2 / beta) * functional.logsigmoid(beta * margin)


def preference(won: Scores, won_before: Scores, lost: Scores, lost_before: Scores, beta: float) -> Tensor:
    """Loss of preferring one answer to another by more than the untouched model does, per pair [n]."""
    positive(beta=beta)
    return sigmoid_loss((won.sums - won_before.sums) - (lost.sums - lost_before.sums), beta)


def log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """``log(p / (1 - p))`` of each label [m], exact where p is within rounding of 0 or 1."""
    at = labels.unsqueeze(-1)
    others = logits.scatter(-1, at, -torch.inf).logsumexp(-1)
    return logits.gather(-1, at).squeeze(-1) - others


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    """``sum_v p log(p / q)`` of log-probabilities [m, V], in nats per token [m]."""
    p, q = p.clamp_min(FLOOR), q.clamp_min(FLOOR)
    return (p.exp() * (p - q)).sum(-1)


def js_divergence(p: Tensor, q: Tensor) -> Tensor:
    """``KL(p | m) / 2 + KL(q | m) / 2`` with m the mean of p and q, of log-probabilities [m, V]: 0 to log 2 [m]."""
    p, q = p.clamp_min(FLOOR), q.clamp_min(FLOOR)
    middle = torch.logaddexp(p, q) - math.log(2)
    return (kl_divergence(p, middle) + kl_divergence(q, middle)) / 2
