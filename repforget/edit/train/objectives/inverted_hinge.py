"""The inverted hinge loss of LoKU: the forget token changes places with the runner-up."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train._objective import objective


@objective("token_mean")
def inverted_hinge(logits: Tensor, labels: Tensor) -> Tensor:
    """Lower each forget token and raise only the strongest of the other tokens.

    ``1 + p(label) - max_other p`` per token [m], in 0 to 2.  Source: Cha et al. 2024, arXiv 2408.06621; published with
    nll on retained facts of weight 1 and LoRA of rank 4 to 32, learning rate 1e-4 to 2e-4, 5 epochs.
    Cost: one forward and backward; two entries of the softmax.

    Weakness: the gradient on a token learned by heart is that of ascent, 1 - p: it starts slowly; the second choice
    becomes the answer, which may be a near synonym.  A loss near 0 shows that another token wins, not that the
    answer is unlikely further down.
    """
    p, at = logits.softmax(-1), labels.unsqueeze(-1)
    return 1 + p.gather(-1, at).squeeze(-1) - p.scatter(-1, at, -1.0).amax(-1)
