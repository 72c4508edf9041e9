"""``repforget plan``: what a run would do and need, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table


def command(
    recipe: o.RecipeFile = None,
    model: o.ModelFlag = None,
    knowledge: o.KnowledgeFlag = None,
    twin: o.Twins = None,
    level: o.LevelFlag = None,
    seed: o.SeedFlag = None,
    device: o.DeviceFlag = None,
    dtype: o.DtypeFlag = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe file instead.")] = False,
    as_json: o.AsJson = False,
) -> None:
    """Say what a run will do and need; no weight is loaded.

    Without RECIPE the flags describe the run, as for 'repforget run'.
    """
    from repforget.cli._recipes import chosen_recipe
    from repforget.recipe import recipe_schema

    if schema:
        print_json(recipe_schema())
        return
    flags = {"model": model, "knowledge": knowledge, "twins": twin, "verify": level, "seed": seed, "device": device,
             "dtype": dtype}  # fmt: skip
    chosen = chosen_recipe(recipe, flags)
    from repforget import loop

    planned = loop.plan(chosen)
    if as_json:
        print_json(planned.to_json())
        return
    print_table(("stage", "what", "cost"), [(step.stage, step.what, step.cost) for step in planned.steps])
    gib = 2**30
    verdict = "fits" if planned.fits else "does NOT fit"
    typer.echo(f"Peak memory about {planned.peak_bytes / gib:.2f} GiB of {planned.available_bytes / gib:.2f} GiB "
               f"available: it {verdict}.")  # fmt: skip
    for note in planned.notes:
        typer.echo(f"Note: {note}.")
