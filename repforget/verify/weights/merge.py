"""What lies on the line between the edited weights and those of another model?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from repforget.knowledge import View
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.records import Measurement
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import alike, at_best, exam, pairs, sweep

_Y = "probability of the truth"
MEASURES = {
    "sibling": MeasureInfo("knowledge", "weights", curve=("merging with a model that never knew", "share of it", _Y)),
    "towards_original": MeasureInfo("knowledge", "weights", votes=False,
                                    curve=("taking the edit back", "share taken back", _Y)),
}  # fmt: skip
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"alphas": [-0.5, 0.25]},
    "standard": {},
    "thorough": {"alphas": [-2.0, -1.0, -0.5, -0.25, -0.1, 0.1, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5],
                 "alternatives": 63, "max_items": 1000},
}  # fmt: skip


def merge(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    alphas: Sequence[float] = (-0.5, -0.25, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5), forms: int = 1, alternatives: int = 31,
    max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Move all weights along theta + alpha (theta' - theta), towards theta' and (alpha < 0) away from it, and ask.

    ``sibling``: theta' is a model that never knew (the first twin that is not this arm), such as the public base of a
    fine-tune.  Nothing can come from it, so what appears was in theta: going away from ignorance amplifies what is
    left.  At the alpha (0 among them) with the highest mean over items, the same maximum on every arm; without another
    twin of this shape it is the model as it is.  ``towards_original``: theta' is the knowing original.  Who has it
    needs no attack (taking an adapter off is alpha = 1), so this only describes: the value with half of the edit taken
    back; alpha < 0 edits further.  The truth's probability under decoding confined to the candidates; every parameter
    moves, hooks stay.  Source: Ilharco et al. 2022, arXiv 2212.04089.  Cost: one float32 copy, two passes of questions
    per alpha.

    A twin trained apart lies in another basis; a flat curve towards it does not show that nothing is left.
    """
    points = sorted({0.0, 0.5, *alphas})
    questions = exam(model, view, references, forms=forms, alternatives=alternatives, max_items=max_items, seed=seed)
    others = (t for t in references.twins if t is not model and t.fingerprint != model.fingerprint)
    sibling = next((t for t in others if alike(model.module, t.module)), model)
    original = references.original if alike(model.module, references.original.module) else model
    tables = {
        name: sweep(model, questions, points, lambda copied, alpha, to=other: move(copied, alpha, to),  # type: ignore[misc]
                    progress=progress, text=f"merging, {name}")
        for name, other in (("sibling", sibling), ("towards_original", original))
    }  # fmt: skip
    found = at_best(questions, tables, points, "alpha")
    half = questions.scores("towards_original", tables["towards_original"][points.index(0.5)])
    facts = {name: value for name, value in found.facts.items() if "original" not in name}
    facts["twins to merge with"] = float(sibling is not model)
    return Measurement({**found.scores, **half}, found.series, facts)


def move(model: LoadedModel, alpha: float, towards: LoadedModel) -> None:
    """Move every parameter in place; exactly itself at alpha 0 and exactly ``towards`` at 1."""
    for parameter, target in pairs(model.module, towards.module):
        parameter.copy_(torch.lerp(parameter, target, alpha))
