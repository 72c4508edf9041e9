"""``repforget methods``: what can be asked for, from the methods' own docstrings."""

from __future__ import annotations

from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table


def command(
    room: Annotated[str | None, typer.Argument(help="locate, edit or verify.")] = None,
    name: Annotated[str | None, typer.Argument(help="One method, explained in full.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """List the methods of each stage, or explain one of them.

    ROOM is locate, edit or verify; NAME is one of its methods.
    """
    from repforget.cli import _describe as d

    if name is not None:
        chosen = d.describe(d.checked_room(room), name)
        if as_json:
            print_json(chosen.to_json())
            return
        typer.echo(f"{chosen.room} {chosen.name}\n\n{chosen.docstring}\n")
        print_table(("setting", "type", "default"), chosen.settings)
        return
    rooms = d.ROOMS if room is None else (d.checked_room(room),)
    if as_json:
        print_json({key: [entry.to_json() for entry in d.described(key)] for key in rooms})
    elif markdown:
        typer.echo("\n".join(d.markdown_table(key) for key in rooms), nl=False)
    else:
        for key in rooms:
            print_table((key, "family", "what it does"), [(e.name, e.family, e.summary) for e in d.described(key)])
