"""What of a model is trained, its weights or low-rank additions, and what that amounts to as operations.

The additions are modules of their own beside the linear layers, so that gradients of single records can be taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repforget.artifact import BiasDelta, DenseDelta, LowRankDelta, Operation
from repforget.artifact.weights import is_conv1d
from repforget.errors import UsageError


class Addition(nn.Module):
    """A linear layer plus ``scale * left(right(x))``; the layer itself stays as it is."""

    def __init__(self, base: nn.Module, left: Tensor, right: Tensor, scale: float) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.left, self.right = _linear(left), _linear(right)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        added: Tensor = self.left(self.right(x.to(self.right.weight.dtype)))
        return out + (self.scale * added).to(out.dtype)


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # no global generator is used
    layer.weight = nn.Parameter(weight)
    return layer


@dataclass(frozen=True, eq=False)
class Trained:
    """The trainable ``parameters`` by name, and a function that says what they amount to by now."""

    parameters: Mapping[str, nn.Parameter]
    operations: Callable[[], list[Operation]]


def everything(module: nn.Module, original: nn.Module) -> Trained:
    """All weights of ``module``, a copy of ``original``."""
    parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
    before = dict(original.named_parameters())

    def operations() -> list[Operation]:
        found: list[Operation] = []
        for name, parameter in parameters.items():
            delta = (parameter.detach().double() - before[name].detach().double()).float().cpu()
            if delta.any():
                found.append(BiasDelta(name, delta) if name.endswith(".bias") else DenseDelta(name, delta))
        return found

    return Trained(parameters, operations)


def low_rank(module: nn.Module, rank: int, seed: int) -> Trained:
    """Additions of ``rank`` (scale 2, Hu et al. 2021, arXiv 2106.09685) to every linear layer of ``module``."""
    if rank < 1:
        raise UsageError(f"An addition of rank {rank} holds nothing: give a rank of 1 or more, or train all weights.")
    generator = torch.Generator().manual_seed(seed)

    def factors(out: int, width: int) -> tuple[Tensor, Tensor]:
        right = (torch.rand(rank, width, generator=generator) * 2 - 1) / math.sqrt(width)
        return torch.zeros(out, rank), right

    return put_on(module, {name: factors(*shape) for name, shape in linear_weights(module).items()}, 2.0)


def linear_weights(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) of the matrices of linear layers by name, those of the vocabulary and tied ones left out."""
    head = module.get_output_embeddings()  # type: ignore[operator]
    shared = [id(p) for _, p in module.named_parameters(remove_duplicate=False)]
    found: dict[str, tuple[int, int]] = {}
    for path, part in module.named_modules():
        if part is head or not (isinstance(part, nn.Linear) or is_conv1d(part)):
            continue
        weight = part.weight
        if isinstance(weight, Tensor) and shared.count(id(weight)) == 1:
            out, width = weight.shape if isinstance(part, nn.Linear) else reversed(weight.shape)
            found[f"{path}.weight"] = (int(out), int(width))
    if not found:
        raise UsageError(f"{type(module).__name__} has no linear layer that takes a low-rank addition: train all its "
                         "weights (--full).")  # fmt: skip
    return found


def put_on(module: nn.Module, factors: Mapping[str, Sequence[Tensor]], scale: float = 1.0) -> Trained:
    """``left [out, r]``, ``right [r, in]`` for the named weights put beside their layers in ``module``, for good."""
    parts: dict[str, Addition] = {}
    for name, (left, right) in factors.items():
        path = name.removesuffix(".weight")
        base = module.get_submodule(path)
        holder, _, attribute = path.rpartition(".")
        device = next(base.parameters()).device
        parts[name] = Addition(base, left.float().to(device), right.float().to(device), scale)
        setattr(module.get_submodule(holder), attribute, parts[name])

    def operations() -> list[Operation]:
        pairs = {name: (part.left.weight.detach() * scale, part.right.weight.detach()) for name, part in parts.items()}
        return [LowRankDelta(name, u, v) for name, (u, v) in pairs.items() if (u @ v).any()]

    own = {f"{name}:{side}": getattr(part, side).weight for name, part in parts.items() for side in ("left", "right")}
    return Trained(own, operations)
