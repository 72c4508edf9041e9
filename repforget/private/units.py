"""Units of privacy and the randomness of a private training: who is drawn for a step, and the noise added."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from repforget.training import Record

Unit = Literal["cluster", "record"]
Purpose = Literal[0, 1]
DRAW: Purpose = 0
NOISE: Purpose = 1


def units_of(records: Sequence[Record], unit: Unit) -> tuple[tuple[int, ...], ...]:
    """Places of the records of each unit, units in order of their names."""
    found: dict[str, list[int]] = {}
    for place, record in enumerate(records):
        found.setdefault(record.cluster if unit == "cluster" else record.id, []).append(place)
    return tuple(tuple(found[name]) for name in sorted(found))


@dataclass(frozen=True)
class Randomness:
    """Draws and noise that follow from ``secret`` and the step alone, so that a step done again is the same step."""

    secret: int

    @classmethod
    def fresh(cls) -> Randomness:
        """From 128 bits of the operating system."""
        return cls(secrets.randbits(128))

    def of(self, step: int, purpose: Purpose) -> np.random.Generator:
        return np.random.default_rng(np.random.SeedSequence(self.secret, spawn_key=(purpose, step)))

    def drawn(self, step: int, units: int, rate: float) -> list[int]:
        """Poisson sampling: every unit is in with chance ``rate``, each on its own; may be none."""
        return np.flatnonzero(self.of(step, DRAW).random(units) < rate).tolist()

    def add_noise(self, step: int, sums: Sequence[Tensor], deviation: float) -> list[Tensor]:
        """``sums`` plus independent normal noise of that standard deviation in every coordinate."""
        source = self.of(step, NOISE)
        noise = [torch.from_numpy(source.standard_normal(tuple(s.shape))) for s in sums]
        return [s + (deviation * n).to(s.device, s.dtype) for s, n in zip(sums, noise, strict=True)]
