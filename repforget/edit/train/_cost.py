"""What training an edit needs, from counts alone: bytes by part, seconds, and which setting would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from repforget.edit.train._head import CHUNK, DIRECT, KEPT
from repforget.edit.train._settings import Settings, named

# Numbers that the backward pass needs of each token, per layer and unit of width: 21 to 34 in blocks of Llama, Qwen and
# GPT-2 shape; up to 46 where attention is written out ("eager").
KEPT_BY_LAYER = 28
# Copies that an optimiser keeps; all others keep two.
MOMENTS = {"descent": 0, "sgd": 1, "nesterov": 1, "adagrad": 1, "sign": 1}
LOOKED_AT = 128  # rows read when training is looked at
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """A model in counts: its parameters, those that are trained, and those that LoRA would train."""

    parameters: int
    trained: int
    low_rank: int
    layers: int
    width: int
    vocab_size: int
    itemsize: int


@dataclass(frozen=True)
class Work:
    """One optimiser step: rows of all terms, tokens of the longest and of the mean row, answer tokens of the mean row,
    the most padded tokens that are run at once, and how many rows the untouched model is asked about before."""

    rows: int
    longest: int
    tokens: float
    labels: float
    budget: int
    asked: int = 0


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak; ``copies`` are the trained weights at the start and at the last look."""

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.copies + self.gradients + self.optimizer + self.activations

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {value / GIB:.2f}" for name, value in vars(self).items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def memory(size: Size, settings: Settings, work: Work, *, adapter: bool) -> Memory:
    """Bytes that a step needs at its peak.

    Assumed: gradients, moments and masters in float32; activations of :data:`KEPT_BY_LAYER` numbers per token, layer
    and unit of width (one where they are computed again), for parts of a step as large as they may get; logits in
    chunks.  Not counted: copies that robust wrappers make, cached teachers, libraries, the allocator's own waste.  On
    a Llama of 20 M parameters the measured peak was 0.98 to 1.16 times the estimate.
    """
    trained, item = (size.low_rank, 4) if adapter else (size.trained, size.itemsize)
    masters = item < 4 and settings.precision == "masters"
    tokens = max(work.longest, min(work.budget, work.rows * work.tokens / settings.accumulate))
    layer = tokens * size.width * size.itemsize
    kept = (size.layers + KEPT_BY_LAYER if settings.checkpointing else size.layers * KEPT_BY_LAYER) * layer
    logits = int(tokens / work.tokens * work.labels * size.vocab_size)
    chunk = logits if logits <= DIRECT else CHUNK + (0 if adapter else min(KEPT, logits))
    sides = _sides(settings)
    return Memory(
        weights=size.parameters * size.itemsize,
        copies=2 * trained * item,
        gradients=4 * trained * (1 if sides == 1 else 3),
        optimizer=4 * trained * (MOMENTS.get(settings.optimizer, 2) + masters),
        activations=max(int(kept + 12 * chunk), 4 * trained),  # or what the optimiser needs for a step
    )


def operations(size: Size, settings: Settings, work: Work, *, adapter: bool) -> float:
    """Floating-point operations of the whole training.

    Assumed: two per parameter and token forward, two back to the activations, two to the trained weights, twice the
    way back where gradients are joined otherwise than by their sum; all steps are taken.  Not counted: attention
    between tokens, what robust wrappers add.
    """
    forward = 2.0 * size.parameters
    back = forward + 2.0 * (size.low_rank if adapter else size.trained)
    step = (forward * (2 if settings.checkpointing else 1) + back * _sides(settings)) * work.rows * work.tokens
    looks = 1 + -(-settings.steps // settings.check_every)
    return settings.steps * step + (looks * LOOKED_AT + work.asked) * work.tokens * forward


def advice(size: Size, settings: Settings, work: Work, *, adapter: bool, available: int, device: str) -> str:
    """The sentence for a training that did not fit: what it needs, and which settings would fit by the estimate."""
    need = memory(size, settings, work, adapter=adapter)
    room = min(available, int(0.7 * need.total))
    fitting: dict[str, str] = {}  # one of each kind
    for name, other, rows, lora in _others(settings, work, adapter):
        if memory(size, other, rows, adapter=lora).total <= room:
            fitting.setdefault(name.split()[0], name)
    way = f"give {' or '.join(fitting.values())}" if fitting else "take a smaller model or dtype, or fewer targets"
    return (f"Training does not fit into the memory of {device}: it needs about {need} of {available / GIB:.2f} GiB; "
            f"{way}.")  # fmt: skip


def _others(settings: Settings, work: Work, adapter: bool) -> Iterator[tuple[str, Settings, Work, bool]]:
    """Ways to need less, the cheapest first: name, settings, rows, whether an adapter is trained."""
    parts = settings.accumulate
    while (parts := 2 * parts) <= settings.batch_size:
        yield f"accumulate: {parts}", replace(settings, accumulate=parts), work, adapter
    if not settings.checkpointing:
        yield "checkpointing: true", replace(settings, checkpointing=True), work, adapter
    half = work.longest // 2
    shorter = replace(work, longest=half, tokens=min(half, work.tokens))
    yield f"texts of at most {half} tokens", settings, shorter, adapter
    if not adapter:
        yield "adapter: lora", settings, work, True


def _sides(settings: Settings) -> int:
    """How many gradients are kept apart."""
    return 1 if named(settings.combine)[0] == "linear" and settings.robust in ("none", []) else 2
