"""RMIA: how many non-members does a forget item dominate, each weighed against models that never knew?"""

from __future__ import annotations

import numpy as np

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.privacy import _matched as matched
from repforget.verify.privacy._likelihood import rmia as dominated
from repforget.verify.privacy._likelihood import rmia_ratio

MEASURES = {"dominance": MeasureInfo("knowledge", "logits", votes=False)}
JOINS = None  # needs twins, which a level cannot ask for
BUDGETS: Budgets = {
    "quick": {"alternatives": 7, "max_items": 100},
    "standard": {},
    "thorough": {"forms": 2, "alternatives": 31, "max_items": 1000},
}


def rmia(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    a: float = 0.3, forms: int = 1, alternatives: int = 15, asked: matched.Asked = "questions", holdout: str = "",
    max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Share of a population of non-members whose likelihood ratio to the twins lies below the item's.

    ratio = P / (((1 + ``a``) P_twins + 1 - ``a``) / 2) with length-normalised P (probability per answer token), P_twins
    the mean over twins; the population z is every item's matched non-members (``alternatives`` other answers each, or
    ``holdout``), pooled.  Ties count half, 0.5 is chance, mean over ``forms``.  A twin is weighed against the other
    twins; a single one against itself.  Source: Zarifzadeh et al. 2023, arXiv 2312.03262.  Cost: one pass over items x
    ``forms`` prompts with a short row per alternative, and one such pass per twin once for all arms.

    With one or two twins the ratio is coarse; chance does not show that no other reference would tell.
    """
    if not references.twins:
        raise UsageError("Verifier 'rmia' compares with models that never knew: give at least one twin, or use "
                         "'membership', which needs none.")  # fmt: skip
    if not 0 <= a <= 1:
        raise UsageError(f"Verifier 'rmia' needs 0 <= a <= 1, got {a}.")
    items = ask.limited(view.forget, max_items, seed)
    found = matched.texts(items, view.knowledge, forms=forms, limit=alternatives, asked=asked, holdout=holdout)
    twins = track(progress, matched.outsiders(model, references), "asking the twins")
    outside = [matched.kept_confidence(references, twin, found) for twin in twins]
    own = matched.confidence(model, found.pairs)
    ratio = rmia_ratio(own, np.stack(outside), a)
    share = dominated(ratio[found.members], ratio[found.strangers])
    values = [_mean([s for s, t in zip(share, found.trials, strict=True) if t.item == k]) for k in range(len(items))]
    half = np.full(len(items), 0.5)
    return Measurement({"dominance": ask.scores(items, values), "dominance_prior": ask.scores(items, half)},
                       facts=matched.rates("dominance", ratio, found))  # fmt: skip


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
