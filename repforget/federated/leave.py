"""A client leaves a finished training: one of the four ways is run, and what is recorded of the client goes."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from repforget.artifact import Edit
from repforget.errors import NumericalError, UsageError, nearest
from repforget.federated.clients import Client, answer, shapes_of
from repforget.federated.faults import fault_of
from repforget.federated.forget import Forgotten, Weights, client_side, fed_eraser, retrain, rollback
from repforget.federated.history import History, final_state
from repforget.federated.local import unlearned
from repforget.federated.messages import Task, pack_task, size, unpack_reply
from repforget.federated.records import Update
from repforget.federated.run import EDIT, Note, Setup, edit_of, highest_rank
from repforget.federated.server import REPORT, Plan
from repforget.federated.sources import Source
from repforget.models.load import LoadedModel
from repforget.progress import Progress
from repforget.store import Store, read_json, write_json

Method = Literal["retrain", "federaser", "rollback", "client"]
METHODS: tuple[str, ...] = get_args(Method)
COST = "forget.json"


@dataclass
class Again:
    """The clients asked once more, in this process; what that costs, and each round as it was trained."""

    base: LoadedModel
    plan: Plan
    sources: Mapping[str, Source]
    clients: dict[str, Client] = field(default_factory=dict)
    rounds: dict[int, tuple[Weights, list[Update]]] = field(default_factory=dict)
    down: int = 0
    up: int = 0
    seconds: float = 0.0

    def client(self, name: str) -> Client:
        """The client with its records, read when it is first asked; UsageError where they are elsewhere."""
        if name not in self.sources:
            raise UsageError(f"The records of client '{name}' are with the client, not here: use rollback, which asks "
                             "nobody, or serve a new training to the others in another folder.")  # fmt: skip
        if name not in self.clients:
            self.clients[name] = Client.of(name, self.base, self.sources[name].records())
        return self.clients[name]

    def others(self, names: Iterable[str], client: str) -> list[str]:
        """All but ``client``, which must be one of them."""
        known = sorted(names)
        if client not in known:
            raise UsageError(f"Client '{client}' never took part, so that there is nothing to forget: "
                             f"{nearest(client, known)}")  # fmt: skip
        return [name for name in known if name != client]

    def unlearn(self, name: str, weights: Weights, editor: str) -> Update:
        """The update by which a client takes its own records out of the global ``weights``."""
        self.client(name)
        local, started = self.plan.local, time.process_time()
        update = unlearned(name, self.base, local, weights, self.sources[name].records(), editor, seed=local.seed)
        self.seconds += time.process_time() - started
        self.down, self.up = self.down + sum(w.nbytes for w in weights.values()), self.up + update.nbytes
        return update

    def train(self, name: str, weights: Weights, number: int, share: float) -> Update:
        """The update of one client to the global ``weights`` in the 0-based round ``number``; checked like any."""
        client = self.client(name)
        packed = pack_task(Task(number + 1, replace(self.plan.local, share=share), weights))
        started = time.process_time()
        back = answer(client, packed)
        self.seconds += time.process_time() - started
        self.down, self.up = self.down + size(packed), self.up + size(back)
        reply = unpack_reply(back)
        fault = fault_of(reply, number + 1, client.introduce(), shapes_of(self.base, self.plan.local))
        if fault is not None or reply.update is None:
            raise NumericalError(f"Client '{name}' was asked to train again and {fault}: nothing was changed.")
        self.rounds.setdefault(number, (weights, []))[1].append(reply.update)
        return reply.update


def leave(
    base: LoadedModel, folder: Path, client: str, method: Method, out: Path, *, interval: int = 1,
    local_share: float = 0.5, editor: str = "simnpo", keep_record: bool = False, note: Note = lambda line: None,
    progress: Progress | None = None,
) -> Edit:  # fmt: skip
    """Make the edit of the training in ``folder`` without ``client``, and save it in ``out``.

    "retrain" asks all others for all rounds again and is exact; "federaser" asks them for ``local_share`` of the
    epochs in every ``interval``-th round; "rollback" asks nobody; "client" lets the client unlearn its records by
    ``editor`` and the others train on for two rounds.  Then the client's updates leave the record in ``folder``, unless
    ``keep_record``, and nobody trains on there.  The edit of the training with the client stays where it is.  Writes
    ``edit/`` and ``forget.json`` (cost in CPU seconds and bytes), under "retrain" a whole training that can be
    forgotten from again.

    Raises UsageError for a client that never took part, for another base model, and where clients are needed that are
    not here.  Costs and what each way leaves behind: :mod:`repforget.federated.forget`.
    """
    if method not in METHODS:
        raise UsageError(f"There is no way to forget '{method}': {nearest(method, METHODS)}")
    with Store(folder).locked(), Store(out).locked():
        setup = Setup.read(folder)
        report = read_json(folder / REPORT)
        _check_base(base, report["base"], folder)
        history = History.open(folder / "history")
        again = Again(base, setup.plan, setup.sources)
        started = time.process_time()
        done = _forgotten(method, history, client, again, (interval, local_share, editor), progress)
        edit = edit_of(base, setup.plan, done.weights, f"federated_{done.method}",
                       {"clients": len(history.clients()) - 1}, bound=_bound(setup.plan, method, history),
                       notes=done.notes, guarantee=done.guarantee)  # fmt: skip
        edit.save(out / EDIT)
        write_json(out / COST, {"client": client, "method": method, "trainings": done.trainings, "notes": done.notes,
                                "cpu_seconds": time.process_time() - started, "client_cpu_seconds": again.seconds,
                                "down": again.down, "up": again.up})  # fmt: skip
        for line in done.notes:
            note(line)
        if method == "retrain":
            _as_training(setup, report, again, done, len(history), out)
        if not keep_record:
            rounds = history.erase(client)
            _gone(setup, client, folder)
            note(f"the updates of '{client}' in {rounds} rounds have left '{folder / 'history'}'; "
                 f"'{folder / EDIT}' was trained with them and is still there")  # fmt: skip
    return edit


def _forgotten(
    method: Method, history: History, client: str, again: Again, how: tuple[int, float, str], progress: Progress | None
) -> Forgotten:
    rule, adam = again.plan.local.rule, again.plan.adam
    interval, share, editor = how
    if method == "retrain":
        return retrain(history, client, again.train, rule=rule, adam=adam, progress=progress)
    if method == "federaser":
        return fed_eraser(history, client, again.train, interval=interval, local_share=share, rule=rule, adam=adam,
                          progress=progress)  # fmt: skip
    if method == "rollback":
        return rollback(history, client, rule=rule)

    def train(name: str, weights: Weights, number: int, part: float) -> Update:
        return again.train(name, weights, len(history) + number, part)

    others = again.others(history.clients(), client)
    weights = final_state(history, rule, adam)
    return client_side(weights, client, lambda w: again.unlearn(client, w, editor), others, train, rule=rule,
                       adam=adam, progress=progress)  # fmt: skip


def _bound(plan: Plan, method: Method, history: History) -> int:
    """Rank that the result does not exceed; of a retraining the one that it would have had from the start."""
    return 0 if method == "client" else highest_rank(plan, len(history.clients()) - (method == "retrain"))


def _as_training(
    setup: Setup, report: Mapping[str, Any], again: Again, done: Forgotten, rounds: int, out: Path
) -> None:  # fmt: skip
    """Write what was trained again as a training of its own."""
    held: list[tuple[Weights, list[Update]]] = []
    after = done.weights
    for number in reversed(range(rounds)):  # a round of the client alone is one without updates
        held.append(again.rounds.get(number, (after, [])))
        after = held[-1][0]
    record = History(out / "history", setup.plan.local.rule, setup.plan.adam)
    for weights, updates in reversed(held[: rounds - len(record)]):
        record.append(weights, updates)
    sources = {name: source for name, source in setup.sources.items() if name != done.client}
    Setup(setup.plan, sources).write(out)
    clients = {name: records for name, records in report["clients"].items() if name != done.client}
    write_json(out / REPORT, {**report, "clients": clients, "rounds": [], "totals": {}})


def _gone(setup: Setup, client: str, folder: Path) -> None:
    sources = {name: source for name, source in setup.sources.items() if name != client}
    replace(setup, sources=sources, left=(*setup.left, client)).write(folder)


def _check_base(base: LoadedModel, wanted: str, folder: Path) -> None:
    if base.fingerprint != wanted:
        raise UsageError(f"The training in '{folder}' was of a model with weights {wanted[:12]} and '{base.name}' has "
                         f"{base.fingerprint[:12]}: load the same model.")  # fmt: skip


