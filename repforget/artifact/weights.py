"""Weight operations at work: new values for parameters, computed in float64 and cast once.

Work is grouped by the module that owns the parameters, so that at most one module's weights exist in double
at a time, and a weight and its bias are changed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repforget.artifact.operations import (
    BiasDelta,
    DenseDelta,
    LowRankDelta,
    Untie,
    WeightOperation,
    apply_to_weight,
    target,
)
from repforget.artifact.runtime import check_finite
from repforget.errors import ArtifactError, SiteError, nearest

Slots = dict[str, Tensor]  # attribute of the owner ("weight", "bias", ...) -> float64 value
Change = Callable[[Slots], None]  # changes the slots of one owner


@dataclass(frozen=True)
class NewValue:
    """The value that a parameter is to get; ``parameter`` is None for a bias that does not exist yet."""

    owner: nn.Module
    attribute: str
    name: str
    parameter: nn.Parameter | None
    value: Tensor
    exact: Tensor  # before the cast, float64
    old: Tensor  # float64; zeros for a bias that does not exist yet


def is_conv1d(owner: nn.Module) -> bool:
    """True for the transposed linear layer of GPT-2 ([in, out])."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(owner, Conv1D)


def owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds the parameter ``name`` and its attribute there; SiteError where there is none."""
    path, _, attribute = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None  # type: ignore[assignment]
    if owner is None or attribute not in owner._parameters:
        valid = [known for known, _ in module.named_parameters(remove_duplicate=False)]
        raise SiteError(f"The model has no parameter '{name}': {nearest(name, valid)}")
    return owner, attribute


def canonical(module: nn.Module, name: str) -> str:
    """The first name of the parameter that ``name`` means: tied parameters are one."""
    owner, attribute = owner_of(module, name)
    parameter = owner._parameters[attribute]
    if parameter is None:
        return name
    return next(known for known, p in module.named_parameters() if p is parameter)


def untie(module: nn.Module) -> Callable[[], None]:
    """Give the unembedding a parameter of its own; returns the exact undo (nothing happens where it has
    one).
    """
    head, embedding = module.get_output_embeddings(), module.get_input_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        return lambda: None
    shared, config = head.weight, module.config.get_text_config()  # type: ignore[operator, union-attr]
    flags = [(c, c.tie_word_embeddings) for c in {id(c): c for c in (module.config, config)}.values()
             if hasattr(c, "tie_word_embeddings")]  # fmt: skip
    head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
    for c, _ in flags:
        c.tie_word_embeddings = False  # type: ignore[union-attr]

    def retie() -> None:
        head.weight = shared
        for c, value in flags:
            c.tie_word_embeddings = value  # type: ignore[union-attr]

    return retie


def _checked(operation: WeightOperation, owner: nn.Module, attribute: str) -> None:
    parameter = owner._parameters[attribute]
    if parameter is not None and not parameter.is_floating_point():
        raise ArtifactError(f"Parameter '{target(operation)}' is quantised ({parameter.dtype}): edit the "
                            "full-precision model, or attach the edit as an adapter.")  # fmt: skip
    match operation:
        case LowRankDelta():
            shape = (*operation.u.shape[:-1], operation.v.shape[-1])
            shape = (*shape[:-2], shape[-1], shape[-2]) if is_conv1d(owner) else shape
        case DenseDelta() | BiasDelta():
            shape = tuple(operation.delta.shape)
        case _:
            return
    expected = tuple(parameter.shape) if parameter is not None else (_outputs(owner, target(operation)),)
    if tuple(shape) != expected:
        raise ArtifactError(f"The {operation.kind} operation on '{target(operation)}' has shape "
                            f"{tuple(shape)} and the parameter has {expected}: the edit was made for another "
                            "model.")  # fmt: skip


def _outputs(owner: nn.Module, name: str) -> int:
    weight = owner._parameters.get("weight")
    if weight is None or weight.ndim != 2:
        raise SiteError(f"A bias cannot be created at '{name}': its module has no two-dimensional weight.")
    return int(weight.shape[1] if is_conv1d(owner) else weight.shape[0])


def changes_by_owner(module: nn.Module, operations: Sequence[WeightOperation]) -> dict[str, list[Change]]:
    """Group weight operations by the path of the module that owns the parameter, in order, checked."""
    grouped: dict[str, list[Change]] = {}
    for operation in operations:
        if isinstance(operation, Untie):
            continue
        owner, attribute = owner_of(module, target(operation))
        _checked(operation, owner, attribute)
        path, _, attribute = canonical(module, target(operation)).rpartition(".")
        transposed = attribute == "weight" and is_conv1d(owner)
        grouped.setdefault(path, []).append(_change(operation, attribute, transposed))
    return grouped


def _change(operation: WeightOperation, attribute: str, transposed: bool) -> Change:
    def run(slots: Slots) -> None:
        slots[attribute] = apply_to_weight(operation, slots[attribute], transposed=transposed)

    return run


class _Slots(dict[str, Tensor]):
    """Float64 copies of an owner's parameters, made when asked for; an absent bias starts as zeros."""

    def __init__(self, owner: nn.Module, path: str) -> None:
        super().__init__()
        self.owner, self.path = owner, path

    def __missing__(self, attribute: str) -> Tensor:
        parameter = self.owner._parameters.get(attribute)
        if parameter is None:
            weight = self.owner._parameters["weight"]
            assert weight is not None
            zeros = torch.zeros(_outputs(self.owner, f"{self.path}.{attribute}"), dtype=torch.float64)
            self[attribute] = zeros.to(weight.device if weight.device.type != "mps" else "cpu")
        else:
            # Apple GPUs have no float64.
            place = "cpu" if parameter.device.type == "mps" else parameter.device
            self[attribute] = parameter.detach().to(place, torch.float64)
        return self[attribute]


