"""Facts to locate, and aligned pairs of a clean and a corrupted prompt made of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from repforget.causal import Positions, Run, prompt_run
from repforget.errors import KnowledgeError
from repforget.knowledge import EditData, Fact

MAX_PARTNERS_TRIED = 200


@dataclass(frozen=True)
class Pairs:
    """Runs with the clean prompt as base and the corrupted one as donor, and what had to be left out."""

    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()


def choose_facts(facts: Sequence[Fact], limit: int, seed: int) -> tuple[Fact, ...]:
    """At most ``limit`` facts, one statement of each item, taken in turn from the clusters, drawn by seed."""
    order = sorted(facts, key=lambda f: f.id)
    random.Random(f"facts-{seed}").shuffle(order)
    items: dict[str, Fact] = {}
    for fact in order:
        items.setdefault(fact.id.rsplit("#", 1)[0], fact)
    turn: dict[str, int] = {}
    ranked: list[tuple[int, int, Fact]] = []
    for place, fact in enumerate(items.values()):
        turn[fact.cluster] = turn.get(fact.cluster, 0) + 1
        ranked.append((turn[fact.cluster], place, fact))
    return tuple(fact for *_, fact in sorted(ranked, key=lambda r: r[:2])[:limit])


def matched_facts(chosen: Sequence[Fact], retain: Sequence[Fact], seed: int) -> tuple[Fact, ...]:
    """As many retain facts as ``chosen``, of the same relations in the same numbers where there are
    enough."""
    pool = list(choose_facts(retain, len(retain), seed))
    taken: list[Fact] = []
    for fact in chosen:
        k = next((k for k, other in enumerate(pool) if other.relation == fact.relation), 0 if pool else None)
        if k is not None:
            taken.append(pool.pop(k))
    return tuple(taken)


def corrupted_pairs(
    tokenizer: Any, facts: Sequence[Fact], others: Sequence[Fact], *, seed: int, positions: Positions = "all",
    partners: int = 1,
) -> Pairs:  # fmt: skip
    """Pair each fact with the same prompt about another subject of equal token length and another answer.

    Up to ``partners`` partners per fact are drawn by seed from ``others`` of the same relation (of any relation
    where none has an answer to it); their answers become the rivals of ``logit_difference``.  Facts
    without a subject in the prompt or without a partner are left out and counted; raises KnowledgeError when none
    is left.  Symmetric token replacement: Zhang & Nanda 2023, arXiv 2309.16042.
    """
    by_relation: dict[str, list[Fact]] = {}
    for other in others:
        by_relation.setdefault(other.relation, []).append(other)
    runs: list[Run] = []
    missing: list[str] = []
    alone: list[str] = []
    for fact in facts:
        if not fact.subject or fact.subject not in fact.prompt:
            missing.append(fact.id)
            continue
        same = by_relation.get(fact.relation)
        found = _pair(tokenizer, fact, same or others, same is not None, seed, positions, partners)
        runs += found
        if not found:
            alone.append(fact.id)
    if not runs:
        raise KnowledgeError(_nothing_left(len(facts), missing, alone))
    reasons = {
        "their prompt does not contain their subject": missing,
        "no retain subject of equal token length has another answer": alone,
    }
    notes = (_left_out(ids, len(facts), why) for why, ids in reasons.items() if ids)
    return Pairs(tuple(runs), tuple(notes))


def _left_out(ids: Sequence[str], total: int, why: str) -> str:
    return f"{len(ids)} of {total} facts are left out because {why} (first '{ids[0]}')."


def _pair(
    tokenizer: Any, fact: Fact, others: Sequence[Fact], related: bool, seed: int, positions: Positions, partners: int
) -> list[Run]:
    """Runs with the first seeded partners that give an aligned prompt."""
    found = {p.subject: p for p in sorted(others, key=lambda p: p.id)
             if p.subject and p.subject != fact.subject and p.cluster != fact.cluster
             and not (related and p.answer == fact.answer)}  # fmt: skip
    order = list(found.values())
    random.Random(f"partner-{seed}-{fact.id}").shuffle(order)
    runs: list[Run] = []
    for partner in order[:MAX_PARTNERS_TRIED]:
        if len(runs) == partners:
            break
        donor = fact.prompt.replace(fact.subject, partner.subject)
        try:
            runs.append(prompt_run(tokenizer, fact.id, fact.cluster, fact.prompt, fact.answer, donor_prompt=donor,
                                   subject=fact.subject, positions=positions,
                                   rival=partner.answer if related else None))  # fmt: skip
        except KnowledgeError:  # not aligned with this partner: try the next
            continue
    return runs


def _nothing_left(total: int, missing: Sequence[str], alone: Sequence[str]) -> str:
    if missing and not alone:
        return (f"No clean and corrupted pair can be made: none of the {total} forget facts has its subject "
                f"in its prompt (first '{missing[0]}'); give each item a 'subject' as written in its "
                "prompt.")  # fmt: skip
    return (f"No clean and corrupted pair can be made from {total} facts: {len(missing)} have no subject in "
            f"their prompt and {len(alone)} have no retain subject of equal token length with another "
            "answer; add retain items about similar subjects.")  # fmt: skip


def plain_runs(tokenizer: Any, facts: Sequence[Fact], positions: Positions) -> Pairs:
    """Runs whose donor has the same ids, for patching from another model."""
    runs: list[Run] = []
    missing: list[str] = []
    for fact in facts:
        try:
            runs.append(prompt_run(tokenizer, fact.id, fact.cluster, fact.prompt, fact.answer,
                                   subject=fact.subject, positions=positions))  # fmt: skip
        except KnowledgeError:
            missing.append(fact.id)
    if not runs:
        raise KnowledgeError(f"None of the {len(facts)} facts can be patched: their subjects do not occur in their "
                             "prompts, or their answers have no tokens of their own; check one item.")  # fmt: skip
    notes = (_left_out(missing, len(facts), "they do not align"),) if missing else ()
    return Pairs(tuple(runs), notes)


def forget_and_retain(
    data: EditData, limit: int, seed: int, build: Callable[[Sequence[Fact]], Pairs], contrast: bool
) -> tuple[Pairs, Pairs]:
    """Runs for the chosen forget facts, and for matched retain facts when a contrast is wanted."""
    chosen = choose_facts(data.forget, limit, seed)
    forget = build(chosen)
    return forget, build(matched_facts(chosen, data.retain, seed)) if contrast else Pairs(())
