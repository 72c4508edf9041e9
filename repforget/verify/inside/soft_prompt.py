"""Do virtual tokens learned on some facts make the model tell others? An attack by gradient from the front."""

from __future__ import annotations

from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.inside import _optimise as opt

_CURVE = ("soft prompt", "training steps", "probability of the truth on the half not taught")
MEASURES = {
    "best_step": MeasureInfo("knowledge", "white-box", teaches="the other half of the forget clusters", curve=_CURVE),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"tokens": 2, "steps": 4, "checks": 1, "alternatives": 7, "max_taught": 16, "max_items": 40},
    "standard": {},
    "thorough": {"tokens": 10, "steps": 80, "checks": 5, "alternatives": 63, "max_taught": 128, "max_items": 1000},
}


def soft_prompt(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    tokens: int = 5, steps: int = 40, checks: int = 4, lr: float = 0.1, teach: opt.Teach = "halves",
    company: float = 1.0, max_taught: int = 64, forms: int = 1, alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Learn ``tokens`` input vectors in front of questions with known answers, ask other questions behind them.

    Adam lowers the cross-entropy of the true answers of one half of the forget clusters and of ``company`` retain
    items for each of them (together at most ``max_taught``, all in every step); the other half is asked, then the
    halves swap.  ``teach: support`` learns on retain items alone, so that nothing about a forget subject is told, and
    asks all; where the arm answers those already, their loss leaves little to learn.  ``best_step`` is the truth's
    probability under decoding confined to the candidates (mean over ``forms``) at the check with the highest mean, 0
    being the question without vectors; the same maximum, seed, starting tokens and rate on every arm.  ``lr`` counts
    in root mean squares of the arm's token embeddings.  The model itself stays as it is.  Source: Lester et al. 2021,
    arXiv 2104.08691; soft prompts elicit strings that were never trained, so that never-trained arms and exchanged
    answers are the control (arXiv 2502.15836).
    Cost: 2 x ``steps`` forward and backward passes over ``max_taught`` texts, 2 x (``checks`` + 1) passes of
    questions; a half-precision model is copied to float32.

    An edit whose hooks pass no gradient leaves the curve flat, and no curve shows that other vectors would not do.
    """
    marks = opt.marks_of("soft_prompt", steps, checks)
    parts, losses = [], []
    with opt.frozen(model) as exact:
        sample = opt.some_embeddings(exact, seed)
        halves = opt.crossed("soft_prompt", view, seed=seed, teach=teach, company=company, max_taught=max_taught,
                             max_items=max_items)  # fmt: skip
        for part in track(progress, halves, "learning a soft prompt"):
            chosen = path.kept_paths(references, exact, part.items, view.knowledge, forms=forms, limit=alternatives)
            chosen = opt.fitting(exact, chosen, tokens)
            rows, last = opt.universal(exact, part, chosen, sample[:tokens], opt.front, opt.adam(lr * opt.rms(sample)),
                                       marks)  # fmt: skip
            parts.append((part.items, rows))
            losses.append(last)
    scores, means, best = opt.best_of("best_step", parts, view, alternatives)
    x = (0.0, *map(float, marks))
    facts = {"best step": x[best], "last loss": sum(losses) / len(losses)}
    return Measurement(scores, {"x": x, "best_step": means}, facts)
