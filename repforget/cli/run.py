"""``repforget run``: locate, edit, verify, escalate; the same command resumes."""

from __future__ import annotations

import typer

from repforget.cli import _options as o
from repforget.cli._output import EXIT_CODES, exit_with, print_json, print_verdict
from repforget.cli._progress import display


def command(
    context: typer.Context,
    recipe: o.RecipeFile = None,
    model: o.ModelFlag = None,
    knowledge: o.KnowledgeFlag = None,
    twin: o.Twins = None,
    level: o.LevelFlag = None,
    out: o.OutFolder = None,
    seed: o.SeedFlag = None,
    device: o.DeviceFlag = None,
    dtype: o.DtypeFlag = None,
    show_texts: o.ShowTexts = False,
    as_json: o.AsJson = False,
) -> None:
    """Locate, edit, verify, and escalate as a recipe says.

    Without RECIPE the flags describe the run; without flags it is the embedded demonstration.
    The same command continues a run that was interrupted.
    """
    from repforget.cli._recipes import chosen_recipe, default_folder

    flags = {"model": model, "knowledge": knowledge, "twins": twin, "verify": level, "seed": seed, "device": device,
             "dtype": dtype}  # fmt: skip
    chosen = chosen_recipe(recipe, flags)
    folder = out or default_folder(recipe, chosen)
    context.obj.folder = folder
    from repforget import loop
    from repforget._workers import together

    with together() as first:
        if not first:
            return
        with display(as_json) as (progress, echo):
            result = loop.run(chosen, folder, progress=progress, echo=echo, show_texts=show_texts)
    if as_json:
        code = EXIT_CODES[result.verdict.outcome]
        print_json({"verdict": result.verdict.to_json(), "folder": str(result.folder), "exit_code": code})
    else:
        print_verdict(result.verdict)
        typer.echo(f"report: {result.folder / 'report.html'}")
    exit_with(result.verdict)
