"""``repforget features``: sparse autoencoders trained, and checked against the site they are said to belong to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

app = typer.Typer(help="Sparse autoencoders of a model.", no_args_is_help=True, rich_markup_mode="rich")
SiteName = Annotated[str | None, typer.Option("--site", help="Where it belongs, for example mlp_out.2.")]


@app.callback()
def _group() -> None:
    """Sparse autoencoders of a model."""


@app.command()
def train(
    out: Annotated[Path, typer.Option("--out", help="New folder for the autoencoder.")],
    site: Annotated[str, typer.Option("--site", help="Site whose activations are described, for example mlp_out.2.")],
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    size: Annotated[int, typer.Option("--size", help="Number of features; 0 is four times the width.")] = 0,
    active: Annotated[int, typer.Option("--active", help="Features active per token, on average.")] = 8,
    steps: Annotated[int, typer.Option("--steps", help="Training steps; 0 is 20 passes, 100 to 500 steps.")] = 0,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Train a small autoencoder on the texts of a probe that an editor may see, into a new folder.

    Its features describe these texts; what it leaves unexplained of them is printed.
    """
    from repforget.errors import UsageError
    from repforget.features import save, told, train_features
    from repforget.knowledge_files import load_knowledge
    from repforget.models.load import load
    from repforget.records import Site

    place = Site.parse(site)
    if out.exists():
        raise UsageError(f"'{out}' exists already, and an autoencoder is never overwritten: name a new folder.")
    data = load_knowledge(knowledge, seed=seed).for_editor()
    loaded = load(model, device=device, dtype=dtype)
    texts = told(loaded, [*data.forget, *data.retain], data.general)
    with display(as_json) as (progress, _):
        made = train_features(loaded, [place], texts, size=size, active=active, steps=steps or "auto", seed=seed,
                              progress=progress)[place]  # fmt: skip
    folder = save(made.sae, out)
    if as_json:
        print_json({"folder": str(folder), "site": site, "features": made.sae.size, "unexplained": made.unexplained,
                    "dead": made.dead, "texts": made.texts})  # fmt: skip
        return
    typer.echo(made.note)
    typer.echo(str(folder))


@app.command()
def check(
    path: Annotated[Path, typer.Argument(help="Folder or file of an autoencoder.")],
    model: o.Model = "organism:bios",
    knowledge: o.KnowledgeName = "bios-people",
    site: SiteName = None,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Compare the variance an autoencoder leaves unexplained at its site and at the two beside it.

    Where another site fits better the command fails and names it; also where none fits.
    """
    from repforget.features import check_site, read, told
    from repforget.knowledge_files import load_knowledge
    from repforget.models.load import load
    from repforget.records import Site

    sae = read(path, None if site is None else Site.parse(site))
    data = load_knowledge(knowledge, seed=seed).for_editor()
    loaded = load(model, device=device, dtype=dtype)
    with display(as_json) as (progress, _):
        found = check_site(loaded, sae, told(loaded, [*data.forget, *data.retain], data.general), progress)
    if as_json:
        print_json({"site": str(sae.site), "features": sae.size,
                    "unexplained": {str(where): value for where, value in found.items()}})  # fmt: skip
        return
    print_table(("site", "variance unexplained"), [(str(s), f"{v:.3f}") for s, v in found.items()], numbers=[1])
    typer.echo(f"{sae.size} features fit {sae.site}.")
