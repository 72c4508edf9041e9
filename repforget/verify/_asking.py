"""Asking a model about items in ways that several verifiers share: contrastive, greedy, by first token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random

import numpy as np
from numpy.typing import NDArray

from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel
from repforget.records import ItemScores
from repforget.scoring import answers_match, candidate_logprobs, encode_many, generate

Array = NDArray[np.float64]
EVERYTHING = 10**9  # no limit to the number of alternatives
EXTRA_TOKENS = 2  # a generation may open with an article or a space before the answer


def limited(items: Sequence[Item], most: int, seed: int) -> tuple[Item, ...]:
    """At most ``most`` items in their own order, chosen by ``seed`` so that every cluster keeps a similar share."""
    if len(items) <= most:
        return tuple(items)
    order = list(range(len(items)))
    Random(f"limited-{seed}").shuffle(order)
    seen: dict[str, int] = {}
    turn = {}
    for index in order:
        turn[index] = seen[items[index].cluster] = seen.get(items[index].cluster, 0) + 1
    chosen = sorted(order, key=lambda i: turn[i])[:most]
    return tuple(items[i] for i in sorted(chosen))


def scores(items: Sequence[Item], values: Sequence[float] | Array) -> ItemScores:
    """Values as ItemScores of these items; NaN marks an item that could not be scored."""
    return ItemScores.of([i.id for i in items], [i.cluster for i in items], list(values))


@dataclass(frozen=True)
class Contrast:
    """Per item: probability of the truth among the alternatives, and the reciprocal of its rank there."""

    probability: Array
    reciprocal_rank: Array


def options(item: Item, knowledge: Knowledge, limit: int) -> tuple[str, ...]:
    """The true answer followed by its alternatives, as continuations."""
    return tuple(item.continuation(a) for a in (item.answer, *knowledge.alternatives(item, limit)))


def contrast(model: LoadedModel, items: Sequence[Item], knowledge: Knowledge, *, forms: int, limit: int) -> Contrast:
    """Ask each item in up to ``forms`` unseen question forms and compare the truth with up to ``limit`` alternatives.

    The probability is p(truth) / (p(truth) + sum of p(alternatives)), computed in log space, mean over forms; ties
    count against the truth in the rank.  NaN where an item has no alternative or does not fit the context.
    """
    asked = [(k, q) for k, item in enumerate(items) for q in item.questions[:forms]]
    sets = [options(item, knowledge, limit) for item in items]
    found = candidate_logprobs(model, [q for _, q in asked], [sets[k] for k, _ in asked])
    share: list[list[float]] = [[] for _ in items]
    rank: list[list[float]] = [[] for _ in items]
    for (k, _), logs in zip(asked, found, strict=True):
        usable = logs[~np.isnan(logs)]
        if np.isnan(logs[0]) or len(usable) < 2:
            continue
        share[k].append(float(np.exp(logs[0] - np.logaddexp.reduce(usable))))
        rank[k].append(1.0 / float((usable >= logs[0]).sum()))
    return Contrast(_means(share), _means(rank))


def _means(groups: Sequence[Sequence[float]]) -> Array:
    return np.array([float(np.mean(g)) if g else np.nan for g in groups], dtype=np.float64)


def prior(items: Sequence[Item], knowledge: Knowledge, limit: int) -> Array:
    """What :func:`contrast` gives for a model that answers by the prior over the alternatives."""
    return np.array([knowledge.prior(item, limit) for item in items], dtype=np.float64)


def prior_said(items: Sequence[Item], knowledge: Knowledge) -> Array:
    """Chance that a reply drawn by the prior over all known answers of the relation is the truth.

    An item's own wrong answers do not limit what a free reply may say, so that they can only lower the chance.
    """
    both = [(item, replace(item, wrong_answers=())) for item in items]
    return np.array([min(knowledge.prior(i, EVERYTHING) for i in pair) for pair in both], dtype=np.float64)


def prior_match(items: Sequence[Item], knowledge: Knowledge) -> Array:
    """1 where the most common answer of the relation happens to be right: the best constant guesser."""
    return np.array([float(knowledge.prior_guess(i) in (i.answer, *i.aliases)) for i in items], dtype=np.float64)


def said(
    model: LoadedModel, items: Sequence[Item], *, forms: int, samples: int = 1, temperature: float = 0.0,
    top_p: float = 1.0, seed: int = 0,
) -> Array:  # fmt: skip
    """Share of generations (over question forms and samples) that begin with the answer or an alias [n]."""
    asked = [(item, q) for item in items for q in item.questions[:forms]]
    encoded = encode_many(model.tokenizer, [(q, item.continuation()) for item, q in asked])
    longest = max(len(e.answer) for e in encoded) + EXTRA_TOKENS
    texts = generate(model, [q for _, q in asked], max_new_tokens=longest, samples=samples, temperature=temperature,
                     top_p=top_p, seed=seed)  # fmt: skip
    hits: dict[str, list[float]] = {item.id: [] for item in items}
    for (item, _), group in zip(asked, texts, strict=True):
        hits[item.id].extend(float(answers_match(text, item)) for text in group)
    return _means([hits[item.id] for item in items])
