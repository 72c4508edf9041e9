"""``repforget train-shards`` and ``repforget shards``: records that can be taken out of a training again."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

if TYPE_CHECKING:
    from repforget.shards import Training
    from repforget.training import Record

app = typer.Typer(help="Trainings of which records can be taken out again.", no_args_is_help=True,
                  rich_markup_mode="rich")  # fmt: skip
Folder = Annotated[Path, typer.Argument(help="Folder that 'repforget train-shards' wrote.")]
Data = Annotated[Path | None, typer.Option("--data", help="JSON lines: id, cluster, and prompt and answer, or text.")]
Sets = Annotated[list[str] | None, typer.Option("--sets", help="Sets of the probe to train on; repeatable.")]
Modules = Annotated[list[str] | None, typer.Option("--modules", help="Linear layers to adapt, by name; repeatable.")]
Base = Annotated[str | None, typer.Option("--model", help="The base; without it the one that the folder names.")]
RATE = 0.64  # times 1 / width: 5e-3 at the organism's 128, 1.6e-4 at 4096
As = Literal["checkpoint", "peft", "edit"]


@app.callback()
def _group() -> None:
    """Trainings of which records can be taken out again."""


def command(
    context: typer.Context,
    out: Annotated[Path, typer.Option("--out", help="Folder of the training; the same command continues it.")],
    model: o.Model = "organism:bios/twin-0",
    data: Data = None,
    knowledge: o.KnowledgeFlag = None,
    sets: Sets = None,
    shards: Annotated[int, typer.Option(help="Adapters, each on records of its own (K).")] = 4,
    slices: Annotated[int, typer.Option(help="Slices of a shard, taken in one after the other (R).")] = 4,
    unit: Annotated[Literal["cluster", "record"], typer.Option(help="What is never split over shards.")] = "cluster",
    order: Annotated[Literal["sisa", "s3t"], typer.Option(help="s3t: slice i trains blocks from the top.")] = "sisa",
    permutations: Annotated[int, typer.Option(help="Cyclic orders of the slices that s3t keeps.")] = 1,
    rank: Annotated[int, typer.Option(help="Rank of each adapter.")] = 8,
    alpha: Annotated[float, typer.Option(help="Adapters are scaled by alpha / rank.")] = 16.0,
    modules: Modules = None,
    epochs: Annotated[int, typer.Option(help="Passes over all slices so far, for every slice.")] = 10,
    lr: Annotated[float | None, typer.Option(help="Learning rate of AdamW; without it 0.64 / width.")] = None,
    schedule: Annotated[Literal["linear", "cosine", "constant"], typer.Option(help="Within a slice.")] = "linear",
    batch_size: Annotated[int, typer.Option(help="Records per step.")] = 16,
    combine: Annotated[Literal["sum", "mean"], typer.Option(help="How shards are served together.")] = "sum",
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Train adapters on shards of the data, so that records can be taken out again at a fraction of the cost.

    One adapter per shard on the frozen MODEL, its slices one after the other, a checkpoint after each.
    """
    from repforget.models.load import load
    from repforget.shards import Settings, begin, block_groups, complete

    records = _records(data, knowledge, sets)
    loaded = load(model, device=device, dtype=dtype)
    rate = RATE / loaded.width if lr is None else lr
    settings = Settings(
        block_groups(loaded.module, modules or (), order, slices), shards=shards, slices=slices, unit=unit, order=order,
        permutations=permutations, rank=rank, alpha=alpha, epochs=epochs, lr=rate,
        schedule=schedule, batch_size=batch_size, combine=combine, seed=seed,
    )  # fmt: skip
    with display(as_json) as (progress, say):
        training = begin(out, loaded, settings, records, say)
        context.obj.folder = out
        with training.store.locked():
            complete(training, loaded, progress)
    _show(training, as_json, [])


