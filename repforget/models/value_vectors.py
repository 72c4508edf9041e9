"""Value vectors: the columns of MLP output projections, and which tokens each of them speaks of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from repforget.errors import SiteError
from repforget.models._names import core
from repforget.models.readout import lens
from repforget.models.weights import WeightRef, get_weight, writers

LOGIT_ELEMENTS = 2**26  # logits of the value vectors that are read out at a time


def projections(model: Any) -> tuple[WeightRef, ...]:
    """The down projections [d, neurons], one per layer; SiteError where they are batched experts."""
    refs = tuple(ref for ref in writers(model) if ref.role == "mlp_out")
    if any(ref.batched for ref in refs):
        raise SiteError("The experts of this model are one batched tensor, so that it has no value vectors of single "
                        "neurons: choose a method that acts on whole MLPs.")  # fmt: skip
    return refs


def in_parts(vectors: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Vectors [n, d] in parts whose logits fit into memory together."""
    return torch.split(vectors, max(1, LOGIT_ELEMENTS // vocabulary))


def spoken(model: Any, ref: WeightRef, vectors: Tensor) -> Tensor:
    """Logits [n, V] of value vectors [n, d] of ``ref`` through a norm behind the MLP, the final norm and the
    unembedding."""
    module = core(model)
    if ref.post_norm is not None:
        norm = module.get_submodule(ref.post_norm)
        vectors = norm(vectors.to(norm.weight))  # type: ignore[arg-type]
    return lens(module, vectors)


@torch.no_grad()
def readouts(model: Any, ref: WeightRef) -> Iterator[Tensor]:
    """Logits [n, V] (float32) of all value vectors of ``ref`` in order, some at a time."""
    module = core(model)
    columns = get_weight(module, ref).T
    vocabulary = len(module.get_output_embeddings().weight)  # type: ignore[operator]
    for part in in_parts(columns, vocabulary):
        yield spoken(module, ref, part).float()


@torch.no_grad()
def concept_scores(model: Any, concepts: Sequence[Sequence[int]], tokens: int) -> Tensor:
    """How well each value vector [layers, neurons] names the tokens of its best concept, 0 to 1 (float64).

    A concept's score is the discounted cumulative gain of its tokens among the ``tokens`` a vector ranks highest,
    ``sum_w idf_w / log2(2 + rank_w)``, over its greatest possible value; idf_w = log((1 + n) / (1 + n_w)) where n_w of
    the n vectors have w among theirs, so that what all vectors say counts little.  Cost: one unembedding per neuron,
    no forward pass; memory: one number per neuron and distinct token.
    """
    wanted = sorted({token for concept in concepts for token in concept})
    refs = projections(model)
    gains = torch.cat([_gains(part, wanted, tokens) for ref in refs for part in readouts(model, ref)])
    n = len(gains)
    rarity = torch.log((1 + n) / (1 + (gains > 0).sum(0).double()))
    place = {token: k for k, token in enumerate(wanted)}
    best = torch.zeros(n, dtype=torch.float64)
    for concept in concepts:
        columns = [place[token] for token in sorted(set(concept))]
        weight = rarity[columns]
        discount = 1 / torch.log2(torch.arange(2, 2 + min(len(columns), tokens)).double())
        ideal = (weight.sort(descending=True).values[: len(discount)] * discount).sum().clamp(min=1e-300)
        best = torch.maximum(best, gains[:, columns].double() @ weight / ideal)
    return best.reshape(len(refs), -1)


def _gains(logits: Tensor, wanted: Sequence[int], tokens: int) -> Tensor:
    """1 / log2(2 + rank) of the wanted tokens [n, w] among the highest ``tokens`` of each row, 0 outside them."""
    count = min(tokens, logits.shape[1])
    gain = torch.zeros_like(logits)
    discount = 1 / torch.log2(torch.arange(2, 2 + count, device=logits.device).float())
    gain.scatter_(1, logits.topk(count, dim=1).indices, discount.expand(len(logits), -1))
    return gain[:, list(wanted)].cpu()
