"""Several processes that train together: each takes its share of the rows, and gradients are added up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from repforget.errors import UsageError

T = TypeVar("T")
PATIENCE_DAYS = 30  # that a process waits for the others: the first one may verify for hours before the next edit
SHARDED = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that were launched together (one, unless a launcher made more)."""

    rank: int = 0
    world: int = 1

    @classmethod
    def launched(cls) -> Processes:
        """What the launcher's environment says; UsageError where it asks for a model in shards."""
        if any(os.environ.get(name, "false").lower() == "true" for name in SHARDED):
            raise UsageError("The launcher was asked to cut the model into shards (FSDP or DeepSpeed), and edits are "
                             "made on whole weights: launch plain processes, or train an adapter in one.")  # fmt: skip
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), world) if world > 1 else cls()

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        return rows[self.rank :: self.world]

    @cached_property
    def _accelerator(self) -> Any:
        from datetime import timedelta

        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs

        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=PATIENCE_DAYS))])

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all processes of each tensor, in place where the tensors lie on the device of the launcher."""
        if self.world == 1:
            return list(tensors)
        place: torch.device = self._accelerator.device
        found = []
        for tensor in tensors:
            here = tensor if tensor.device.type == place.type else tensor.to(place)
            torch.distributed.all_reduce(here)
            found.append(here.to(tensor.device))
        return found

    def first(self, values: Sequence[float]) -> list[float]:
        """The first process's values, the same for all."""
        own = torch.tensor(values if self.rank == 0 else [0.0] * len(values), dtype=torch.float64)
        return [float(v) for v in self.total([own])[0]]
