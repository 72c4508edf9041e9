"""Several locators on one model and probe: run one after the other, then printed side by side."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from repforget import discover
from repforget.cli._output import print_json, print_table
from repforget.errors import RecipeError, RepforgetError, UsageError, nearest

if TYPE_CHECKING:
    from repforget.knowledge import Knowledge
    from repforget.locate._compare import Comparison
    from repforget.records import Localization

Settings = dict[str, Any]


def settings_of(methods: Sequence[str], given: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings meant for each method, checked: ``name`` for all that have it, ``method.name`` for one.

    Raises UnknownNameError for a method and RecipeError for a setting that does not exist.
    """
    if len(set(methods)) < len(methods):
        raise UsageError("A method was named twice: every method of a comparison runs once.")
    known = {name: discover.method("locate", name) for name in methods}
    if len(methods) == 1:
        known[methods[0]].settings(given)
        return {methods[0]: dict(given)}
    chosen: dict[str, Settings] = {name: {} for name in methods}
    for key, value in given.items():
        method, dot, name = key.rpartition(".")
        takers = [method] if dot else [m for m, found in known.items() if key in found.hyperparameters]
        if not takers or any(m not in known for m in takers):
            every = {name for found in known.values() for name in found.hyperparameters}
            raise RecipeError(f"None of the methods compared has the setting '{key}': {nearest(name, every)}")
        for taker in takers:
            chosen[taker][name] = value
    for name, own in chosen.items():
        known[name].settings(own)
    return chosen


def budgeted(method: str, settings: Settings, budget: int | None, probe: Knowledge, seed: int = 0) -> Settings:
    """``settings`` with at most ``budget`` forget facts; refused for a locator that has no ``items``.

    Locators whose items count for every relation get an equal share for each that they can probe, and refuse a share
    that would lose one.
    """
    if budget is None:
        return settings
    found = discover.method("locate", method)
    if "items" not in found.hyperparameters:
        raise UsageError(f"Locator '{method}' has no setting 'items' that a budget could lower: leave --budget out.")
    full = {**{name: p.default for name, p in found.hyperparameters.items()}, **settings}
    per_relation = found.constant("ITEMS_PER_RELATION", {"items": None})  # the settings under which they are
    if all(full[name] == value for name, value in per_relation.items()):
        from repforget.locate._labelled import least_items

        count, least = least_items(probe.for_editor(), full["statements"], full["items"], seed)
        if budget // count < least:
            raise UsageError(f"A budget of {budget} facts leaves '{method}' {budget // count} for each of the {count} "
                             f"relations it can probe, which need {least} each: give --budget {count * least} or "
                             "more, or leave the method out.")  # fmt: skip
        budget //= count
    return {**settings, "items": min(budget, settings.get("items", budget))}


def collect(
    methods: Sequence[str], run: Callable[[str], Localization], echo: Callable[[str], None], truth: Sequence[Any]
) -> Iterator[Comparison]:
    """Run one method after the other and give what is there, first nothing; a failure is kept beside the others."""
    from repforget.locate._compare import Comparison

    done = Comparison({}, truth=tuple(truth), missing=tuple(methods))
    yield done
    for k, name in enumerate(methods):
        echo(f"{k + 1} of {len(methods)}: {name}")
        start = time.process_time()
        left = tuple(methods[k + 1 :])
        try:
            where = run(name)
        except RepforgetError as error:
            done = replace(done, failed={**done.failed, name: str(error)}, missing=left)
        else:
            seconds = {**done.seconds, name: time.process_time() - start}
            done = replace(done, localizations={**done.localizations, name: where}, seconds=seconds, missing=left)
        yield done


def save(result: Comparison, out: Path | None, html: Path | None) -> None:
    """Write what is there so far."""
    from repforget.report import locators
    from repforget.store import write_atomic, write_json

    if out is not None:
        write_json(out, result.to_json())
    if html is not None:
        write_atomic(html, locators.html(result).encode())


def show(result: Comparison, as_json: bool) -> None:
    """Print one row per method, then one per pair, then what failed."""
    from repforget.report import locators

    if as_json:
        print_json(result.to_json())
        return
    listed = ((locators.method_table, 2), (locators.truth_table, 1), (locators.agreement_table, 3))
    for table, words in listed:
        headings, rows = table(result)
        if rows:
            print_table(headings, rows, numbers=range(words, len(headings)))
    for name, where in result.localizations.items():
        for note in where.notes:
            typer.echo(f"{name}: {note}")
    for name, reason in result.failed.items():
        typer.echo(f"{name} failed: {reason}", err=True)
