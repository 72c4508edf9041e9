"""Optimiser steps from given gradients: schedules, float32 masters of half-precision weights, state to resume from."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from repforget.errors import UsageError
from repforget.training.optimizers import Sign, Sophia

Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "adam", "sgd", "nesterov", "adagrad", "adadelta"]
AnyOptimizer = Literal[Optimizer, "descent", "sign", "sophia"]
Precision = Literal["masters", "stochastic", "plain"]
MOMENTUM = 0.9  # of the two forms of stochastic gradient descent
REFRESH = 10  # steps for which an estimate of curvature serves


def learning_rate(step: int, total: int, peak: float, warmup: int, schedule: Schedule) -> float:
    """Learning rate of 0-based ``step``: linear warm-up to ``peak``, then the schedule."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * (1.0 - done) if schedule == "linear" else peak * 0.5 * (1.0 + math.cos(math.pi * done))


class Stepper:
    """Takes optimiser steps on ``parameters`` from gradients that were computed elsewhere.

    Half-precision parameters have float32 masters (``precision="masters"``), so that steps too small for their grid
    still add up; with "stochastic" the parameter itself is the state and is rounded to its grid at random, right in
    the mean; "plain" rounds to the nearest, which swallows small steps.  With ``fused`` the Adams take one pass over
    memory, other roundings and a tenth of the time.  ``total`` adds numbers up over processes that hold other parts of
    the same parameters, for the global norm.  Memory: two float32 moments per parameter for the Adams, one more
    copy for masters.
    """

    def __init__(
        self, parameters: Sequence[Tensor], *, steps: int, lr: float, optimizer: AnyOptimizer = "adamw",
        schedule: Schedule = "cosine", warmup: int = 0, weight_decay: float = 0.0, beta2: float = 0.98,
        clip: float = 1.0, precision: Precision = "masters", seed: int = 0, fused: bool = False,
        total: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.parameters = list(parameters)
        self.steps, self.lr, self.schedule, self.warmup, self.clip = steps, lr, schedule, warmup, clip
        self.precision, self.seed, self.total = precision, seed, total
        if precision == "plain" and any(p.dtype.itemsize < 4 for p in parameters):
            warnings.warn("Half-precision weights are trained without masters (precision: plain), which swallows steps "
                          "below their grid: use masters or stochastic.", stacklevel=2)  # fmt: skip
        self.masters = [p if p.dtype.itemsize >= 4 or precision == "plain" else p.detach().float().requires_grad_()
                        for p in self.parameters]  # fmt: skip
        self.optimizer = _optimizer(self.masters, lr, weight_decay, beta2, optimizer, fused)

    def rate(self, index: int) -> float:
        return learning_rate(index, self.steps, self.lr, self.warmup, self.schedule)

    @property
    def metric(self) -> list[Tensor] | None:
        """The diagonal of the inverse preconditioner, per parameter (None before the first step or without one)."""
        state = self.optimizer.state
        found = [state[m].get("exp_avg_sq") if m in state else None for m in self.masters]
        if any(v is None for v in found):
            return None
        return [v.sqrt().add_(1e-8).reciprocal_() for v in found if v is not None]

    def step(self, index: int, gradients: Sequence[Tensor | None]) -> float:
        """Take 0-based step ``index`` against ``gradients``, clipped to a global norm; returns the norm before."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(index)
        for parameter, master, gradient in zip(self.parameters, self.masters, gradients, strict=True):
            if master is not parameter and self.precision == "stochastic":
                master.data = parameter.detach().float()
            master.grad = None if gradient is None else gradient.to(master.dtype)
        norm = self._clip(self.clip if self.clip > 0 else math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.write(index)
        return float(norm)

    def _clip(self, limit: float) -> Tensor:
        """Shorten the gradients to a global norm of at most ``limit``; returns the norm before."""
        if self.total is None:
            return torch.nn.utils.clip_grad_norm_(self.masters, limit)
        own = torch.nn.utils.get_total_norm([m.grad for m in self.masters if m.grad is not None])
        norm = self.total(own.double().square()).sqrt()
        torch.nn.utils.clip_grads_with_norm_(self.masters, limit, norm)
        return norm

    def refresh(self, index: int, drawn: Callable[[int], tuple[Sequence[Tensor | None], int]]) -> None:
        """Every tenth step, let an optimiser that wants curvature take it from the gradients that ``drawn`` makes."""
        if isinstance(self.optimizer, Sophia) and index % REFRESH == 0:
            gradients, count = drawn(index)
            self.optimizer.refresh(dict(zip(self.masters, gradients, strict=True)), count)

    @torch.no_grad()
    def write(self, index: int) -> None:
        """Copy the masters into the parameters."""
        for place, (parameter, master) in enumerate(zip(self.parameters, self.masters, strict=True)):
            if master is parameter:
                continue
            if self.precision == "stochastic":
                from repforget.training.rounding import stochastic_round_

                generator = torch.Generator(parameter.device).manual_seed(hash((self.seed, index, place)) % 2**63)
                stochastic_round_(parameter, master, generator)
                master.data = master.new_empty(0)
            else:
                parameter.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as tensors by name, copied to the CPU."""
        out = {f"master.{i}": m.detach().to("cpu", copy=True) for i, m in enumerate(self._stored())}
        for place, own in self.optimizer.state_dict()["state"].items():
            for name, value in own.items():
                if value is not None:
                    out[f"optimizer.{place}.{name}"] = torch.as_tensor(value).detach().to("cpu", copy=True)
        return out

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state` of a stepper over the same parameters."""
        stored = self._stored()
        if sum(name.startswith("master.") for name in state) != len(stored):
            raise UsageError("The checkpoint was written for other parameters: start again without it.")
        own: dict[int, dict[str, Any]] = {}
        for name, value in state.items():
            if name.startswith("optimizer."):
                _, place, key = name.split(".", 2)
                own.setdefault(int(place), {})[key] = value
        for i, master in enumerate(stored):
            master.copy_(state[f"master.{i}"])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": own})
        if self.precision != "stochastic":
            self.write(0)

    def _stored(self) -> list[Tensor]:
        return list(self.parameters) if self.precision == "stochastic" else self.masters


def _optimizer(
    masters: Sequence[Tensor], lr: float, decay: float, beta2: float, kind: AnyOptimizer, fused: bool
) -> torch.optim.Optimizer:
    """The optimiser with weight decay on matrices only (vectors are norms and biases)."""
    parts = [([p for p in masters if p.ndim >= 2], decay), ([p for p in masters if p.ndim < 2], 0.0)]
    groups: list[dict[str, Any]] = [{"params": own, "weight_decay": rate} for own, rate in parts if own]
    match kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), fused=fused)
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=(0.9, beta2), fused=fused)
        case "sgd" | "nesterov":
            return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=kind == "nesterov")
        case "descent":
            return torch.optim.SGD(groups, lr=lr)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=lr)
        case "adadelta":
            return torch.optim.Adadelta(groups, lr=lr)
        case "sign":
            return Sign(groups, lr=lr)
        case "sophia":
            return Sophia(groups, lr=lr)
