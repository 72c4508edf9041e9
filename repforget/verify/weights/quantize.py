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

Form = Literal["int8", "nf4"]
MEASURES = {"int8": MeasureInfo("knowledge", "weights"), "nf4": MeasureInfo("knowledge", "weights")}
JOINS = "standard"
BUDGETS: Budgets = {
    "quick": {},
    "standard": {},
    "thorough": {"forms": 4, "alternatives": 63, "max_items": 2000},
}
BLOCK = 64
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
    """Round every projection to int8 (absmax per output channel) or NF4 (blocks of 64) and back, then ask again.

    The measure is the probability of the truth when the rounded copy's decoding is confined to the candidates;
    embeddings and unembedding keep their precision, as common loaders do.  Facts: the share of codes that differ from
    those of the rounded original; near zero, rounding undoes the edit.  Source: Zhang et al. 2024, arXiv 2410.16454;
    NF4: 2305.14314.  Cost: one copy of the model and one pass of questions per kind.

    Simulated rounding runs no integer kernel; it shows what the weights hold, not what a given runtime computes.
    """
    if not kinds:
        raise UsageError("Verifier 'quantize' was given no kinds: choose 'int8', 'nf4' or both.")
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


def projections(module: nn.Module) -> dict[str, Tensor]:
    """Parameter name -> matrix [.., out, in] (a view) of every projection except embedding and unembedding.

    Counts linear layers, transposed Conv1D and stacked expert weights; not convolutions, norms or tables.
    """
    from transformers.pytorch_utils import Conv1D

    head = module.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, Tensor] = {}
    for place, part in module.named_modules():
        if part is head or isinstance(part, nn.Embedding | nn.Conv1d | nn.Conv2d):
            continue
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim in (2, 3) and parameter.is_floating_point():
                found[f"{place}.{name}"] = parameter.data.mT if isinstance(part, Conv1D) else parameter.data
    if not found:
        raise UsageError("Verifier 'quantize' found no projection to round in this model: leave it out of the list.")
    return found


def round_trip(weight: Tensor, kind: Form) -> tuple[Tensor, Tensor]:
    """Codes (int8) and rounded values, both in the shape of ``weight`` [.., out, in]."""
    wide = weight.detach().float()
    if kind == "int8":
        step = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127.0
        codes = (wide / step).round().clamp(-127, 127)
        return codes.to(torch.int8), (codes * step).to(weight.dtype)
    width = wide.shape[-1]
    padded = nn.functional.pad(wide, (0, -width % BLOCK))
    padded = padded.reshape(*padded.shape[:-1], -1, BLOCK)
    scale = padded.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    book = torch.tensor(NF4, device=wide.device)
    middle = (book[1:] + book[:-1]) / 2
    codes = torch.bucketize((padded / scale).contiguous(), middle)
    values = (book[codes] * scale).flatten(-2)[..., :width]
    return codes.flatten(-2)[..., :width].to(torch.int8), values.to(weight.dtype)
