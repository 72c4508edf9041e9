"""Keep the hidden states of retained texts, by squared distance."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from repforget.edit.train._depth import at_depth
from repforget.edit.train._objective import objective


@objective("token_mean", role="retain", layers=at_depth(7 / 32))
def hidden_state(hidden: Tensor, original: Tensor, *, layers: Literal["auto"] | list[int] = "auto") -> Tensor:
    """Keep the states of the retained texts at ``layers`` where the untouched model has them.

    ``|h - h0|² / d`` per token [m], mean over layers; "auto" is the layers of the forget objective where it has some.
    Source: Li et al. 2024, arXiv 2403.03218.  Cost: two forwards up to the deepest layer read (one without
    gradient) and one backward.  It holds states at these layers, not what later trained layers make of them.
    """
    return (hidden.float() - original.float()).square().mean((1, 2))
