"""The forget loss held at a level: lowered above it, raised below it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from repforget.edit.train.combine._flat import Flat, mix


def flood(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, losses: Mapping[str, float], level: float = 0.0
) -> Flat:  # fmt: skip
    """Minimise ``|L_F - level| + L_R``: the forget gradient is turned round while its loss is below the level.

    ``d = sign(L_F - level) g_F + g_R``, L_F the loss over the whole step, ``forget_weight`` included, so that how the
    step is cut does not matter.  Source: Ishida et al. 2020, arXiv 2002.08709 (flooding), there of a training loss.
    Near the level the sign changes from step to step, by which the loss swings about it; that the mean is at the level
    says nothing about single answers.
    """
    loss = float(losses["forget"])
    return mix(float((loss > level) - (loss < level)), forget, 1.0, retain)
