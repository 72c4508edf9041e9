"""Statements labelled with their answers, relation by relation, and the states a classifier reads them from."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from repforget.causal import subject_tokens
from repforget.errors import KnowledgeError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.locate._exact import Task, may_rank
from repforget.locate._pairs import choose_facts
from repforget.models.capture import Batch, capture
from repforget.models.load import LoadedModel
from repforget.records import Component
from repforget.scoring import encode_prompts, token_batches
from repforget.scoring.encode import pad_id

Token = Literal["last", "subject"]
MIN_ROWS = 16  # fewer rows of a relation than this teach no classifier


@dataclass(frozen=True)
class Rows:
    """The labelled statements of one relation: facts, answers as classes, and which of them are to be forgotten."""

    relation: str
    facts: tuple[Fact, ...]
    labels: NDArray[np.int64]
    forget: NDArray[np.bool_]

    @property
    def clusters(self) -> list[str]:
        return [fact.cluster for fact in self.facts]

    def ranking(self, early: Collection[str]) -> tuple[Rows, NDArray[np.bool_]] | None:
        """The statements without those of forget subjects that are not ``early``, and which these are.

        None where too few are left to teach a classifier or to rank by.
        """
        kept = np.array([not f or c in early for c, f in zip(self.clusters, self.forget, strict=True)], dtype=bool)
        classes, labels = np.unique(self.labels[kept], return_inverse=True)
        if kept.sum() < MIN_ROWS or len(classes) < 2 or not self.forget[kept].any():
            return None
        facts = tuple(compress(self.facts, kept))
        return Rows(self.relation, facts, labels.astype(np.int64), self.forget[kept]), kept


def early_subjects(tasks: Sequence[Task], probed: Sequence[Rows], seed: int) -> frozenset[str]:
    """Forget subjects that may teach and rank, because the band of ``tasks`` is not measured on them.

    KnowledgeError where no relation has enough of them.
    """
    names = [c for rows in probed for c, forget in zip(rows.clusters, rows.forget, strict=True) if forget]
    return early_of(probed, frozenset(compress(names, may_rank(tasks, names, seed))))


def early_of(probed: Sequence[Rows], early: frozenset[str]) -> frozenset[str]:
    """``early``; KnowledgeError where no relation has enough of these forget subjects to rank by."""
    if not any(rows.ranking(early) for rows in probed):
        raise KnowledgeError(f"No relation has {MIN_ROWS} statements left to rank by, beside those of the subjects on "
                             "whom the ranking is measured: allow more items, or give facts about more "
                             "subjects.")  # fmt: skip
    return early


def relations(data: EditData, statements: int, items: int, seed: int) -> tuple[list[Rows], tuple[str, ...]]:
    """The relations that can be probed, and a note on those that cannot."""
    forget, retain = _some(data.forget, statements, items, seed), _some(data.retain, statements, items, seed)
    by_relation: dict[str, list[tuple[Fact, bool]]] = defaultdict(list)
    for facts, is_forget in ((forget, True), (retain, False)):
        for fact in facts:
            by_relation[fact.relation].append((fact, is_forget))
    usable: list[Rows] = []
    refused: list[str] = []
    for relation, members in sorted(by_relation.items()):
        holders = Counter(answer for answer, _ in {(fact.answer, fact.cluster) for fact, _ in members})
        kept = [(fact, f) for fact, f in members if holders[fact.answer] > 1]
        classes = sorted({fact.answer for fact, _ in kept})
        if len(kept) < MIN_ROWS or len(classes) < 2 or not any(f for _, f in kept):
            refused.append(relation)
            continue
        number = {answer: k for k, answer in enumerate(classes)}
        usable.append(Rows(relation, tuple(f for f, _ in kept), np.array([number[f.answer] for f, _ in kept]),
                            np.array([f for _, f in kept], dtype=bool)))  # fmt: skip
    if not usable:
        raise KnowledgeError(f"No relation can be probed: each of {len(by_relation)} has fewer than {MIN_ROWS} "
                             "statements whose answer occurs with two subjects, or only one such answer; raise "
                             "'items', add retain items with the same answers, or use "
                             "attribution_patching.")  # fmt: skip
    note = f"Relations without enough shared answers are not probed: {', '.join(repr(r) for r in refused)}."
    return usable, (note,) if refused else ()


def least_items(data: EditData, statements: int, items: int, seed: int) -> tuple[int, int]:
    """How many relations can be probed with ``items`` of each, and with how few of each all of these still can."""
    usable = len(relations(data, statements, items, seed)[0])

    def enough(count: int) -> bool:
        try:
            return len(relations(data, statements, count, seed)[0]) == usable
        except KnowledgeError:
            return False

    return usable, bisect_left(range(items), True, lo=1, key=enough)  # more items only add statements


def _some(facts: Sequence[Fact], statements: int, items: int, seed: int) -> list[Fact]:
    """Up to ``items`` items per relation, each with its first ``statements`` statements."""
    if statements < 1 or items < 1:
        raise UsageError(f"A sweep needs at least one statement and one item, not statements={statements} and "
                         f"items={items}.")  # fmt: skip
    forms: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        forms[fact.id.rsplit("#", 1)[0]].append(fact)
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_relation[fact.relation].append(fact)
    return [form for members in by_relation.values() for chosen in choose_facts(members, items, seed)
            for form in forms[chosen.id.rsplit("#", 1)[0]][:statements]]  # fmt: skip


def features(
    model: LoadedModel, components: Sequence[Component], facts: Sequence[Fact], token: Token
) -> dict[Component, NDArray[np.float32]]:
    """State of each component at the chosen token of each statement [n, d]; only that token is kept."""
    prompts = encode_prompts(model.tokenizer, [fact.prompt for fact in facts])
    wanted = [len(ids) - 1 for ids in prompts] if token == "last" else [
        subject_tokens(model.tokenizer, fact.id, fact.prompt, fact.subject, ids)[-1]
        for fact, ids in zip(facts, prompts, strict=True)
    ]  # fmt: skip
    sites = [component.site for component in components]
    values: dict[Component, NDArray[np.float32]] = {}
    for rows, batch in token_batches(prompts, pad_id=pad_id(model.tokenizer)):
        at = torch.tensor([wanted[row] for row in rows])
        found = capture(model, sites, Batch(batch.ids, batch.mask), gather=at)
        for component in components:
            part = found[component.site].float().cpu().numpy()
            values.setdefault(component, np.zeros((len(facts), part.shape[1]), dtype=np.float32))[rows] = part
    return values
