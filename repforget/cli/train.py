"""``repforget train``: fine-tuning whose records can be asked for again, plainly or with differential privacy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

SETS = "Sets of the probe that are trained on; repeatable (default: forget)."
PRIVATE = "Train by DP-SGD, within --epsilon at --delta for one unit."
UNIT = "What is protected as one: cluster (all records about a subject) or record."


def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of the training: the edit and train.json.")],
    model: o.Model = "organism:bios/twin-0",
    data: Annotated[Path | None, typer.Option("--data", help="JSON lines: id, cluster, prompt, answer.")] = None,
    knowledge: o.KnowledgeFlag = None,
    sets: Annotated[list[str] | None, typer.Option("--sets", help=SETS)] = None,
    forms: Annotated[str, typer.Option(help="Of a probe: statements, questions or all.")] = "all",
    rank: Annotated[int, typer.Option(help="Rank of the low-rank additions that are trained.")] = 8,
    full: Annotated[bool, typer.Option("--full", help="Train all weights.")] = False,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 10.0,
    lr: Annotated[float, typer.Option(help="Peak of the learning rate.")] = 1e-3,
    batch: Annotated[int, typer.Option("--batch-size", "--batch", help="Records per step; with --private units, on "
                                       "average.")] = 32,
    private: Annotated[bool, typer.Option("--private", help=PRIVATE)] = False,
    epsilon: Annotated[float | None, typer.Option(help="Budget of one unit.")] = None,
    delta: Annotated[float | None, typer.Option(help="At most one over the number of units.")] = None,
    clip: Annotated[float | None, typer.Option(help="Norm to which a unit's gradient is cut (1 by default).")] = None,
    unit: Annotated[str | None, typer.Option(help=UNIT)] = None,
    accountant: Annotated[str | None, typer.Option(help="rdp or prv.")] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Also write the trained model as a checkpoint.")] = None,
    seed: Annotated[int | None, typer.Option(help="Without it 0; with --private better none: a secret.")] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Fine-tune a model on records that a later request can name, and save what that adds as an edit.

    The same command continues an interrupted training. What a private training says, and about how many units, is
    printed and kept in train.json.
    """
    given = {"epsilon": epsilon, "delta": delta, "clip": clip, "unit": unit, "accountant": accountant}
    budget = _budget(private, {name: value for name, value in given.items() if value is not None})
    from repforget.models.load import load
    from repforget.private.job import facts, records_for, run, unfinished
    from repforget.private.trainer import Privacy

    records, name = records_for(data, knowledge, sets, forms)  # type: ignore[arg-type]
    loaded = load(model, device=device, dtype=dtype)
    context.obj.interrupted = (f"Interrupted: the state of training is kept in '{unfinished(out)}'; the same command "
                               "continues from there.")  # fmt: skip
    wanted = None if budget is None else Privacy(**budget)
    with display(as_json) as (progress, echo):
        made = run(loaded, records, out, rank=None if full else rank, epochs=epochs, lr=lr, batch=batch, seed=seed,
                   private=wanted, name=name, progress=progress, echo=echo)  # fmt: skip
    if checkpoint is not None:
        made.export_checkpoint(loaded, checkpoint)
    found = facts(made)
    if as_json:
        print_json({"folder": str(out), **found})
        return
    settings = found["settings"]
    typer.echo(f"{settings['records']} records of {settings['clusters']} clusters, {settings['steps']} steps, "
               f"{len(found['weights'])} weights changed; saved to {out}")  # fmt: skip
    if "guarantee" in found:
        print_table(("", ""), made.manifest.guarantee.lines())  # type: ignore[union-attr]
        typer.echo(found["guarantee"]["sentence"])


def _budget(private: bool, given: dict[str, Any]) -> dict[str, Any] | None:
    if not private and given:
        raise typer.BadParameter("is for private trainings: add --private", param_hint=f"--{next(iter(given))}")
    if private and (missing := [name for name in ("epsilon", "delta") if name not in given]):
        raise typer.BadParameter("a private training needs a budget", param_hint=f"--{missing[0]}")
    for name, valid in (("unit", ("cluster", "record")), ("accountant", ("rdp", "prv"))):
        if given.get(name, valid[0]) not in valid and not (name == "accountant" and given[name] == "gdp"):
            raise typer.BadParameter(f"'{given[name]}' is not {' or '.join(valid)}", param_hint=f"--{name}")
    return given if private else None
