"""Several processes that train together: each takes its share of the rows, and gradients are added up."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that were launched together (one, unless a launcher made more)."""

    rank: int = 0
    world: int = 1

    @classmethod
    def launched(cls) -> Processes:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), world) if world > 1 else cls()

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        return rows[self.rank :: self.world]

    @cached_property
    def _accelerator(self) -> Any:
        from accelerate import Accelerator

        return Accelerator()

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all processes of each tensor."""
        if self.world == 1:
            return list(tensors)
        return [self._accelerator.reduce(t, reduction="sum") for t in tensors]