@app.command()
def remove(
    context: typer.Context,
    folder: Folder,
    names: Annotated[list[str], typer.Argument(help="Ids or clusters of the records that are to go.")],
    model: Base = None,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Take records out of a training: slices that saw them are erased and trained again without them.

    Models that were exported before stay as they are: export again, or see 'repforget methods edit' for shard_removal.
    """
    from repforget.models.load import load
    from repforget.shards import opened, take_out

    context.obj.interrupted = f"Interrupted: repeat the command, which finishes the request in '{folder}'."
    with display(as_json) as (progress, say), opened(folder).store.locked():
        training = opened(folder, say)  # again, now that nobody else writes
        base = model or training.base["model"]
        _, outcome = take_out(training, names, lambda: load(base, device=device, dtype=training.base["dtype"]),
                              progress)  # fmt: skip
    if as_json:
        print_json(asdict(outcome))
        return
    print_table(("", ""), outcome.guarantee.lines())
    if not (outcome.records or outcome.erased or outcome.trained):
        typer.echo("these records had been taken out before; there was nothing left to do")
        return
    typer.echo(f"records taken out: {outcome.records}, from shards: {outcome.shards}; slices trained again: "
               f"{outcome.trained} in {outcome.steps} steps, {outcome.share:.3f} of a whole training; erased: the "
               f"records and {outcome.erased} checkpoints that saw them; hashes of their names stay, so that none is "
               "trained on again")  # fmt: skip
    for line in outcome.notes:
        typer.echo(line)


@app.command()
def show(
    folder: Folder,
    name: Annotated[str | None, typer.Argument(help="Id or cluster: what did its records touch?")] = None,
    scores: Annotated[Path | None, typer.Option("--scores", help="JSON lines: score, and id or cluster.")] = None,
    as_json: o.AsJson = False,
) -> None:
    """Show shards, slices and steps of a training, or what the records of one cluster touched."""
    from repforget.shards import opened, summed_scores, touched_by

    training = opened(folder)
    if name is None:
        _show(training, as_json, [] if scores is None else sorted(summed_scores(training, scores).items()))
        return
    found = touched_by(training, name)
    if as_json:
        print_json({"taken_out": not found, "touched": found})
        return
    if not found:
        typer.echo("these records were in the training and have been taken out; nothing that is left saw them")
        return
    print_table(("shard", "slice", "records", "adapter", "steps"), [
        (str(t["shard"]), str(t["slice"]), str(t["records"]), a["file"], "{} to {}".format(*a["steps"]))
        for t in found for a in t["adapters"]], numbers=[0, 1, 2])  # fmt: skip


@app.command()
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option("--out", help="New folder.")],
    kind: Annotated[As, typer.Option("--as", help="All weights, a PEFT adapter, or an edit.")] = "checkpoint",
    shard: Annotated[int | None, typer.Option(help="One shard alone; without it all of them.")] = None,
    model: Base = None,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Write the base with its shards as a checkpoint, or the shards alone as one adapter or edit."""
    from repforget.models.load import load
    from repforget.shards import combined, opened, shard_edit
    from repforget.store import refusing

    training = opened(folder)
    loaded = load(model or training.base["model"], device=device, dtype=training.base["dtype"])
    edit = combined(training, loaded) if shard is None else shard_edit(training, loaded, shard)
    with refusing(out):
        if kind == "checkpoint":
            edit.export_checkpoint(loaded, out)
        elif kind == "peft":
            edit.export_peft(loaded, out)
        else:
            edit.save(out)
    if as_json:
        print_json({"folder": str(out), "kind": kind, "settings": dict(edit.manifest.settings)})
        return
    typer.echo(f"{kind} of {'all shards' if shard is None else f'shard {shard}'} written to {out}")


@app.command()
def ask(
    folder: Folder,
    prompts: Annotated[list[str], typer.Argument(help="Prompts to continue.")],
    by: Annotated[Literal["confidence", "loss"], typer.Option(help="How the shard is chosen.")] = "confidence",
    model: Base = None,
    device: o.Device = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Answer each prompt by one shard alone: the one that is surest of what follows."""
    from repforget.models.load import load
    from repforget.shards import answers, opened

    training = opened(folder)
    loaded = load(model or training.base["model"], device=device, dtype=training.base["dtype"])
    found = answers(training, loaded, prompts, by=by)
    if as_json:
        print_json([{"prompt": p, "shard": k, "text": text} for p, (k, text) in zip(prompts, found, strict=True)])
        return
    print_table(("prompt", "shard", "answer"), [(p, str(k), text) for p, (k, text) in zip(prompts, found, strict=True)])


def _records(data: Path | None, knowledge: str | None, sets: list[str] | None) -> tuple[Record, ...]:
    from repforget.errors import UnknownNameError, nearest
    from repforget.knowledge_files import load_knowledge
    from repforget.training import read_records, records_of

    if (data is None) == (knowledge is None):
        raise typer.BadParameter("give either --data or --knowledge", param_hint="--data")
    if data is not None:
        return read_records(data)
    known = ("forget", "retain", "neighbours")
    for name in sets or ():
        if name not in known:
            raise UnknownNameError(f"A probe has no set '{name}' of facts: {nearest(name, known)}")
    return records_of(load_knowledge(str(knowledge)), sets or ("forget",))


def _show(training: Training, as_json: bool, scores: list[tuple[tuple[int, int], float]]) -> None:
    from collections import Counter

    from repforget.shards import expected_share, place

    s = training.settings
    cells = Counter(place(s, r) for r in training.records)
    named = {(r.cluster if s.unit == "cluster" else r.id): r for r in training.records}
    units = Counter(place(s, r) for r in named.values())
    found = [{"shard": k, "slice": i, "units": units[k, i], "records": cells[k, i],
              **({"score": dict(scores).get((k, i), 0.0)} if scores else {})}
             for k in range(s.shards) for i in range(s.slices)]  # fmt: skip
    done, stale = sum(map(training.done, training.stages)), len([p for p in training.stale() if p.name[0] != "."])
    if as_json:
        print_json({"base": training.base["model"], "shards": s.shards, "slices": s.slices, "order": s.order,
                    "unit": s.unit, "combine": s.combine, "records": len(training.records),
                    "taken_out": len(training.gone), "checkpoints": done, "planned": len(training.stages),
                    "stale": stale, "expected_share": float(expected_share(s)), "cells": found})  # fmt: skip
        return
    headings = ("shard", "slice", f"{s.unit}s", "records", *(["score"] if scores else []))
    print_table(headings, [[f"{value:.4g}" for value in cell.values()] for cell in found], numbers=range(5))
    typer.echo(f"{done} of {len(training.stages)} checkpoints on '{training.base['model']}'; {len(training.records)} "
               f"records, {len(training.gone)} taken out; one request costs {float(expected_share(s)):.3f} of a "
               "training on average")  # fmt: skip
    if stale:
        typer.echo(f"{stale} checkpoints more are of a request that was interrupted, or of 'shard_removal': repeat "
                   "'repforget shards remove' with its names.")  # fmt: skip
