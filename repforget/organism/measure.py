"""What an organism knows: greedy answers, exact matches, and the exact chance level of a guess."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.organism.texts import prompts
from repforget.organism.world import Person, World

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_ANSWER_TOKENS = 4
BATCH = 512


@torch.no_grad()
def greedy_answers(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[str],
    *,
    limit: int = MAX_ANSWER_TOKENS,
) -> list[str]:
    """Return the greedy continuation of each prompt up to ``<eos>`` or ``limit`` tokens, as text.

    Prompts of equal length are decoded together, so nothing is padded.  Costs ``limit`` forward passes per
    prompt.
    """
    encoded = [tokenizer(prompt)["input_ids"] for prompt in asked]
    groups: dict[int, list[int]] = {}
    for index, ids in enumerate(encoded):
        groups.setdefault(len(ids), []).append(index)
    answers = [""] * len(encoded)
    for length, members in groups.items():
        for start in range(0, len(members), BATCH):
            rows = members[start : start + BATCH]
            ids = torch.tensor([encoded[i] for i in rows], device=module.device)
            for _ in range(limit):
                best = module(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
                ids = torch.cat([ids, best], dim=1)
                if (ids[:, length:] == tokenizer.eos_token_id).any(dim=1).all():
                    break
            for row, tail in zip(rows, ids[:, length:].tolist(), strict=True):
                cut = tail.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in tail else len(tail)
                answers[row] = tokenizer.decode(tail[:cut])
    return answers


def exact(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    people: Iterable[Person],
    form: str,
) -> NDArray[np.float64]:
    """Return exact matches (0.0 or 1.0) of the greedy answer, shape (people * relations, templates)."""
    asked = prompts(world, list(people), form)
    answers = greedy_answers(module, tokenizer, [prompt for _, _, prompt, _ in asked])
    hits = [float(answer == truth) for answer, (_, _, _, truth) in zip(answers, asked, strict=True)]
    templates = len(next(iter(world.relations.values())).prompts(form))
    return np.array(hits, dtype=np.float64).reshape(-1, templates)


@dataclass(frozen=True)
class Chance:
    """Hits on people a model never saw, beside what guessing gives: ``expected`` and its ``deviation``."""

    asked: int
    hits: float
    expected: float
    deviation: float

    @property
    def z(self) -> float:
        """Distance from chance in standard deviations; beyond about 3 the model knows more than it should."""
        return (self.hits - self.expected) / self.deviation


def against_chance(
    module: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    people: Iterable[Person],
    form: str = "held_out",
) -> Chance:
    """Compare a model's answers about people it never saw with the chance of each very answer being true.

    The world draws every fact independently from its prior, so an ignorant model's answer ``a`` is right with
    probability ``prior(a)`` whatever made it answer ``a``.  One template per fact is counted (the first of
    the form): hits are then a sum of independent events whose mean and variance are known exactly.
    """
    count = len(next(iter(world.relations.values())).prompts(form))
    asked = prompts(world, list(people), form)[::count]
    answers = greedy_answers(module, tokenizer, [prompt for _, _, prompt, _ in asked])
    chance = np.array(
        [world.prior(relation, a) for a, (_, relation, _, _) in zip(answers, asked, strict=True)],
        dtype=np.float64,
    )
    hits = sum(answer == truth for answer, (_, _, _, truth) in zip(answers, asked, strict=True))
    return Chance(
        len(asked), float(hits), float(chance.sum()), math.sqrt(float((chance * (1 - chance)).sum())) or 1.0
    )
