"""Write an edit into the weights: which site operations have an exact weight form, and the undo.

An affine map or added vector at the output of a linear module goes into its rows and bias, at the input into
its columns and bias; at a norm output into every reader.  A vector added to the residual stream goes into the
bias of the projection that writes there.  Everything else has no exact weight form (``spec``: skip
connections, gates, clamped features, norms after a writer, batched experts) and stays a hook.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from repforget.artifact.attach import attach, hook_operations
from repforget.artifact.operations import (
    AddVector,
    Affine,
    ClampFeatures,
    LinearOperation,
    Operation,
    ScaleUnits,
    SiteOperation,
    Untie,
    site_operations,
    weight_operations,
)
from repforget.artifact.weights import (
    Change,
    NewValue,
    Slots,
    changes_by_owner,
    is_conv1d,
    new_values,
    untie,
    write,
)
from repforget.errors import NoEffectError
from repforget.models.load import LoadedModel, copy_of, fingerprint
from repforget.models.sites import SiteMap, site_map
from repforget.quantizers import Form, round_trip
from repforget.records import Site

if TYPE_CHECKING:
    from repforget.artifact.edit import Edit

PROBE_ROWS, PROBE_COLUMNS = 2, 16
ROUNDED: tuple[Form, ...] = ("int8", "nf4")
CHUNK = 1 << 20  # entries compared at a time


@dataclass(frozen=True)
class Parity:
    """How the folded model compares with the hook form, and how much of each weight delta survives casting.

    ``max_logit_difference`` is over random probe tokens, beside the largest logit (``logit_scale``).
    ``cosines``: parameter -> dtype -> cosine of the delta that remains after a cast to that dtype with the
    exact one (1 = all of it; the model's own dtype is listed as "own"), and of matrices to int8 and nf4.
    Says nothing about knowledge, only about arithmetic.
    """

    max_logit_difference: float
    logit_scale: float
    cosines: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Undo:
    """Call it to restore every touched tensor bit for bit; a second call does nothing."""

    parity: Parity
    touched: tuple[str, ...]  # parameters that were written
    hooked: tuple[str, ...]  # sites that stay hooks, "" none
    _stack: ExitStack = field(repr=False)

    def __call__(self) -> None:
        self._stack.close()


@dataclass(frozen=True)
class _Place:
    """A linear module (or embedding table) whose weights carry a site operation exactly."""

    path: str
    side: str  # "out": rows and bias; "in": columns and bias; "table": rows of an embedding
    columns: slice | list[int] | None = None


def _linear(module: nn.Module, path: str | None) -> bool:
    if not path:
        return False
    found = module.get_submodule(path)
    # exact class families only: wrapped or quantised projections have weights that mean something else
    weight = found._parameters.get("weight")
    kind = isinstance(found, nn.Linear) or is_conv1d(found)
    return kind and weight is not None and weight.is_floating_point()


def _readers(module: nn.Module, sites: SiteMap, site: Site) -> tuple[str, ...] | None:
    """Paths of every module that reads a norm output, or None where not all of them are linear."""
    if site.kind == "final_norm":
        return (sites.anatomy.unembed,)
    layer = sites.anatomy.layers[site.layer]
    if site.kind == "attn_in":
        return (layer.qkv,) if isinstance(layer.qkv, str) else layer.qkv
    if layer.experts or layer.router:
        return None
    return tuple(path for path in (layer.gate, layer.up, layer.gate_up) if path)


def _writer(sites: SiteMap, site: Site) -> str | None:
    """Path of the projection that writes the site (or adds to it) with no norm between."""
    index = site.layer - 1 if site.kind == "resid_pre" else site.layer
    if index < 0:
        return None
    layer = sites.anatomy.layers[index]
    if site.kind == "attn_out":
        return None if layer.attention_post_norm else layer.attention_out
    return None if layer.mlp_post_norm or layer.experts else layer.down


def _places(module: nn.Module, operation: SiteOperation, untied: bool) -> tuple[_Place, ...] | None:
    """Where the weights can carry a site operation exactly; None where they cannot."""
    if isinstance(operation, ClampFeatures) or getattr(operation, "gate", None) is not None:
        return None
    constant = isinstance(operation, AddVector)
    if isinstance(operation, AddVector) and operation.positions != "all":
        return None
    sites, site = site_map(module), operation.site
    location = sites.locate(site)
    if site.kind in ("q", "k", "v", "mlp_gate", "mlp_up", "attn_z", "mlp_post"):
        found: tuple[_Place, ...] = (_Place(location.path, location.side, location.columns),)
    elif site.kind in ("attn_out", "mlp_out") or (constant and site.kind in ("resid_post", "resid_pre")):
        writer = _writer(sites, site)
        found = (_Place(writer, "out"),) if writer else ()
    elif site.kind in ("attn_in", "mlp_in", "final_norm"):
        if site.kind == "final_norm" and not untied:
            return None
        found = tuple(_Place(path, "in") for path in _readers(module, sites, site) or ())
    elif site.kind == "embed" and untied and type(module.get_submodule(location.path)) is nn.Embedding:
        return (_Place(location.path, "table"),)
    else:
        found = ()
    return found if found and all(_linear(module, place.path) for place in found) else None


def _group(site: Site) -> str:
    """Sites whose operations fold into the same place, so that they fold together or not at all."""
    if site.kind in ("mlp_out", "resid_post"):
        return f"mlp_write.{site.layer}"
    if site.kind == "resid_pre" and site.layer > 0:
        return f"mlp_write.{site.layer - 1}"
    return f"{site.kind}.{site.layer}"


def foldable(module: nn.Module, operations: Sequence[Operation]) -> Callable[[SiteOperation], bool]:
    """Tell for each site operation of an edit whether it folds exactly; order at one place is kept."""
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()  # type: ignore[operator]
    apart = head is not None and head.weight is not embedding.weight
    untied = apart or any(isinstance(op, Untie) for op in operations)
    own = site_operations(operations)
    blocked = {_group(op.site) for op in own if _places(module, op, untied) is None}
    return lambda op: _group(op.site) not in blocked


def _matrix(slots: Slots, owner: nn.Module) -> Tensor:
    return slots["weight"].T if is_conv1d(owner) else slots["weight"]


def _store(slots: Slots, owner: nn.Module, matrix: Tensor) -> None:
    slots["weight"] = matrix.T.contiguous() if is_conv1d(owner) else matrix


def _into_rows(operation: LinearOperation, owner: nn.Module, columns: slice | list[int] | None) -> Change:
    """y = Wx + b becomes op(y): rows of W and entries of b, for the given outputs."""
    rows = slice(None) if columns is None else columns

    def run(slots: Slots) -> None:
        if isinstance(operation, AddVector):
            bias = slots["bias"].clone()
            bias[rows] += operation.scale * operation.vector.to(bias)
            slots["bias"] = bias
            return
        matrix = _matrix(slots, owner).clone()
        matrix[rows] = _mapped(operation, matrix[rows].T, centred=False).T
        _store(slots, owner, matrix)
        constant = isinstance(operation, Affine) and operation.center is not None
        if constant or "bias" in slots or owner._parameters.get("bias") is not None:
            bias = slots["bias"].clone()
            bias[rows] = _mapped(operation, bias[rows], centred=True)
            slots["bias"] = bias

    return run


def _mapped(operation: Affine | ScaleUnits, x: Tensor, *, centred: bool) -> Tensor:
    """A site operation on vectors x [.., d] in float64, with or without its constant part."""
    if isinstance(operation, ScaleUnits):
        out = x.clone()
        out[..., operation.index.to(x.device)] *= operation.factor.to(x)
        return out
    moved = x - operation.center.to(x) if centred and operation.center is not None else x
    return x - moved @ operation.right.to(x).T @ operation.left.to(x).T


def _into_columns(operation: LinearOperation, owner: nn.Module, columns: slice | list[int] | None) -> Change:
    """y = Wx + b becomes W op(x) + b: columns of W, and what the constant part of op adds to b."""
    part = slice(None) if columns is None else columns

    def run(slots: Slots) -> None:
        matrix = _matrix(slots, owner)
        zero = matrix.new_zeros(matrix[:, part].shape[1])
        if isinstance(operation, AddVector):
            constant = operation.scale * operation.vector.to(matrix)
        else:
            constant = _mapped(operation, zero, centred=True)
            columns_now = matrix[:, part]
            changed = matrix.clone()
            if isinstance(operation, Affine):
                left, right = operation.left.to(matrix), operation.right.to(matrix)
                changed[:, part] = columns_now - columns_now @ left @ right
            else:
                changed[:, part] = _mapped(operation, columns_now, centred=False)
            _store(slots, owner, changed)
        if bool(constant.any()):
            slots["bias"] = slots["bias"] + matrix[:, part] @ constant

    return run


def _into_table(operation: LinearOperation) -> Change:
    def run(slots: Slots) -> None:
        table = slots["weight"]
        if isinstance(operation, AddVector):
            slots["weight"] = table + operation.scale * operation.vector.to(table)
        else:
            slots["weight"] = _mapped(operation, table, centred=True)

    return run


def fold_changes(
    module: nn.Module, operations: Sequence[Operation]
) -> tuple[dict[str, list[Change]], list[SiteOperation]]:
    """All weight changes of an edit by owner (weights, then sites), and the operations that stay hooks."""
    can = foldable(module, operations)
    grouped = changes_by_owner(module, weight_operations(operations))
    rank = site_map(module).rank
    own = site_operations(operations)
    linear = [op for op in own if not isinstance(op, ClampFeatures) and can(op)]
    folded = sorted(linear, key=lambda op: rank(op.site))
    placed = [(op, place) for op in folded for place in _places(module, op, True) or ()]
    outward = [(op, place) for op, place in placed if place.side != "in"]
    # The operation nearest to the weight goes in first: at an output in order, at an input in reverse.
    inward = [(op, place) for op, place in reversed(placed) if place.side == "in"]
    for op, place in (*outward, *inward):
        owner = module.get_submodule(place.path)
        change = (_into_table(op) if place.side == "table" else _into_rows(op, owner, place.columns)
                  if place.side == "out" else _into_columns(op, owner, place.columns))  # fmt: skip
        grouped.setdefault(place.path, []).append(change)
    return grouped, [op for op in own if not can(op)]


@torch.no_grad()
def probe_logits(module: nn.Module) -> Tensor:
    """Logits (float64, CPU) on fixed random tokens; what parity and exports are compared on."""
    vocabulary = module.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (PROBE_ROWS, PROBE_COLUMNS), generator=generator)
    device = module.get_input_embeddings().weight.device  # type: ignore[operator]
    logits: Tensor = module(input_ids=ids.to(device), use_cache=False).logits
    return logits.double().cpu()


def cosines(new: NewValue, *, projection: bool = True) -> dict[str, float]:
    """How much of a change survives: cosine with the exact one in the parameter's own dtype and in half precisions.

    For a matrix of a ``projection`` also rounded to int8 (a scale per output) and nf4 (per 64 inputs) before and after:
    low where few codes flip, or where rounding noise is larger than the change.
    """
    whole, before = (torch.split(t.flatten(), CHUNK) for t in (new.exact, new.old))  # type: ignore[no-untyped-call]
    pieces = list(zip(whole, before, strict=True))
    casts: dict[str, torch.dtype] = {"own": new.value.dtype, "bfloat16": torch.bfloat16, "float16": torch.float16}
    out = {name: _cosine((value - old, value.to(dtype).double() - old.to(dtype).double()) for value, old in pieces)
           for name, dtype in casts.items()}  # fmt: skip
    if not projection or new.value.ndim < 2:
        return out
    rows = [t.mT.flatten(0, -2) if is_conv1d(new.owner) else t.flatten(0, -2) for t in (new.exact, new.old)]
    blocks = [torch.split(t, max(1, CHUNK // t.shape[1])) for t in rows]  # type: ignore[no-untyped-call]
    for kind in ROUNDED:
        out[kind] = _cosine((value - old, _rounded(value, kind) - _rounded(old, kind))
                            for value, old in zip(*blocks, strict=True))  # fmt: skip
    return out


def _rounded(weight: Tensor, kind: Form) -> Tensor:
    return round_trip(weight.float(), kind)[1].double()


def _cosine(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Cosine of two tensors given in pieces; 0 where one of them is zero."""
    product, size, left_size = 0.0, 0.0, 0.0
    for exact, left in pairs:
        product += float((left * exact).sum())
        left_size += float(left.square().sum())
        size += float(exact.square().sum())
    return product / math.sqrt(left_size * size) if left_size * size > 0 else 0.0


def fold(edit: Edit, model: LoadedModel, *, check: bool) -> Undo:
    """Write ``edit`` into ``model``; see :meth:`repforget.artifact.Edit.fold`."""
    if check:
        edit.check_base(model)
    module = model.module
    with attach(edit, model, check=False):
        expected = probe_logits(module)
    with ExitStack() as stack:
        touched, kept, hooked = _install(edit, module, stack)
        gap = float((probe_logits(module) - expected).abs().max())
        parity = Parity(gap, float(expected.abs().max()), kept)
        return Undo(parity, touched, hooked, stack.pop_all())


def _install(
    edit: Edit, module: nn.Module, stack: ExitStack
) -> tuple[tuple[str, ...], dict[str, dict[str, float]], tuple[str, ...]]:
    if any(isinstance(op, Untie) for op in edit.weight_operations):
        stack.callback(untie(module))
    grouped, rest = fold_changes(module, edit.operations)
    head = module.get_output_embeddings()  # type: ignore[operator]
    found: dict[str, dict[str, float]] = {}
    for new in new_values(module, grouped):
        found[new.name] = cosines(new, projection=new.owner is not head)
        stack.callback(write(new))
    if not found and not rest and edit.manifest.strength != 0.0 and grouped:
        raise NoEffectError(f"Edit '{edit.manifest.method}' changes no weight at the precision of this "
                            "model: raise its strength, or load the model in float32.")  # fmt: skip
    hook_operations(module, rest, stack)
    return tuple(found), found, tuple(dict.fromkeys(str(op.site) for op in rest))


class _Kept:
    """Holds what keeps hooks alive (a dropped context manager removes them); shared by copies."""

    def __init__(self, stack: ExitStack, hooked: tuple[str, ...]) -> None:
        self.stack, self.hooked = stack, hooked

    def __deepcopy__(self, memo: dict[int, object]) -> _Kept:
        return self


def applied(edit: Edit, model: LoadedModel, *, check: bool) -> LoadedModel:
    """A deep copy of ``model`` with ``edit`` in place; see :meth:`repforget.artifact.Edit.applied_to`."""
    if check:
        edit.check_base(model)
    copy = copy_of(model)
    stack = ExitStack()
    _, _, hooked = _install(edit, copy.module, stack)
    copy.module.__dict__["_repforget_edit"] = _Kept(stack, hooked)
    mark = fingerprint(copy.module)
    if hooked:  # hooks are no part of the weights, yet they make another model
        mark = hashlib.sha256(f"{mark}{edit.digest}".encode()).hexdigest()
    return dataclasses.replace(copy, name=f"{model.name}+{edit.manifest.method}", fingerprint=mark)
