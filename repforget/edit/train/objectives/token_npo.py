"""NPO token by token: TNPO and W-TNPO."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean")
def token_npo(own: Scores, reference: Scores, *, beta: float = 4.0, power: float = 0.0) -> Tensor:
    """Raise the cross-entropy of each forget token until it is less likely than under the untouched model.

    ``w log p`` per token [m], nats, with ``w = 2 p^beta / (p^beta + p0^beta) p^power`` held constant in the gradient.
    Source: Wang et al. 2025, arXiv 2502.19301: TNPO has beta 4 and power 0, W-TNPO power 1.5.
    Cost: one forward and backward; the reference is one cached number per token.

    Weakness: at the start, and with power 0, a token that was never known weighs as much as one learned by heart.  The
    value of the loss shows nothing: it is not what is minimised.
    """
    p, p0 = own.logprob.detach(), reference.logprob
    return 2 * (beta * (p - p0)).sigmoid() * (power * p).exp() * own.logprob
