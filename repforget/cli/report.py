"""``repforget report``: write the report of a finished run again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_verdict


def command(
    context: typer.Context,
    folder: Annotated[Path, typer.Argument(help="A run folder.")],
    show_texts: o.ShowTexts = False,
    as_json: o.AsJson = False,
) -> None:
    """Write the report of a run folder again; show its verdict.

    FOLDER is what 'repforget run' wrote.
    """
    from repforget import report

    finished = report.load(folder)
    context.obj.folder = folder
    page = report.write(folder, finished, show_texts=show_texts)
    if as_json:
        print_json({"verdict": finished.verdict.to_json(), "report": str(page)})
        return
    print_verdict(finished.verdict, finished.evidence)
    typer.echo(f"report: {page}")
