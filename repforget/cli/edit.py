"""``repforget edit``: make one edit and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

RESUME = "Folder in which training keeps its state: the same command continues from there after an interruption."


def command(
    context: typer.Context,
    method: o.Method,
    out: Annotated[Path, typer.Option("--out", help="Folder to save the edit to.")],
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    where: Annotated[Path | None, typer.Option("--where", help="A localization saved by 'repforget locate'.")] = None,
    settings: o.Settings = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Also write the edited model as a plain checkpoint.")] = None,
    resume: Annotated[Path | None, typer.Option(help=RESUME)] = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Make one edit and save it; the model stays as it is.

    METHOD is one of 'repforget methods edit'.
    """
    from repforget import discover
    from repforget.knowledge_files import load_knowledge

    given = o.parse_settings(settings)
    discover.method("edit", method).settings(given)
    context.obj.training = resume
    probe = load_knowledge(knowledge, seed=seed)
    from repforget._workers import ask, together
    from repforget.edit._dispatch import edit
    from repforget.edit.train._checkpoint import discard
    from repforget.models.load import load
    from repforget.report import tables
    from repforget.store import read_json, refusing

    with together() as first:
        if not first:
            return
        located = o.located(where)
        loaded, data = load(model, device=device, dtype=dtype), probe.for_editor()
        ask(loaded, data, method, given, where=located, seed=seed, checkpoint=resume)
        with display(as_json) as (progress, _):
            made = edit(loaded, data, method, where=located, seed=seed, progress=progress, checkpoint=resume, **given)
    with refusing(out):
        made.save(out)
        if checkpoint is not None:
            made.export_checkpoint(loaded, checkpoint)
        if resume is not None:
            discard(resume)
    manifest = tables.manifest_of(read_json(out / "edit.json"))
    if as_json:
        print_json({"folder": str(out), "manifest": manifest})
        return
    print_table(("kind", "touched"), [row[:2] for row in tables.touched_rows(manifest)])
    if held := tables.guarantee_rows(manifest):
        print_table(("", ""), held)
    typer.echo(f"artifact: {made.artifact}; saved to {out}")
