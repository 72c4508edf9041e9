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
REFUSED = {  # switches of the launcher: what they ask for, and what to do instead
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", "use --use_fsdp --fsdp_version 2"),
    "FSDP_OFFLOAD_PARAMS": ("shards kept on the CPU (fsdp_offload_params)", "leave it out"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("activation checkpointing of its own", "set checkpointing: true in the recipe"),
}


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that were launched together (one, unless a launcher made more)."""

    rank: int = 0
    world: int = 1
    sharded: bool = False  # whether each holds but its part of the model while it trains

    @classmethod
    def launched(cls) -> Processes:
        """What the launcher's environment says; UsageError where it asks for what is not done here."""
        sharded = _asked("ACCELERATE_USE_FSDP")
        for name, (what, instead) in REFUSED.items():
            if _asked(name) and (sharded or not name.startswith("FSDP")):
                raise UsageError(f"The launcher was asked for {what}, which is not done here: {instead}.")
        if sharded and os.environ.get("FSDP_VERSION", "1") != "2":
            raise UsageError("The launcher was asked for the first version of FSDP, which is not done here: add "
                             "--fsdp_version 2.")  # fmt: skip
        world = int(os.environ.get("WORLD_SIZE", "1"))
        return cls(int(os.environ.get("RANK", "0")), world, sharded) if world > 1 else cls()

    @property
    def name(self) -> str | int:
        """What a state is bound to: other processes would add up in another order."""
        return f"{self.world} in shards" if self.sharded else self.world

    def share(self, rows: Sequence[T]) -> Sequence[T]:
        return rows[self.rank :: self.world]

    @cached_property
    def _accelerator(self) -> Any:
        from datetime import timedelta

        from accelerate import Accelerator
        from accelerate.utils import FullyShardedDataParallelPlugin, InitProcessGroupKwargs

        # Each process reads the whole model: the first one may be asked about it at any time.
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False) if self.sharded \
            else None  # fmt: skip
        return Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=PATIENCE_DAYS))],
                           fsdp_plugin=plugin)  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where this process sends from."""
        place: torch.device = self._accelerator.device
        return place

    def total(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sum over all processes of each tensor, in place where the tensors lie on the device of the launcher."""
        if self.world == 1:
            return list(tensors)
        place = self.device
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


def _asked(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"
