"""Do the MLP's value vectors that speak of the answer still say the same tokens? A parameter trace."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.models.readout import lens
from repforget.models.value_vectors import in_parts
from repforget.models.weights import WeightRef, get_weight, writers
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import encode_many
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References

MEASURES = {
    "jaccard": MeasureInfo("knowledge", "weights", votes=False),
    "cosine": MeasureInfo("knowledge", "weights", votes=False),
}
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"vectors": 2, "tokens": 20, "max_items": 64},
    "standard": {},
    "thorough": {"vectors": 10, "max_items": 2000},
}


def concept_vectors(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    vectors: int = 5, tokens: int = 200, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """Compare the value vectors that rank an answer's first token highest in the original with the same ones here.

    A value vector is a column of an MLP's down projection; its tokens are the ``tokens`` highest of its readout through
    the original's final norm and unembedding.  For each item the ``vectors`` of the original whose readout gives the
    answer's first token the largest share are looked up in the arm: ``jaccard`` of the two token sets and ``cosine`` of
    the two columns, means over them; 1 means that the trace is intact.  Source: Hong et al. 2024, arXiv 2406.11614.
    Cost: no forward pass; one unembedding per neuron and arm.

    A trace is no use of it: an intact vector does not show that the knowledge can be reached, and a model from another
    start has other vectors at these places, so the twin's value is that of a mismatch.  Models without such a
    projection (batched experts), or of another shape, give NaN.
    """
    if vectors < 1 or tokens < 1:
        raise UsageError("Verifier 'concept_vectors' needs at least one vector and one token.")
    items = ask.limited(view.forget, max_items, seed)
    original = references.original
    nothing = ask.scores(items, np.full(len(items), np.nan))
    own, theirs = _projections(model), _projections(original)
    if not theirs or _shapes(model, own) != _shapes(original, theirs) or model.vocab_size != original.vocab_size:
        return Measurement({"jaccard": nothing, "cosine": nothing})
    wanted = _first_tokens(original, items)
    tokens = min(tokens, original.vocab_size // 2)
    key = ("concept_vectors", vectors, tuple(wanted))
    chosen: Tensor = references.once(key, lambda: _chosen(original, theirs, wanted, vectors, progress))
    index = {int(n): k for k, n in enumerate(sorted(set(chosen.flatten().tolist())))}
    before, after = _vectors(original, theirs, sorted(index)), _vectors(model, own, sorted(index))
    overlap = _jaccard(_tokens(original, before, tokens), _tokens(original, after, tokens))
    angle = torch.nn.functional.cosine_similarity(before.double(), after.double(), dim=-1)
    place = [[index[int(n)] for n in row] for row in chosen]
    return Measurement({
        "jaccard": ask.scores(items, [float(overlap[rows].mean()) for rows in place]),
        "cosine": ask.scores(items, [float(angle[rows].mean()) for rows in place]),
    })  # fmt: skip


def _projections(model: LoadedModel) -> list[WeightRef]:
    """The down projections [d, neurons], one per layer; none where they are batched experts."""
    refs = [ref for ref in writers(model.module) if ref.role == "mlp_out"]
    return [] if any(ref.batched for ref in refs) else refs


def _shapes(model: LoadedModel, refs: Sequence[WeightRef]) -> list[torch.Size]:
    return [get_weight(model.module, ref).shape for ref in refs]


def _vectors(model: LoadedModel, refs: Sequence[WeightRef], numbers: Sequence[int]) -> Tensor:
    """The value vectors [n, d] of these rising numbers, in float32 on the CPU; one layer is copied at a time."""
    parts, start = [], 0
    for ref in refs:
        columns = get_weight(model.module, ref)
        end = start + columns.shape[1]
        parts.append(columns[:, [n - start for n in numbers if start <= n < end]].T.cpu())
        start = end
    return torch.cat(parts)


def _first_tokens(model: LoadedModel, items: Sequence[Item]) -> list[int]:
    return [e.answer[0] for e in encode_many(model.tokenizer, [(i.questions[0], i.continuation()) for i in items])]


@torch.no_grad()
def _chosen(
    model: LoadedModel, refs: Sequence[WeightRef], wanted: Sequence[int], count: int, progress: Progress | None
) -> Tensor:
    """Numbers of the value vectors (over all layers) that read out each token most strongly: [items, count]."""
    distinct = sorted(set(wanted))
    shares, numbers, start = [], [], 0
    for ref in track(progress, refs, "reading value vectors", len(refs)):
        for part in in_parts(get_weight(model.module, ref).T, model.vocab_size):
            share = lens(model, part).float().log_softmax(-1)[:, distinct].cpu()
            highest = share.topk(min(count, len(share)), dim=0)
            shares.append(highest.values)
            numbers.append(highest.indices + start)
            start += len(part)
    best = torch.cat(shares)
    rows = best.topk(min(count, len(best)), dim=0).indices
    found = torch.cat(numbers).gather(0, rows)  # [count, distinct]
    return torch.stack([found[:, distinct.index(token)] for token in wanted])


@torch.no_grad()
def _tokens(model: LoadedModel, vectors: Tensor, count: int) -> Tensor:
    """The ``count`` tokens that each vector [n, d] reads out most strongly [n, count]."""
    parts = in_parts(vectors, model.vocab_size)
    return torch.cat([lens(model, part).topk(count, dim=-1).indices.cpu() for part in parts])


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|a & b| / |a | b| of token sets [n, k] row by row, in float64."""
    common = torch.stack([torch.isin(x, y).sum() for x, y in zip(a, b, strict=True)]).double()
    return common / (2 * a.shape[1] - common)
