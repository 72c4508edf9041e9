"""Answer preservation: retained prompts prefer their answer to a refusal."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective
from repforget.edit.train.objectives._math import positive, sigmoid_loss


@objective("seq_sum_batch_mean", role="retain", instead="refusal")
def answer_preservation(own: Scores, instead: Scores, *, beta: float = 0.1) -> Tensor:
    """Keep retained answers more likely than a refusal, against refusing everything.

    ``-(1 / beta) log sigmoid(beta (log p(answer) - log p(refusal)))`` per sequence [n], sums over tokens, nats.
    Source: Yuan et al. 2024, arXiv 2410.08109.
    Cost: forward and backward on both answers, no reference.

    Weakness: only the order of the two matters: both may fall together, and nothing else about the answer is held.
    """
    positive(beta=beta)
    return sigmoid_loss(own.sums - instead.sums, beta) / 2
