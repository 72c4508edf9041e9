"""Low-rank factors beside frozen weights: started from a seed, worn by a model while it runs, written as an edit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.artifact import LowRankDelta
from repforget.models._structure import projection_shape
from repforget.shards.plan import Settings, keyed

Factors = dict[str, Tensor]  # "<module path>.A" [r, in] and "<module path>.B" [out, r], float32


def fresh(module: nn.Module, settings: Settings, shard: int, paths: Sequence[str]) -> Factors:
    """Factors that change nothing yet: A uniform in +-1/sqrt(inputs) from (seed, shard, path), B zero."""
    found: Factors = {}
    for path in paths:
        owner = module.get_submodule(path)
        outputs, inputs = projection_shape(owner)
        rank = min(settings.rank, outputs, inputs)
        generator = torch.Generator().manual_seed(keyed(settings.seed, "start", shard, path) % 2**63)
        drawn = (torch.rand(rank, inputs, generator=generator) * 2 - 1) / math.sqrt(inputs)
        device = next(owner.parameters()).device
        found[f"{path}.A"], found[f"{path}.B"] = drawn.to(device), torch.zeros(outputs, rank, device=device)
    return found


@contextmanager
def worn(module: nn.Module, factors: Mapping[str, Tensor], scale: float) -> Iterator[None]:
    """While inside, every adapted layer computes ``y + scale B A x``, the addition in float32; then it is as before."""

    def added(path: str) -> Any:
        right, left = factors[f"{path}.A"], factors[f"{path}.B"]

        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inner = functional.linear(args[0].to(right.dtype), right)
            return output + (scale * functional.linear(inner, left)).to(output.dtype)

        return hook

    handles = [module.get_submodule(p).register_forward_hook(added(p)) for p in paths_of(factors)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def paths_of(factors: Mapping[str, Tensor]) -> list[str]:
    return [name.removesuffix(".A") for name in factors if name.endswith(".A")]


def merged_factors(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> Factors:
    """The factors side by side, so that B A is the weighted sum of the parts' (B_i A_i), without cross terms.

    Adding or averaging A and B apart would give (sum B_i)(sum A_j), which is another matrix.  Parts that are zero in a
    layer are left out there.  Rank: the sum of theirs.
    """
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for weight, factors in parts:
        for path in paths_of(factors):
            left, right = factors[f"{path}.B"].cpu(), factors[f"{path}.A"].cpu()
            if weight and bool(left.any()):
                lefts, rights = found.setdefault(path, ([], []))
                lefts.append(weight * left)
                rights.append(right)
    return {f"{path}.{name}": tensor for path, (lefts, rights) in sorted(found.items())
            for name, tensor in (("A", torch.cat(rights)), ("B", torch.cat(lefts, 1)))}  # fmt: skip


def operations(factors: Mapping[str, Tensor], scale: float) -> list[LowRankDelta]:
    """The weight changes of factors: exact, low-rank, one per layer."""
    return [LowRankDelta(f"{path}.weight", scale * factors[f"{path}.B"], factors[f"{path}.A"])
            for path in paths_of(factors)]  # fmt: skip
