"""What fact-level surgery asks for: groups of prompts that share one key and one value, and where each key is read."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from repforget.edit._collect import subject_token
from repforget.errors import KnowledgeError, SiteError, UsageError
from repforget.knowledge import EditData, Fact
from repforget.models.load import LoadedModel
from repforget.models.sites import site_map
from repforget.records import Localization
from repforget.scoring.encode import Encoded, context_limit, encode_many, encode_prompts

Token = Literal["subject_last", "last"]
Unit = Literal["auto", "subject", "fact", "prompt"]
Aim = Literal["erase", "inject", "refuse", "lens", "entropy"]
HEIGHT = 0.28  # of the depth: layers 4 to 8 of 32
REFUSAL = " I don't know."
ESSENCE = "{} is a"  # what the subject is in general, which a changed fact should leave alone


@dataclass(frozen=True)
class Row:
    """A prompt with the text that its loss reads: the key is at ``at``, the text starts at ``start``.

    A row whose ``start`` is the length of ``ids`` has no text: its last distribution should stay (see ESSENCE).
    """

    group: int
    ids: tuple[int, ...]
    at: int
    start: int

    @property
    def kept(self) -> bool:
        return self.start == len(self.ids)


@dataclass(frozen=True)
class Requests:
    """``names`` of the groups, one value each, and all their rows (skipped: rows with the key at the first token)."""

    names: tuple[str, ...]
    rows: tuple[Row, ...]
    skipped: int

    def of(self, groups: Sequence[int]) -> Requests:
        """Those groups alone, numbered anew."""
        place = {old: new for new, old in enumerate(groups)}
        rows = tuple(replace(row, group=place[row.group]) for row in self.rows if row.group in place)
        return Requests(tuple(self.names[g] for g in groups), rows, 0)


def requests(
    model: LoadedModel, data: EditData, *, token: Token, unit: Unit, aim: Aim, contexts: int, seed: int
) -> Requests:
    """The forget facts in groups that share a value: of one subject, of one fact in all its statements, or of one
    prompt; at most ``contexts`` prompts of a group, drawn by seed.

    "auto" is the subject where keys are read at its last token (in a prompt that starts with it, the key there knows
    nothing else), and the fact where they are read at the last token.
    """
    if contexts < 1:
        raise UsageError(f"A value was to be found from {contexts} prompts: give contexts of at least 1.")
    unit = ("subject" if token == "subject_last" else "fact") if unit == "auto" else unit
    groups: dict[str, list[Fact]] = {}
    for fact in dict.fromkeys(replace(fact, id="") for fact in data.forget):
        groups.setdefault(_group(fact, unit), []).append(fact)
    drawn = [_drawn(facts, contexts, f"contexts-{seed}-{name}") for name, facts in groups.items()]
    chosen = [(number, fact) for number, facts in enumerate(drawn) for fact in facts]
    texts = _texts(data, [fact for _, fact in chosen], aim, seed)
    facts = [replace(fact, answer=text) for (_, fact), text in zip(chosen, texts, strict=True)]
    limit = context_limit(model)
    codes = encode_many(model.tokenizer, [(fact.prompt, fact.answer) for fact in facts], limit=limit)
    rows = [Row(number, code.ids, _place(model, fact, code, token), code.start)
            for (number, _), fact, code in zip(chosen, facts, codes, strict=True) if code.valid]  # fmt: skip
    rows += _kept(model, drawn, token, limit)
    usable = [row for row in rows if row.at > 0]
    left = {row.group for row in usable if not row.kept}
    missing = next((name for number, name in enumerate(groups) if number not in left), None)
    if missing is not None or not groups:
        raise KnowledgeError(f"No prompt of '{missing}' has its key behind the first token and fits the context of "
                             f"{limit} tokens: give longer prompts, or other statements.")  # fmt: skip
    return Requests(tuple(groups), tuple(usable), len(rows) - len(usable))


def _group(fact: Fact, unit: Unit) -> str:
    whose = fact.subject or fact.cluster
    return {"subject": whose, "fact": f"{whose} / {fact.relation} / {fact.answer}"}.get(unit, fact.prompt + fact.answer)


def _drawn(facts: list[Fact], most: int, salt: str) -> list[Fact]:
    return sorted(random.Random(salt).sample(facts, most), key=facts.index) if len(facts) > most else facts


def _texts(data: EditData, facts: Sequence[Fact], aim: Aim, seed: int) -> list[str]:
    """The text after each prompt: a refusal, another answer of the same relation, or the answer itself."""
    if aim == "refuse":
        return [REFUSAL] * len(facts)
    if aim != "inject":
        return [fact.answer for fact in facts]
    out = []
    for fact in facts:
        pool = data.pool.get(fact.relation) or {f.answer for f in data.forget if f.relation == fact.relation}
        others = sorted(set(pool) - {fact.answer})
        if not others:
            raise KnowledgeError(f"No other answer of the relation '{fact.relation}' is known to put in the place of "
                                 f"'{fact.answer.strip()}': choose another objective, for example erase.")  # fmt: skip
        out.append(random.Random(f"inject-{seed}-{fact.cluster}-{fact.relation}-{fact.answer}").choice(others))
    return out


def _place(model: LoadedModel, fact: Fact, code: Encoded, token: Token) -> int:
    if token == "last":
        return code.start - 1
    if not fact.subject or fact.subject not in fact.prompt:
        raise KnowledgeError(f"The prompt '{fact.prompt}' does not hold its subject '{fact.subject}', at whose last "
                             "token the key was to be read: give items their subject, or set token: last.")  # fmt: skip
    return min(subject_token(model.tokenizer, fact), code.start - 1)


def _kept(model: LoadedModel, groups: Sequence[Sequence[Fact]], token: Token, limit: int) -> list[Row]:
    """One prompt per group (that has a subject) whose last distribution should stay."""
    whose = [(number, facts[0].subject) for number, facts in enumerate(groups) if facts[0].subject]
    prompts = [ESSENCE.format(subject) for _, subject in whose]
    coded = encode_prompts(model.tokenizer, prompts) if prompts else []
    rows = []
    for (number, subject), prompt, ids in zip(whose, prompts, coded, strict=True):
        at = len(ids) - 1
        if token == "subject_last":
            at = subject_token(model.tokenizer, Fact("", "", subject, "", prompt, ""))
        if len(ids) <= limit:
            rows.append(Row(number, ids, at, len(ids)))
    return rows


def projections(model: LoadedModel, method: str, layers: Sequence[int]) -> list[str]:
    """Paths of the MLP output projections of ``layers``; SiteError where there is no single one."""
    found = []
    for layer in layers:
        down = site_map(model.module).anatomy.layers[layer].down
        if down is None:
            raise SiteError(f"Layer {layer} of '{model.name}' has batched experts and no two-dimensional MLP output "
                            f"projection, which {method} changes: choose an editor that trains.")  # fmt: skip
        found.append(down)
    return found


def chosen_layers(
    model: LoadedModel, asked: Literal["auto"] | Sequence[int], where: Localization | None, count: int
) -> list[int]:
    """The layers asked for, the ``count`` best of ``where``, or without it the ``count`` that end at HEIGHT, where
    published edits of facts are made."""
    depth = model.n_layers
    if asked == "auto":
        stop = min(depth, max(count, round(HEIGHT * depth)))
        asked = where.layers()[:count] if where is not None and where.layers() else range(max(0, stop - count), stop)
    if not asked or not all(0 <= layer < depth for layer in asked):
        raise SiteError(f"Layers {list(asked)} were asked for: give some of 0 to {depth - 1}.")
    return sorted(set(asked))


def share_of_layers(model: LoadedModel, top_layers: int | Literal["auto"]) -> int:
    """How many layers share an edit; "auto" is a sixth of them, at least two (five of 32)."""
    return max(2, round(model.n_layers / 6)) if top_layers == "auto" else top_layers
