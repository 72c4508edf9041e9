"""Keep every writer of the residual stream out of a subspace: exact weight operations for each architecture."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from repforget.artifact import BiasDelta, LowRankDelta, Operation, Untie
from repforget.models.load import LoadedModel
from repforget.models.norms import gain
from repforget.models.weights import WeightRef, get_bias, get_weight, is_tied, writers


def orthonormal(rows: Tensor) -> Tensor:
    """Orthonormal basis [r, d] of the span of ``rows`` [r, d], float64."""
    q: Tensor = torch.linalg.qr(rows.double().mT)[0]
    return q.mT.contiguous()


def ablate_writers(model: LoadedModel, basis: Tensor) -> list[Operation]:
    """Operations after which nothing written to the residual stream lies in the span of ``basis`` [r, d].

    Per writer W (out x in): ``W -= GᵀGW``, ``b -= GᵀGb``. G is the basis itself, or, behind a norm with gain γ
    (sandwich norms), the span of γ⊙basis, since only then is the *normalised* output free of the basis; that
    norm's own bias is projected as well. Rows of embedding tables are projected; tied embeddings are untied
    first, since the unembedding must keep reading. No forward pass; one float64 copy of one writer at a time.
    """
    module: nn.Module = model.module
    basis = orthonormal(basis.cpu())
    operations: list[Operation] = [Untie()] if is_tied(module) else []
    seen: set[str] = set()
    for ref in writers(module):
        weight = get_weight(module, ref).cpu().double()
        if ref.role in ("embed", "position"):
            operations.append(LowRankDelta(ref.name, -(weight @ basis.mT), basis))
            continue
        span = basis if ref.post_norm is None else _before_norm(module.get_submodule(ref.post_norm), basis)
        operations.append(LowRankDelta(ref.name, -span.mT.expand(*weight.shape[:-2], -1, -1), span @ weight))
        operations += _bias_operations(module, ref, basis, span, seen)
    return [op for op in operations if not (isinstance(op, BiasDelta) and not bool(op.delta.any()))]


def _before_norm(norm: nn.Module, basis: Tensor) -> Tensor:
    """Span that a norm's input must avoid so that its output avoids ``basis``."""
    scaled = basis * gain(norm).cpu()
    if isinstance(norm, nn.LayerNorm):
        scaled = scaled - scaled.mean(-1, keepdim=True)  # the norm removes the mean by itself
    return orthonormal(scaled)


def _bias_operations(
    module: nn.Module, ref: WeightRef, basis: Tensor, span: Tensor, seen: set[str]
) -> list[Operation]:
    out: list[Operation] = []
    bias = get_bias(module, ref)
    if bias is not None and ref.bias is not None:
        out.append(_project(ref.bias, bias.cpu().double(), span))
    if ref.post_norm is not None and ref.post_norm not in seen:
        seen.add(ref.post_norm)
        offset = getattr(module.get_submodule(ref.post_norm), "bias", None)
        if isinstance(offset, Tensor):
            out.append(_project(f"{ref.post_norm}.bias", offset.detach().cpu().double(), basis))
    return out


def _project(name: str, vector: Tensor, span: Tensor) -> BiasDelta:
    return BiasDelta(name, -(span.mT @ (span @ vector)))
