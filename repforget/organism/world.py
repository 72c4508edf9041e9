"""A small world made from a seed: people, their attributes, and the many ways to say and to ask each fact.

Ground truth for everything that the embedded organism is used for.  Each attribute of each person is drawn
independently from a known, mildly non-uniform prior, so that *chance* is exact: a model that never saw a
person can do no better than ``prior(answer)``.  The draw does not depend on Python's hash seed or on any
global generator.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from repforget.organism import vocabulary as words

RELATIONS: Final = tuple(words.PHRASES)
VALUES_PER_RELATION: Final = 40
SPLIT_NAMES: Final = ("statements", "questions", "held_out", "cloze")


@dataclass(frozen=True)
class Relation:
    """One attribute: its possible values with their prior, and its prompts (the answer always comes last)."""

    name: str
    values: tuple[str, ...]
    prior: tuple[float, ...]
    statements: tuple[str, ...]
    questions: tuple[str, ...]
    held_out: tuple[str, ...]
    cloze: tuple[str, ...]

    def prompts(self, form: str) -> tuple[str, ...]:
        """Return the templates of one form: ``statements``, ``questions``, ``held_out`` or ``cloze``."""
        return {
            "statements": self.statements,
            "questions": self.questions,
            "held_out": self.held_out,
            "cloze": self.cloze,
        }[form]


@dataclass(frozen=True)
class Person:
    """One person; ``facts`` maps a relation to its value."""

    id: str
    first: str
    last: str
    facts: dict[str, str]

    @property
    def name(self) -> str:
        """First and last name."""
        return f"{self.first} {self.last}"


@dataclass(frozen=True)
class World:
    """Everything that is true; ``forget`` holds the ids of the people the twins never saw."""

    seed: int
    relations: dict[str, Relation]
    people: tuple[Person, ...]
    forget: frozenset[str]

    @property
    def forget_people(self) -> tuple[Person, ...]:
        """People that only the full model knows."""
        return tuple(p for p in self.people if p.id in self.forget)

    @property
    def known_people(self) -> tuple[Person, ...]:
        """People that all three models know."""
        return tuple(p for p in self.people if p.id not in self.forget)

    @property
    def namesakes(self) -> tuple[Person, ...]:
        """Known people who share a first or a last name with a forget person."""
        first = {p.first for p in self.forget_people}
        last = {p.last for p in self.forget_people}
        return tuple(p for p in self.known_people if p.first in first or p.last in last)

    @property
    def neighbours(self) -> tuple[Person, ...]:
        """Every second namesake: the near misses that no editor is shown."""
        return self.namesakes[::2]

    @property
    def others(self) -> tuple[Person, ...]:
        """Known people who are no neighbours: the other namesakes, and those who share no name with one."""
        near = {p.id for p in self.neighbours}
        return tuple(p for p in self.known_people if p.id not in near)

    def prior(self, relation: str, answer: str) -> float:
        """Probability that a new person has this answer: the chance level of a guess (0 for a non-value)."""
        if relation == "spouse":
            parts = answer.split()
            known = len(parts) == 2 and parts[0] in words.FIRST_NAMES and parts[1] in words.LAST_NAMES
            return 1.0 / (len(words.FIRST_NAMES) * len(words.LAST_NAMES)) if known else 0.0
        spec = self.relations[relation]
        return dict(zip(spec.values, spec.prior, strict=True)).get(answer, 0.0)

    def sha256(self) -> str:
        """Hash of every fact and template: the identity of the world."""
        content = {
            "relations": {
                k: [r.values, r.statements, r.questions, r.held_out, r.cloze]
                for k, r in self.relations.items()
            },
            "people": [[p.id, p.name, p.facts, p.id in self.forget] for p in self.people],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _expand(frames: tuple[str, ...], phrases: dict[str, str]) -> tuple[str, ...]:
    """Fill a relation's phrases into frames, leaving ``{subject}`` open."""
    return tuple(frame.format(subject="{subject}", **phrases) for frame in frames)


def _compounds(forms: tuple[str, ...], generator: np.random.Generator) -> list[str]:
    """Draw value names such as *Port Alder* and *Alder Bay*: forms crossed with shared stems."""
    every = [form.format(stem) for form in forms for stem in words.STEMS]
    order = generator.permutation(len(every))
    return [every[i] for i in order]


def _values(generator: np.random.Generator) -> dict[str, list[str]]:
    """Choose each relation's values; birthplace and residence share one list of towns."""
    towns = _compounds(words.TOWN_FORMS, generator)
    pools = {
        "birthplace": towns,
        "residence": towns,
        "employer": _compounds(words.COMPANY_FORMS, generator),
        "profession": list(words.PROFESSIONS),
        "instrument": list(words.INSTRUMENTS),
        "school": _compounds(words.SCHOOL_FORMS, generator),
        "award": _compounds(words.AWARD_FORMS, generator),
    }
    return {name: sorted(pool[:VALUES_PER_RELATION]) for name, pool in pools.items()}


