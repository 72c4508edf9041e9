"""Texts with the tokens that carry loss: collated, batched by length, and their cross-entropy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from repforget.errors import UsageError

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


def label_logits(module: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [m, V] (float32) and labels [m] of the labelled tokens of a collated batch, with gradient."""
    mask = batch["attention_mask"]
    # Equal lengths need no mask, and without one the attention kernel takes its fast causal path.
    extra = {} if bool(mask.all()) else {"attention_mask": mask}
    logits = module(input_ids=batch["input_ids"], use_cache=False, **extra).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    chosen = labels != NO_LABEL
    return logits[chosen].float(), labels[chosen]


def label_loss(module: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean cross-entropy (nats) over the labelled tokens of a collated batch; a scalar with gradient."""
    return functional.cross_entropy(*label_logits(module, batch))


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
