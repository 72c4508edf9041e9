"""How fast are the forgotten facts learned again when they themselves are taught?"""

from __future__ import annotations

import numpy as np

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Measurement
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import exam
from repforget.verify.weights._taught import curve, halfway, mean_over, teaching

_CURVE = ("learning the same facts again", "training steps", "probability of the truth")
MEASURES = {"speed": MeasureInfo("knowledge", "weights", votes=False, teaches="the asked facts", curve=_CURVE)}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"steps": 2, "checks": 2},
    "standard": {},
    "thorough": {"steps": 64, "checks": 16, "alternatives": 63, "max_items": 1000},
}


def relearn_same(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    steps: int = 24, checks: int = 8, lr: float | None = None, batch_size: int = 16, alternatives: int = 31,
    forms: int = 1, company: float = 3.0, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Fine-tune a copy on the statements of the asked facts among retained ones; the faster, the more was left.

    ``speed`` is the mean over the steps of the truth's probability under decoding confined to the candidates, asked in
    forms that are not taught: the area under the curve, whose share between twin and original says what was saved.
    Every model learns what it is taught, so only the difference to a twin means anything, and nothing votes.  Fact:
    steps until half of the original's value above the prior is back.  Cost: one float32 copy with two optimiser
    moments, ``steps`` training steps, ``checks`` + 1 passes of questions.

    Slow learning does not show absence: damage slows learning as well.
    """
    if steps < checks or checks < 1:
        raise UsageError(f"Verifier 'relearn_same' has {steps} steps and {checks} checks: give at least one step per "
                         "check.")  # fmt: skip
    questions = exam(model, view, references, forms=forms, alternatives=alternatives, max_items=max_items, seed=seed)
    marks = sorted({round(steps * k / checks) for k in range(checks + 1)})
    kept = ask.limited(view.support, round(company * len(questions.items)), seed)
    examples = [*teaching(model, questions.items, 2, questions=0), *teaching(model, kept, 2)]
    rows, _ = curve(model, examples, questions.probability, marks, lr=lr, batch_size=batch_size, seed=seed)
    means = np.nanmean(rows, axis=1)
    half = halfway(references, questions.items, view, questions.prior, alternatives=alternatives, forms=forms)
    reached = [mark for mark, mean in zip(marks, means, strict=True) if mean >= half]
    facts = {"steps to half of the original": float(reached[0])} if reached else {}
    series = {"x": tuple(map(float, marks)), "speed": tuple(map(float, means))}
    return Measurement(questions.scores("speed", mean_over(marks, rows)), series, facts)
