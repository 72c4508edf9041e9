"""Alternate preference optimisation: direct preference for a plausible other answer."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective
from repforget.edit.train.objectives._math import preference


@objective("seq_sum_batch_mean", instead="alternative")
def altpo(own: Scores, reference: Scores, instead: Scores, instead_reference: Scores, *, beta: float = 0.1) -> Tensor:
    """Make a plausible other answer more, and the forget answer less likely than under the untouched model.

    The loss of :func:`idk_dpo` with another answer of the same kind as the winner, per pair [n], nats.  Source:
    Mekala et al. 2024, arXiv 2409.13474; published with beta 0.1 (grid 0.05, 0.1, 0.5), retain weight 1 (1, 2, 5),
    learning rate 1e-5 to 5e-5 and five answers per question that the model itself wrote.  Here the alternatives are
    other answers of the relation, or those of a file (setting ``answers``).
    Cost: forward and backward on both answers; two cached numbers per pair.

    Weakness: teaches a confident falsehood, which may be a true answer for a neighbour; the margin may grow by the
    alternative alone.  It does not show that the true answer is gone.
    """
    return preference(instead, instead_reference, own, reference, beta)
