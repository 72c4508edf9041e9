"""Any aggregator of the library TorchJD."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from repforget.edit.train.combine._flat import Flat, Space, metric_of
from repforget.errors import MissingExtraError, UnknownNameError, nearest


def torchjd(
    forget: Flat, retain: Flat, state: dict[str, Tensor], *, aggregator: str = "UPGrad",
    options: dict[str, Any] | None = None, space: Space = "raw", metric: Flat | None = None,
) -> Flat:  # fmt: skip
    """Combine the two gradients by an aggregator of TorchJD, named as its class and built with ``options``.

    The aggregator sees the matrix [2, parameters] whose rows are the forget and the retain gradient, times the square
    root of the metric in preconditioned space, and is built anew in each step; one that draws at random does so by the
    number of the step.  Source: Quinton and Rey 2024, arXiv 2406.16232.  What it guarantees is its own; memory: two
    copies of the gradients.
    """
    combine = _aggregator(aggregator, options or {})
    inner = metric_of(space, metric)
    scales = [torch.ones_like(g) if inner is None else inner[i].sqrt() for i, g in enumerate(forget)]
    home = forget[0].device
    rows = [torch.cat([(g * s).reshape(-1).to(home) for g, s in zip(side, scales, strict=True)])
            for side in (forget, retain)]  # fmt: skip
    step = state.setdefault("steps", torch.zeros((), dtype=torch.long))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(step))
        found = combine(torch.stack(rows))
    state["steps"] = step + 1
    pieces = torch.split(found, [g.numel() for g in forget])
    return [p.view_as(g).to(g.device) / s for p, g, s in zip(pieces, forget, scales, strict=True)]


def _aggregator(name: str, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    try:
        aggregation = importlib.import_module("torchjd.aggregation")
        base = aggregation.Aggregator
        known = [n for n, part in vars(aggregation).items() if inspect.isclass(part) and issubclass(part, base)]
        if name not in known:
            raise UnknownNameError(f"TorchJD has no aggregator '{name}': {nearest(name, known)}")
        made: Callable[[Tensor], Tensor] = getattr(aggregation, name)(**options)
    except ImportError as error:
        raise MissingExtraError(f"Aggregator '{name}' needs the library torchjd with its solvers, which is not "
                                f"installed ({error}): run pip install 'repforget[multi]', or combine by ngdiff, "
                                "pcgrad, mgda, gru or blur.") from None  # fmt: skip
    return made
