"""What a theorem says about an edit or a trained model, and the words that only a theorem allows.

"Removed", "deleted", "guaranteed" and "certified" are kept for methods whose result follows from a theorem; whatever
writes a report asks :func:`unearned` first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from typing import Any, Literal, get_args

from repforget.errors import UsageError

Kind = Literal["exact", "certified", "private"]
KINDS: tuple[str, ...] = get_args(Kind)
# exact: as if it had never been trained on; certified: indistinguishable from that; private: bounded beforehand.
WORDS: Mapping[str, frozenset[str]] = {
    "exact": frozenset({"removed", "deleted", "guaranteed"}),
    "certified": frozenset({"certified", "removed", "guaranteed"}),
    "private": frozenset({"guaranteed"}),
}
SUPPORTS = frozenset({"noise", "output noise", "deviation", "penalty", "budget", "distance covered"})
RESERVED = tuple(sorted(frozenset().union(*WORDS.values())))


@dataclass(frozen=True)
class Guarantee:
    """A theorem applied: what holds, for which unit, under which assumptions.

    ``kind``: "exact" (equal to training without the items), "certified" (within an (epsilon, delta) bound of that) or
    "private" (differential privacy of the training).  ``statement`` is one sentence with its numbers; ``unit`` is
    what is counted (a record, a cluster, a client); ``theorem`` names author, year, arXiv id and number;
    ``assumptions`` are what must be true for it to hold; ``numbers`` are epsilon, delta, residual bounds and the like.
    It says nothing about knowledge that other training data carry.
    """

    kind: Kind
    statement: str
    unit: str
    theorem: str
    assumptions: tuple[str, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UsageError(f"A guarantee of the kind '{self.kind}' is not known: use one of {', '.join(KINDS)}.")
        if not (self.statement and self.unit and self.theorem and self.assumptions):
            raise UsageError("A guarantee without statement, unit, theorem or assumptions says nothing: give all four.")

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Guarantee:
        return cls(**{**body, "assumptions": tuple(body["assumptions"])})

    def lines(self) -> tuple[tuple[str, str], ...]:
        """(what, text) rows for a report."""
        numbers = ", ".join(f"{name} {_printed(name, value)}" for name, value in sorted(self.numbers.items()))
        rows = [("holds", self.statement), ("per", self.unit), ("by", self.theorem)]
        rows += [("if", text) for text in self.assumptions]
        return (*rows, ("numbers", numbers)) if numbers else tuple(rows)


def at_most(value: float, digits: int = 3) -> str:
    """``value`` to at most six digits, rounded up: a bound is never printed below what holds."""
    return _rounded(value, digits, ROUND_CEILING)


def at_least(value: float, digits: int = 3) -> str:
    """``value`` to at most six digits, rounded down: for what a promise rests on, such as noise or a penalty."""
    return _rounded(value, digits, ROUND_FLOOR)


def _printed(name: str, value: float) -> str:
    """Counts as they are; what :data:`SUPPORTS` a promise rounded down; all else is a bound and rounded up."""
    if float(value).is_integer() and abs(value) < 2**53:
        return str(int(value))
    return (at_least if name in SUPPORTS else at_most)(value, 4)


def _rounded(value: float, digits: int, direction: str) -> str:
    # from the shortest decimal that is this float: 0.1 stays 0.1, though the float lies above it
    return f"{float(Context(prec=digits, rounding=direction).create_decimal(repr(float(value)))):.{digits}g}"


def unearned(text: str, guarantees: Iterable[Guarantee | None] = ()) -> tuple[str, ...]:
    """The reserved words in ``text`` that none of ``guarantees`` allows, each once, in order of the alphabet."""
    allowed: frozenset[str] = frozenset().union(*(WORDS[g.kind] for g in guarantees if g is not None))
    return tuple(word for word in RESERVED if word not in allowed and re.search(rf"\b{word}\b", text, re.IGNORECASE))
