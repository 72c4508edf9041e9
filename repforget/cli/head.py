"""``repforget head``: linear heads from which rows can be taken out, exactly or within a promise."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

if TYPE_CHECKING:
    from repforget.guarantee import Guarantee
    from repforget.linear import Head

app = typer.Typer(help="Linear heads from which rows can be taken out.", no_args_is_help=True, rich_markup_mode="rich")
Folder = Annotated[Path, typer.Argument(help="Folder of the head.")]
Features = Annotated[Path | None, typer.Option("--features", help="An .npz or .safetensors file with X, y and, as far "
                                               "as rows have them, ids and clusters.")]  # fmt: skip
OUTPUT = ("Standard deviation of fresh noise on every publication of the weights, for a promise with --epsilon and "
          "--delta (recommended: it assumes least).")  # fmt: skip
NOISE = "Standard deviation of secret noise in the objective, another promise with --epsilon and --delta."
DELTA = "Part of that promise: at most one over the number of rows."
RADIUS = "Divide rows by this and cut longer ones to norm 1; choose it without looking at the rows."
SAVED = "With --model: the file the features are kept in (default: beside the folder, OUT.rows.npz)."
SITE = "With --model: where to read, as resid_post.3."


@app.callback()
def _group() -> None:
    """Linear heads from which rows can be taken out."""


@app.command()
def fit(
    out: Annotated[Path, typer.Option("--out", help="Folder to write the head to.")],
    features: Features = None,
    model: o.ModelFlag = None,
    knowledge: o.KnowledgeName = "bios-people",
    site: Annotated[str | None, typer.Option("--site", help=SITE)] = None,
    label: Annotated[str, typer.Option(help="With --model: what is predicted, relation or answer.")] = "relation",
    relation: Annotated[str | None, typer.Option(help="With --model: only the items of this relation.")] = None,
    sets: Annotated[list[str] | None, typer.Option(help="With --model: sets of the probe; repeatable.")] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help=SAVED)] = None,
    loss: Annotated[str, typer.Option(help="ridge, logistic (several classes: one against the rest) or "
                                      "softmax.")] = "logistic",
    l2: Annotated[float, typer.Option(help="Penalty: of a row's loss for logistic, of the whole otherwise.")] = 1e-3,
    radius: Annotated[float | None, typer.Option(help=RADIUS)] = None,
    intercept: Annotated[bool, typer.Option("--intercept", help="One more, constant feature.")] = False,
    output: Annotated[float | None, typer.Option("--output-noise", help=OUTPUT)] = None,
    private: Annotated[float | None, typer.Option("--private-noise", help=NOISE)] = None,
    epsilon: Annotated[float | None, typer.Option(help="How far it may be told from a retrained head.")] = None,
    delta: Annotated[float | None, typer.Option(help=DELTA)] = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Fit a linear head that later requests can take rows out of.

    The rows come from a file, or are what a model has at a site for the statements of a probe. The folder is private.
    """
    from repforget.linear import fit_head, read_table, refuse, save_head, utility, write_table

    promise = _promise(output, private, epsilon, delta)
    if (features is None) == (model is None) or (model is not None and site is None):
        raise typer.BadParameter("give --features FILE, or --model with --site", param_hint="--features")
    refuse(out, fresh=True)  # before the rows of a head that is there are written over
    if features is None:
        from repforget.edit.exact._features import probe_rows
        from repforget.knowledge_files import load_knowledge
        from repforget.models.load import load
        from repforget.records import Site

        place, loaded = Site.parse(str(site)), load(str(model), device=device, dtype=dtype)
        with display(as_json) as (progress, _):
            found = probe_rows(loaded, load_knowledge(knowledge), place, sets=sets or ("forget", "retain"),
                               label=label, relation=relation, progress=progress)  # type: ignore[arg-type] # fmt: skip
        features = write_table(found, rows or out.with_name(out.name + ".rows.npz"))
    table = read_table(features.absolute())
    head = fit_head(table, loss, l2, radius=radius, intercept=intercept, **promise)  # type: ignore[arg-type]
    save_head(head, out, fresh=True)
    _print(head, out, as_json, {"features": str(features)} | ({"utility": utility(head, table)} if output else {}))


