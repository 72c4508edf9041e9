"""Direct preference for a refusal over the true answer."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective
from repforget.edit.train.objectives._math import preference


@objective("seq_sum_batch_mean", instead="refusal")
def idk_dpo(
    own: Scores, reference: Scores, instead: Scores, instead_reference: Scores, *, beta: float = 0.1
) -> Tensor:
    """Make a refusal more, and the forget answer less likely than under the untouched model.

    ``-(2 / beta) log sigmoid(beta ((log q - log q0) - (log p - log p0)))`` per pair [n], q the refusal, p the answer,
    sums over tokens, nats: the DPO loss (Rafailov et al. 2023, arXiv 2305.18290) times 2 / beta, so that it is NPO
    where the refusal does not move.  Source: Maini et al. 2024, arXiv 2401.06121; published with beta 0.1 and a retain
    weight of 1.
    Cost: forward and backward on both answers; two cached numbers per pair.

    Weakness: the margin may grow by the refusal alone, with the answer left where it was; refuses everything unless
    held back (:func:`answer_preservation`).  A refusal does not show that the fact is gone.
    """
    return preference(instead, instead_reference, own, reference, beta)