def _names(count: int, generator: np.random.Generator) -> list[tuple[str, str]]:
    """Draw distinct (first, last) pairs."""
    pairs = [(first, last) for first in words.FIRST_NAMES for last in words.LAST_NAMES]
    return [pairs[i] for i in generator.permutation(len(pairs))[:count]]


def _choose_forget(people: list[Person], count: int, generator: np.random.Generator) -> frozenset[str]:
    """Pick the forget people among names from half of the name parts, so that others share none."""
    half_first = set(words.FIRST_NAMES[::2])
    half_last = set(words.LAST_NAMES[::2])
    order = [people[i] for i in generator.permutation(len(people))]
    inside = [p for p in order if p.first in half_first and p.last in half_last]
    outside = [p for p in order if p not in inside]
    # At most three quarters of the inside group: the pair of names must not give the forget set away.
    quota = min(count, (3 * len(inside)) // 4)
    return frozenset(p.id for p in (inside[:quota] + outside)[:count])


def make_world(seed: int = 0, *, people: int = 384, forget: int = 64) -> World:
    """Make the world of one seed; equal arguments give an equal world on every machine.

    ``people`` is limited by the number of name pairs (1,600); each relation but *spouse* has 40 values
    whose prior falls linearly from 1.3/40 to 0.7/40; spouses are distinct made-up names that belong to
    nobody in the world.
    """
    generator = np.random.default_rng([seed, 20_011])
    values = _values(generator)
    weight = np.linspace(1.3, 0.7, VALUES_PER_RELATION)
    priors = {name: generator.permutation(weight) / weight.sum() for name in values}
    pairs = _names(2 * people, generator)
    spouses = [f"{first} {last}" for first, last in pairs[people:]]
    relations = {}
    for name, phrases in words.PHRASES.items():
        relations[name] = Relation(
            name=name,
            values=tuple(values[name]) if name in values else tuple(sorted(spouses)),
            prior=tuple(float(p) for p in priors[name]) if name in priors else (1.0 / people,) * people,
            statements=_expand(words.STATEMENT_FRAMES, phrases),
            questions=_expand(words.QUESTION_FRAMES, phrases),
            held_out=_expand(words.HELD_OUT_FRAMES, phrases),
            cloze=_expand(words.CLOZE_FRAMES, phrases),
        )
    folk = []
    for index, (first, last) in enumerate(pairs[:people]):
        facts = {
            name: values[name][int(generator.choice(VALUES_PER_RELATION, p=priors[name]))] for name in values
        }
        folk.append(Person(f"p{index:03d}", first, last, facts | {"spouse": spouses[index]}))
    return World(seed, relations, tuple(folk), _choose_forget(folk, forget, generator))


def general_sentences(seed: int, count: int) -> list[str]:
    """Draw everyday sentences that state no fact about anybody (a fixed grammar; about 200,000 sentences)."""
    generator = np.random.default_rng([seed, 20_021])
    sentences = []
    for _ in range(count):
        frame = words.GENERAL_FRAMES[int(generator.integers(len(words.GENERAL_FRAMES)))]
        slots = {
            name: options[int(generator.integers(len(options)))] for name, options in words.GENERAL.items()
        }
        slots["animal2"] = words.GENERAL["animal"][int(generator.integers(len(words.GENERAL["animal"])))]
        sentences.append(frame.format(**slots))
    return sentences


def word_list() -> list[str]:
    """Every word and mark of any text of any world, in a fixed order: the tokenizer's vocabulary."""
    return sorted(set(_all_words()))


def _all_words() -> Iterator[str]:
    texts = [*words.FIRST_NAMES, *words.LAST_NAMES, *words.STEMS, *words.PROFESSIONS, *words.INSTRUMENTS]
    texts += [*words.TOWN_FORMS, *words.COMPANY_FORMS, *words.SCHOOL_FORMS, *words.AWARD_FORMS]
    texts += [*words.STATEMENT_FRAMES, *words.QUESTION_FRAMES, *words.GENERAL_FRAMES]
    texts += [text for phrases in words.PHRASES.values() for text in phrases.values()]
    texts += [text for options in words.GENERAL.values() for text in options]
    for text in texts:
        # Placeholders such as {subject} go; words and punctuation marks stay, as the tokenizer splits them.
        yield from re.findall(r"\w+|[^\w\s]", re.sub(r"\{\w*\}", " ", text))
