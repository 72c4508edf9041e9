"""Representation rerouting (circuit breakers): states of the forget texts turn away from what they were."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional

from repforget.edit.train._depth import at_depth
from repforget.edit.train._objective import objective

DEPTHS = (10 / 32, 20 / 32)
# The retain side starts with no weight, so that retained facts may be far off in between.
DEFAULTS = {"forget_weight": 10.0, "retain": {"hidden_distance": {}}, "retain_weight": 100.0, "max_retain_rise": 10.0}


@objective("token_mean", layers=at_depth(*DEPTHS), rate=4.0, defaults=DEFAULTS)
def representation_rerouting(
    hidden: Tensor, original: Tensor, *, layers: Literal["auto"] | list[int] = "auto", turn: float = 0.5,
    done: float = 0.0,
) -> Tensor:  # fmt: skip
    """Turn the states of the forget texts at ``layers`` until they are orthogonal to those of the untouched model.

    ``(1 - turn · done) max(0, cos(h, h0))`` per token [m], mean over layers; ``done`` is the share of training behind,
    so that weight moves from forgetting to :func:`hidden_distance`, the retain side, whose weight is ``turn · done``.
    Source: Zou et al. 2024, arXiv 2406.04313; the released run has ``turn`` 0.25.  Give both sides the same ``turn``.
    The cosine is flat at the start, so that a low rate never leaves it: by default four times the usual one.
    Cost: two forwards up to the deepest layer read (one without gradient) and one backward.

    Weakness: knowledge comes back in dialogues of several turns and under attacks on embeddings; harmless near texts
    are rerouted too, since nothing here holds the answers' likelihood.  An orthogonal state is not an empty one: it
    does not show that the answer cannot be read from it.
    """
    along = functional.cosine_similarity(hidden.float(), original.float(), dim=-1)
    return (1 - turn * done) * along.clamp(min=0).mean(1)
