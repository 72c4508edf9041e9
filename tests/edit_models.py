"""A tiny world of people for tests of editors: two relations, two statement forms, answers drawn by seed."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import tiny_models

from repforget.knowledge import Item, Knowledge

FIRST = ["Ada", "Tom", "Eva", "Max", "Lea", "Ben", "Mia", "Jon"]
LAST = ["red", "green", "blue", "cat", "dog", "bird"]
ANSWERS = {"city": ["Berlin", "Paris", "Rome", "Oslo"], "job": ["baker", "pilot", "doctor"]}
STATEMENTS = {
    "city": ("{} was born in", "the city of {} is"),
    "job": ("{} works as a", "the job of {} is"),
}


@cache
def people() -> Knowledge:
    """24 people to forget and 24 to keep, with a city and a job each."""
    draw = random.Random(0)
    names = [f"{first} {last}" for first in FIRST for last in LAST]
    items = [
        Item(
            f"{name}-{relation}", name, f"Q : {relation} of {name} A :", draw.choice(ANSWERS[relation]), name,
            relation, tuple(form.format(name) for form in STATEMENTS[relation]),
        )
        for name in names for relation in ANSWERS
    ]  # fmt: skip
    half = len(items) // 2
    general = ["Q : who was born in Rome A : Eva", "the cat is a dog", "a baker and a pilot of Paris"] * 4
    return Knowledge.build("people", items[:half], items[half:], general=general)


def model(architecture: str = "llama") -> Any:
    """A LoadedModel of a tiny random architecture with the tiny tokenizer."""
    from repforget.models.load import wrap

    return wrap(tiny_models.build(architecture), tiny_models.tiny_tokenizer(), f"tiny-{architecture}")


def double() -> Any:
    """The same of llama in float64, where sums in another order agree."""
    from repforget.models.load import wrap

    loaded = model()
    return wrap(loaded.module.double(), loaded.tokenizer, "tiny-double")
