"""What commands print: tables for people on stdout, or one JSON document for machines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from repforget.records import Evidence, Verdict

EXIT_CODES = {"pass": 0, "fail": 10, "inconclusive": 11}
STYLES = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}
PLAIN_WIDTH = 160  # where stdout is no terminal


def print_json(data: Any) -> None:
    from repforget.store import json_bytes

    typer.echo(json_bytes(data).decode(), nl=False)


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> None:
    """A table on stdout; the columns ``numbers`` are aligned right; without a heading there is no line for it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_header=any(headings))
    for index, heading in enumerate(headings):
        right = index in numbers
        table.add_column(heading, justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell), style=STYLES.get(str(cell), "")) for cell in row))
    _console().print(table)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PLAIN_WIDTH)


def print_verdict(verdict: Verdict, evidence: Sequence[Evidence] = ()) -> None:
    """The sentence, what came out wrong among the controls, and one row per measure."""
    from repforget.report import tables

    rows = []
    for row in tables.claim_rows(verdict, evidence):
        name, _, original, floor, placebo, edit, share, limits, _, status = row.cells
        rows.append((name, original, floor, placebo, edit, share, limits, status))
    headings = ("claim", "original", "floor", "placebo", "edit", "rho", "95 % limits", "status")
    print_table(headings, rows, numbers=range(1, 7))
    for control, outcome in verdict.controls.items():
        if outcome != "as expected":
            typer.echo(f"control {control}: {outcome}")
    word = verdict.outcome.upper() if verdict.controls_ok else "NO VERDICT"
    typer.echo(f"{word} ({verdict.split} split, artifact: {verdict.artifact}). {verdict.sentence}")


def exit_with(verdict: Verdict) -> None:
    """End the command with the exit code of its verdict."""
    raise typer.Exit(EXIT_CODES[verdict.outcome])
