"""The server: rounds that ask, check, average and are written down before the next one starts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from repforget.errors import NumericalError, ResourceError
from repforget.federated.aggregate import ADAM, Adam, aggregate, applied
from repforget.federated.clients import State, shapes_of, untouched, weights_norm
from repforget.federated.door import ATTEMPTS, Door, Fleet, Members
from repforget.federated.faults import fault_of, unusual
from repforget.federated.history import History
from repforget.federated.messages import Introduction, Local, Reply, Task
from repforget.federated.records import Update
from repforget.models.load import LoadedModel
from repforget.progress import Progress, track
from repforget.store import read_json, write_json

REPORT = "report.json"
Fault = Callable[[Reply, int, Introduction], str | None]


@dataclass(frozen=True)
class Plan:
    """What is trained and how; ``min_clients`` and ``timeout`` (seconds for one round) say what a round needs.

    A client that says it has more than ``max_records`` is refused: the average would be its own.
    """

    model: str
    local: Local
    rounds: int = 1
    min_clients: int = 1
    timeout: float = 600.0
    adam: Adam = ADAM
    max_records: int = 1_000_000


@dataclass
class Report:
    """Who took part, who failed and why, and what it cost: ``report.json``, rewritten after every round."""

    path: Path
    body: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, folder: Path, plan: Plan, base: LoadedModel, rounds: int) -> Report:
        """The report in ``folder``, less what it says of rounds that were never written."""
        path = folder / REPORT
        body = read_json(path) if path.exists() else {"rounds": [], "refused": {}, "clients": {}}
        body["rounds"] = [row for row in body["rounds"] if row["round"] <= rounds]
        body |= {"model": plan.model, "base": base.fingerprint, "strategy": plan.local.rule}
        return cls(path, body)

    def add(self, row: Mapping[str, Any]) -> None:
        self.body["rounds"].append(row)
        self.body["totals"] = totals_of(self.body["rounds"])
        self.write()

    def write(self) -> None:
        write_json(self.path, self.body)


def totals_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Bytes to and from clients, seconds of the server's clock and of the clients' CPU, over all rows."""
    return {key: sum(row[key] for row in rounds) for key in ("down", "up", "seconds", "client_seconds")}


def federate(
    fleet: Fleet, plan: Plan, base: LoadedModel, folder: Path, *, first: int = 0,
    note: Callable[[str], None] = lambda line: None, progress: Progress | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Train for ``plan.rounds`` rounds, from the last one written in ``folder``; returns the global state at the end.

    Waits for ``first`` clients before it begins.

    A client that dies, is late or sends what is no update is named in the report and by ``note``, and its round is what
    it would have been without it.  A round with fewer than ``plan.min_clients`` is repeated, then refused with
    ResourceError; finished rounds are kept.  Memory at the server: the base, a few copies of the trained weights, and
    the updates of one round.
    """
    history = History(folder / "history", plan.local.rule, plan.adam)
    report = Report.open(folder, plan, base, len(history))
    state, moments = resumed(history, untouched(base, plan.local))
    door = Door(fleet, base, note, lambda member: None if member.records else "has no records", plan.max_records,
                report.body["refused"])  # fmt: skip
    fault = partial(fault_of, shapes=shapes_of(base, plan.local), norm=weights_norm(base, plan.local))
    if len(history) < plan.rounds:
        door.gathered(lambda members: len(members) >= first, f"{first} clients")
    for number in track(progress, range(len(history) + 1, plan.rounds + 1), "rounds"):
        updates, row = _round(door, report, plan, Task(number, plan.local, state), fault)
        after = applied(state, aggregate(updates, plan.local.rule, adam=plan.adam, state=moments))
        if not all(np.isfinite(value).all() for value in after.values()):
            raise NumericalError(f"Round {number} drove the global weights out of range: lower the learning rate.")
        report.add({**row, "kept": True})  # first: what it says of a round that was never written is dropped again
        history.append(state, updates)
        state = after
    door.members()  # who came too late hears why it may not take part
    return state


def _round(door: Door, report: Report, plan: Plan, task: Task, fault: Fault) -> tuple[list[Update], dict[str, Any]]:
    """The usable updates of one round and its row of the report; asked again where they are too few."""
    failed: dict[str, str] = {}
    for attempt in range(1, ATTEMPTS + 1):
        started = time.monotonic()
        members = door.gathered(lambda members: len(members) >= plan.min_clients, f"{plan.min_clients} clients")
        report.body["clients"] |= {name: member.records for name, member in members.items()}
        replies, failed = _asked(door, task, members, fault) if len(members) >= plan.min_clients else ([], {})
        good = [reply.update for reply in replies if reply.client not in failed and reply.update is not None]
        row = _row(task.round, attempt, replies, good, failed, time.monotonic() - started)
        if len(good) >= plan.min_clients:
            for client, what in row["unusual"].items():
                door.note(f"round {task.round}: client '{client}' {what}; it is used all the same")
            return good, row
        report.add({**row, "kept": False})
        door.note(f"round {task.round}: {len(good)} of at least {plan.min_clients} clients, attempt {attempt} of "
                  f"{ATTEMPTS}")  # fmt: skip
    reasons = "; ".join(f"'{client}' {why}" for client, why in {**door.refused, **failed}.items())
    raise ResourceError(f"Round {task.round} had too few clients {ATTEMPTS} times: it needs {plan.min_clients}"
                        f"{f' ({reasons})' if reasons else ''}; bring them back and give the same command, the rounds "
                        f"before are kept in '{report.path.parent}'.")  # fmt: skip


def _asked(door: Door, task: Task, members: Members, fault: Fault) -> tuple[list[Reply], dict[str, str]]:
    """All replies in the order of names, and who failed and why."""
    pairs = sorted(door.ask(task, members, lambda reply, member: fault(reply, task.round, member)),
                   key=lambda pair: pair[0].client)  # fmt: skip
    failed = {reply.client: reason for reply, reason in pairs if reason is not None}
    for client, reason in failed.items():
        door.note(f"round {task.round}: client '{client}' {reason}; it is left out")
    return [reply for reply, _ in pairs], failed


def resumed(history: History, start: State) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Global state and moments after the rounds that are written; ``start`` and none before the first."""
    moments: dict[str, np.ndarray] = {}
    state = dict(start)
    first = 0 if history.rule == "fedadam" else max(0, len(history) - 1)
    for number in range(first, len(history)):
        held = history[number]
        state = dict(held.before)
        if held.updates:
            state = applied(state, aggregate(held.updates, history.rule, adam=history.adam, state=moments))
    return state, moments


def _row(
    number: int, attempt: int, replies: Sequence[Reply], good: Sequence[Update], failed: Mapping[str, str],
    seconds: float,
) -> dict[str, Any]:  # fmt: skip
    used = {update.client for update in good}
    took = [{"client": r.client, "records": r.update.records, "loss": r.loss, "seconds": r.seconds}
            for r in sorted(replies, key=lambda r: r.client) if r.client in used and r.update is not None]  # fmt: skip
    return {"round": number, "attempt": attempt, "took_part": took, "failed": dict(failed), "unusual": unusual(good),
            "down": sum(r.down for r in replies), "up": sum(r.up for r in replies), "seconds": seconds,
            "client_seconds": sum(r.seconds for r in replies)}  # fmt: skip

