"""``repforget methods``: what can be asked for, from the methods' own docstrings."""

from __future__ import annotations

from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table


def command(
    stage: Annotated[str | None, typer.Argument(help="locate, edit, verify or bench; or a method.")] = None,
    name: Annotated[str | None, typer.Argument(help="One method, explained in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """List the methods of each stage, or explain one of them.

    STAGE is locate, edit, verify or bench; NAME is one of its methods, and may be given alone.
    """
    from repforget.cli import _describe as d

    rooms, method = d.asked_for(stage, name)
    if method is not None:
        chosen = d.describe(rooms[0], method)
        if as_json:
            print_json(chosen.to_json())
            return
        typer.echo(f"{chosen.room} {chosen.name}\n\n{chosen.docstring}\n")
        print_table(("setting", "type", "default"), chosen.settings)
        return
    if as_json:
        print_json({key: [entry.to_json() for entry in d.described(key)] for key in rooms})
    elif markdown:
        typer.echo("\n".join(d.markdown_table(key) for key in rooms), nl=False)
    else:
        for key in rooms:
            print_table((key, "family", "what it does"), [(e.name, e.family, e.summary) for e in d.described(key)])
