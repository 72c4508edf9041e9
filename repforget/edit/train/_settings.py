"""The settings that every trained editor has beside those of its objective."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from repforget.errors import UsageError
from repforget.training import Optimizer, Schedule

Named = str | dict[str, Any]  # "kl" or {kl: {settings}}


@dataclass(frozen=True)
class Settings:
    """How a trained editor trains: what is trained, on how much, against what, and when it stops.

    Steps: ``steps`` optimiser steps on ``batch_size`` forget rows each (and ``retain_batch`` retain rows, None: as
    many), in ``accumulate`` parts.  ``lr`` "auto" is 0.1 / width for full weights and ten times that for adapters.
    Loss: ``forget_weight`` x objective + ``retain_weight`` x ``retain`` (a retain term, "none" for none), their
    gradients joined by ``combine`` and taken through the wrappers ``robust``.
    What is trained: ``adapter`` ("auto": weights below 1 B parameters, LoRA of ``rank`` and ``alpha`` above; or any
    tuner of peft), on ``targets`` (regular expressions over parameter names; "auto": the layers of the localisation,
    else everything), only its units with ``mask``.
    ``answers``: what is put in the place of the true answers, where the objective reads another one ("auto": as it
    declares; or a JSON-lines file).
    Stops: forget probability at or below ``stop_probability``; retain loss more than ``max_retain_rise`` nats per
    token above its start (the last good state is kept); both are looked at every ``check_every`` steps.
    """

    steps: int = 150
    batch_size: int = 32
    retain_batch: int | None = None
    accumulate: int = 1
    lr: float | Literal["auto"] = "auto"
    optimizer: Optimizer = "adamw"
    schedule: Schedule = "linear"
    warmup: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    forget_weight: float = 1.0
    retain: Named = "nll"
    retain_weight: float = 1.0
    combine: Named = "linear"
    robust: Named | list[Named] = "none"
    adapter: str = "auto"
    rank: int = 16
    alpha: float | Literal["auto"] = "auto"
    targets: Literal["auto"] | list[str] = "auto"
    top_layers: int = 4
    mask: bool = False
    answers: str = "auto"
    teacher: Literal["auto", "cached", "live"] = "auto"
    precision: Literal["masters", "stochastic", "plain"] = "masters"
    checkpointing: bool = False
    clamp: float | None = None
    stop_probability: float = 0.0
    max_retain_rise: float = 1.0
    check_every: int = 25
    max_facts: int = 20000

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "rank", "check_every", "max_facts"):
            if getattr(self, name) < 1:
                raise UsageError(f"A trained editor needs a positive {name}: {getattr(self, name)} was given.")
        if self.steps < 0 or self.warmup < 0:
            raise UsageError("A trained editor cannot take a negative number of steps: give 0 or more.")
        if self.accumulate > self.batch_size:
            raise UsageError(f"{self.batch_size} forget rows per step cannot be taken in {self.accumulate} parts: "
                             "give at least one row per part.")  # fmt: skip


def named(value: Named) -> tuple[str, dict[str, Any]]:
    """``"kl"`` or ``{kl: {settings}}`` as (name, settings)."""
    if isinstance(value, str):
        return value, {}
    if len(value) != 1:
        raise UsageError(f"A part of a trained editor is written 'name' or 'name: {{setting: value}}': found {value}.")
    ((name, settings),) = value.items()
    return name, dict(settings or {})
