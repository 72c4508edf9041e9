"""The fine-tuning loop that the organism, the trained editors and the relearning attacks share.

One device, one schedule, one loss: next-token cross-entropy on the labelled tokens.  Order and batches
follow from ``seed`` alone, never from a global generator, so that a run can be repeated and compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.errors import NumericalError, UsageError

Schedule = Literal["cosine", "linear", "constant"]
Optimizer = Literal["adamw", "adam", "sgd", "nesterov", "adagrad", "adadelta"]
MOMENTUM = 0.9  # of the two forms of stochastic gradient descent
NO_LABEL = -100


@dataclass(frozen=True)
class Example:
    """One text: token ids (with any special tokens) and which of them carry loss.

    ``labelled[i]`` says whether token ``i`` is predicted (from the tokens before it); position 0 never is.
    """

    tokens: tuple[int, ...]
    labelled: tuple[bool, ...]

    def __post_init__(self) -> None:
        if len(self.tokens) != len(self.labelled):
            raise UsageError(
                f"Example: {len(self.tokens)} tokens but {len(self.labelled)} marks: give one mark per token."
            )
        if not any(self.labelled[1:]):
            raise UsageError("Example labels no token after the first: mark at least one token that is to be learned.")


@dataclass(frozen=True)
class Step:
    """What a callback is told after each step: 1-based ``index``, mean loss in nats per labelled token."""

    index: int
    total: int
    loss: float
    lr: float
    tokens: int


def collate(examples: Sequence[Example], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Right-pad examples into ``input_ids``, ``attention_mask`` and ``labels``, each (batch, longest).

    Padding ids are 0 and masked; labels are -100 wherever no loss is taken.
    """
    longest = max(len(e.tokens) for e in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, NO_LABEL)
    for row, example in enumerate(examples):
        size = len(example.tokens)
        ids[row, :size] = torch.tensor(example.tokens)
        mask[row, :size] = 1
        marked = torch.tensor(example.labelled)
        labels[row, :size][marked] = ids[row, :size][marked]
    labels[:, 0] = NO_LABEL
    return {name: t.to(device) for name, t in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def label_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) over the labelled tokens of a collated batch; a scalar with gradient."""
    mask = batch["attention_mask"]
    # Equal lengths need no mask, and without one the attention kernel takes its fast causal path.
    extra = {} if bool(mask.all()) else {"attention_mask": mask}
    logits = module(input_ids=batch["input_ids"], use_cache=False, **extra).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    chosen = labels != NO_LABEL
    return functional.cross_entropy(logits[chosen].float(), labels[chosen])


def batches(examples: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Yield shuffled batches for ever; each pass uses every example once, texts of equal length together.

    Grouping by length keeps padding small; groups are cut after a shuffle, and their order is shuffled
    again, so no batch composition repeats.  ``size`` is the largest number of examples in a batch.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(examples), generator=generator).tolist()
        order.sort(key=lambda i: len(examples[i].tokens))  # stable: random within one length
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        for index in torch.randperm(len(chunks), generator=generator).tolist():
            yield [examples[i] for i in chunks[index]]


def learning_rate(step: int, total: int, peak: float, warmup: int, schedule: Schedule) -> float:
    """Learning rate of 0-based ``step``: linear warm-up to ``peak``, then the schedule."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    done = (step - warmup) / max(1, total - warmup)
    return peak * (1.0 - done) if schedule == "linear" else peak * 0.5 * (1.0 + math.cos(math.pi * done))


def _select(module: nn.Module, trainable: Callable[[str], bool] | None) -> list[nn.Parameter]:
    """Return the parameters to train; a filter that matches nothing is an error."""
    chosen = [p for name, p in module.named_parameters() if trainable is None or trainable(name)]
    if not chosen:
        raise UsageError("The parameter filter matches none of the model's parameters: check it against the names.")
    return chosen


@contextmanager
def _only(module: nn.Module, chosen: Sequence[nn.Parameter]) -> Iterator[None]:
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


def _masters(chosen: Sequence[nn.Parameter]) -> list[Tensor]:
    """Float32 stand-ins for half-precision parameters, so that steps too small for their grid still add up."""
    return [p if p.dtype.itemsize >= 4 else p.detach().float().requires_grad_() for p in chosen]


def _optimizer(
    masters: Sequence[Tensor], lr: float, decay: float, beta2: float, kind: Optimizer
) -> torch.optim.Optimizer:
    """The optimiser with weight decay on matrices only (vectors are norms and biases)."""
    parts = [([p for p in masters if p.ndim >= 2], decay), ([p for p in masters if p.ndim < 2], 0.0)]
    groups: list[dict[str, Any]] = [{"params": own, "weight_decay": rate} for own, rate in parts if own]
    match kind:
        case "adamw":
            return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2))
        case "adam":
            return torch.optim.Adam(groups, lr=lr, betas=(0.9, beta2))
        case "sgd" | "nesterov":
            return torch.optim.SGD(groups, lr=lr, momentum=MOMENTUM, nesterov=kind == "nesterov")
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=lr)
        case "adadelta":
            return torch.optim.Adadelta(groups, lr=lr)


