"""Settings inside settings: parts that a trained editor names with settings of their own, checked before any model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from repforget.edit.train._objective import Objective, checked, find, load_part
from repforget.edit.train._settings import Named, Settings, named
from repforget.errors import RepforgetError, UsageError

CONTEXT = ("metric", "losses", "probe")  # given to a part by the trainer
LABELS = {"robust": "Robust wrapper '{}'", "combine": "'combine: {}'"}


def part(folder: str, value: Named) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The function of a robust wrapper or way of combining, and its settings, names and types checked."""
    name, settings = named(value)
    function = load_part(folder, name)
    known = {p.name: p for p in inspect.signature(function).parameters.values()
             if p.kind is p.KEYWORD_ONLY and p.name not in CONTEXT}  # fmt: skip
    checked(LABELS[folder].format(name), function, known, settings)
    return function, settings


def retain_term(value: Named) -> tuple[Objective, dict[str, Any]] | None:
    """The term that keeps and its settings, names and types checked; None for none."""
    name, settings = named(value)
    if name == "none":
        return None
    keep = find(name, "retain")
    if keep.role != "retain":
        raise UsageError(f"'{name}' forgets and cannot be what keeps (retain): give a retain term, such as kl.")
    return keep, keep.bound(settings)


def way(value: Named) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """The way of combining gradients and its settings, checked; None for their sum."""
    return None if named(value)[0] == "linear" else part("combine", value)


def wrappers(value: Named | list[Named]) -> list[Named]:
    return [entry for entry in (value if isinstance(value, list) else [value]) if entry != "none"]


def faults(full: Mapping[str, Any]) -> Iterator[tuple[tuple[str | int, ...], RepforgetError]]:
    """What is wrong inside the settings ``full`` of a trained editor, whose own types are right, and where."""
    names = {field.name for field in fields(Settings)}
    checks: list[tuple[str, Callable[[], object]]] = [
        ("", lambda: Settings(**{name: value for name, value in full.items() if name in names})),
        ("retain", lambda: retain_term(full.get("retain", "none"))),
        ("combine", lambda: way(full.get("combine", "linear"))),
        *(("robust", partial(part, "robust", entry)) for entry in wrappers(full.get("robust", "none"))),
    ]
    for name, check in checks:
        try:
            check()
        except RepforgetError as error:
            yield (name,) if name else (), error
