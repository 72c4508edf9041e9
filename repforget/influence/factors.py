"""Kronecker factors of the Gauss-Newton matrix of linear maps, their refitted eigenvalues, and the damped inverse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from repforget.errors import NumericalError
from repforget.models.load import LoadedModel


@dataclass(frozen=True, eq=False)
class Factors:
    """``A ⊗ G`` of a weight [out, in] by eigenvectors: inputs A = ``q_in`` diag(``in_values``) ``q_in``ᵀ, gradients of
    outputs G likewise; per prediction, in float64.  ``refitted`` [out, in] takes the place of the products of their
    eigenvalues: EK-FAC (George et al. 2018, arXiv 1806.03884)."""

    q_in: Tensor
    in_values: Tensor
    q_out: Tensor
    out_values: Tensor
    refitted: Tensor | None = None

    @staticmethod
    def of(second_in: Tensor, second_out: Tensor) -> Factors:
        (in_values, q_in), (out_values, q_out) = (torch.linalg.eigh(m.double()) for m in (second_in, second_out))
        return Factors(q_in, in_values.clamp(min=0), q_out, out_values.clamp(min=0))

    @property
    def values(self) -> Tensor:
        """Eigenvalues [out, in]: refitted ones where there are any, else those of A ⊗ G."""
        return self.out_values[:, None] * self.in_values if self.refitted is None else self.refitted

    def damped(self, damping: float) -> Tensor:
        """Eigenvalues [out, in] plus ``damping`` times their mean."""
        values = self.values
        return values + damping * values.mean()

    def natural(self, gradient: Tensor, damping: float) -> Tensor:
        """``(H + λ)⁻¹ gradient`` [out, in], H the factored matrix, λ = ``damping`` times the mean eigenvalue."""
        inner = self.q_out.T @ gradient.to(self.q_out) @ self.q_in
        return self.q_out @ (inner / self.damped(damping)) @ self.q_in.T

    def divergence(self, move: Tensor) -> float:
        """``½ moveᵀ H move``: to second order, the divergence in nats per prediction after ``W += move``."""
        inner = self.q_out.T @ move.to(self.q_out) @ self.q_in
        return 0.5 * float((self.values * inner.square()).sum())


class Moments:
    """Sums of the second moments of a map's inputs and of the gradients of its outputs."""

    def __init__(self) -> None:
        self.second_in: Tensor | None = None
        self.second_out: Tensor | None = None
        self.points, self.predictions = 0, 0

    def add(self, inputs: Tensor, gradients: Tensor, predictions: int) -> None:
        """``inputs`` [n, in] and gradients [n, out] of a loss *summed* over ``predictions``; positions that no
        prediction depends on (padding, the end of a text) have gradient 0 and do not count."""
        heard = gradients.any(dim=-1)
        found = [m[heard].float() if m.dtype.itemsize < 4 else m[heard] for m in (inputs, gradients)]
        squares = [(m.T @ m).double() for m in found]
        self.second_in = squares[0] if self.second_in is None else self.second_in + squares[0]
        self.second_out = squares[1] if self.second_out is None else self.second_out + squares[1]
        self.points += int(heard.sum())
        self.predictions += predictions

    def factors(self, name: str) -> Factors:
        """The factors, those of the true Fisher for labels drawn by the model; NumericalError where nothing came."""
        if self.second_in is None or self.second_out is None or not self.points:
            raise NumericalError(f"No prediction on the given rows depends on '{name}': choose other layers.")
        return Factors.of(self.second_in / self.points, self.second_out / self.predictions)


class Spread:
    """Sums of the squares of records' gradients in the eigenbasis of ``factors``."""

    def __init__(self, factors: Factors) -> None:
        self.factors = factors
        self.squares = torch.zeros_like(factors.values)
        self.predictions = 0

    def add(self, inputs: Tensor, gradients: Tensor, predictions: int) -> None:
        """``inputs`` [b, t, in] and gradients [b, t, out] of b records' losses, each *summed* over its predictions
        (``predictions`` in all); labels drawn by the model are independent, so that products of two have mean 0."""
        rotated = per_record(inputs, gradients, self.factors)
        self.squares += rotated.square().sum(0).double()
        self.predictions += predictions

    def refitted(self) -> Factors:
        return replace(self.factors, refitted=self.squares / self.predictions)


def per_record(inputs: Tensor, gradients: Tensor, factors: Factors | None) -> Tensor:
    """Gradients [b, out, in] of a map's weight, one per record, in the eigenbasis of ``factors`` (None: as they are).

    From inputs [b, t, in] and gradients of outputs [b, t, out], in their precision, float32 at least.
    """
    a, g = (m.float() if m.dtype.itemsize < 4 else m for m in (inputs, gradients))
    if factors is not None:
        a, g = a @ factors.q_in.to(a), g @ factors.q_out.to(g)
    return g.mT @ a


def slices(inputs: Tensor, gradients: Tensor, most: int = 1 << 21) -> Iterable[slice]:
    """Slices of a batch whose gradients of the weight have no more than so many entries in all.

    Memory of this size is used again; of 2^25 entries the system takes back and clears every piece, which costs more
    time than the arithmetic.
    """
    size = max(1, most // (inputs.shape[-1] * gradients.shape[-1]))
    return (slice(k, k + size) for k in range(0, len(inputs), size))


@contextmanager
def watched(model: LoadedModel, names: Sequence[str]) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
    """Inputs and outputs (with graph) [.., in], [.., out] of the linear maps ``names`` (parameter names) at the last
    forward."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    handles = []
    try:
        for name in names:
            owner = model.module.get_submodule(name.rpartition(".")[0])
            handles.append(owner.register_forward_hook(_keeper(found, name)))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _keeper(found: dict[str, tuple[Tensor, Tensor]], name: str) -> Any:
    def keep(_module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
        found[name] = (args[0].detach(), output)

    return keep
