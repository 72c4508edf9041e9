"""Fine-tuning on texts: next-token cross-entropy on the labelled tokens, shared by the organism and the attacks.

Order and batches follow from ``seed`` alone, never from a global generator, so that a run can be repeated and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from repforget.errors import NumericalError, UsageError
from repforget.training.examples import Example, batches, collate, label_loss
from repforget.training.stepper import Optimizer, Schedule, Stepper


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step: 1-based ``index``, mean loss in nats per labelled token."""

    index: int
    total: int
    loss: float
    lr: float
    tokens: int


def select(module: nn.Module, trainable: Callable[[str], bool] | None) -> list[nn.Parameter]:
    """Return the parameters to train; a filter that matches nothing is an error."""
    chosen = [p for name, p in module.named_parameters() if trainable is None or trainable(name)]
    if not chosen:
        raise UsageError("The parameter filter matches none of the model's parameters: check it against the names.")
    return chosen


@contextmanager
def only(module: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to ``chosen`` alone; afterwards every flag is as before and no gradient is left."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    wanted = {id(p) for p in chosen}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in wanted)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in before:
            parameter.grad = None
            parameter.requires_grad_(flag)


def finetune(
    module: nn.Module,
    examples: Sequence[Example] | Iterable[list[Example]],
    *,
    steps: int,
    lr: float,
    seed: int,
    batch_size: int = 32,
    weight_decay: float = 0.0,
    beta2: float = 0.98,
    warmup: int = 0,
    schedule: Schedule = "cosine",
    clip: float = 1.0,
    trainable: Callable[[str], bool] | None = None,
    loss: Callable[[nn.Module, dict[str, Tensor]], Tensor] = label_loss,
    extra_loss: Callable[[nn.Module], Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
    autocast: bool = False,
    optimizer: Optimizer = "adamw",
) -> list[float]:
    """Train ``module`` in place for ``steps`` optimiser steps and return each step's mean loss (nats per token).

    ``examples`` is a sequence (shuffled and batched here, by ``seed``) or an iterable of ready batches.
    ``trainable`` picks parameters by name (all others keep their bits and their ``requires_grad``);
    ``loss`` of a collated batch is what falls, in nats; ``extra_loss`` adds a term, for example a penalty; ``on_step``
    sees every step and may raise to stop.
    ``autocast`` multiplies in bfloat16 while weights stay as they are; ``beta2`` is that of AdamW and Adam.  The
    module keeps its mode: one in evaluation mode trains without dropout.  Raises NumericalError when the loss is not
    finite.

    Costs one forward and one backward pass per step, and two float32 copies of the trained parameters (three
    where they are half precision).  A low loss does not show that facts generalise beyond the texts given.
    """
    chosen = select(module, trainable)
    device = chosen[0].device
    stepper = Stepper(chosen, steps=steps, lr=lr, optimizer=optimizer, schedule=schedule, warmup=warmup,
                      weight_decay=weight_decay, beta2=beta2, clip=clip)  # fmt: skip
    stream = iter(batches(examples, batch_size, seed) if isinstance(examples, Sequence) else examples)
    losses: list[float] = []
    with only(module, chosen):
        for index, rows in zip(range(steps), stream, strict=False):
            batch = collate(rows, device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                mean = loss(module, batch)
                total = mean if extra_loss is None else mean + extra_loss(module)
            losses.append(_finite(mean, index))
            stepper.step(index, torch.autograd.grad(total, chosen, allow_unused=True))
            if on_step is not None:
                on_step(Step(index + 1, steps, losses[-1], stepper.rate(index), int(batch["attention_mask"].sum())))
    if len(losses) < steps:
        raise UsageError(f"The batches ended after {len(losses)} of {steps} steps: give more, or fewer steps.")
    return losses


def _finite(loss: Tensor, index: int) -> float:
    """Return the loss as a number, or refuse to go on from one that is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(f"The training loss is {value} at step {index + 1}: lower the learning rate.")
    return value