def _promise(
    output: float | None, private: float | None, epsilon: float | None, delta: float | None
) -> dict[str, Any]:
    """The promise that the options ask for, for ``fit_head``."""
    from repforget.linear import Budget, Release

    noise = private if output is None else output
    if noise is None and epsilon is None and delta is None:
        return {}
    if noise is None or epsilon is None or delta is None or None not in (output, private):
        raise typer.BadParameter("--output-noise or --private-noise, one of them, --epsilon and --delta are given "
                                 "together or not at all", param_hint="--output-noise")  # fmt: skip
    return {"budget": Budget(epsilon, delta, noise)} if output is None else {"release": Release(epsilon, delta, noise)}


@app.command()
def remove(
    context: typer.Context,
    folder: Folder,
    names: Annotated[list[str] | None, typer.Argument(help="Ids or clusters of the rows that are to go; with --retrain "
                                                      "none is needed.")] = None,
    features: Features = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="To convergence on all remaining rows, which restores a "
                                          "promise.")] = False,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Take rows out of a head, and say by which theorem and with which numbers.

    Where a promise would not hold it refuses, and --retrain does it at a training's cost. The rows are read again from
    the file of the training, which still holds them afterwards.
    """
    from repforget.linear import guarantee, opened, read_table, save_head
    from repforget.linear import remove as without

    context.obj.interrupted = f"Interrupted: 'repforget head show {folder}' says whether the rows are out already."
    with opened(folder) as head:
        new = without(head, read_table(features or head.source), names or (), retrain=retrain)
        save_head(new, folder)
    _print(new, folder, as_json, {"taken_out": new.log[-1], "still_in": str(features or head.source)}, guarantee(new))
    if not as_json and names:
        typer.echo(f"'{features or head.source}' still holds these rows: take them out there as well")


@app.command()
def show(
    folder: Folder,
    weights: Annotated[Path | None, typer.Option("--weights", help="File to publish the weights in, .npz: with fresh "
                                                 "output noise if the head has it, which is counted.")] = None,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Show what a head is, what was taken out of it, and what holds."""
    from repforget.linear import guarantee, load_head, opened, publish, refuse_target, save_head, write_weights

    if weights is None:
        head = load_head(folder)
    else:
        with opened(folder) as held:
            refuse_target(held, folder, weights)
            head, seen = publish(held)
            if head.release is not None:
                save_head(head, folder)  # counted before anybody can see it
            write_weights(head, seen, weights)
    if not as_json and head.log:
        print_table(("at", "rows", "left", "by", "residual bound"),
                    [(e["at"], e["rows"], e["left"], e["by"], f"{e['residual']:.3g}" if "residual" in e else "")
                     for e in head.log], numbers=[1, 2, 4])  # fmt: skip
    more: dict[str, Any] = {"log": head.log} | ({"published": str(weights)} if weights else {})
    _print(head, folder, as_json, more, guarantee(head) if head.log or head.published else None)


