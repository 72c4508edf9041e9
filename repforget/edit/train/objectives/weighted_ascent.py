"""Ascent with a weight per token that follows the token's probability: WGA and SatImp."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import Scores, objective


@objective("token_mean")
def weighted_ascent(own: Scores, *, beta: float = 1.0, saturation: float = 0.0) -> Tensor:
    """Raise the cross-entropy of the forget tokens in proportion to how likely they still are.

    ``w log p`` per token [m], nats, with ``w = p^beta (1 - p)^saturation`` held constant in the gradient.  WGA (Wang et
    al. 2025, arXiv 2502.19301) has saturation 0 and beta 1: its gradient is that of ``p^beta / beta``, so that at
    beta 1 the mean probability of the tokens is minimised.  SatImp (Yang et al. 2025, arXiv 2505.11953) has beta 5,
    saturation 1, forget weight 1, retain weight 0.1.  beta 0 with saturation 0 is :func:`grad_ascent`.
    Cost: one forward and backward, no reference.

    Weakness: tokens of middling probability hardly move at a large beta; with saturation above 0 neither do those that
    are perfectly memorised.  The value of the loss shows nothing: it is not what is minimised.
    """
    p = own.logprob.detach().exp()
    return p**beta * (-own.logprob.detach().expm1()) ** saturation * own.logprob
