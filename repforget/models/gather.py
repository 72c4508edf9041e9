"""Token batches and the selection of positions: shared by every source of activations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from repforget.errors import UsageError

Gather = Literal["last", "mean", "all", "tokens"] | Tensor


@dataclass(frozen=True)
class Batch:
    """Padded token ids [b, s] (long) with their mask [b, s] (1 = token, 0 = padding), on either padding side."""

    ids: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape != self.mask.shape:
            raise UsageError(f"A batch needs ids and mask of the same shape [b, s]; got ids "
                             f"{tuple(self.ids.shape)} and mask {tuple(self.mask.shape)}.")  # fmt: skip
        if self.ids.numel() == 0 or not bool(self.mask.any(1).all()):
            raise UsageError("A batch needs at least one row, and at least one token in every row; drop empty texts.")

    @classmethod
    def pad(cls, sequences: Sequence[Sequence[int]], pad_id: int = 0, side: str = "right") -> Batch:
        """Pad token sequences to one length on the given side."""
        if side not in ("left", "right"):
            raise UsageError(f"Padding side '{side}' is unknown: choose 'left' or 'right'.")
        length = max((len(s) for s in sequences), default=0)
        ids = torch.full((len(sequences), length), pad_id, dtype=torch.long)
        mask = torch.zeros(len(sequences), length, dtype=torch.long)
        for row, sequence in enumerate(sequences):
            where = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
            ids[row, where] = torch.as_tensor(sequence, dtype=torch.long)
            mask[row, where] = 1
        return cls(ids, mask)

    @cached_property
    def position_ids(self) -> Tensor:
        """Position of every token within its own text [b, s]; needed for left padding."""
        return (self.mask.long().cumsum(-1) - 1).clamp(min=0)

    @cached_property
    def last(self) -> Tensor:
        """Index of the last real token of every row [b]."""
        columns = torch.arange(self.mask.shape[1], device=self.mask.device)
        return (self.mask.long() * columns).argmax(1)

    @cached_property
    def rows(self) -> Tensor:
        """0, 1, ..., b - 1."""
        return torch.arange(len(self.ids), device=self.ids.device)

    @cached_property
    def counted(self) -> Tensor:
        """Tokens that enter a statistic [b, s] bool: real, and not the first of their row (position 0 carries
        massive activations) unless it is the only one."""
        mask = self.mask.bool()
        first = self.position_ids.eq(0) & (self.mask.sum(1, keepdim=True) > 1)
        return mask & ~first

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.ids.to(device), self.mask.to(device))

    def __len__(self) -> int:
        return len(self.ids)


def select(x: Tensor, batch: Batch, gather: Gather) -> Tensor:
    """Return the chosen positions of an activation, as a copy that does not keep the whole activation alive.

    ``x`` is [b, s, d] (or [b*s, d], which some blocks use inside). ``last`` -> [b, d]; ``mean`` -> [b, d]
    over real tokens without each row's first; ``all`` -> [b, s, d]; ``tokens`` -> [n, d], the same tokens as
    in ``mean``, row after row; positions [b] -> [b, d]; positions [b, k] -> [b, k, d] (indices into the
    padded row).
    """
    if x.ndim == 2 and len(x) == batch.mask.numel():
        x = x.view(*batch.mask.shape, -1)
    rows = batch.rows.to(x.device)
    if isinstance(gather, Tensor):
        where = positions(gather, batch).to(x.device)
        return x[rows, where] if where.ndim == 1 else x[rows[:, None], where]  # indexing copies
    if gather == "last":
        return x[rows, batch.last.to(x.device)]
    if gather == "all":
        return x.clone()  # a clone, because Falcon adds to its MLP output in place
    if gather == "tokens":
        return x[batch.counted.to(x.device)]
    if gather == "mean":
        wide = x if x.dtype == torch.float64 else x.float()
        weight = batch.counted.to(x.device, wide.dtype).unsqueeze(-1)
        zeroed = torch.where(weight.bool(), wide, torch.zeros((), dtype=wide.dtype, device=x.device))
        return (zeroed.sum(1) / weight.sum(1)).to(x.dtype)
    raise UsageError(f"Gather '{gather}' is unknown: choose last, mean, all, tokens, or give a tensor of positions.")


def positions(gather: Tensor, batch: Batch) -> Tensor:
    """Check a tensor of positions against a batch: right shape, in range, on real tokens."""
    if gather.dtype not in (torch.long, torch.int32) or gather.ndim not in (1, 2) or len(gather) != len(batch):
        raise UsageError(f"Positions need shape [b] or [b, k] with b = {len(batch)} and an integer type; got "
                         f"{tuple(gather.shape)} of {gather.dtype}.")  # fmt: skip
    where = gather.long().to(batch.mask.device)
    inside = (where >= 0) & (where < batch.mask.shape[1])
    if not bool(inside.all()) or not bool(batch.mask.bool().gather(1, where.view(len(batch), -1)).all()):
        raise UsageError(f"Positions must point at real tokens of the padded rows (0 to "
                         f"{batch.mask.shape[1] - 1}, mask 1); at least one points outside or at padding.")  # fmt: skip
    return where
