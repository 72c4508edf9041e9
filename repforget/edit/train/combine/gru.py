"""The forget gradient without what it does against what is to be kept."""

from __future__ import annotations

from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Space, dot, metric_of, mix, ratio
from repforget.errors import UsageError


def gru(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, newest: float = 0.8, add_retain: bool = False,
    space: Space = "raw", metric: Flat | None = None,
) -> Flat:  # fmt: skip
    """Project the forget gradient off a running mean of the retain gradient where the two conflict.

    ``d = g_F - min(0, g_F·m) / |m|² m`` with ``m <- newest g_R + (1 - newest) m``; then ``d·m >= 0``, and ``d = g_F``
    without a conflict.  Source: Wang et al. 2025, arXiv 2503.09117 (GRU).  The retain gradient only guards the step:
    what finite steps damage is not repaired unless ``add_retain`` adds it.  Memory: one more copy of the gradients.
    """
    if not 0 < newest <= 1:
        raise UsageError(f"gru weighs the newest retain gradient by {newest}: give a number above 0 and at most 1.")
    before = [state.get(f"mean.{i}", g) for i, g in enumerate(retain)]
    mean = mix(newest, retain, 1.0 - newest, before)
    state.update({f"mean.{i}": m for i, m in enumerate(mean)})
    inner = metric_of(space, metric)
    clash = min(0.0, dot(forget, mean, inner))
    found = mix(1.0, forget, -ratio(clash, dot(mean, mean, inner)), mean)
    return mix(1.0, found, 1.0, retain) if add_retain else found
