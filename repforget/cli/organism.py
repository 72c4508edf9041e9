"""``repforget organism``: the embedded model and its twins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json

app = typer.Typer(help="The embedded model organism and its twins.", no_args_is_help=True, rich_markup_mode="rich")


@app.callback()
def _group() -> None:
    """The embedded model organism and its twins."""


@app.command()
def build(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the models to.")],
    name: Annotated[str, typer.Option(help="Name of the organism.")] = "bios",
    which: Annotated[list[str] | None, typer.Option(help="full, twin-0 or twin-1; may be repeated.")] = None,
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """Train the organism and its twins from their world.

    Takes about six minutes per model on two CPU cores.
    """
    from repforget.organism.build import ROLES
    from repforget.organism.build import build as train
    from repforget.store import refusing

    with refusing(out):
        made = train(out, name=name, seed=seed, which=tuple(which or ROLES), progress=not as_json)
    if as_json:
        print_json({"folders": [str(folder) for folder in made]})
        return
    for folder in made:
        typer.echo(str(folder))


@app.command()
def tofu(
    folder: Annotated[Path, typer.Argument(help="Folder to write the files to.")],
    seed: o.Seed = 0,
    as_json: o.AsJson = False,
) -> None:
    """Write the organism's world in the schema of TOFU, for 'repforget bench tofu --data FOLDER'."""
    from repforget.organism.tofu_files import write_tofu
    from repforget.organism.world import make_world

    made = write_tofu(make_world(seed), folder)
    if as_json:
        print_json({"files": [str(path) for path in made]})
        return
    for path in made:
        typer.echo(str(path))
