"""Models so small that the whole Gauss-Newton matrix is known: softmax regression on what a token stands for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from repforget.models.load import LoadedModel
from repforget.training import Example

NAME = "map.weight"


class Bigram(nn.Module):
    """Logits of the next token are linear in fixed features of the last one; ``logits_to_keep`` and masks mean
    nothing."""

    def __init__(self, features: Tensor, weight: Tensor) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(features)
        self.map = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.map.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.dtype = weight.dtype
        self.config = SimpleNamespace(max_position_embeddings=16)

    def get_input_embeddings(self) -> Any:
        return self.table

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.map(self.table(input_ids)))


def bigram(weight: Tensor, features: Tensor) -> LoadedModel:
    return LoadedModel("bigram", Bigram(features, weight).eval(), SimpleNamespace(pad_token_id=0, eos_token_id=0), "-")


def pair(first: int, second: int) -> Example:
    return Example((first, second), (False, True))


def fisher(weight: Tensor, features: Tensor, contexts: list[int]) -> Tensor:
    """The exact Gauss-Newton matrix [out * in, out * in] per prediction, over the row-major entries of the weight."""
    total = torch.zeros(weight.numel(), weight.numel(), dtype=weight.dtype)
    for context in contexts:
        x = features[context]
        p = (weight @ x).softmax(0)
        total += torch.kron(p.diag() - p[:, None] * p, x[:, None] * x)
    return total / len(contexts)


def gradient(weight: Tensor, features: Tensor, example: Example) -> Tensor:
    """Of the negative log-probability of a pair, flat."""
    x = features[example.tokens[0]]
    p = (weight @ x).softmax(0)
    p[example.tokens[1]] -= 1
    return (p[:, None] * x).flatten()
