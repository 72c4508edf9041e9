"""``repforget fold``: an edit written into a checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display


def command(
    edit: Annotated[Path, typer.Argument(help="Folder of a saved edit.")],
    model: Annotated[str, typer.Argument(help="Folder of the checkpoint it was made for, or an organism.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the folded checkpoint.")],
    as_json: o.AsJson = False,
) -> None:
    """Write an edit into a copy of a checkpoint, one weight at a time; the model is never loaded.

    MODEL stays as it is, and the new folder appears whole or not at all.
    """
    from repforget.artifact import load_edit
    from repforget.artifact.shards import fold_checkpoint
    from repforget.errors import UsageError
    from repforget.models._files import locate

    source = locate(model)[1]
    if source is None:
        raise UsageError(f"'{model}' is not a folder on this machine: download the checkpoint and give its folder.")
    with display(as_json) as (progress, _):
        found = fold_checkpoint(load_edit(edit), source, out, progress=progress)
    if as_json:
        print_json({"folder": str(out), "cosines": found.cosines})
        return
    forms = ("own", "bfloat16", "float16", "int8", "nf4")
    rows = [(name, *(f"{kept[k]:.4f}" if k in kept else "" for k in forms)) for name, kept in found.cosines.items()]
    print_table(("changed", "left of it as stored", *(f"in {k}" for k in forms[1:])), rows, numbers=range(1, 6))
    typer.echo(f"folded into {out}; '{source}' is as it was (left of it: cosine of the change after rounding with the "
               "exact one; int8 and nf4 as the verifier 'quantize' rounds)")  # fmt: skip
