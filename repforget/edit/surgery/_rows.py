"""The rows of null-space surgery: token prefixes whose next token is to be forgotten or kept.

A row is a prefix of a prompt with part of its answer; what counts is the distribution of the token after it.
Forget rows get the prior over answers of their relation as target.  Kept rows (retained facts, *strangers* and
general text) get what the model itself says.  Strangers are names that nobody whom the editor is shown bears, put
together from parts of real names: they stand for the people an editor is not shown, above all those who share a name
with a forgotten one, and where names are few many of them are those very people.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.scoring.encode import context_limit, encode_many, encode_prompts

Kind = Literal["forget", "retain", "stranger", "check", "general"]  # check: kept rows that measure separation
MOST_NAMES = 20000  # made-up names
CHECKED = 5  # every fifth kept name only measures before it is protected too
Prior = Mapping[int, float]  # token -> probability


@dataclass(frozen=True)
class Row:
    """One sequence: the tokens after positions ``start`` - 1 ... count; ``priors`` are their targets (forget only)."""

    kind: Kind
    ids: tuple[int, ...]  # prompt and all but the last token of the answer
    start: int  # first predicted token: the prediction is made at index start - 1
    priors: tuple[Prior | None, ...] = ()


def strangers(subjects: Sequence[str]) -> tuple[str, ...]:
    """Names that nobody of ``subjects`` bears: the beginning of one with the last word of another, sorted.

    At most :data:`MOST_NAMES`, drawn by their number and always the same: not all pairs are ever made.
    """
    parts = [subject.rpartition(" ") for subject in subjects if " " in subject.strip()]
    heads, tails = sorted({head for head, _, _ in parts}), sorted({tail for _, _, tail in parts})
    pairs: Sequence[int] = range(len(heads) * len(tails))
    if len(pairs) > MOST_NAMES + len(subjects):  # enough for as many that nobody bears
        pairs = random.Random("strangers").sample(pairs, MOST_NAMES + len(subjects))
    made = (f"{heads[pair // len(tails)]} {tails[pair % len(tails)]}" for pair in pairs)
    known = set(subjects)
    return tuple(sorted(islice((name for name in made if name not in known), MOST_NAMES)))


def stranger_facts(data: EditData, count: int, seed: int) -> tuple[Fact, ...]:
    """``count`` made-up facts: a forget statement with a stranger in it, completed by some retained answer."""
    names = strangers(sorted({fact.subject for fact in (*data.forget, *data.retain) if fact.subject}))
    frames = [fact for fact in data.forget if fact.subject and fact.subject in fact.prompt]
    if not names or not frames:
        return ()
    draw = random.Random(f"strangers-{seed}")
    if len(names) > count:  # in order the first ones would be alike
        names = tuple(random.Random(f"names-{seed}").sample(names, count))
    found = []
    for number in range(count):
        frame, name = draw.choice(frames), names[number % len(names)]
        answers = sorted(data.pool.get(frame.relation, ())) or [frame.answer]
        prompt = frame.prompt.replace(frame.subject, name)
        found.append(Fact(f"stranger-{number}", name, name, frame.relation, prompt, draw.choice(answers)))
    return tuple(found)


def checked(facts: Sequence[Fact]) -> frozenset[str]:
    """Every fifth cluster of ``facts``, at least one."""
    return frozenset(sorted({fact.cluster for fact in facts})[::CHECKED])


def _prior(pool: Mapping[tuple[int, ...], int], prefix: tuple[int, ...]) -> Prior | None:
    """Distribution of the token after ``prefix`` among the pool's answers; None where no answer goes on from it."""
    counts: Counter[int] = Counter()
    for answer, n in pool.items():
        if len(answer) > len(prefix) and answer[: len(prefix)] == prefix:
            counts[answer[len(prefix)]] += n
    total = sum(counts.values())
    return {token: n / total for token, n in counts.items()} if total else None


def _pools(model: LoadedModel, data: EditData) -> dict[str, dict[tuple[int, ...], int]]:
    """relation -> answer tokens -> count, over retained answers (over forget answers where there are none)."""
    counts: dict[str, Counter[str]] = {relation: Counter(pool) for relation, pool in data.pool.items()}
    frames = {fact.relation: fact.prompt for fact in (*data.forget, *data.retain)}
    for fact in data.forget:
        if fact.relation not in data.pool:
            counts.setdefault(fact.relation, Counter())[fact.answer] += 1
    pools: dict[str, dict[tuple[int, ...], int]] = {}
    for relation, counter in counts.items():
        if relation in frames:
            coded = encode_many(model.tokenizer, [(frames[relation], answer) for answer in counter])
            pools[relation] = {code.answer: n for code, n in zip(coded, counter.values(), strict=True)}
    return pools


def fact_rows(
    model: LoadedModel, data: EditData, facts: Sequence[Fact], kind: Kind, aside: frozenset[str] = frozenset()
) -> list[Row]:
    """Rows of facts, each with a prior per answer token where they are to be forgotten.

    Facts of the clusters ``aside`` become rows of kind "check".
    """
    pools = _pools(model, data) if kind == "forget" else {}
    known: dict[tuple[str, tuple[int, ...]], Prior | None] = {}
    rows = []
    coded = encode_many(model.tokenizer, [(f.prompt, f.answer) for f in facts], limit=context_limit(model))
    for fact, code in zip(facts, coded, strict=True):
        if not code.valid:
            continue
        own: Kind = "check" if fact.cluster in aside else kind
        priors: list[Prior | None] = []
        for stop in range(code.start, len(code.ids)) if kind == "forget" else ():
            key = (fact.relation, code.ids[code.start : stop])
            if key not in known:
                known[key] = _prior(pools[fact.relation], key[1])
            priors.append(known[key])
        rows.append(Row(own, code.ids[:-1], code.start, tuple(priors)))
    return rows


def text_rows(model: LoadedModel, texts: Sequence[str]) -> list[Row]:
    """General text: every token after the second is predicted from those before it."""
    limit = context_limit(model)
    coded = (ids[:limit] for ids in encode_prompts(model.tokenizer, list(texts)))
    return [Row("general", ids[:-1], 2) for ids in coded if len(ids) > 2]


def dense(priors: Sequence[Prior], size: int) -> Tensor:
    """Priors as a tensor [n, size]."""
    out = torch.zeros(len(priors), size)
    for row, prior in enumerate(priors):
        out[row, list(prior)] = torch.tensor(list(prior.values()))
    return out
