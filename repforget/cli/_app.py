"""The commands put together."""

from __future__ import annotations

from typing import Annotated

import typer

from repforget import __version__
from repforget.cli import (
    bench,
    calibrate,
    compare,
    edit,
    features,
    federated,
    fold,
    head,
    influence,
    locate,
    methods,
    moments,
    organism,
    plan,
    report,
    request,
    run,
    train,
    train_shards,
    verify,
)

app = typer.Typer(
    name="repforget", add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Find where a language model keeps a piece of knowledge, edit it away, and try to prove that wrong.\n\n"
         "Exit codes: 0 pass, 10 fail, 11 inconclusive, 1 runtime error, 2 usage error, 130 interrupted.",
)  # fmt: skip
for module in (run, plan, locate, edit, train, fold, verify, bench, compare, calibrate, report, methods):
    app.command(name=module.__name__.rpartition(".")[2])(module.command)
app.add_typer(organism.app, name="organism")
app.add_typer(features.app, name="features")
app.add_typer(head.app, name="head")
app.add_typer(moments.app, name="moments")
app.add_typer(federated.app, name="federated")
app.add_typer(request.app, name="request")
app.command(name="train-shards")(train_shards.command)
app.add_typer(train_shards.app, name="shards")
app.add_typer(influence.app, name="influence")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an unexpected error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    context.obj.debug = debug
