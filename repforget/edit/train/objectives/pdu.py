"""Primal-dual unlearning: flat logits for the forget answers, under a bound on the retain loss."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import objective


@objective("token_mean", defaults={"combine": "constraint"})
def pdu(logits: Tensor) -> Tensor:
    """Close the gap between the largest and the mean logit at the positions of the forget answers.

    ``(max_v z - mean_v z)^2`` per token [m]; unchanged by a constant added to the logits, 0 only where they are flat.
    Source: Entesari et al. 2025, arXiv 2506.05314; its retain side is the constraint (``combine: constraint``) that the
    retain loss stays below a bound, with a dual weight that grows while it does not: 100 at the start, rate 5, bound
    0.3 on TOFU, to be chosen slightly above the retain loss at the start.
    Cost: one forward and backward over the full vocabulary.

    Weakness: squared logits have no common scale among models, and the first steps are large; flat answers are easy to
    detect.  It does not show that the answer is not still the most likely token.
    """
    return (logits.amax(-1) - logits.mean(-1)).square()
