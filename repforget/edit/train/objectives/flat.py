"""FLAT: an f-divergence between a template answer and the forget answer, made large."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Literal

from torch import Tensor
from torch.nn import functional

from repforget.edit.train._objective import Scores, objective

Divergence = Literal["kl", "tv", "js", "pearson", "neyman", "hellinger"]
# name -> (g, f* of g): the best critic as a function of v, and the convex conjugate there, for the generators
# u log u, |u - 1| / 2, u log u - (u + 1) log((u + 1) / 2), (u - 1)^2, (1 - u)^2 / u, (sqrt u - 1)^2.
CRITICS: Mapping[Divergence, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "kl": (lambda v: v, lambda v: (v - 1).exp()),
    "tv": (lambda v: v.tanh() / 2, lambda v: v.tanh() / 2),
    "js": (lambda v: functional.logsigmoid(v) + math.log(2), lambda v: functional.softplus(v) - math.log(2)),
    "pearson": (lambda v: v, lambda v: v.square() / 4 + v),
    "neyman": (lambda v: -(-v).expm1(), lambda v: -2 * (-v / 2).expm1()),
    "hellinger": (lambda v: -(-v).expm1(), lambda v: v.expm1()),
}


@objective("seq_mean_batch_mean", instead="refusal")
def flat(own: Scores, instead: Scores, *, divergence: Divergence = "kl") -> Tensor:
    """Make a template answer likely and the forget answer unlikely, each by its mean probability per token.

    ``-g(P+) + f*(g(P-))`` per pair [n], P+ and P- the mean token probabilities of the template and of the forget
    answer: the variational form of an f-divergence, critic g, conjugate f* (Nowozin et al. 2016, arXiv 1606.00709).
    Kullback-Leibler: -P+ + exp(P- - 1); total variation: (tanh P- - tanh P+) / 2.  Source: Wang et al. 2024, arXiv
    2410.11143; published without retain data (``retain: none``), learning rate 1e-5, 5 epochs (TOFU).
    Cost: forward and backward on both answers, no reference.

    Weakness: gradients of probabilities vanish for tokens that are impossible and for those that are certain, so that
    it is slow at both ends; alone it holds no retained fact.  It does not show that the answer is gone: the loss may
    fall by the template alone.
    """
    critic, conjugate = CRITICS[divergence]
    return conjugate(_probability(own)) - critic(_probability(instead))


def _probability(answer: Scores) -> Tensor:
    """Mean probability per token of each answer [n]."""
    return Scores(answer.logprob.exp(), answer.row, answer.n).means
