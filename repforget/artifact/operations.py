"""The few kinds of operation an edit consists of: plain frozen values, no model in sight.

Site operations change activations (``affine``, ``add_vector``, ``scale_units``, ``clamp_features``); weight
operations change parameters (``low_rank``, ``dense``, ``sparse``, ``bias``, ``untie``).  Weight operations are applied
to the base weights first; site operations then act in their order on what the network computes.  Tensors are float32
on the CPU; computation follows the device of the activation or parameter.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from repforget.errors import ArtifactError
from repforget.features import Scaling, encoded
from repforget.records import Site

Positions = Literal["all", "last", "prompt", "generated"]
POSITIONS: tuple[str, ...] = get_args(Positions)


@dataclass(frozen=True, eq=False)
class Gate:
    """Opens a site operation where ``direction`` is present at ``site`` (default: the operation's own site).

    The score of a token is ``x . direction`` (or the cosine with it); the gate is open where the score lies
    above ``threshold`` (below, with ``above=False``).  ``scope="token"`` decides each token alone;
    ``"prefix"`` stays open from the first token that opens it, which depends on earlier tokens only and is
    therefore the same with and without a key/value cache.  Padding never opens it, nor does the first token
    unless ``first`` is set (position 0 carries massive activations in most models).  ``site`` must not lie
    deeper than the gated operation.
    """

    direction: Tensor  # [d]
    threshold: float
    scope: Literal["token", "prefix"] = "token"
    cosine: bool = False
    above: bool = True
    first: bool = False
    site: Site | None = None


@dataclass(frozen=True, eq=False)
class Affine:
    """``x -> x - (x - center) @ right.T @ left.T``: an eraser or ablation of rank r at a site."""

    site: Site
    left: Tensor  # [d, r]
    right: Tensor  # [r, d]
    center: Tensor | None = None  # [d]
    gate: Gate | None = None
    kind: ClassVar[str] = "affine"


@dataclass(frozen=True, eq=False)
class AddVector:
    """``x -> x + scale * vector`` at a site, at some positions, where the gate (if any) is open.

    ``positions``: ``all``; ``prompt`` (the tokens given), ``generated`` (the tokens after them) or ``last``
    (the last prompt token).  Inside ``generate`` the prompt is what was given to it; in any other pass over
    fresh tokens the whole input counts as prompt, and tokens fed later on its cache count as generated.
    """

    site: Site
    vector: Tensor  # [d]
    scale: float = 1.0
    gate: Gate | None = None
    positions: Positions = "all"
    kind: ClassVar[str] = "add_vector"


@dataclass(frozen=True, eq=False)
class ScaleUnits:
    """Multiply units of a site by factors: neurons of ``mlp_post``, channels of ``attn_z`` or of a head."""

    site: Site
    index: Tensor  # [k] int64, positions in the site's last axis
    factor: Tensor  # [k]
    kind: ClassVar[str] = "scale_units"


@dataclass(frozen=True, eq=False)
class ClampFeatures:
    """``x -> x + sum_i (factor_i f_i + value_i - f_i) d_i`` over active features i of a sparse autoencoder.

    ``f = encoder x + bias`` where that exceeds ``threshold``; the rest of x, with the autoencoder's error, stays as it
    is.  Factor 0 with value 0 ablates a feature, with another value clamps it; factor 1 with value 0 is the identity.
    ``scaling`` is the autoencoder's, applied to x before encoding and undone in what is added.  With ``share``, a
    sequence is left alone until more than that share of its tokens so far had one of the features active (``prior``
    idle tokens counted in front), and changed from there on: earlier tokens alone decide, with a cache and without.
    Never changed or counted: padding and the first token.
    """

    site: Site
    encoder: Tensor  # [n, d]
    bias: Tensor  # [n]
    threshold: Tensor  # [n], at least 0
    decoder: Tensor  # [n, d]
    factor: Tensor  # [n]
    value: Tensor  # [n]
    scaling: Scaling = "none"
    share: float | None = None
    prior: float = 0.0
    gate: Gate | None = None
    kind: ClassVar[str] = "clamp_features"


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """``W += u @ v`` in Linear orientation ([out, in], also where the module is a transposed Conv1D)."""

    weight: str  # parameter name in memory, for example "model.layers.0.mlp.down_proj.weight"
    u: Tensor  # [out, r] (or [experts, out, r])
    v: Tensor  # [r, in] (or [experts, r, in])
    kind: ClassVar[str] = "low_rank"


@dataclass(frozen=True, eq=False)
class DenseDelta:
    """``W += delta`` in the parameter's own layout and shape."""

    weight: str
    delta: Tensor
    kind: ClassVar[str] = "dense"


@dataclass(frozen=True, eq=False)
class SparseDelta:
    """``W.flatten()[index] += values`` in the parameter's own layout; indices are distinct."""

    weight: str
    index: Tensor  # [k] int64 into the flattened parameter
    values: Tensor  # [k]
    kind: ClassVar[str] = "sparse"


@dataclass(frozen=True, eq=False)
class BiasDelta:
    """``bias += delta``; a bias that the module lacks is created (exports refuse where it would be lost)."""

    bias: str  # "model.layers.0.mlp.down_proj.bias"
    delta: Tensor  # [out]
    kind: ClassVar[str] = "bias"


@dataclass(frozen=True, eq=False)
class Untie:
    """Give the unembedding a weight of its own, so that it is edited apart; changes no logit by itself."""

    kind: ClassVar[str] = "untie"


LinearOperation: TypeAlias = Affine | AddVector | ScaleUnits
SiteOperation: TypeAlias = LinearOperation | ClampFeatures
WeightOperation: TypeAlias = LowRankDelta | DenseDelta | SparseDelta | BiasDelta | Untie
Operation: TypeAlias = SiteOperation | WeightOperation
KINDS: Mapping[str, type[Any]] = {
    cls.kind: cls for cls in (*get_args(SiteOperation), *get_args(WeightOperation))
}


def site_operations(operations: Sequence[Operation]) -> list[SiteOperation]:
    """Those of ``operations`` that change activations, in order."""
    return [op for op in operations if isinstance(op, SiteOperation)]


def weight_operations(operations: Sequence[Operation]) -> list[WeightOperation]:
    """Those of ``operations`` that change parameters, in order."""
    return [op for op in operations if not isinstance(op, SiteOperation)]


def target(operation: Operation) -> str:
    """The site or parameter that an operation changes, as text ("" for :class:`Untie`)."""
    if isinstance(operation, Untie):
        return ""
    if isinstance(operation, BiasDelta):
        return operation.bias
    if isinstance(operation, LowRankDelta | DenseDelta | SparseDelta):
        return operation.weight
    return str(operation.site)


def normalised(operation: Operation) -> Operation:
    """The same operation with detached contiguous CPU tensors of its own (float32, int64 for indices)."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(operation):
        value = getattr(operation, field.name)
        if isinstance(value, Tensor):
            dtype = torch.float32 if value.is_floating_point() else torch.int64
            changes[field.name] = value.detach().to("cpu", dtype, copy=True).contiguous()
        elif isinstance(value, Gate):
            direction = value.direction.detach().to("cpu", torch.float32, copy=True).contiguous()
            changes[field.name] = dataclasses.replace(value, direction=direction)
    return dataclasses.replace(operation, **changes)


def scaled(operation: Operation, a: float) -> Operation:
    """The operation at strength ``a``: 1 is itself, 0 the identity (bit for bit), more goes further."""
    match operation:
        case Affine():
            return dataclasses.replace(operation, left=operation.left * a)
        case AddVector():
            return dataclasses.replace(operation, scale=operation.scale * a)
        case ScaleUnits():
            return dataclasses.replace(operation, factor=1.0 + a * (operation.factor - 1.0))
        case ClampFeatures():
            factor = 1.0 + a * (operation.factor - 1.0)
            return dataclasses.replace(operation, factor=factor, value=a * operation.value)
        case LowRankDelta():
            return dataclasses.replace(operation, u=operation.u * a)
        case DenseDelta() | BiasDelta():
            return dataclasses.replace(operation, delta=operation.delta * a)
        case SparseDelta():
            return dataclasses.replace(operation, values=operation.values * a)
        case Untie():
            return operation


def inverse(operation: Operation) -> Operation:
    """The operation that undoes this one up to rounding; ArtifactError where information was destroyed."""
    match operation:
        case Affine(gate=None):
            r = operation.left.shape[1]
            core = torch.eye(r, dtype=torch.float64) - operation.right.double() @ operation.left.double()
            if float(torch.linalg.svdvals(core).min()) < 1e-6:
                raise ArtifactError(f"The affine map at {operation.site} projects directions away and has no "
                                    "inverse: attach the edit instead of folding it, or keep the undo of "
                                    "fold.")  # fmt: skip
            left = (-operation.left.double() @ torch.linalg.inv(core)).float()
            return dataclasses.replace(operation, left=left)
        case ScaleUnits() if bool((operation.factor == 0).any()):
            raise ArtifactError(f"Units at {operation.site} are multiplied by zero, which has no inverse: "
                                "attach the edit instead of folding it, or keep the undo of "
                                "fold.")  # fmt: skip
        case ScaleUnits():
            return dataclasses.replace(operation, factor=1.0 / operation.factor)
        case Affine() | AddVector(gate=Gate()) | ClampFeatures():
            raise ArtifactError(f"The operation at {operation.site} depends on the activation it changes "
                                "and has no exact inverse: attach the edit instead of inverting "
                                "it.")  # fmt: skip
        case Untie():
            return operation
        case _:
            return scaled(operation, -1.0)


def is_zero(operation: Operation) -> bool:
    """True when the operation changes nothing whatever the activations are."""
    match operation:
        case Affine():
            return not (operation.left.any() and operation.right.any())
        case AddVector():
            return operation.scale == 0.0 or not operation.vector.any()
        case ScaleUnits():
            return bool((operation.factor == 1).all())
        case ClampFeatures():
            return not ((operation.factor != 1) | (operation.value != 0))[operation.decoder.any(1)].any()
        case LowRankDelta():
            return not (operation.u.double() @ operation.v.double()).any()
        case DenseDelta() | BiasDelta():
            return not operation.delta.any()
        case SparseDelta():
            return not operation.values.any()
        case Untie():
            return True


def size(operation: Operation) -> float:
    """Frobenius norm of what the operation adds: of the delta, of ``scale * vector``, of ``left @ right``, of
    factor - 1, of the rows (factor - 1, value) times the lengths of their decoder rows.
    """
    match operation:
        case Affine():
            return float(torch.linalg.norm(operation.left.double() @ operation.right.double()))
        case AddVector():
            return abs(operation.scale) * float(operation.vector.double().norm())
        case ScaleUnits():
            return float((operation.factor.double() - 1).norm())
        case ClampFeatures():
            moves = torch.stack([operation.factor.double() - 1, operation.value.double()])
            return float((moves * operation.decoder.double().norm(dim=1)).norm())
        case LowRankDelta():
            return float(torch.linalg.norm(operation.u.double() @ operation.v.double()))
        case DenseDelta() | BiasDelta():
            return float(operation.delta.double().norm())
        case SparseDelta():
            return float(operation.values.double().norm())
        case Untie():
            return 0.0


def change(operation: SiteOperation, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """What a site operation adds to the activations ``x`` [.., d]; ``tensors`` are its arrays on x's device
    and dtype.
    """
    if isinstance(operation, AddVector):
        return operation.scale * tensors["vector"]
    if isinstance(operation, ScaleUnits):
        added = torch.zeros_like(x)
        added[..., tensors["index"]] = x[..., tensors["index"]] * (tensors["factor"] - 1.0)
        return added
    if isinstance(operation, ClampFeatures):
        f, unit = active_features(operation, x, tensors)
        moved = torch.where(f > 0, (tensors["factor"] - 1.0) * f + tensors["value"], 0.0)
        return moved @ tensors["decoder"] * unit
    centred = x - tensors["center"] if "center" in tensors else x
    return -(centred @ tensors["right"].T) @ tensors["left"].T


def active_features(operation: ClampFeatures, x: Tensor, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Values [.., n] of the operation's features, 0 where idle, and the factor [.., 1] that undoes its scaling."""
    return encoded(x, tensors["encoder"], tensors["bias"], tensors["threshold"], operation.scaling)


def apply_to_weight(operation: WeightOperation, weight: Tensor, *, transposed: bool) -> Tensor:
    """``weight`` (float64, in the parameter's own layout) with one weight operation applied; a new tensor."""
    match operation:
        case LowRankDelta():
            delta = operation.u.to(weight) @ operation.v.to(weight)
            return weight + (delta.mT if transposed else delta)
        case DenseDelta() | BiasDelta():
            return weight + operation.delta.to(weight)
        case SparseDelta():
            index = operation.index.to(weight.device)
            return weight.flatten().index_add(0, index, operation.values.to(weight)).view_as(weight)
        case Untie():
            return weight
