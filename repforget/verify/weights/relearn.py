"""Does teaching half of the forgotten subjects bring back the other half, which was never shown again?"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

import numpy as np

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._taught import curve, halfway, teaching

_CURVE = ("relearning", "training steps", "probability of the truth on the half not taught")
MEASURES = {
    "best_step": MeasureInfo("knowledge", "weights", teaches="the other half of the forget clusters", curve=_CURVE),
}
JOINS = "standard"
BUDGETS: Budgets = {
    "quick": {},
    "standard": {},
    "thorough": {"steps": 96, "checks": 6, "alternatives": 63, "max_items": 1000},
}


def relearn(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    steps: int = 24, checks: int = 3, lr: float | None = None, batch_size: int = 16, alternatives: int = 31,
    forms: int = 1, train_forms: int = 2, company: float = 3.0, parameters: str = "", max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Fine-tune a copy on half of the forget clusters among retained facts, ask the other half, swap the halves.

    ``best_step`` is the truth's probability under decoding confined to the candidates (mean over ``forms``) on items
    not taught, at the check (0 = before training) with the highest mean, the same maximum on every arm; data, order,
    seed, ``steps`` and ``lr`` (None: 0.04 / width) are the same on every arm, which a twin needs to be a floor.
    ``company`` retain items per taught item keep the model from forgetting everything else, which would hide what
    comes back.  ``parameters`` is a regular expression over parameter names (empty: all).  Fact: steps until half of
    the original's value above the prior is back.  Source: Deeb and Roger 2024, arXiv 2410.08827.  Cost: two copies one
    after the other in float32 with two optimiser moments each, 2 x ``steps`` training steps, 2 x (``checks`` + 1)
    passes of questions.

    An edit whose hooks pass no gradient leaves the curve flat: whoever holds the weights can take the hooks off.
    A flat curve does not show that other data, rates or more steps would not bring the knowledge back.
    """
    if steps < checks or checks < 1:
        raise UsageError(f"Verifier 'relearn' has {steps} steps and {checks} checks: give at least one step per check.")
    halves = view.halves(seed)
    if not all(halves):
        raise UsageError(f"Verifier 'relearn' needs at least two forget clusters on split '{view.split}' to teach one "
                         "half and ask the other.")  # fmt: skip
    marks = sorted({round(steps * k / checks) for k in range(checks + 1)})
    parts = []
    for taught, asked in track(progress, [halves, halves[::-1]], "relearning"):
        taught = (*taught, *ask.limited(view.support, round(company * len(taught)), seed))
        asked = ask.limited(asked, max_items // 2, seed)
        chosen = path.kept_paths(references, model, asked, view.knowledge, forms=forms, limit=alternatives)
        examine = partial(path.probability, count=len(asked), chosen=chosen)
        table, _ = curve(model, teaching(model, taught, train_forms), examine, marks, lr=lr, batch_size=batch_size,
                         seed=seed, trainable=_chosen(parameters))  # fmt: skip
        parts.append((asked, table))
    items = [item for asked, _ in parts for item in asked]
    table = np.concatenate([rows for _, rows in parts], axis=1)
    means = np.nanmean(table, axis=1)
    best = int(means.argmax())
    before = ask.prior(items, view.knowledge, alternatives)
    half = halfway(references, items, view, before, alternatives=alternatives, forms=forms)
    reached = [mark for mark, mean in zip(marks, means, strict=True) if mean >= half]
    facts = {"best step": float(marks[best])}
    if reached:
        facts["steps to half of the original"] = float(reached[0])
    scores = {"best_step": ask.scores(items, table[best]), "best_step_prior": ask.scores(items, before)}
    series = {"x": tuple(float(m) for m in marks), "best_step": tuple(float(m) for m in means)}
    return Measurement(scores, series, facts)


def _chosen(parameters: str) -> Callable[[str], bool] | None:
    pattern = re.compile(parameters)
    return (lambda name: pattern.search(name) is not None) if parameters else None
