"""How hard each objective pushes on a token, by how likely the token still is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from repforget.edit.train._objective import Objective, Scores, find

COLUMNS: dict[str, tuple[str, dict[str, float]]] = {
    "GA": ("grad_ascent", {}),
    "WGA": ("weighted_ascent", {}),
    "WGA, beta 5": ("weighted_ascent", {"beta": 5.0}),
    "SatImp": ("weighted_ascent", {"beta": 5.0, "saturation": 1.0}),
    "unlikelihood": ("unlikelihood", {}),
    "inverted hinge": ("inverted_hinge", {}),
}


def cheat_sheet(probabilities: Sequence[float] = (0.999, 0.9, 0.5, 0.1, 0.001)) -> dict[str, list[float]]:
    """Size of the gradient on the label's logit at each probability of the label, of two tokens, per objective.

    Computed from the objectives themselves, in float64.  It shows what the first step pushes on, not where it ends.
    """
    return {title: [_push(find(name), settings, p) for p in probabilities]
            for title, (name, settings) in COLUMNS.items()}  # fmt: skip


def _push(made: Objective, settings: dict[str, float], p: float) -> float:
    chance = torch.tensor([[p, 1 - p]], dtype=torch.float64)
    logits, first = chance.log().requires_grad_(), torch.zeros(1, dtype=torch.long)
    own = Scores(logits.log_softmax(-1)[:, 0], first, 1)
    given = {"own": own, "logits": logits, "labels": first, "place": first}
    loss = made.function(*(given[name] for name in made.reads), **settings).sum()
    return abs(float(torch.autograd.grad(loss, logits)[0][0, 0]))
