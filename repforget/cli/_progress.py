"""Progress on stderr: bars with the time left on a terminal, plain lines elsewhere, nothing with ``--json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from repforget.progress import Progress

Echo = Callable[[str], None]
QUIET_SECONDS = 10.0  # between two plain lines of one task


@contextmanager
def display(quiet: bool) -> Iterator[tuple[Progress | None, Echo]]:
    """Give the progress callable of :mod:`repforget.progress` and a way to say one line beside it."""
    if quiet:
        yield None, lambda line: None
    elif sys.stderr.isatty():
        with _bars() as pair:
            yield pair
    else:
        yield plain_progress, _plain_echo


def _plain_echo(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def plain_progress(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Iterate with a line every ten seconds, so that a log stays short."""
    started = said = time.monotonic()
    for count, item in enumerate(items):
        now = time.monotonic()
        if now - said >= QUIET_SECONDS:
            said = now
            left = f", about {(now - started) / count * (total - count):.0f} s left" if total and count else ""
            _plain_echo(f"{description}: {count}{f' of {total}' if total else ''}{left}")
        yield item


@contextmanager
def _bars() -> Iterator[tuple[Progress, Echo]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:

        def progress(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
            task = bars.add_task(description, total=total)
            try:
                for item in items:
                    yield item
                    bars.advance(task)
            finally:
                bars.remove_task(task)

        yield progress, lambda line: bars.console.print(line, markup=False, highlight=False)
