"""A client leaves a finished training: one of the four ways is run, and what is recorded of the client goes."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, get_args

from repforget.artifact import Edit, load_edit
from repforget.errors import UsageError, nearest
from repforget.federated.again import Again
from repforget.federated.aggregate import aggregate, applied
from repforget.federated.distil import Distillation, general_texts, staged
from repforget.federated.door import Door, Fleet
from repforget.federated.forget import Distil, Distilled, Forgotten, Weights, client_side, fed_eraser, retrain, rollback
from repforget.federated.history import History, final_state
from repforget.federated.messages import Introduction
from repforget.federated.records import Update
from repforget.federated.run import EDIT, Note, Setup, edit_of, highest_rank, is_mark, mark
from repforget.federated.server import REPORT, Plan, totals_of
from repforget.federated.simulate import here
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.store import LOCK, Store, read_json, write_json

Method = Literal["retrain", "federaser", "rollback", "client"]
METHODS: tuple[str, ...] = get_args(Method)
REQUEST, COST = "request.json", "forget.json"
AGAIN = "again"  # local trainings of an interrupted request
THEIRS = ("every client trained again on the records that it had trained on, on a machine that computes alike: the "
          "server compared their number alone")  # fmt: skip
Meet = Callable[[], AbstractContextManager[Fleet]]  # the clients of a finished training, elsewhere


def leave(
    base: LoadedModel, folder: Path, client: str, method: Method, out: Path, *, interval: int = 1,
    local_share: float = 0.5, editor: str = "simnpo", distil: Distillation | None = None, keep_record: bool = False,
    meet: Meet | None = None, note: Note = lambda line: None, progress: Progress | None = None,
) -> Edit:  # fmt: skip
    """Make the edit of the training in ``folder`` without ``client``, and save it in ``out``.

    "retrain" asks all others for all rounds again and is exact; "federaser" asks them for ``local_share`` of the
    epochs in every ``interval``-th round; "rollback" asks nobody, and repairs the damage where it is told how to
    ``distil`` (the paper's method does, and so does the command); "client" lets the client unlearn its records by
    ``editor`` and the others train on for two rounds.  Writes ``edit/`` and ``forget.json`` (cost in CPU seconds and
    bytes), under "retrain" a whole training that can be forgotten from again.  The same call continues an interrupted
    one: local trainings that were finished are not done again.  With ``meet`` the clients are asked where they are
    (:class:`repforget.federated.serve.Post`), without it their records are read here.

    Then, unless ``keep_record``, nobody trains on in ``folder``, and the client goes out of its history, its report
    (name, records, losses) and its list of clients.  What stays there: a salted digest of its name, the edit that was
    trained with it, and the sums of bytes and seconds over all clients.  Its own file of records is not touched.

    Raises UsageError for a client that never took part, for another base model, for an ``out`` that holds something
    else, and where clients are needed that are not here.  Costs and what each way leaves behind:
    :mod:`repforget.federated.forget`.
    """
    _checked(method, meet, distil)
    if out.resolve() == folder.resolve():
        raise UsageError(f"The result cannot go into the folder of the training, '{folder}': give a new one with "
                         "--out.")  # fmt: skip
    request = {"run": str(folder.resolve()), "method": method, "interval": interval, "local_share": local_share,
               "editor": editor, **({"distil": asdict(distil)} if distil else {})}  # fmt: skip
    with Store(folder).locked():
        setup = Setup.read(folder)
        report = read_json(folder / REPORT)
        _check_base(base, report["base"], folder)
        history = History.open(folder / "history")
        mine = _answers(request, client, out)
        finished = mine and (out / COST).exists()
        repair: Distil | None = None
        if not finished:
            _here(history, client, setup, folder)
            if distil:
                texts = general_texts(setup.sources, client, distil.texts)
                repair = staged(base, setup.plan.local, *texts, distil, Store(out / AGAIN), progress)
        with Store(out).locked():
            if not mine:
                shutil.rmtree(out / AGAIN, ignore_errors=True)
                write_json(out / REQUEST, {**request, "client": mark(client)})
            if not finished:
                how = (method, (interval, local_share, editor, repair))
                with _again(base, setup, report, history, client, method, Store(out / AGAIN), meet, note) as again:
                    _made(again, setup, report, history, client, how, out, progress)
            shutil.rmtree(out / AGAIN, ignore_errors=True)
            for line in read_json(out / COST)["notes"]:
                note(line)
            if not keep_record and client in {**history.clients(), **report["clients"], **setup.sources}:
                _gone(setup, report, history, client, folder)
                note(f"the updates of '{client}' have left '{folder / 'history'}'; '{folder / EDIT}' was trained with "
                     "them and is still there")  # fmt: skip
    return load_edit(out / EDIT)


def known(method: str) -> None:
    """UsageError for what is no way to forget."""
    if method not in METHODS:
        raise UsageError(f"There is no way to forget '{method}': {nearest(method, METHODS)}")


def _checked(method: str, meet: Meet | None, distil: Distillation | None) -> None:
    known(method)
    if meet and method == "rollback":
        raise UsageError("Rollback asks no client: leave the address out, or choose another method.")
    if distil and method != "rollback":
        raise UsageError(f"Only rollback distils, and '{method}' was asked for: leave the distillation out.")


def _answers(request: Mapping[str, Any], client: str, out: Path) -> bool:
    """Whether ``out`` was made for this very request; False where it holds no result, UsageError where another's."""
    if (out / REQUEST).exists():
        held = read_json(out / REQUEST)
        if is_mark(str(held.pop("client")), client) and held == request:
            return True
    if not out.is_dir() or {path.name for path in out.iterdir()} <= {LOCK, REQUEST, AGAIN}:
        return False
    raise UsageError(f"'{out}' holds something other than the answer to this request: give a new folder with --out.")


def _here(history: History, client: str, setup: Setup, folder: Path) -> None:
    """Refuse a client that is not in the record."""
    names = history.clients()
    if client in names:
        return
    if setup.has_left(client):
        raise UsageError(f"Client '{client}' was already forgotten in '{folder}': the result is in the --out of that "
                         "time.")  # fmt: skip
    raise UsageError(f"Client '{client}' never took part in the training in '{folder}', so that there is nothing to "
                     f"forget: {nearest(client, names)}")  # fmt: skip


@contextmanager
def _again(
    base: LoadedModel, setup: Setup, report: Mapping[str, Any], history: History, client: str, method: Method,
    kept: Store, meet: Meet | None, note: Note,
) -> Iterator[Again]:  # fmt: skip
    """The clients that ``method`` asks, there or here; UsageError where the records of one are with it alone."""
    others = [name for name in history.clients() if name != client]
    asked = [] if method == "rollback" else [*others, client] if method == "client" else others

    def against(member: Introduction) -> str | None:
        if member.client not in asked:
            leaves = member.client == client
            return "is the client that leaves, and is not asked" if leaves else "took no part in the training"
        trained = report["clients"].get(member.client, member.records)
        return None if member.records == trained else (f"joins with {member.records} records and trained with "
                                                       f"{trained}: bring the same")  # fmt: skip

    def group(number: int) -> Sequence[str]:
        return others if method == "client" else [name for name in history[number].clients if name != client]

    def again(fleet: Fleet) -> Again:
        return Again(base, setup.plan, Door(fleet, base, note, against), kept, group, meet is not None)

    if meet is not None:
        with meet() as fleet:
            asking = again(fleet)
            yield asking
            asking.door.members()  # who came too late to be asked hears why it may not take part
        return
    if away := [name for name in asked if name not in setup.sources]:
        raise UsageError(f"The records of client '{away[0]}' are with the client, not here: give --address, where the "
                         "clients join again, or use rollback, which asks nobody.")  # fmt: skip
    yield again(here(base, {name: setup.sources[name] for name in asked}, timeout=math.inf))


def _made(
    again: Again, setup: Setup, report: Mapping[str, Any], history: History, client: str,
    how: tuple[Method, tuple[int, float, str, Distil | None]], out: Path, progress: Progress | None,
) -> None:  # fmt: skip
    """Run the way and write its result into ``out``; ``forget.json`` comes last and says that it is complete."""
    started = time.process_time()
    method, details = how
    done = _forgotten(method, history, client, again, details, progress)
    if method == "retrain":
        _as_training(setup, report, again, history, client, out)
    guarantee = done.guarantee
    if guarantee is not None and again.apart:
        guarantee = replace(guarantee, assumptions=(*guarantee.assumptions, THEIRS))
    edit = edit_of(again.base, setup.plan, done.weights, f"federated_{done.method}",
                   {"clients": len(history.clients()) - 1}, bound=_bound(setup.plan, method, history, done.distilled),
                   notes=done.notes, guarantee=guarantee)  # fmt: skip
    edit.save(out / EDIT)
    write_json(out / COST, {"method": method, "trainings": done.trainings, "notes": done.notes,
                            "cpu_seconds": time.process_time() - started, "client_cpu_seconds": again.seconds,
                            "down": again.down, "up": again.up,
                            "distil_steps": done.distilled.steps if done.distilled else 0,
                            "distil_cpu_seconds": done.distilled.seconds if done.distilled else 0.0})  # fmt: skip


def _forgotten(
    method: Method, history: History, client: str, again: Again, how: tuple[int, float, str, Distil | None],
    progress: Progress | None,
) -> Forgotten:  # fmt: skip
    rule, adam = again.plan.local.rule, again.plan.adam
    interval, share, editor, repair = how
    if method == "retrain":
        return retrain(history, client, again.train, rule=rule, adam=adam, progress=progress)
    if method == "federaser":
        return fed_eraser(history, client, again.train, interval=interval, local_share=share, rule=rule, adam=adam,
                          progress=progress)  # fmt: skip
    if method == "rollback":
        return rollback(history, client, distil=repair, rule=rule)

    def train(name: str, weights: Weights, number: int, part: float) -> Update:
        return again.train(name, weights, len(history) + number, part)

    others = [name for name in history.clients() if name != client]
    weights = final_state(history, rule, adam)
    return client_side(weights, client, lambda w: again.unlearn(client, w, editor), others, train, rule=rule,
                       adam=adam, progress=progress)  # fmt: skip


def _bound(plan: Plan, method: Method, history: History, distilled: Distilled | None) -> int:
    """Rank that the result does not exceed; of a retraining the one that it would have had from the start."""
    return 0 if method == "client" or distilled else highest_rank(plan, len(history.clients()) - (method == "retrain"))


def _as_training(
    setup: Setup, report: Mapping[str, Any], again: Again, history: History, client: str, out: Path
) -> None:  # fmt: skip
    """Write what was trained again as a training of its own; a round of the client alone is one without updates."""
    rule, adam = setup.plan.local.rule, setup.plan.adam
    record = History(out / "history", rule, adam)
    weights: Weights = history[0].before
    moments: dict[str, Any] = {}
    for number in range(len(history)):
        updates = again.updates(number)
        if number >= len(record):
            record.append(weights, updates)
        if updates:
            weights = applied(weights, aggregate(updates, rule, adam=adam, state=moments))
    Setup(setup.plan, {name: source for name, source in setup.sources.items() if name != client}).write(out)
    write_json(out / REPORT, {**_without(report, client), "rounds": [], "totals": totals_of([])})


def _gone(setup: Setup, report: Mapping[str, Any], history: History, client: str, folder: Path) -> None:
    """Take the client out of ``folder``: first that nobody trains on there, then its updates, then the report.

    Killed at any point, it is done again by the same request.
    """
    left = setup.left if setup.has_left(client) else (*setup.left, mark(client))
    replace(setup, left=left).write(folder)
    if client in history.clients():
        history.erase(client)
    write_json(folder / REPORT, _without(report, client))
    sources = {name: source for name, source in setup.sources.items() if name != client}
    replace(setup, sources=sources, left=left).write(folder)


def _without(report: Mapping[str, Any], client: str) -> dict[str, Any]:
    """The report without the client's name, records, losses and seconds."""
    rounds = []
    for row in report["rounds"]:
        own = sum(took["seconds"] for took in row["took_part"] if took["client"] == client)
        kept: dict[str, Any] = {name: {k: v for k, v in row[name].items() if k != client}
                                for name in ("failed", "unusual")}  # fmt: skip
        kept["took_part"] = [took for took in row["took_part"] if took["client"] != client]
        rounds.append({**row, **kept, "client_seconds": row["client_seconds"] - own})
    named = {name: {k: v for k, v in report[name].items() if k != client} for name in ("clients", "refused")}
    return {**report, **named, "rounds": rounds, "totals": totals_of(rounds)}


def _check_base(base: LoadedModel, wanted: str, folder: Path) -> None:
    if base.fingerprint != wanted:
        raise UsageError(f"The training in '{folder}' was of a model with weights {wanted[:12]} and '{base.name}' has "
                         f"{base.fingerprint[:12]}: load the same model.")  # fmt: skip


