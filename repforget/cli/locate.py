"""``repforget locate``: where is it kept?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from repforget.cli import _options as o
from repforget.cli import _side_by_side as beside
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

if TYPE_CHECKING:
    from repforget.locate._compare import Comparison
    from repforget.records import Localization


def _some(value: int | None) -> int | None:
    if value is not None and value < 1:
        raise typer.BadParameter(f"{value} facts are none; give 1 or more")
    return value


def command(
    context: typer.Context,
    methods: Annotated[list[str], typer.Argument(metavar="METHOD...", help="A locator; several with --compare.")],
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    twin: o.Twins = None,
    settings: o.Settings = None,
    compare: Annotated[bool, typer.Option("--compare", help="Run several methods and show them side by side.")] = False,
    truth: Annotated[
        list[str] | None,
        typer.Option("--truth", help="With --compare: a component known to hold it, such as mlp_out.2; repeatable."),
    ] = None,
    budget: Annotated[
        int | None, typer.Option("--budget", callback=_some, help="Use at most so many forget facts, by seed.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the result to, as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page: the circuit where there is one, or heat maps.")
    ] = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Rank the parts of a model by the knowledge they carry.

    METHOD is one of 'repforget methods locate'. With --compare several run on the same facts, and are printed with the
    agreement of their rankings, their cost and whether they beat random selections; --set name=value then goes to every
    method that has the setting, --set method.name=value to one.
    """
    from repforget.knowledge_files import load_knowledge
    from repforget.records import Component

    if not compare and (len(methods) > 1 or truth):
        raise typer.BadParameter("several methods, or a truth, are for --compare", param_hint="METHOD")
    chosen = beside.settings_of(methods, o.parse_settings(settings))
    true = [Component.parse(text) for text in truth or ()]
    probe = load_knowledge(knowledge, seed=seed)
    chosen = {name: beside.budgeted(name, own, budget, probe, seed) for name, own in chosen.items()}
    from repforget.locate._dispatch import locate
    from repforget.models.load import load
    from repforget.models.sites import site_map

    loaded, *twins = (load(name, device=device, dtype=dtype) for name in (model, *(twin or ())))
    for component in true:
        site_map(loaded).locate(component.site)
    with display(as_json) as (progress, echo):

        def run(name: str) -> Localization:
            return locate(loaded, probe, name, twins=twins, seed=seed, progress=progress, **chosen[name])

        if compare:
            _compare(context, beside.collect(methods, run, echo, true), out, html, as_json)
            return
        where = run(methods[0])
    _one(where, site_map(loaded).n_kv_heads, out, html, as_json)


def _compare(
    context: typer.Context, results: Iterator[Comparison], out: Path | None, html: Path | None, as_json: bool
) -> None:
    """Write after every method; print at the end, or what is done when interrupted."""
    result = next(results)
    try:
        for result in results:
            beside.save(result, out, html)
    except KeyboardInterrupt:
        done = ", ".join(result.localizations)
        kept = f" and is in '{out}'" if out is not None and done else ""
        context.obj.interrupted = f"Interrupted: {done or 'no method'} finished{kept}."
        if done:
            beside.show(result, as_json)
        raise
    beside.show(result, as_json)
    if result.failed:
        raise typer.Exit(1)


def _one(where: Localization, key_value_heads: int, out: Path | None, html: Path | None, as_json: bool) -> None:
    from repforget.report import circuit, tables
    from repforget.store import write_atomic, write_json

    if out is not None:
        write_json(out, where.to_json())
    if html is not None:
        write_atomic(html, circuit.html(where, key_value_heads).encode())
    if as_json:
        print_json(where.to_json())
        return
    print_table(("component", "score"), [row[:2] for row in tables.location_rows(where)], numbers=[1])
    for line in (tables.location_sentence(where), *where.notes):
        typer.echo(line)
