"""``repforget calibrate``: measure the judge on organisms whose truth is known."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display


def command(
    context: typer.Context,
    verifier: Annotated[list[str] | None, typer.Option(help="Only this verifier; may be repeated.")] = None,
    budget: Annotated[str, typer.Option(help="quick, standard or thorough.")] = "quick",
    items: Annotated[int, typer.Option(min=16, help="Forget items asked.")] = 96,
    jobs: Annotated[int, typer.Option(min=1, help="Processes side by side.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="Folder to write to; the same command resumes there.")] = Path(
        "runs/calibration"
    ),
    as_json: o.AsJson = False,
) -> None:
    """Measure every metric and attack on organisms of known truth.

    Writes calibration.json; a measure below AUC 0.9 is descriptive and cannot carry a verdict.
    """
    from repforget.calibration.run import BENCHMARK, Plan, calibrate, chosen
    from repforget.discover import LEVELS, method
    from repforget.errors import UsageError, nearest
    from repforget.verify._calibration import NEEDED

    if budget not in LEVELS:
        raise UsageError(f"There is no budget '{budget}': {nearest(budget, LEVELS)}")
    for name in verifier or ():
        if name != BENCHMARK:
            method("verify", name)
    context.obj.folder = out
    plan = Plan(chosen(verifier), budget, items, jobs, str(out))
    with display(as_json) as (progress, _):
        rows = calibrate(plan, progress)
    if as_json:
        print_json({row.name: row.to_json() for row in rows})
        return
    print_table(
        ("measure", "access", "AUC", "95 %", "says", "missed", "relearning", "rounding", "CPU s"),
        [(r.name, r.access, f"{r.auc:.2f}", f"{r.low:.2f} to {r.high:.2f}",
          "votes" if r.declared and r.auc >= NEEDED else "descriptive", ", ".join(r.missed) or "none",
          f"{r.relearning:.2f}", f"{r.rounding:.2f}", f"{r.seconds:.1f}") for r in rows],
        numbers=(2, 6, 7, 8),
    )  # fmt: skip
    typer.echo(f"Written to '{out / 'calibration.json'}'.")
