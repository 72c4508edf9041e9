"""Optimisers that PyTorch lacks: the sign of the step, and clipped steps scaled by a Gauss-Newton diagonal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


class Sign(torch.optim.Optimizer):
    """Steps of one size in every coordinate: ``θ -= lr sign(m)``, ``m`` the running mean of the gradient.

    Source: Bernstein et al. 2018, arXiv 1802.04434 (signSGD with momentum); 2025, arXiv 2510.00761 report that
    unlearning by such coarse steps withstands relearning and quantisation better.  Steps do not depend on the
    gradient's scale and do not shrink by themselves.  Memory: one copy of the parameters.
    """

    def __init__(self, params: Iterable[Any], lr: float, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in _trained(self):
            mean = _ema(self.state[parameter], "mean", parameter.grad, group["beta"])
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_(mean.sign(), alpha=group["lr"])


class Sophia(torch.optim.Optimizer):
    """Steps of momentum over curvature, at most ``lr`` per coordinate: ``θ -= lr clip(m / (rho h), -1, 1)``.

    ``m`` is the running mean of the gradient (one update per step), ``h`` that of the diagonal Gauss-Newton matrix of
    the mean loss, fed through :meth:`refresh`; where ``h`` is 0, as before the first, steps are those of
    :class:`Sign`.  Source: Liu et al. 2023, arXiv 2305.14342 (Sophia-G); Jia et al. 2024, arXiv 2404.18239 (SOUL)
    unlearn with it.  Memory: two copies of the parameters.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.95), rho: float = 0.04,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "rho": rho, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group, parameter in _trained(self):
            state = self.state[parameter]
            mean = _ema(state, "mean", parameter.grad, group["betas"][0])
            curvature = state.get("curvature")
            scale = (0.0 if curvature is None else group["rho"] * curvature) + torch.full_like(mean, 1e-15)
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.sub_((mean / scale).clamp_(-1, 1), alpha=group["lr"])

    @torch.no_grad()
    def refresh(self, gradients: Mapping[Tensor, Tensor | None], count: int) -> None:
        """Take in an estimate of the curvature: gradients of :func:`drawn_loss` over ``count`` predictions.

        ``count g²`` estimates the diagonal without bias: gradients at labels that the model draws have mean 0 and are
        independent, so that only the squares of single ones remain.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = gradients.get(parameter)
                if gradient is not None:
                    estimate = count * gradient.to(parameter.dtype).square()
                    _ema(self.state[parameter], "curvature", estimate, group["betas"][1])


def drawn_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Mean cross-entropy (nats) of ``logits`` [m, V] against labels drawn from the model itself, with gradient.

    Its gradients carry the Gauss-Newton matrix, which for this loss is the true Fisher; with the labels of the data it
    would be the empirical one, which is neither.
    """
    chances = logits.detach().float().softmax(-1).to(generator.device)
    labels = torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)
    return functional.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), labels)


def _trained(optimizer: torch.optim.Optimizer) -> list[tuple[dict[str, Any], Tensor]]:
    return [(group, p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def _ema(state: dict[str, Tensor], name: str, value: Tensor | None, beta: float) -> Tensor:
    """The running mean of that name after one more value; it starts at 0."""
    if value is None:
        raise RuntimeError("an optimiser was given no gradient")
    mean = state.setdefault(name, torch.zeros_like(value))
    return mean.lerp_(value, 1 - beta)
