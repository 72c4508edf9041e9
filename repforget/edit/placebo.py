"""The control that an editor has to beat: an edit of ordinary size in directions that mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from repforget.artifact import Edit, LowRankDelta
from repforget.artifact.weights import is_conv1d, owner_of
from repforget.errors import SiteError, UsageError
from repforget.knowledge import EditData
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.records import Localization


def placebo(
    model: LoadedModel, data: EditData, *, where: Localization | None = None, seed: int = 0,
    layers: Literal["auto"] | list[int] = "auto", top_layers: int = 4, rank: int = 4, norm: float = 0.05,
) -> Edit:  # fmt: skip
    """Change MLP output weights by random low-rank deltas of a given size, whatever is to be forgotten.

    A control of this project, no published method: ``W += norm * |W|_F * U Vᵀ / |U Vᵀ|_F`` with random orthonormal
    U [out, rank], V [in, rank].  What it does to a measure is what *some* edit of that size does; it says nothing
    about knowledge, and random directions change activations less than fitted ones of equal norm.  To match the
    size of a particular edit operation by operation, use :func:`repforget.artifact.placebo_of`.

    Args:
        layers: layers to change; "auto" is the ``top_layers`` best of ``where``, or all of them.
        rank: rank of each delta.
        norm: Frobenius norm of each delta, relative to its weight.

    Raises UsageError for a rank or norm that is not positive, SiteError where the MLP has no two-dimensional output
    projection (batched experts).  Cost: no forward pass.
    """
    if rank < 1 or norm <= 0:
        raise UsageError(f"A placebo of rank {rank} and norm {norm} changes nothing: give positive numbers.")
    anatomy = site_map(model.module).anatomy
    chosen = _layers(len(anatomy.layers), layers, where, top_layers)
    generator = torch.Generator().manual_seed(seed)
    operations = []
    for layer in chosen:
        down = anatomy.layers[layer].down
        if down is None:
            raise SiteError(f"Layer {layer} has batched experts and no two-dimensional MLP output projection: give "
                            "layers that have one.")  # fmt: skip
        operations.append(_delta(model, f"{down}.weight", rank, norm, generator))
    settings = {"layers": list(chosen), "rank": rank, "norm": norm}
    return Edit.build("placebo", settings, model, data.digest, operations)


def _layers(
    depth: int, layers: Literal["auto"] | list[int], where: Localization | None, top: int
) -> Sequence[int]:
    if layers != "auto":
        bad = [layer for layer in layers if not 0 <= layer < depth]
        if bad or not layers:
            raise SiteError(f"Layers {layers} were asked for: give some of 0 to {depth - 1}.")
        return layers
    return sorted(where.layers()[:top]) if where is not None and where.layers() else range(depth)


def _delta(model: LoadedModel, name: str, rank: int, norm: float, generator: torch.Generator) -> LowRankDelta:
    owner, _ = owner_of(model.module, name)
    weight: Tensor = model.module.get_parameter(name)
    out, inner = (weight.shape[1], weight.shape[0]) if is_conv1d(owner) else weight.shape
    r = min(rank, out, inner)
    u = torch.linalg.qr(torch.randn(out, r, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(inner, r, generator=generator, dtype=torch.float64)).Q
    size = norm * float(weight.detach().double().norm()) / r**0.5
    return LowRankDelta(name, (size * u).float(), v.T.float())
