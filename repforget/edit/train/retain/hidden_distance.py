"""Keep the hidden states of retained texts, by distance, ever more strongly."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.linalg import vector_norm

from repforget.edit.train._depth import at_depth
from repforget.edit.train._objective import objective


@objective("token_mean", role="retain", layers=at_depth(10 / 32, 20 / 32))
def hidden_distance(
    hidden: Tensor, original: Tensor, *, layers: Literal["auto"] | list[int] = "auto", turn: float = 0.5,
    relative: bool = True, done: float = 0.0,
) -> Tensor:  # fmt: skip
    """Keep the states of the retained texts at ``layers``, with a weight that rises over the training.

    ``turn · done · |h - h0| / |h0|`` per token [m], mean over layers; ``done`` is the share of training behind.  "auto"
    is the layers of the forget objective where it has some.  Source: Zou et al. 2024, arXiv 2406.04313, as
    the counterpart of :func:`representation_rerouting`; there without |h0| (``relative`` false), which makes the
    balance with a cosine depend on how long a model's states are.  Cost: two forwards up to the deepest layer read (one
    without gradient) and one backward.  It holds states at these layers, not what later trained layers make of them.
    """
    away: Tensor = vector_norm(hidden.float() - original.float(), dim=-1)
    if relative:
        away = away / vector_norm(original.float(), dim=-1)
    return turn * done * away.mean(1)
