"""Methods described by their own signatures and docstrings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from repforget import discover
from repforget.errors import UnknownNameError, nearest

ROOMS = tuple(discover.ROOMS)


@dataclass(frozen=True)
class Description:
    """One method for people: settings are (name, type, default) as written in its signature."""

    room: str
    name: str
    family: str
    summary: str
    docstring: str
    settings: tuple[tuple[str, str, str], ...]

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "settings": [list(row) for row in self.settings]}


def asked_for(first: str | None, second: str | None) -> tuple[tuple[str, ...], str | None]:
    """(stages, method) of ``methods [STAGE] [METHOD]``, where a method alone names its stage too."""
    if first is None or first in ROOMS:
        return (ROOMS if first is None else (first,)), second
    homes = tuple(room for room in ROOMS if first in discover.names(room))
    if homes and second is None:
        return homes[:1], first
    known = (*ROOMS, *(name for room in ROOMS for name in discover.names(room)))
    raise UnknownNameError(f"There is no stage or method '{first}': {nearest(first, known)}")


def describe(room: str, name: str) -> Description:
    """One method by name; UnknownNameError with the nearest ones."""
    return _description(discover.method(room, name))


def described(room: str) -> tuple[Description, ...]:
    """All methods of a stage, ordered by family and name."""
    return tuple(sorted(map(_description, discover.methods(room)), key=lambda d: (d.family, d.name)))


def _description(method: discover.Method) -> Description:
    settings = tuple(
        (name, _annotation(parameter), "required" if parameter.default is parameter.empty else repr(parameter.default))
        for name, parameter in method.hyperparameters.items()
    )
    docstring = inspect.getdoc(method.function) or ""
    return Description(method.room, method.name, method.family, method.summary, docstring, settings)


def _annotation(parameter: inspect.Parameter) -> str:
    kind = parameter.annotation
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def markdown_table(room: str) -> str:
    """The table of a stage for the documentation: method, effect, settings with their defaults."""
    lines = [f"| {room} | what it does | settings |", "| --- | --- | --- |"]
    for entry in described(room):
        shared = discover.method(room, entry.name).shared
        own = [f"`{name}={default}`" for name, _, default in entry.settings if name not in shared]
        settings = ", ".join([*own, *(["those of training"] if shared else [])]) or "none"
        lines.append("| " + " | ".join(cell(text) for text in (f"`{entry.name}`", entry.summary, settings)) + " |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Text as one cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|")


