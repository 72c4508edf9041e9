"""Does the knowledge come back when the weights are rounded, as whoever deploys the model may do?"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel, copy_of
from repforget.progress import Progress, track
from repforget.quantizers import GRIDS, Form, round_trip, scales
from repforget.records import ItemScores, Measurement
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import projections

MEASURES = {kind: MeasureInfo("knowledge", "weights") for kind in ("int8", "nf4", "int4", "int3")}
JOINS = "standard"
BUDGETS: Budgets = {
    "quick": {},
    "standard": {},
    "thorough": {"kinds": ["int8", "nf4", "int4", "int3"], "forms": 4, "alternatives": 63, "max_items": 2000},
}


def quantize(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    forms: int = 1, alternatives: int = 31, kinds: Sequence[Form] = ("int8", "nf4"), max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Round every projection to int8, int4, int3 or NF4 and back, then ask again.

    Round to nearest, scaled by the largest weight of an output channel (int8), of 128 (int4, int3) or 64 (NF4) inputs.
    The measure is the probability of the truth when the rounded copy's decoding is confined to the candidates;
    embeddings and unembedding keep their precision, as common loaders do.  Facts: the share of codes that differ from
    those of the rounded original (near zero, rounding undoes the edit), the median change of a weight in steps.
    Source: Zhang et al. 2024, arXiv 2410.16454; NF4: 2305.14314.  Cost: one copy of the model and one pass of questions
    per kind.

    Simulated rounding runs no integer kernel; it shows what the weights hold, not what a given runtime computes.
    """
    if not kinds:
        raise UsageError("Verifier 'quantize' was given no kinds: choose among " + ", ".join(MEASURES) + ".")
    items = ask.limited(view.forget, max_items, seed)
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    asked = path.kept_paths(references, model, items, view.knowledge, forms=forms, limit=alternatives)
    out: dict[str, ItemScores] = {}
    facts: dict[str, float] = {}
    for kind in track(progress, list(kinds), "rounding weights"):
        rounded = copy_of(model)
        flips = round_weights(rounded.module, kind, references.original.module)
        if flips is not None:
            facts[f"share of {kind} codes that differ from the original's"] = flips
            facts[f"median change in {kind} steps"] = median_change(model.module, references.original.module, kind)
        out[kind] = ask.scores(items, path.probability(rounded, len(items), asked))
        out[f"{kind}_prior"] = before
    return Measurement(out, {}, facts)


@torch.no_grad()
def round_weights(module: nn.Module, kind: Form, original: nn.Module | None = None) -> float | None:
    """Round the projections of ``module`` in place; return the share of codes unlike ``original``'s, if comparable."""
    theirs = projections(original) if original is not None else {}
    changed = total = 0
    for name, weight in projections(module).items():
        codes, values = round_trip(weight, kind)
        other = theirs.get(name)
        if other is not None and other.shape == weight.shape:
            changed += int((codes != round_trip(other, kind)[0].to(codes.device)).sum())
            total += codes.numel()
        weight.copy_(values)
    return changed / total if total else None


def median_change(module: nn.Module, original: nn.Module, kind: Form) -> float:
    """Median over weights of |difference to ``original``| in its rounding steps, mean over matrices by their size."""
    theirs, total, count = projections(original), 0.0, 0
    for name, weight in projections(module).items():
        other = theirs.get(name)
        if other is None or other.shape != weight.shape:
            continue
        steps = scales(other, kind) / (7.5 if kind == "nf4" else 2 ** (GRIDS[kind][0] - 1) - 1)  # NF4: on average
        change = (weight.float() - other.to(weight.device).float()).abs() / steps.to(weight.device)
        total += weight.numel() * float(change.median())
        count += weight.numel()
    return total / count