@app.command("train-unembedding")
def train_unembedding(
    out: Annotated[Path, typer.Option("--out", help="Folder of the training; what it adds to the model is in OUT/edit. "
                                      "The same command continues it.")],
    model: o.Model = "organism:bios/twin-0",
    data: Annotated[Path | None, typer.Option("--data", help="JSON lines: id, cluster, prompt, answer.")] = None,
    knowledge: o.KnowledgeName = "bios-people",
    sets: Annotated[list[str] | None, typer.Option(help="Sets of the probe that are trained on; repeatable.")] = None,
    forms: Annotated[str, typer.Option(help="Of a probe: statements, questions or all.")] = "statements",
    l2: Annotated[float, typer.Option(help="Penalty on the change of the unembedding, of the whole objective.")] = 1.0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:
    """Train a model's unembedding alone, to convergence, so that records can be taken out ('head_removal').

    The model's features stay frozen; the training is convex and has one solution. The folder holds the records.
    """
    from repforget.edit.exact import _unembedding as unembedding
    from repforget.knowledge_files import load_knowledge
    from repforget.models.load import load
    from repforget.training import read_records, records_of

    records = (read_records(data) if data is not None
               else records_of(load_knowledge(knowledge), tuple(sets or ("forget",)), forms))  # type: ignore[arg-type] # fmt: skip
    loaded = load(model, device=device, dtype=dtype)
    with display(as_json) as (progress, _):
        tuned = unembedding.train_into(out, loaded, records, l2, progress)
    unembedding.edit_of(tuned, loaded).save(out / "edit")
    found = {"folder": str(out), "records": len(records), "tokens": len(tuned.tokens), "l2": l2}
    if as_json:
        print_json(found)
        return
    typer.echo(f"{len(records)} records, {len(tuned.tokens)} tokens; the training is in {out}, what it adds in "
               f"{out / 'edit'}; 'repforget edit head_removal --set folder={out}' takes records out")  # fmt: skip


def _print(
    head: Head, folder: Path, as_json: bool, more: dict[str, Any], claim: Guarantee | None = None
) -> None:
    from repforget.linear import publications_left, removals_left, spent

    width, columns = head.weights.shape
    facts: dict[str, Any] = {"folder": str(folder), "loss": head.loss, "rows": head.n, "features": width,
                             "columns": columns, "classes": head.classes,
                             "removals_left": removals_left(head)}  # fmt: skip
    if head.budget is not None:
        facts["budget"] = asdict(head.budget) | {"limit": head.budget.limit, "spent": head.model.residual}  # type: ignore[union-attr]
    if head.release is not None:
        facts["release"] = asdict(head.release) | {
            "limit": head.release.limit, "spent": spent(head), "distance": head.distance,
            "publications": len(head.published), "publications_left": publications_left(head, head.release),
        }  # fmt: skip
    if as_json:
        print_json(facts | more | ({"guarantee": asdict(claim)} if claim else {}))
        return
    line = f"{head.loss} head in {folder}: {head.n} rows, weights {width} x {columns}"
    typer.echo(line + (f", {len(head.classes)} classes" if head.classes else ""))
    for line in _promised(facts, more):
        typer.echo(line)
    if claim is not None:
        print_table(("", ""), claim.lines())


def _promised(facts: dict[str, Any], more: dict[str, Any]) -> list[str]:
    """Sentences on what noise covers and costs."""
    from repforget.guarantee import at_least, at_most

    about = "" if facts["removals_left"] is None else f"; about {facts['removals_left']} more single rows fit"
    said = []
    if "budget" in facts:
        b = facts["budget"]
        said.append(f"noise {b['sigma']:g} allows a residual of {at_least(b['limit'])}, {at_most(b['spent'])} of it is "
                    f"used{about}")  # fmt: skip
    if "release" in facts:
        r = facts["release"]
        said.append(f"output noise {r['tau']:g} covers a distance of {at_least(r['limit'])} for all publications "
                    f"together; {r['publications']} so far have used {at_most(r['spent'])}{about}")  # fmt: skip
        said.append(f"a publication now is at most {at_most(r['distance'])} from a retrained one; distances add up as "
                    f"squares, so that {_many(r['publications_left'])} more like it fit")  # fmt: skip
    if "published" in more:
        noisy = "with fresh noise: one sample, counted in the folder" if "release" in facts else "as they are"
        said.append(f"the weights are in {more['published']}, {noisy}")
    if "utility" in more:
        u = more["utility"]
        said.append(f"{u['measure']}: {u['without noise']:.3f}, published with noise {u['published']:.3f} (mean of ten "
                    "draws; the numbers are no part of the promise)")  # fmt: skip
    return said


def _many(count: int) -> str:
    return "more than a million" if count > 10**6 else str(count)
