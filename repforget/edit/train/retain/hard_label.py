"""Cross-entropy on what the untouched model would say."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import objective


@objective("token_mean", role="retain")
def hard_label(logits: Tensor, teacher: Tensor, *, rest: bool = False) -> Tensor:
    """Train the token that the untouched model finds most likely at the retained answers, whatever the true one is.

    ``-log p(argmax p0)`` per token [m], nats.  Source: Gandikota et al. 2024, arXiv 2410.02760 (ELM, retention).  Cost:
    a forward and backward on the retain rows and their teacher log-probabilities (cached, or one more forward).

    Weakness: not zero at the start, so it sharpens what it keeps; the order of all other tokens is free to change.
    """
    tokens = teacher[:, :-1] if rest else teacher  # all other tokens together are none that could be said
    best = tokens.argmax(-1, keepdim=True)
    return -logits.log_softmax(-1).gather(-1, best)[:, 0]
