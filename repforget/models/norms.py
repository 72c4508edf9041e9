"""A norm with its scale held fixed is linear: gain, centring and scale read from the module itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repforget.errors import SiteError


@dataclass(frozen=True)
class FrozenNorm:
    """The affine map a norm performs at given states: ``y = gain * (x - mean(x) if centred) * scale + bias``.

    ``gain`` and ``bias`` [d], ``scale`` [..., 1] one number per state, all float64.
    """

    gain: Tensor
    bias: Tensor
    centred: bool
    scale: Tensor

    def linear(self, part: Tensor) -> Tensor:
        """Apply the map without its bias to an additive part [..., d] of the state (float64)."""
        part = part.double()
        if self.centred:
            part = part - part.mean(-1, keepdim=True)
        return part * self.gain * self.scale


def gain(norm: nn.Module) -> Tensor:
    """Return the factor [d] float64 by which a norm multiplies each coordinate (1 + weight in Gemma).

    Read from what the module does to a constant vector, not from its name; SiteError for norms of other
    kinds.
    """
    weight = getattr(norm, "weight", None)
    if isinstance(norm, nn.LayerNorm):
        width = norm.normalized_shape[-1]
        return torch.ones(width, dtype=torch.float64) if weight is None else weight.detach().double()
    if isinstance(weight, Tensor) and weight.ndim == 1:
        with torch.no_grad():
            seen = norm(torch.full((1, len(weight)), 64.0, dtype=weight.dtype, device=weight.device))[0].double()
        rounding = 8 * max(torch.finfo(weight.dtype).eps, torch.finfo(torch.float32).eps)  # some compute in float32
        for candidate in (weight.detach().double(), 1.0 + weight.detach().double()):
            if torch.allclose(seen, candidate, rtol=rounding, atol=rounding):
                return candidate
    raise SiteError(f"Norm '{type(norm).__name__}' is neither a LayerNorm nor an RMS norm with a gain, so "
                    "that it cannot be held fixed; use a covered architecture.")  # fmt: skip


@torch.no_grad()
def freeze(norm: nn.Module, state: Tensor) -> FrozenNorm:
    """Return the affine map that ``norm`` performs at ``state`` [..., d].

    The scale is the least-squares factor between the norm's own output and its unscaled input, so that no
    epsilon has to be guessed.
    """
    factor = gain(norm)
    centred = isinstance(norm, nn.LayerNorm)
    bias = getattr(norm, "bias", None)
    offset = torch.zeros_like(factor) if bias is None else bias.detach().double()
    shifted = state.double() - (state.double().mean(-1, keepdim=True) if centred else 0.0)
    unscaled = shifted * factor
    output = norm(state).double() - offset
    scale = (output * unscaled).sum(-1, keepdim=True) / unscaled.square().sum(-1, keepdim=True).clamp(min=1e-300)
    return FrozenNorm(factor, offset, centred, scale)


def secant(norm: nn.Module, start: Tensor, end: Tensor) -> Callable[[Tensor], Tensor]:
    """Return the linear map of additive parts of ``end - start`` that adds up to ``norm(end) - norm(start)`` exactly.

    For the inverse root of a mean square, s(end) - s(start) = -s(start)^2 s(end)^2 / (s(start) + s(end)) times the
    change of the mean square, which is linear in the parts of the change; a part of zero therefore gives zero. Parts
    [..., *start.shape], float64.
    """
    first, last = freeze(norm, start), freeze(norm, end)

    def centred(x: Tensor) -> Tensor:
        x = x.double()
        return x - x.mean(-1, keepdim=True) if first.centred else x

    middle = (centred(start) + centred(end)) / 2
    total = first.scale + last.scale
    bend = 2 * first.scale.square() * last.scale.square() / (middle.shape[-1] * total.clamp(min=1e-300))

    def split(part: Tensor) -> Tensor:
        part = centred(part)
        return first.gain * (part * total / 2 - middle * bend * (part * middle).sum(-1, keepdim=True))

    return split