@torch.no_grad()
def new_values(module: nn.Module, grouped: Mapping[str, Sequence[Change]]) -> Iterator[NewValue]:
    """The new value of every parameter that the grouped changes touch, in the parameter's dtype, checked
    finite.
    """
    for path, changes in grouped.items():
        owner = module.get_submodule(path)
        slots = _Slots(owner, path)
        for change in changes:
            change(slots)
        fresh = _Slots(owner, path)
        reference = next(p for p in owner.parameters(recurse=False))
        for attribute, value in slots.items():
            parameter = owner._parameters.get(attribute)
            like = reference if parameter is None else parameter
            cast = value.to(like.device, like.dtype)
            if parameter is not None and torch.equal(cast, parameter):
                continue  # only read, or a change below the resolution of the dtype
            check_finite(f"{path}.{attribute}", cast)
            yield NewValue(owner, attribute, f"{path}.{attribute}", parameter, cast, value, fresh[attribute])


def swap(new: NewValue) -> Callable[[], None]:
    """Let the parameter point at the new value until the returned function is called; the old bytes stay
    untouched.
    """
    if new.parameter is None:
        return _create_bias(new)
    parameter, old = new.parameter, new.parameter.data
    parameter.data = new.value

    def restore() -> None:
        parameter.data = old

    return restore


@torch.no_grad()
def write(new: NewValue) -> Callable[[], None]:
    """Write the new value into the parameter in place; the returned function writes the old bytes back."""
    if new.parameter is None:
        return _create_bias(new)
    parameter, old = new.parameter, new.parameter.detach().clone()
    parameter.copy_(new.value)

    @torch.no_grad()
    def restore() -> None:
        parameter.copy_(old)

    return restore


def _create_bias(new: NewValue) -> Callable[[], None]:
    trainable = any(p.requires_grad for p in new.owner.parameters(recurse=False))
    new.owner._parameters[new.attribute] = nn.Parameter(new.value, requires_grad=trainable)

    def restore() -> None:
        new.owner._parameters[new.attribute] = None

    return restore
