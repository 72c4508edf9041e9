"""``repforget influence``: which training records are behind an answer, and who else carries what a forget set says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

if TYPE_CHECKING:
    from repforget.influence import Ranking
    from repforget.models.load import LoadedModel
    from repforget.training import Record

app = typer.Typer(
    help="Training records behind an answer ('repforget locate' finds components of the model).",
    no_args_is_help=True, rich_markup_mode="rich",
)  # fmt: skip
Data = Annotated[Path | None, typer.Option("--data", help="The training data: JSON lines with id, cluster, prompt and "
                                           "answer, or text; without it the sets of the probe.")]  # fmt: skip
Sets = Annotated[list[str] | None, typer.Option("--sets", help="Sets of the probe that were trained on; repeatable "
                                                "(default: forget and retain).")]  # fmt: skip
Where = Annotated[Path | None, typer.Option("--where", help="A localization by 'repforget locate': only the linear "
                                            "maps at its best sites are read.")]  # fmt: skip
Out = Annotated[Path | None, typer.Option("--out", dir_okay=False, help="File for the whole ranking, as JSON.")]
Clusters = Annotated[Path | None, typer.Option("--clusters", dir_okay=False, help="File for the sum of each cluster's "
                                               "influence, as JSON lines.")]  # fmt: skip
Top = Annotated[int, typer.Option("--top", min=1, help="How many records are printed.")]
Damping = Annotated[float, typer.Option("--damping", help="Share of the mean eigenvalue added to the curvature.")]
Fit = Annotated[int, typer.Option("--fit", min=1, help="Most records the curvature is fitted on, drawn by seed.")]
Draws = Annotated[int, typer.Option("--draws", min=2, help="Random query sets, the control (19 or more for 95 %).")]
Cache = Annotated[str, typer.Option("--cache", help="Folder in which factors are kept; 'none' keeps none.")]


@app.callback()
def _group() -> None:
    """Training records behind an answer."""


@app.command()
def find(
    context: typer.Context,
    model: o.Model = "organism:bios",
    data: Data = None,
    knowledge: o.KnowledgeName = "bios-people",
    sets: Sets = None,
    prompt: Annotated[str | None, typer.Option("--prompt", help="A prompt to ask; give --answer with it.")] = None,
    answer: Annotated[str | None, typer.Option("--answer", help="The answer whose sources are sought.")] = None,
    query: Annotated[str | None, typer.Option("--query", help="Ask a set of the probe: forget, retain or "
                                              "neighbours.")] = None,
    split: Annotated[str, typer.Option("--split", help="With --query: dev, gate, sealed or all.")] = "dev",
    cluster: Annotated[list[str] | None, typer.Option("--of", help="With --query: only items of this cluster, or of "
                                                      "this id; repeatable.")] = None,
    where: Where = None,
    top: Top = 20,
    damping: Damping = 0.1,
    fit: Fit = 2000,
    draws: Draws = 20,
    out: Out = None,
    clusters: Clusters = None,
    cache: Cache = "",
    show_texts: o.ShowTexts = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Rank the training records behind an answer of the model.

    The answer is one (--prompt, --answer) or those of a set of the probe (--query forget), asked as the judge asks.
    """
    from repforget.influence.ask import Ask, asked, trained_on
    from repforget.knowledge_files import load_knowledge

    probe = load_knowledge(knowledge, seed=seed)
    records = trained_on(probe, data, sets)
    queries = asked(probe, Ask(prompt, answer, query, split, tuple(cluster or ())))
    found = _ranked(context, model, records, queries, (), where, damping, fit, draws, cache, seed, device, dtype,
                    as_json)  # fmt: skip
    _show(found, top, out, clusters, show_texts, as_json)


@app.command()
def audit(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Ids or clusters of the forget set (default: the clusters "
                                                      "of the probe's).")] = None,
    model: o.Model = "organism:bios",
    data: Data = None,
    knowledge: o.KnowledgeName = "bios-people",
    sets: Sets = None,
    where: Where = None,
    top: Top = 20,
    damping: Damping = 0.1,
    fit: Fit = 2000,
    draws: Draws = 20,
    out: Out = None,
    clusters: Clusters = None,
    cache: Cache = "",
    show_texts: o.ShowTexts = False,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Rank the other training records by their influence on what a forget set says.

    Those above the limit carry it too, or what it rests on: forgetting the set alone may leave it with them.
    """
    from repforget.influence.ask import forget_set, trained_on
    from repforget.knowledge_files import load_knowledge

    probe = load_knowledge(knowledge, seed=seed)
    records = trained_on(probe, data, sets)
    ours = forget_set(probe, records, names, str(data or probe.name))
    found = _ranked(context, model, records, ours, [r.id for r in ours], where, damping, fit, draws, cache, seed,
                    device, dtype, as_json)  # fmt: skip
    _show(found, top, out, clusters, show_texts, as_json)


def _ranked(
    context: typer.Context, model: str, records: tuple[Record, ...], queries: tuple[Record, ...], inside: Any,
    where: Path | None, damping: float, fit: int, draws: int, cache: str, seed: int, device: str, dtype: str,
    as_json: bool,
) -> Ranking:  # fmt: skip
    from repforget.influence import curvature, linear_maps, rank
    from repforget.influence.ask import cache_folder, some
    from repforget.influence.score import check
    from repforget.models.load import load
    from repforget.training import encoded

    check(damping)
    located = o.located(where)
    loaded: LoadedModel = load(model, device=device, dtype=dtype)
    names, folder = linear_maps(loaded, located), cache_folder(cache)
    train, asked = encoded(loaded, records), encoded(loaded, queries)
    with display(as_json) as (progress, echo):
        made = curvature(loaded, some(train, fit, seed), names, seed=seed, folder=folder, progress=progress)
        kept = "the factors are not kept" if folder is None else f"the factors are kept in '{folder}'"
        context.obj.interrupted = f"Interrupted: {kept}."
        entries = sum(loaded.module.get_parameter(name).numel() for name in names)
        echo(f"{len(names)} linear maps; factors {made.bytes / 1e6:.1f} MB, query gradients "
             f"{2 * (draws + 1) * entries * 4 / 1e6:.1f} MB; {kept}")  # fmt: skip
        return rank(loaded, records, train, asked, names, made, inside=inside, clusters=[q.cluster for q in queries],
                    damping=damping, draws=draws, seed=seed, progress=progress)  # fmt: skip


def _show(found: Ranking, top: int, out: Path | None, clusters: Path | None, texts: bool, as_json: bool) -> None:
    from repforget.influence.audit import cluster_lines, sentences
    from repforget.store import write_atomic, write_json

    if out is not None:
        write_json(out, found.to_json())
    if clusters is not None:
        write_atomic(clusters, cluster_lines(found.clusters()).encode())
    if as_json:
        print_json(found.to_json(top))
        return
    rows = []
    for k in found.order[:top]:
        record = found.records[k]
        shown = (f"{record.prompt}{record.answer}",) if texts else ()
        rows.append((record.id, record.cluster, f"{found.alike[k]:.3f}", f"{found.values[k]:.4g}",
                     "yes" if found.alike[k] > found.limit else "", *shown))  # fmt: skip
    columns = ("record", "cluster", "likeness", "influence", "above the limit", *(("text",) if texts else ()))
    print_table(columns, rows, numbers=[2, 3])
    for sentence in sentences(found):
        typer.echo(sentence)
