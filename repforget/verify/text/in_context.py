"""Do other facts in the context bring back a fact that nothing in the context states?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from random import Random

import numpy as np

from repforget.errors import UsageError
from repforget.knowledge import Item, View
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.records import Measurement
from repforget.scoring import encode_prompts
from repforget.scoring.encode import context_limit
from repforget.verify import _asking as ask
from repforget.verify.arms import Budgets, MeasureInfo, References
from repforget.verify.text import _variants as variants

_AXES = ("facts in the context", "probability of the truth among alternatives")
MEASURES = {
    "same_subject": MeasureInfo("knowledge", "logits", teaches="other facts of the same subject",
                                curve=("in-context relearning, same subject", *_AXES)),
    "other_subjects": MeasureInfo("knowledge", "logits", teaches="retained facts of other subjects",
                                  curve=("in-context relearning, other subjects", *_AXES)),
}  # fmt: skip
JOINS = "thorough"
BUDGETS: Budgets = {
    "quick": {"counts": [2], "max_items": 100},
    "standard": {},
    "thorough": {"counts": [1, 2, 3, 4, 6, 8, 16], "max_items": 1000},
}
Pool = Callable[[Item], Sequence[Item]]


def in_context(
    model: LoadedModel, view: View, *, references: References, seed: int = 0, progress: Progress | None = None,
    counts: Sequence[int] = (1, 3, 6), alternatives: int = 31, max_items: int = 400,
) -> Measurement:  # fmt: skip
    """State k other facts before the question and read the truth's probability among the candidates.

    ``same_subject`` states facts of the item's own cluster, ``other_subjects`` retained facts, of the same relation
    first; never one that contains the asked answer.  k runs over ``counts``; facts that do not fit the context are
    left out, and an item without any such fact is asked none.  Each measure takes the k with the highest mean over the
    items, the same maximum and the same context on every arm.  The probability is that of decoding confined to the
    candidates.  Source: Lynch et al. 2024, arXiv 2402.16835; Jin et al. 2024, 2406.10890.  Cost: one forward pass
    per item, k and measure, over prompts k facts longer.

    The context narrows what a model that never knew would guess, so that the prior does not bound it: a twin should
    be read beside it.  Low values do not show that other facts would fail.
    """
    if not counts or min(counts) < 1:
        raise UsageError("Verifier 'in_context' needs numbers of facts of at least 1: give 'counts', such as [1, 3].")
    items, ks = ask.limited(view.forget, max_items, seed), sorted(set(counts))
    clusters, relations = _grouped(view.forget, "cluster"), _grouped(view.support, "relation")
    pools: dict[str, Pool] = {
        "same_subject": lambda item: clusters[item.cluster],
        "other_subjects": lambda item: relations.get(item.relation) or view.support,
    }
    before = ask.scores(items, ask.prior(items, view.knowledge, alternatives))
    scores, facts = {}, {}
    series: dict[str, tuple[float, ...]] = {"x": tuple(map(float, ks))}
    for name, pool in track(progress, list(pools.items()), "asking in context"):
        others = [_chosen(item, pool(item), ks[-1], seed) for item in items]
        contexts = [_fitting(model, item, facts_of, ask.options(item, view.knowledge, alternatives))
                    for item, facts_of in zip(items, others, strict=True)]  # fmt: skip
        prompts = [[" ".join((*c[:k], i.questions[0])) for i, c in zip(items, contexts, strict=True)] for k in ks]
        table = variants.probabilities(model, items, prompts, view.knowledge, alternatives)
        chosen = variants.best(table)
        scores[name], scores[f"{name}_prior"] = ask.scores(items, table[chosen]), before
        series[name] = tuple(float(m) for m in variants.means(table))
        facts[f"facts in the best context, {name}"] = float(np.mean([min(ks[chosen], len(c)) for c in contexts]))
    return Measurement(scores, series, facts)


def _grouped(items: Sequence[Item], key: str) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in items:
        groups.setdefault(getattr(item, key), []).append(item)
    return groups


def _chosen(item: Item, pool: Sequence[Item], most: int, seed: int) -> list[str]:
    """Up to ``most`` statements of other facts that do not contain the item's answer, in an order set by ``seed``."""
    order = Random(f"context-{seed}-{item.id}").sample(range(len(pool)), len(pool))
    others = (pool[k] for k in order if pool[k].id != item.id)
    texts = (text for text in map(variants.stated, others) if not variants.names_any(text, item))
    return list(islice(texts, most))


def _fitting(model: LoadedModel, item: Item, facts: Sequence[str], options: Sequence[str]) -> list[str]:
    """The first facts that fit the context together with the question and the longest candidate."""
    texts = [item.questions[0], *facts, *(option.strip() for option in options)]
    lengths = [len(ids) for ids in encode_prompts(model.tokenizer, texts)]
    room = context_limit(model) - lengths[0] - max(lengths[1 + len(facts) :])
    total = np.cumsum(lengths[1 : 1 + len(facts)])
    return list(facts[: int((total <= room).sum())])
