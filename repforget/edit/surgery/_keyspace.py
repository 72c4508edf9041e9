"""The key side of null-space surgery: directions in which forget keys are strong and protected keys are weak."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from repforget.edit.surgery._prefixes import Reading
from repforget.errors import NumericalError

MAX_KEYS = 8192  # forget keys that are kept one by one


@dataclass
class Moment:
    """A running uncentred second moment [m, m] in float64."""

    total: Tensor
    count: int = 0

    def update(self, keys: Tensor) -> None:
        wide = keys.float()
        self.total += wide.T @ wide  # one chunk in float32, the sum over chunks in float64
        self.count += len(keys)


@dataclass
class LayerKeys:
    """What one layer's MLP keys look like: forget keys one by one, protected keys as moments per source."""

    forget: list[Tensor] = field(default_factory=list)
    check: list[Tensor] = field(default_factory=list)
    kept: dict[str, Moment] = field(default_factory=dict)

    def add(self, reading: Reading, layer: int) -> None:
        """Take in the keys that one chunk of rows gave at ``layer``."""
        at = reading.at[layer]
        if reading.kind == "forget":
            self.forget.append(at)
        else:
            self._protect(reading.kind, at)
        if reading.kind == "check":
            self.check.append(at)
        self._protect("elsewhere", reading.elsewhere[layer])

    def _protect(self, source: str, keys: Tensor) -> None:
        if len(keys):
            zero = torch.zeros(keys.shape[1], keys.shape[1], dtype=torch.float64, device=keys.device)
            self.kept.setdefault(source, Moment(zero)).update(keys)

    def metric(self, ridge: float, *, check: bool) -> Tensor:
        """Second moment [m, m] of protected keys, sources in equal parts, plus ``ridge`` of its mean variance.

        ``check=False`` leaves out the keys that are set aside to measure separation.
        """
        parts = [m.total / m.count for source, m in self.kept.items() if check or source != "check"]
        total = torch.stack(parts).mean(0)
        return total + ridge * total.diagonal().mean() * torch.eye(len(total)).to(total)


def directions(keys: LayerKeys, rank: int, ridge: float) -> Tensor:
    """The ``rank`` directions V [r, m] with the most forget energy per protected energy, best first.

    Generalised eigenvectors of the second moment of forget keys against the protected metric A, each as long as its
    forget energy (so that steps of equal size on the value side move most where least is protected): ``V A Vᵀ`` is
    diagonal, and ``V k`` has a root mean square norm of 1 over forget keys.
    """
    forget = torch.cat(keys.forget)[:MAX_KEYS].double()
    factor, failed = torch.linalg.cholesky_ex(keys.metric(ridge, check=True))
    if int(failed):
        raise NumericalError(f"The second moment of protected keys is singular at ridge {ridge}: give a larger ridge, "
                             "for example 0.01.")  # fmt: skip
    white = torch.linalg.solve_triangular(factor, forget.T, upper=False) / len(forget) ** 0.5  # [m, n]
    left, energy = _principal(white)
    r = min(rank, int((energy > energy[0] * 1e-6).sum()))
    chosen = torch.linalg.solve_triangular(factor.T, left[:, :r], upper=True).T
    signs = torch.sign(chosen.gather(1, chosen.abs().argmax(1, keepdim=True)))  # an eigenvector has none of its own
    found: Tensor = chosen * signs * energy[:r, None] / energy[:r].pow(2).norm()
    return found.float()


def _principal(x: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors [m, min(m, n)] and values of ``x`` [m, n], by the smaller of its two Gram matrices."""
    m, n = x.shape
    if m <= n:
        squares, left = torch.linalg.eigh(x @ x.T)
        return left.flip(1), squares.flip(0).clamp(min=0.0).sqrt()
    squares, right = torch.linalg.eigh(x.T @ x)
    values = squares.flip(0).clamp(min=0.0).sqrt()
    return (x @ right.flip(1)) / values.clamp(min=torch.finfo(values.dtype).tiny), values


def separation(keys: LayerKeys, ridge: float) -> float:
    """Area under the ROC with which one direction, fitted without them, tells forget keys from those set aside."""
    forget, check = torch.cat(keys.forget)[:MAX_KEYS].double(), torch.cat(keys.check).double()
    metric = keys.metric(ridge, check=False) + forget.T @ forget / len(forget)
    scores = torch.cat([forget, check]) @ torch.linalg.solve(metric, forget.mean(0))
    ranks = scores.argsort().argsort().double() + 1
    n = len(forget)
    return float(ranks[:n].sum() - n * (n + 1) / 2) / (n * len(check))


def best_layers(found: Sequence[tuple[int, float]], count: int) -> list[int]:
    """The ``count`` layers that separate best, in forward order."""
    return sorted(layer for layer, _ in sorted(found, key=lambda pair: (-pair[1], pair[0]))[:count])
