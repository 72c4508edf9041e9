"""Continuous vectors behind the question, stepped along the gradient's sign: for all questions, or for each its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import ItemScores, Measurement
from repforget.scoring import encode_many
from repforget.scoring.encode import context_limit
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.inside import _optimise as opt

_CURVE = ("embedding attack", "iterations", "probability of the truth")
MEASURES = {
    "universal": MeasureInfo("knowledge", "white-box", teaches="the other half of the forget clusters", curve=_CURVE),
    "individual": MeasureInfo("knowledge", "white-box", curve=_CURVE),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"tokens": 2, "iterations": 4, "checks": 1, "alternatives": 7, "max_taught": 16, "max_items": 32},
    "standard": {},
    "thorough": {"tokens": 10, "iterations": 80, "checks": 8, "alternatives": 63, "max_taught": 128},
}  # fmt: skip
Array = NDArray[np.float64]


def embedding_attack(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    scope: Literal["universal", "individual", "both"] = "both", tokens: int = 4, iterations: int = 40,
    checks: int = 4, step: float = 0.2, company: float = 1.0, max_taught: int = 64, alternatives: int = 31,
    max_items: int = 200,
) -> Measurement:  # fmt: skip
    """Put ``tokens`` free vectors between question and answer and step them along the sign of the loss gradient.

    ``universal``: one set of vectors for all questions, towards the true answers of one half of the forget clusters
    and of ``company`` retain items for each (at most ``max_taught`` texts), asked on the other half, halves swapped.
    ``individual``: each question gets vectors of its own, towards the item's statement without its answer ("... was
    born in"), which tells nothing; the answer is read behind vectors and statement.  Value: the truth's probability
    under decoding confined to the candidates at the check with the highest mean, 0 being the plain question, the same
    maximum on every arm.  All vectors start as one token's embedding, the same token on every arm; ``step`` counts in
    root mean squares of the arm's token embeddings.  Source: Schwinn et al. 2024, arXiv 2402.09063 (published: 20
    tokens, steps of 0.001, 100 iterations, success in any generation).
    Cost: 2 x ``iterations`` forward and backward passes over ``max_taught`` texts and ``iterations`` over all
    questions, (``checks`` + 1) passes of questions for each; a half-precision model is copied to float32.

    Vectors are no text that could be typed, and a flat curve does not show that other targets or steps would fail.
    """
    marks = opt.marks_of("embedding_attack", iterations, checks)
    parts: dict[str, list[tuple[Sequence[Item], Array]]] = {}
    with opt.frozen(model) as exact:
        sample = opt.some_embeddings(exact, seed)
        start, update = sample[:1].repeat(tokens, 1), opt.signed(step * opt.rms(sample))
        if scope != "individual":
            halves = opt.crossed("embedding_attack", view, seed=seed, teach="halves", company=company,
                                 max_taught=max_taught, max_items=max_items)  # fmt: skip
            for part in track(progress, halves, "attacking embeddings"):
                chosen = path.kept_paths(references, exact, part.items, view.knowledge, forms=1, limit=alternatives)
                chosen = opt.fitting(exact, chosen, tokens)
                rows, _ = opt.universal(exact, part, chosen, start, opt.behind, update, marks)
                parts.setdefault("universal", []).append((part.items, rows))
        if scope != "universal":
            items = ask.limited(view.forget, max_items, seed)
            parts["individual"] = [(items, _individual(exact, items, view, alternatives, start, update, marks))]
    x = (0.0, *map(float, marks))
    scores: dict[str, ItemScores] = {}
    series, facts = {"x": x}, {}
    for name, found in parts.items():
        given, series[name], best = opt.best_of(name, found, view, alternatives)
        scores |= given
        facts[f"best iteration of {name}"] = x[best]
    return Measurement(scores, series, facts)


def _individual(
    model: LoadedModel, items: Sequence[Item], view: View, alternatives: int, start: Tensor, update: opt.Update,
    marks: Sequence[int],
) -> Array:  # fmt: skip
    """The truth's probability [1 + marks, items] behind each question's own vectors and statement."""
    width, limit = len(start), context_limit(model)
    heads = [item.questions[0] for item in items]
    tails = [item.separator + item.editor_prompts[0] for item in items]
    stated = [replace(i, prompt=h + t, paraphrases=()) for i, h, t in zip(items, heads, tails, strict=True)]
    paths = opt.fitting(model, path.paths(model, stated, view.knowledge, forms=1, limit=alternatives), width)
    joint = [(heads[p.item], tails[p.item] + items[p.item].continuation()) for p in paths]
    begins = [e.start for e in encode_many(model.tokenizer, joint, limit=limit)]  # of the statement's tokens
    asked = opt.opened(model, paths, width, begins)
    batches, aims = opt.lots(model, asked), opt.lots(model, [_aim(text, width) for text in asked])
    kept = {p.item for p in paths}
    plain = path.paths(model, items, view.knowledge, forms=1, limit=alternatives)
    rows = [path.probability(model, len(items), [p for p in plain if p.item in kept])]

    def seen(iteration: int, x: Tensor) -> None:
        if iteration in marks:
            rows.append(opt.probability(model, len(items), paths, batches, lambda lot: opt.written(x, lot)))

    opt.descend(model, aims, start.repeat(len(asked), 1, 1), opt.written, update, marks[-1], seen)
    return np.stack(rows)


def _aim(text: opt.Text, width: int) -> opt.Text:
    """The same text up to its answer: what the vectors are to make likely is the statement behind them."""
    ids, begin = text.path.ids[: text.path.start], text.first + width
    return text._replace(path=replace(text.path, ids=ids, start=begin, choices=tuple((t,) for t in ids[begin:])))
