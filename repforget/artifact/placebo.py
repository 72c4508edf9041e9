"""The placebo of an edit: the same operations at the same sites with the same norms, in random directions."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from repforget.artifact.edit import Edit
from repforget.artifact.operations import (
    AddVector,
    Affine,
    BiasDelta,
    ClampFeatures,
    DenseDelta,
    LowRankDelta,
    Operation,
    ScaleUnits,
    SparseDelta,
    Untie,
)
from repforget.models.load import LoadedModel


def placebo_of(edit: Edit, model: LoadedModel, seed: int = 0) -> Edit:
    """Return the placebo of ``edit``: what an edit of this size does when its directions mean nothing.

    Every operation keeps its kind, site, gate and size: low-rank deltas keep all singular values, affine maps
    keep the geometry of their two factors (an ablation stays one), dense and bias deltas their Frobenius
    norm, sparse deltas and unit scalings their values, at random places; clamped features are active where they were
    and written along turned directions.  Deterministic per seed.  What it
    does not match is the effect on activations: random directions carry less of their variance than fitted
    ones.

    Cost: no forward pass.  Raises ArtifactError when ``model`` is not the base of ``edit``.
    """
    edit.check_base(model)
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: tuple(p.shape) for name, p in model.module.named_parameters(remove_duplicate=False)}
    operations = tuple(_random(op, model, shapes, generator) for op in edit.operations)
    manifest = dataclasses.replace(
        edit.manifest, method=f"placebo({edit.manifest.method})",
        settings={"like": edit.manifest.method, "seed": seed, "settings": dict(edit.manifest.settings)},
        notes=(f"random directions, norms of '{edit.manifest.method}'",),
    )  # fmt: skip
    return Edit(manifest, operations)


def _random(
    op: Operation, model: LoadedModel, shapes: dict[str, tuple[int, ...]], g: torch.Generator
) -> Operation:
    match op:
        case Affine():
            left, right = _turned(op.left, op.right.T, g)
            return dataclasses.replace(op, left=left, right=right.T.contiguous())
        case AddVector():
            return dataclasses.replace(op, vector=_noise(op.vector, g))
        case LowRankDelta():
            u, v = _same_spectrum(op.u, op.v, g)
            return dataclasses.replace(op, u=u, v=v)
        case DenseDelta() | BiasDelta():
            return dataclasses.replace(op, delta=_noise(op.delta, g))
        case SparseDelta():
            index = _distinct(torch.Size(shapes[op.weight]).numel(), len(op.index), g)
            return dataclasses.replace(op, index=index, values=_shuffled(op.values, g))
        case ScaleUnits():
            from repforget.models.sites import site_map

            index = _distinct(site_map(model.module).size(op.site), len(op.index), g)
            order = torch.randperm(len(op.factor), generator=g)
            return dataclasses.replace(op, index=index, factor=op.factor[order])
        case ClampFeatures():
            basis, coordinates = torch.linalg.qr(op.decoder.T.double())
            turned = _orthonormal(basis.shape[0], basis.shape[1], g) @ coordinates
            return dataclasses.replace(op, decoder=turned.T.float().contiguous())
        case Untie():
            return op


def _noise(like: Tensor, g: torch.Generator) -> Tensor:
    draw: Tensor = torch.randn(like.shape, generator=g, dtype=torch.float64)
    scaled: Tensor = draw * (like.double().norm() / draw.norm())
    return scaled.float()


def _distinct(size: int, count: int, g: torch.Generator) -> Tensor:
    """``count`` distinct numbers below ``size``, without a permutation of all of a large tensor's entries."""
    if size < 4 * count:
        return torch.randperm(size, generator=g)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        drawn = torch.unique(torch.cat([drawn, torch.randint(size, (2 * count,), generator=g)]))  # type: ignore[no-untyped-call]
    return drawn[torch.randperm(len(drawn), generator=g)[:count]].sort().values


def _shuffled(values: Tensor, g: torch.Generator) -> Tensor:
    signs = torch.randint(0, 2, values.shape, generator=g).to(values) * 2 - 1
    return values[torch.randperm(len(values), generator=g)] * signs


def _orthonormal(rows: int, columns: int, g: torch.Generator) -> Tensor:
    basis: Tensor = torch.linalg.qr(torch.randn(rows, columns, generator=g, dtype=torch.float64)).Q
    return basis


def _turned(left: Tensor, right: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both [d, r] factors carried by one random rotation: angles and lengths between them stay as they
    are.
    """
    basis, coordinates = torch.linalg.qr(torch.cat([left, right], dim=1).double())
    turned = _orthonormal(basis.shape[0], basis.shape[1], g) @ coordinates
    return turned[:, : left.shape[1]].float(), turned[:, left.shape[1] :].float()


def _same_spectrum(u: Tensor, v: Tensor, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors of a random matrix with the singular values of ``u @ v`` (per expert where there are three
    axes).
    """
    if u.ndim == 3:
        pairs = [_same_spectrum(a, b, g) for a, b in zip(u, v, strict=True)]
        return torch.stack([a for a, _ in pairs]), torch.stack([b for _, b in pairs])
    left, right = torch.linalg.qr(u.double()), torch.linalg.qr(v.double().T)
    values = torch.linalg.svdvals(left.R @ right.R.T)
    a = _orthonormal(len(u), len(values), g) * values.sqrt()
    b = _orthonormal(v.shape[1], len(values), g) * values.sqrt()
    return a.float(), b.T.float().contiguous()
