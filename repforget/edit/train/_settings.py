"""The settings that every trained editor has beside those of its objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from repforget.errors import UsageError
from repforget.records import Units
from repforget.training import AnyOptimizer, Schedule

Named = str | dict[str, Any]  # "kl" or {kl: {settings}}


@dataclass(frozen=True)
class Settings:
    """Shared settings: what is trained, on how much, against what, and when it stops.

    ``steps`` optimiser steps on ``batch_size`` forget rows each and ``retain_batch`` retain rows (None: as many), in
    ``accumulate`` parts; at most ``max_facts`` facts per set. ``optimizer`` ("descent" has no memory), ``schedule``,
    ``warmup`` (steps), ``weight_decay``, ``clip`` (global gradient norm, 0: none); ``lr`` "auto" is 0.04 / width for
    weights and 3e-4 for adapters. The loss is ``forget_weight`` x the objective + ``retain_weight`` x the term
    ``retain`` ("none": no term) on each of the sets ``retain_on`` ("retain", "general", "strangers": made-up subjects,
    for terms that compare with the untouched model; or a file), gradients joined by ``combine`` and taken through the
    wrappers ``robust``; ``clamp`` bounds the loss per token or sequence from below. Trained are the weights below 1 B
    parameters and LoRA of ``rank`` and ``alpha`` (auto: twice the rank) above, or what ``adapter`` says ("none", or a
    tuner of peft), on ``targets`` (regular expressions over parameter names; auto: the best ``top_layers`` of the
    localisation, else everything), with ``mask`` its units only ("located" or true; for controls as many "random" ones,
    drawn by the seed, or "inverted": those it ranks lowest). ``answers`` are put in the place of the true ones where
    the objective reads others ("refusal", "alternative", "fresh" or a JSON-lines file). The untouched model is asked
    once (``teacher`` "cached") or at every step ("live"). Half-precision weights have float32 ``precision`` masters, or
    are rounded at random ("stochastic"); ``checkpointing`` computes activations again to save memory. Every
    ``check_every`` steps it stops where the mean probability of forget answers is at most ``stop_probability``, or
    where the retain loss has risen by more than ``max_retain_rise`` nats per token, which keeps the last good state.
    ``quantisation_floor`` makes what is smaller than half a bin of that rounding afterwards either whole or nothing.

    Raises KnowledgeError and UsageError for data and settings that do not fit, NumericalError where nothing good
    was reached, NoEffectError where nothing changed.  Memory, for what is trained: its start and its last good state,
    and in float32 gradients, two moments and the masters; nothing of the rest of the model is copied.  A low
    probability on the training rows does not show that nothing is left inside.
    """

    steps: int = 150
    batch_size: int = 32
    retain_batch: int | None = None
    accumulate: int = 1
    lr: float | Literal["auto"] = "auto"
    optimizer: AnyOptimizer = "adamw"
    schedule: Schedule = "linear"
    warmup: int = 5
    weight_decay: float = 0.0
    clip: float = 1.0
    forget_weight: float = 1.0
    retain: Named = "nll"
    retain_on: tuple[str, ...] = ("retain",)
    retain_weight: float = 1.0
    combine: Named = "linear"
    robust: Named | list[Named] = "none"
    adapter: str = "auto"
    rank: int = 16
    alpha: float | Literal["auto"] = "auto"
    targets: Literal["auto"] | list[str] = "auto"
    top_layers: int = 4
    mask: bool | Units = False
    answers: str = "auto"
    teacher: Literal["auto", "cached", "live"] = "auto"
    precision: Literal["masters", "stochastic", "plain"] = "masters"
    checkpointing: bool = False
    clamp: float | None = None
    stop_probability: float = 0.0
    max_retain_rise: float = 2.0
    check_every: int = 25
    max_facts: int = 20000
    quantisation_floor: Literal["none", "int8", "nf4", "int4", "int3"] = "none"

    def __post_init__(self) -> None:
        for name in ("batch_size", "retain_batch", "accumulate", "rank", "top_layers", "check_every", "max_facts"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"A trained editor needs a positive {name}: {getattr(self, name)} was given.")
        for name in ("lr", "weight_decay", "clip", "max_retain_rise", "forget_weight", "retain_weight"):
            value = getattr(self, name)
            if value != "auto" and not 0 <= value < math.inf:
                raise UsageError(f"A trained editor was given {name} {value}: give a number of at least 0.")
        if self.steps < 0 or self.warmup < 0:
            raise UsageError("A trained editor cannot take a negative number of steps: give 0 or more.")
        if not 0 <= self.stop_probability <= 1:
            raise UsageError(f"A trained editor was given stop_probability {self.stop_probability}: give 0 to 1.")
        if not self.retain_on:
            raise UsageError("A trained editor was given no set to keep facts of (retain_on): name one, or set retain: "
                             "none.")  # fmt: skip
        if self.clamp is not None and self.clamp < 0:
            raise UsageError(f"A trained editor was given clamp {self.clamp}: it bounds losses and is 0 or more.")
        if named(self.combine)[0] == "dual_optim" and (self.optimizer != "descent" or self.clip):
            raise UsageError("'combine: dual_optim' scales each side by itself, which another optimiser or clipping "
                             "would undo: set optimizer: descent and clip: 0.")  # fmt: skip
        if self.accumulate > self.batch_size:
            raise UsageError(f"{self.batch_size} forget rows per step cannot be taken in {self.accumulate} parts: "
                             "give at least one row per part.")  # fmt: skip


def named(value: Named) -> tuple[str, dict[str, Any]]:
    """``"kl"`` or ``{kl: {settings}}`` as (name, settings)."""
    if isinstance(value, str):
        return value, {}
    if len(value) != 1 or not isinstance(next(iter(value.values())), Mapping | None):
        raise UsageError(f"A part of a trained editor is written 'name' or 'name: {{setting: value}}': found {value}.")
    ((name, settings),) = value.items()
    return name, dict(settings or {})
