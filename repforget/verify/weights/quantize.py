"""Does the knowledge come back when the weights are rounded, as whoever deploys the model may do?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from repforget.errors import UsageError
from repforget.knowledge import View
from repforget.models.load import LoadedModel, copy_of
from repforget.progress import Progress, track
from repforget.records import ItemScores, Measurement
from repforget.verify import _asking as ask
from repforget.verify import _constrained as path
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.weights._altered import projections

Form = Literal["int8", "nf4", "int4", "int3"]
MEASURES = {kind: MeasureInfo("knowledge", "weights") for kind in ("int8", "nf4", "int4", "int3")}
JOINS = "standard"
BUDGETS: Budgets = {
    "quick": {},
    "standard": {},
    "thorough": {"kinds": ["int8", "nf4", "int4", "int3"], "forms": 4, "alternatives": 63, "max_items": 2000},
}
BLOCK = 64
GRIDS: dict[str, tuple[int, int | None]] = {"int8": (8, None), "int4": (4, 128), "int3": (3, 128)}  # bits, group
# Dettmers et al. 2023, arXiv 2305.14314: quantiles of a normal scaled to [-1, 1], with an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


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
        blocks, scale = _grouped(other.float(), BLOCK if kind == "nf4" else GRIDS[kind][1] or other.shape[-1])
        step = scale / (7.5 if kind == "nf4" else 2 ** (GRIDS[kind][0] - 1) - 1)  # NF4: the mean distance of its levels
        steps = step.expand_as(blocks).flatten(-2)[..., : weight.shape[-1]]
        change = (weight.float() - other.to(weight.device).float()).abs() / steps.to(weight.device)
        total += weight.numel() * float(change.median())
        count += weight.numel()
    return total / count


def round_trip(weight: Tensor, kind: Form) -> tuple[Tensor, Tensor]:
    """Codes (as int8) and rounded values, both in the shape of ``weight`` [.., out, in]."""
    wide = weight.detach().float()
    if kind != "nf4":
        codes, values = to_nearest(wide, *GRIDS[kind])
        return codes.to(torch.int8), values.to(weight.dtype)
    width = wide.shape[-1]
    padded, scale = _grouped(wide, BLOCK)
    book = torch.tensor(NF4, device=wide.device)
    middle = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize((padded / scale).contiguous(), middle)
    values = (book[codes] * scale).flatten(-2)[..., :width]
    return codes.flatten(-2)[..., :width].to(torch.int8), values.to(weight.dtype)


def to_nearest(weight: Tensor, bits: int, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Integer codes and rounded values of [.., out, in], scaled per output and ``group`` (None: all) inputs."""
    width, highest = weight.shape[-1], 2 ** (bits - 1) - 1
    padded, scale = _grouped(weight, group or width)
    step = scale / highest
    codes = (padded / step).round().clamp(-highest, highest)
    return codes.flatten(-2)[..., :width], (codes * step).flatten(-2)[..., :width]


def _grouped(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The last axis in zero-padded groups [.., groups, group], and the largest size in each [.., groups, 1]."""
    padded = nn.functional.pad(weight, (0, -weight.shape[-1] % group))
    padded = padded.reshape(*padded.shape[:-1], -1, group)
    return padded, padded.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