def _update(
    accelerator: Any, optimizer: Any, chosen: Sequence[nn.Parameter], masters: Sequence[Tensor], clip: float
) -> None:
    """Take one clipped optimiser step on the masters and copy the result into the parameters."""
    for parameter, master in zip(chosen, masters, strict=True):
        if master is not parameter and parameter.grad is not None:
            master.grad, parameter.grad = parameter.grad.float(), None
    accelerator.clip_grad_norm_(masters, clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for parameter, master in zip(chosen, masters, strict=True):
            if master is not parameter:
                parameter.copy_(master)


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
    extra_loss: Callable[[nn.Module], Tensor] | None = None,
    on_step: Callable[[Step], None] | None = None,
    autocast: bool = False,
    optimizer: Optimizer = "adamw",
) -> list[float]:
    """Train ``module`` in place for ``steps`` optimiser steps and return each step's mean loss (nats per token).

    ``examples`` is a sequence (shuffled and batched here, by ``seed``) or an iterable of ready batches.
    ``trainable`` picks parameters by name (all others keep their bits and their ``requires_grad``);
    ``extra_loss`` adds a term, for example a penalty; ``on_step`` sees every step and may raise to stop.
    ``autocast`` multiplies in bfloat16 while weights stay as they are; ``beta2`` is that of AdamW and Adam.  The
    module keeps its mode: one in evaluation mode trains without dropout.  Raises NumericalError when the loss is not
    finite.

    Costs one forward and one backward pass per step, and two float32 copies of the trained parameters (three
    where they are half precision).  A low loss does not show that facts generalise beyond the texts given.
    """
    from accelerate import Accelerator

    chosen = _select(module, trainable)
    device = chosen[0].device
    masters = _masters(chosen)
    accelerator = Accelerator(device_placement=False)
    stepper = accelerator.prepare_optimizer(_optimizer(masters, lr, weight_decay, beta2, optimizer))
    stream = iter(batches(examples, batch_size, seed) if isinstance(examples, Sequence) else examples)
    losses: list[float] = []
    with _only(module, chosen):
        for index, rows in zip(range(steps), stream, strict=False):
            batch = collate(rows, device)
            rate = learning_rate(index, steps, lr, warmup, schedule)
            for group in stepper.param_groups:
                group["lr"] = rate
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                loss = label_loss(module, batch)
                total = loss if extra_loss is None else loss + extra_loss(module)
            losses.append(_finite(loss, index))
            accelerator.backward(total)
            _update(accelerator, stepper, chosen, masters, clip)
            if on_step is not None:
                on_step(Step(index + 1, steps, losses[-1], rate, int(batch["attention_mask"].sum())))
    if len(losses) < steps:
        raise UsageError(f"The batches ended after {len(losses)} of {steps} steps: give more, or fewer steps.")
    return losses


class _LowRank(nn.Module):
    """``W -> W + scale * left @ right`` on a parameter; zero at first, for the side of the outputs is."""

    def __init__(self, weight: Tensor, rank: int, alpha: float, generator: torch.Generator, transposed: bool) -> None:
        super().__init__()
        rows, columns = weight.shape[-2:]
        lead, size = weight.shape[:-2], min(rank, rows, columns)
        inputs = rows if transposed else columns
        draw = (torch.rand(*lead, inputs, size, generator=generator) * 2 - 1) / math.sqrt(inputs)
        zero = torch.zeros(*lead, size, columns if transposed else rows)
        left, right = (draw, zero) if transposed else (zero.mT, draw.mT)
        self.left = nn.Parameter(left.to(weight.device, torch.float32).contiguous())
        self.right = nn.Parameter(right.to(weight.device, torch.float32).contiguous())
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.scale * (self.left @ self.right)).to(weight.dtype)


ADAPTER = "parametrizations."  # in the name of every trainable parameter that an adapter adds


@contextmanager
def low_rank_adapters(module: nn.Module, names: Sequence[str], *, rank: int, alpha: float, seed: int) -> Iterator[None]:
    """Give the named matrices [.., m, n] trainable low-rank additions; on leaving they are merged into the weights.

    Train them with ``trainable=lambda name: ADAPTER in name and not name.endswith("original")``.  They live on the
    parameters, so that hooks, transposed and stacked weights behave as ever.  Source: Hu et al. 2021, arXiv 2106.09685,
    without dropout.  Memory: one more copy of the matrices per forward pass.
    """
    from torch.nn.utils import parametrize
    from transformers.pytorch_utils import Conv1D

    generator = torch.Generator().manual_seed(seed)
    places = [(module.get_submodule(path), attribute) for path, _, attribute in (n.rpartition(".") for n in names)]
    try:
        for owner, attribute in places:
            weight = getattr(owner, attribute)
            part = _LowRank(weight, rank, alpha, generator, isinstance(owner, Conv1D))
            parametrize.register_parametrization(owner, attribute, part)
        yield
    finally:
        for owner, attribute in places:
            if parametrize.is_parametrized(owner, attribute):
                parametrize.remove_parametrizations(owner, attribute, leave_parametrized=True)


def _finite(loss: Tensor, index: int) -> float:
    """Return the loss as a number, or refuse to go on from one that is not finite."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NumericalError(f"The training loss is {value} at step {index + 1}: lower the learning rate.")
    return value
