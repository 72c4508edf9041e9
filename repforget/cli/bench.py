"""``repforget bench``: a published benchmark on one model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

if TYPE_CHECKING:
    from repforget.bench._records import Metric
    from repforget.bench._run import BenchPlan, Row


def command(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="Name of the benchmark; 'repforget methods bench' lists them.")],
    model: o.Model = "organism:bios",
    edit: Annotated[Path | None, typer.Option(help="A saved edit to put in place first.")] = None,
    reference: Annotated[str | None, typer.Option(help="A model that never knew, or the folder of its row.")] = None,
    data: Annotated[str | None, typer.Option(help="Folder of the benchmark's files, or a hub id.")] = None,
    settings: o.Settings = None,
    out: o.OutFolder = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it will cost; no weight is loaded.")] = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Measure a model on a published benchmark.

    NAME is a benchmark; 'repforget methods bench' lists them.
    Writes row.json and items.json; the same command continues a run that was interrupted.
    """
    from repforget.bench import _run as b
    from repforget.store import digest

    given = o.parse_settings(settings)
    if plan:
        planned = b.plan(name, model, data=data, reference=reference, settings=given, device=device, dtype=dtype)
        _show_plan(planned, as_json)
        return
    told = {"model": model, "edit": str(edit or ""), "reference": reference, "data": data, "settings": given,
            "seed": seed, "dtype": dtype}  # fmt: skip
    folder = out or Path("runs") / f"bench-{name}-{Path(model).name.replace(':', '-')}-{digest(told)[:8]}"
    context.obj.folder = folder
    other = None
    if reference is not None:
        other = reference if b.is_row(reference) else lambda: b.load_subject(reference, device=device, dtype=dtype)
    with display(as_json) as (progress, echo):
        row = b.run(name, lambda: b.load_subject(model, edit=edit, device=device, dtype=dtype), data=data,
                    reference=other, settings=given, seed=seed, out=folder, progress=progress, echo=echo)  # fmt: skip
    if as_json:
        print_json({**row.to_json(), "folder": str(folder)})
    else:
        _show(row, folder)


def _show(row: Row, folder: Path) -> None:
    lines = [(m.name, number(m.value), limits(m), str(m.n_items or ""), m.note) for m in row.result.metrics.values()]
    print_table(("metric", "value", "95 % limits", "items", "note"), lines, numbers=range(1, 4))
    for note in row.result.notes:
        typer.echo(f"Note: {note}.")
    typer.echo(f"row: {folder / 'row.json'}")


def number(value: float) -> str:
    """Four significant digits; nothing where there is no number."""
    return "" if math.isnan(value) else f"{value:.4g}"


def limits(metric: Metric) -> str:
    return "" if math.isnan(metric.low) else f"{number(metric.low)} to {number(metric.high)}"


def _show_plan(planned: BenchPlan, as_json: bool) -> None:
    if as_json:
        print_json(planned.to_json())
        return
    work, gib = planned.work, 2**30
    print_table(("what", "count"), [
        ("sequences to score", f"{work.sequences:,}"), ("tokens in them, about", f"{work.tokens:,}"),
        ("generations", f"{work.generations:,}"), ("new tokens at most", f"{work.new_tokens:,}"),
        *((f"parameters of {size.name}", f"{size.parameters:,} ({size.dtype})") for size in planned.models),
    ], numbers=[1])  # fmt: skip
    verdict = "fits" if planned.peak_bytes <= planned.available_bytes else "does NOT fit"
    typer.echo(f"Weights {planned.peak_bytes / gib:.2f} GiB of {planned.available_bytes / gib:.2f} GiB available: it "
               f"{verdict}; activations come on top.")  # fmt: skip
    for note in work.notes:
        typer.echo(f"Note: {note}.")
