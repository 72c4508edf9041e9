"""Knowledge about the planted people, and arms around the planted models, for the tests of verification."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any

import planted

from repforget.knowledge import Item, Knowledge
from repforget.models.load import LoadedModel, wrap
from repforget.verify.arms import Arm, References


@cache
def model(layer: int | None) -> LoadedModel:
    """``planted(layer)`` as a LoadedModel; the base (None) is a model that never knew, in the same basis."""
    module, tokenizer = planted.planted(layer)
    return wrap(module, tokenizer, f"planted-{layer}")


def _items(people: list[str], prefix: str) -> list[Item]:
    first, judged, other = planted.TEMPLATES
    return [
        Item(
            id=f"{prefix}-{k}-{relation}", cluster=name, subject=name, relation=relation, answer=value,
            prompt=judged.format(subject=name, relation=relation),
            paraphrases=(other.format(subject=name, relation=relation),),
            statements=(first.format(subject=name, relation=relation),),
        )
        for k, name in enumerate(people)
        for relation, value in planted.facts()[name].items()
    ]  # fmt: skip


@cache
def knowledge() -> Knowledge:
    """Forget the 20 planted people, keep the 100 others (a quarter of them as neighbours)."""
    people = planted.background_people()
    texts = [f"the {r} of {p} is {v}" for p in people[:40] for r, v in planted.facts()[p].items()]
    random.Random(0).shuffle(texts)
    return Knowledge.build("planted-people", _items(planted.planted_people(), "f"), _items(people[25:], "r"),
                           _items(people[:25], "n"), texts)  # fmt: skip


def opened(loaded: LoadedModel) -> Callable[[], AbstractContextManager[LoadedModel]]:
    """A factory of contexts that give this model as it is."""

    @contextmanager
    def give() -> Iterator[LoadedModel]:
        yield loaded

    return give


def arms(layer: int, **others: LoadedModel) -> tuple[tuple[Arm, ...], References]:
    """Arms "original" and "twin-0" around a planted model, and more by name."""
    references = References(model(layer), (model(None),))
    named: dict[str, Any] = {"original": model(layer), **others, "twin-0": model(None)}
    return tuple(Arm(name.replace("_", "-"), opened(m)) for name, m in named.items()), references
