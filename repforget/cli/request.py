"""``repforget request``: deletion requests taken down, answered, and reported to whoever has to account for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from repforget.cli import _options as o
from repforget.cli._output import print_json, print_table
from repforget.cli._progress import display

HELP = """Requests to forget: taken down in a ledger, answered, checked again, audited.

The ledger (an SQLite file) is only ever added to, and every row carries the hash of the one before. Nothing personal
is in it by default: whoever asks is kept as a salted hash, what is asked for as references to records (a reference that
is a person's name as a salted hash, too), never as text. The salt is in the ledger, so that whoever holds it can test
names: these are pseudonyms, not anonymous."""

app = typer.Typer(help=HELP, no_args_is_help=True, rich_markup_mode="rich")
LedgerFile = Annotated[Path, typer.Option("--ledger", help="The ledger; runs and edits go beside it, into NAME.files.")]
LEDGER = Path("requests.sqlite")
CODES = {"pass": 0, "exact": 0, "refused": 0, "inconclusive": 11, "fail": 10, "failed": 1}  # mild to grave


@app.callback()
def _group() -> None:
    """Requests to forget: taken down in a ledger, answered, checked again, audited."""


@app.command()
def add(
    names: Annotated[list[str] | None, typer.Argument(help="Ids or clusters of the records; '-' reads them from "
                     "standard input. None: all that the probe is to forget.")] = None,
    ledger: LedgerFile = LEDGER,
    knowledge: Annotated[str | None, typer.Option("--knowledge", help="The probe that the names come from.")] = None,
    training: Annotated[Path | None, typer.Option("--training", help="Or the sharded training they come from.")] = None,
    who: Annotated[str, typer.Option("--who", help="Whoever asks; kept as a salted hash. '-' reads a line from "
                                    "standard input, which no list of processes shows.")] = "",
    plain_who: Annotated[bool, typer.Option("--plain-who", help="Keep --who as it is, readable.")] = False,
    basis: Annotated[str, typer.Option("--basis", help="erasure, consent withdrawn, objection, unlawful processing, "
                     "copyright, court order, safety, or own words (nothing personal).")] = "erasure",
    deadline: Annotated[str, typer.Option("--deadline", help="30d, 72h, 2w or a date (its end, UTC).")] = "30d",
    keep: Annotated[bool, typer.Option("--keep", help="A request to keep it; refused as a conflict where an earlier "
                    "request covers it.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="The model of a new ledger.")] = None,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Take down a request; its number is printed when it is on the disk.

    What means nothing in the probe is recorded as refused. Exit code 2 where it was refused or is a conflict.
    """
    from repforget.errors import UsageError
    from repforget.requests import asking
    from repforget.requests.sharded import SCHEME

    if training is None and knowledge is None and not names:
        raise UsageError("A request says what is to be forgotten: give ids or clusters, or --knowledge PROBE for all "
                         "of a probe.")  # fmt: skip
    if who == "-":
        who = sys.stdin.readline().strip()
    if names == ["-"]:
        names = [line.strip() for line in sys.stdin]
    source = knowledge if training is None else f"{SCHEME}{training}"
    with asking.opened(ledger, model, source or asking.SOURCE) as book:
        wanted = asking.split(names or (), source or str(book.facts["source"]))
        made, told = asking.ask(book, wanted, source=source, who=who, named=plain_who, basis=basis, deadline=deadline,
                                keep=keep)  # fmt: skip
        if as_json:
            print_json({"request": made.id, "state": made.state, "reason": made.reason, "head": book.head})
        else:
            typer.echo(f"request {made.id}: {made.state}")
    if made.reason or told:
        typer.echo(" ".join(part for part in (made.reason, told) if part), err=True)
    raise typer.Exit(2 if made.reason else 0)


@app.command("list")
def list_(
    ledger: LedgerFile = LEDGER,
    state: Annotated[str, typer.Option("--state", help="all, open (to be answered), overdue, done, refused, conflict "
                     "or kept.")] = "all",
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Show requests, their deadlines and what became of them."""
    from repforget.requests import listing
    from repforget.requests.ledger import Ledger

    with Ledger(ledger) as book:
        found = listing.chosen(book, state)
    if as_json:
        print_json(found)
        return
    print_table(listing.HEADINGS, listing.rows(found), numbers=(0, 3))


@app.command()
def show(
    request: Annotated[int, typer.Argument(help="Number of the request.")],
    ledger: LedgerFile = LEDGER,
    as_json: o.AsJson = False,
) -> None:
    """Show every row of a request, and the head of the chain."""
    from repforget.requests import listing
    from repforget.requests.ledger import Ledger

    with Ledger(ledger) as book:
        events, head = listing.history(book, request), book.head
    if as_json:
        print_json({"events": events, "head": head})
        return
    print_table(("row", "when (UTC)", "event", "what", "hash"), listing.event_rows(events), numbers=(0,))
    typer.echo(f"head: {head}")


@app.command()
def run(
    context: typer.Context,
    request: Annotated[int | None, typer.Argument(help="Number of the request; without it --all.")] = None,
    everyone: Annotated[bool, typer.Option("--all", help="All that have no verdict yet, in order.")] = False,
    mode: Annotated[str, typer.Option(help="sequential: each edit on the model that the ones before left; union: one "
                    "new edit for everything asked so far.")] = "sequential",
    recipe: Annotated[Path | None, typer.Option("--recipe", help="recipe.yaml for this model; its probe is replaced by "
                      "that of the request.")] = None,
    training: Annotated[Path | None, typer.Option("--training", help="Folder of 'repforget train-shards': take the "
                        "records out of it instead.")] = None,
    ledger: LedgerFile = LEDGER,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Answer requests: edit and verify, or take out of a sharded training; everything is recorded.

    The same command continues after an interruption. While it runs NAME.files holds texts of the probe, readable for
    its owner alone; after a kill -9 or an error of the program itself until the next run. Exit codes as of 'repforget
    run', the gravest of all requests.
    """
    from repforget.requests import listing
    from repforget.requests.ledger import Ledger
    from repforget.requests.run import answer, order_of, workplace

    with Ledger(ledger) as book:
        context.obj.folder = workplace(book)
        numbers = listing.to_answer(book, request, everyone)
        with display(as_json) as (progress, echo):
            found = answer(book, numbers, order_of(recipe, mode, training), progress=progress, echo=echo)
        head = book.head
    code = next((CODES[outcome] for outcome in reversed(CODES) if any(a.outcome == outcome for a in found)), 0)
    if as_json:
        print_json({"answers": [vars(a) for a in found], "head": head, "exit_code": code})
    else:
        for each in found:
            typer.echo(f"request {each.request}: {each.outcome}. {each.sentence}")
        answered = sum(CODES[each.outcome] == 0 for each in found)
        typer.echo(f"requests tried: {len(found)}, of them answered or refused: {answered}; head: {head}")
    raise typer.Exit(code)


@app.command()
def check(
    ledger: LedgerFile = LEDGER,
    knowledge: Annotated[str | None, typer.Option("--knowledge", help="The probe to ask from; without it that of the "
                         "ledger.")] = None,
    before: Annotated[str | None, typer.Option("--before", help="The model as it was served before any request; needed "
                      "for a sharded training.")] = None,
    floor: Annotated[str | None, typer.Option("--floor", help="A model that never knew; without it, guessing by how "
                     "common an answer is.")] = None,
    picture: Annotated[Path | None, typer.Option("--svg", help="Also write the matrix as a picture.")] = None,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Check earlier requests again: did knowledge come back after later ones?

    Every request is asked about in the model after each answer, by behaviour alone, and the result is recorded. One
    that names nothing in the probe, or of which the original knew nothing, is left out and named. Exit code 10 where
    knowledge of a request came back, 11 where that could not be decided or one was left out.
    """
    from repforget.errors import UsageError
    from repforget.knowledge_files import load_knowledge
    from repforget.requests._picture import matrix
    from repforget.requests.again import again
    from repforget.requests.ledger import Ledger
    from repforget.requests.sharded import SCHEME
    from repforget.store import write_atomic

    with Ledger(ledger) as book, display(as_json) as (progress, _):
        source = str(book.facts["source"])
        if knowledge is None and source.startswith(SCHEME):
            raise UsageError(f"'{ledger}' is about the sharded training '{source.removeprefix(SCHEME)}', which has no "
                             "questions: give --knowledge, a probe to ask from, and --before.")  # fmt: skip
        probe = load_knowledge(knowledge or source)
        found = again(book, probe, before=before, floor=floor, progress=progress)
        head = book.head
    if picture is not None:
        write_atomic(picture, matrix(found).encode())
    if as_json:
        print_json({**vars(found), "re_emerged": [vars(back) for back in found.re_emerged], "slope": vars(found.slope),
                    "outcomes": [*found.outcomes.values()], "sentences": found.sentences(), "head": head})  # fmt: skip
    else:
        print_table(("after", *found.names, "what must stay"), found.rows(), numbers=range(1, len(found.names) + 2))
        typer.echo("\n".join((*found.sentences(), f"head: {head}")))
    outcomes = [*found.outcomes.values(), *["inconclusive"] * bool(found.left_out)]
    raise typer.Exit(max((CODES[outcome] for outcome in outcomes), key=list(CODES.values()).index))


@app.command()
def audit(
    ledger: LedgerFile = LEDGER,
    out: Annotated[Path, typer.Option("--out", help="Folder for audit.html and audit.md.")] = Path("audit"),
    expect_head: Annotated[str | None, typer.Option("--expect-head", help="A head kept from earlier: shows whether "
                           "rows up to it are gone or were written anew.")] = None,
    show_names: Annotated[bool, typer.Option("--show-names", help="Also show who asked, for which records, and own "
                          "words; hidden otherwise.")] = False,
    as_json: o.AsJson = False,
) -> None:  # fmt: skip
    """Check the chain and write a report for whoever is accountable.

    Exit code 1 where a row was changed, is missing, or the expected head is not in the chain.
    """
    from repforget.requests import page
    from repforget.requests.audit import audit as audited
    from repforget.requests.ledger import Ledger

    with Ledger(ledger) as book:
        report = audited(book, expect_head)
    path = page.write(report, out, show_names=show_names)
    if as_json:
        print_json({"faults": report.faults, "head": report.head, "report": str(path)})
    else:
        typer.echo(f"{report.sentence}\nhead: {report.head}\nreport: {path}")
    raise typer.Exit(1 if report.faults else 0)
