"""``repforget moments``: key moments in parts, computed by several processes or machines and merged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

app = typer.Typer(help="Moments of MLP keys that weight edits protect, computed in parts.", no_args_is_help=True,
                  rich_markup_mode="rich")  # fmt: skip


@app.callback()
def _group() -> None:
    """Moments of MLP keys that weight edits protect, computed in parts."""


@app.command()
def compute(
    part: Annotated[str, typer.Argument(metavar="K/N", help="Which of how many parts of the texts, as 2/4.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the part.")],
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    layer: Annotated[list[int] | None, typer.Option("--layer", help="Layer; repeatable. Default: all.")] = None,
    strangers: Annotated[int, typer.Option(help="Statements about made-up people, as the edit will ask.")] = 2000,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Compute one part of the moments that rome, memit and alphaedit protect texts with.

    Every process names the same model, probe, strangers and seed, and a part of its own.
    """
    from repforget.edit.surgery._moments import protected_texts
    from repforget.edit.surgery._parts import write_part
    from repforget.knowledge_files import load_knowledge
    from repforget.models.load import load
    from repforget.models.sites import site_map
    from repforget.records import Site

    number, _, count = part.partition("/")
    if not (number.isdigit() and count.isdigit()):
        raise typer.BadParameter(f"'{part}' is no part: write it as 2/4", param_hint="K/N")
    data = load_knowledge(knowledge, seed=seed).for_editor()
    loaded = load(model, device=device, dtype=dtype)
    layers = sorted(set(layer)) if layer else range(loaded.n_layers)
    for index in layers:
        site_map(loaded).locate(Site("mlp_post", index))
    rows = protected_texts(loaded, data, strangers, seed)
    with display(as_json) as (progress, _echo):
        texts = write_part(loaded, rows, layers, int(number), int(count), out, progress)
    if as_json:
        print_json({"folder": str(out), "texts": texts, "total": len(rows), "layers": list(layers)})
        return
    typer.echo(f"{out}: moments of {texts} of {len(rows)} texts in {len(layers)} layers")


@app.command()
def merge(
    parts: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Parts, or parts merged before.")],
    out: Annotated[Path, typer.Option("--out", help="New folder for the sum.")],
    as_json: o.AsJson = False,
) -> None:
    """Add up parts; once all texts are in, editors on this machine find the sum and compute nothing.

    Parts of other models, sites or texts are refused, and so is a text that would count twice.
    """
    from repforget.edit.surgery._parts import merge_parts

    found = merge_parts(parts, out)
    if as_json:
        print_json({"folder": str(out), "sites": [vars(m) for m in found]})
        return
    rows = [(m.site, str(m.tokens), f"{m.texts} of {m.total}", "yes" if m.kept else "no") for m in found]
    print_table(("site", "tokens", "texts", "kept for editors"), rows, numbers=[1])
    typer.echo(str(out))
