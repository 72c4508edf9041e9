"""``repforget compare``: finished runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table

if TYPE_CHECKING:
    from repforget.report.compare import Comparison


def command(
    runs: Annotated[list[str], typer.Argument(help="Folders of finished runs, or their row.json.")],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown instead of tables.")] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Also write one self-contained page.")] = None,
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """Set finished runs side by side, with paired differences from the first.

    RUNS are folders that 'repforget bench' or 'repforget run' wrote.
    """
    from repforget.report import compare as c
    from repforget.store import write_atomic

    found = c.compare(runs, seed=seed)
    if html is not None:
        write_atomic(html, c.html(found).encode())
    if as_json:
        print_json([one.to_json() for one in found])
    elif markdown:
        typer.echo(c.markdown(found), nl=False)
    else:
        for one in found:
            _show(one)


def _show(one: Comparison) -> None:
    from repforget.report import compare as c

    typer.echo(f"{one.benchmark}:")
    print_table(*c.value_table(one), numbers=range(1, len(one.runs) + 1))
    if len(one.runs) > 1:
        typer.echo(f"Difference from {one.runs[0].label}, paired by item:")
        print_table(*c.difference_table(one))
    for note in one.notes:
        typer.echo(f"Note: {note}.")
