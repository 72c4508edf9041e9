"""What the tests of edits share: logits on fixed tokens, hooks counted, operations of every kind for a model."""

from __future__ import annotations

from typing import Any

import tiny_models
import torch
from torch import Tensor

from repforget.artifact import (
    AddVector,
    Affine,
    BiasDelta,
    DenseDelta,
    Edit,
    LowRankDelta,
    Operation,
    ScaleUnits,
    SparseDelta,
)
from repforget.models.capture import Batch, forward
from repforget.models.load import LoadedModel, wrap
from repforget.models.sites import site_map
from repforget.records import Site


def tiny(architecture: str, seed: int = 0) -> LoadedModel:
    return wrap(tiny_models.build(architecture, seed), tiny_models.tiny_tokenizer(), f"tiny-{architecture}")


def logits(model: LoadedModel | Any, side: str = "right") -> Tensor:
    """Logits of three texts of different lengths, one row per real token, in order."""
    batch = Batch.pad(tiny_models.sample_ids(), side=side)
    return forward(model, batch)[batch.mask.bool()]


def hook_count(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def projection(d: int, rank: int = 2, seed: int = 0) -> Tensor:
    """[d, rank] with orthonormal columns."""
    return torch.linalg.qr(draw(d, rank, seed=seed)).Q


def site_operation(kind: str, site: Site, d: int) -> Operation:
    if kind == "affine":
        basis = projection(d)
        return Affine(site, basis, basis.T, 0.3 * draw(d, seed=1))
    if kind == "add_vector":
        return AddVector(site, 0.5 * draw(d, seed=2))
    return ScaleUnits(site, torch.tensor([0, d - 1]), torch.tensor([0.0, 2.0]))


def weight_operation(kind: str, model: LoadedModel) -> Operation:
    """An operation of ``kind`` on the query or fused projection of layer 0 (its bias is made where there is none)."""
    qkv = site_map(model.module).anatomy.layers[0].qkv
    path = qkv if isinstance(qkv, str) else qkv[0]
    owner: Any = model.module.get_submodule(path)
    out, inner = (owner.weight.T if type(owner).__name__ == "Conv1D" else owner.weight).shape
    if kind == "low_rank":
        return LowRankDelta(f"{path}.weight", draw(out, 2), 0.3 * draw(2, inner, seed=1))
    if kind == "dense":
        return DenseDelta(f"{path}.weight", 0.3 * draw(*owner.weight.shape))
    if kind == "sparse":
        return SparseDelta(f"{path}.weight", torch.tensor([1, 7, 40]), 5 * draw(3))
    return BiasDelta(f"{path}.bias", draw(out))


def build(model: LoadedModel, *operations: Operation, **arguments: Any) -> Edit:
    return Edit.build("hand_made", {"strength": 1.0}, model, "no-knowledge", operations, **arguments)
