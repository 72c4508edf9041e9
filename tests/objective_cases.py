"""Arguments for the objectives on outputs, built here from logits alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repforget.edit.train._objective import Objective, Scores, find, part_names

OUTPUTS = {"own", "instead", "reference", "instead_reference", "logits", "labels", "place", "pattern", "teacher"}


def objectives() -> list[Objective]:
    """Every objective and retain term that reads outputs only."""
    found = [find(name) for name in part_names("objectives")]
    found += [find(name, "retain") for name in part_names("retain")]
    return [made for made in found if set(made.reads) <= OUTPUTS]


def scores(logits: Tensor, labels: Tensor, row: Tensor) -> Scores:
    return Scores(logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1), row, int(row.max()) + 1)


@dataclass
class Case:
    """Two answers to the same three prompts, under two models: logits [m, V] with gradient, and who they belong to."""

    logits: Tensor
    labels: Tensor
    row: Tensor
    other: Tensor
    other_labels: Tensor
    other_row: Tensor
    before: Tensor
    other_before: Tensor

    @property
    def place(self) -> Tensor:
        return torch.cat([torch.arange(int(count)) for count in torch.bincount(self.row)])

    def arguments(self, made: Objective) -> list[Any]:
        given = {
            "own": lambda: scores(self.logits, self.labels, self.row),
            "reference": lambda: scores(self.before, self.labels, self.row),
            "instead": lambda: scores(self.other, self.other_labels, self.other_row),
            "instead_reference": lambda: scores(self.other_before, self.other_labels, self.other_row),
            "logits": lambda: self.logits, "labels": lambda: self.labels, "place": lambda: self.place,
            "pattern": lambda: (self.labels + 1) % self.logits.shape[-1],
            "teacher": lambda: self.before.log_softmax(-1),
        }  # fmt: skip
        return [given[name]() for name in made.reads]

    def loss(self, made: Objective, **settings: Any) -> Tensor:
        return made.function(*self.arguments(made), **settings)


def case(
    seed: int = 0, vocabulary: int = 7, counts: tuple[int, ...] = (3, 1, 2), scale: float = 2.0,
    dtype: torch.dtype = torch.float64,
) -> Case:  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    m, k = sum(counts), sum(counts) + len(counts)

    def numbers(n: int) -> Tensor:
        return (scale * torch.randn(n, vocabulary, generator=draw, dtype=torch.float64)).to(dtype)

    def labels(n: int) -> Tensor:
        return torch.randint(vocabulary, (n,), generator=draw)

    row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    other_row = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts) + 1)
    return Case(numbers(m).requires_grad_(), labels(m), row, numbers(k).requires_grad_(), labels(k), other_row,
                numbers(m), numbers(k))  # fmt: skip
