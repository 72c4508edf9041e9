"""``repforget locate``: where is it kept?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display


def command(
    method: o.Method,
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    twin: o.Twins = None,
    settings: o.Settings = None,
    out: Annotated[Path | None, typer.Option("--out", help="File to write the localization to, as JSON.")] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Also write a page: the circuit where there is one, or heat maps.")
    ] = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Rank the parts of a model by the knowledge they carry.

    METHOD is one of 'repforget methods locate'.
    """
    from repforget import discover
    from repforget.knowledge_files import load_knowledge

    given = o.parse_settings(settings)
    discover.method("locate", method).settings(given)
    probe = load_knowledge(knowledge, seed=seed)
    from repforget.locate._dispatch import locate
    from repforget.models.load import load
    from repforget.models.sites import site_map
    from repforget.report import circuit, tables
    from repforget.store import write_atomic, write_json

    loaded, *twins = (load(name, device=device, dtype=dtype) for name in (model, *(twin or ())))
    with display(as_json) as (progress, _):
        where = locate(loaded, probe, method, twins=twins, seed=seed, progress=progress, **given)
    if out is not None:
        write_json(out, where.to_json())
    if html is not None:
        write_atomic(html, circuit.html(where, site_map(loaded).n_kv_heads).encode())
    if as_json:
        print_json(where.to_json())
        return
    print_table(("component", "score"), [row[:2] for row in tables.location_rows(where)], numbers=[1])
    for line in (tables.location_sentence(where), *where.notes):
        typer.echo(line)
