"""Requests as rows, for people and for machines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from repforget.errors import UnknownNameError, UsageError, nearest
from repforget.requests.ledger import Ledger, stamp
from repforget.requests.states import WAITING, Request, requests

HEADINGS = ("no.", "state", "outcome", "names", "source", "basis", "asked", "deadline", "")
STATES = ("all", "open", "overdue", "done", "refused", "conflict", "kept")
SHORT = 90  # characters of a row's content


def chosen(ledger: Ledger, state: str = "all") -> list[dict[str, Any]]:
    """Requests in a state as plain data, in order; "open" are all that wait for an answer, tried or not."""
    if state not in STATES:
        raise UnknownNameError(f"There is no state '{state}' of requests: {nearest(state, STATES)}")
    now = ledger.clock()
    return [_plain(r, r.overdue(now)) for r in requests(ledger)
            if state in ("all", r.state) or (state == "open" and r.state in WAITING)
            or (state == "overdue" and r.overdue(now))]  # fmt: skip


def _plain(request: Request, overdue: bool) -> dict[str, Any]:
    times = {name: None if time is None else stamp(time) for name, time in
             (("asked", request.asked), ("deadline", request.deadline), ("answered", request.answered))}  # fmt: skip
    return {**vars(request), **times, "overdue": overdue, "late": request.late}


def rows(found: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row per request of :func:`chosen`."""
    return [(str(r["id"]), r["state"], r["outcome"], str(len(r["names"]) or "all"), r["source"], r["basis"],
             r["asked"][:10], r["deadline"][:10],
             ", ".join(_remarks(r))) for r in found]


def _remarks(r: Mapping[str, Any]) -> list[str]:
    told = ("overdue" if r["overdue"] else "late" if r["late"] else "",
            f"checked again: {r['rechecked']}" if r["rechecked"] else "", r["clock"])  # fmt: skip
    return [remark for remark in told if remark]


def history(ledger: Ledger, request: int) -> list[dict[str, Any]]:
    """Every event of a request as plain data."""
    requests(ledger, request)
    return [vars(event) for event in ledger.events(request)]


def event_rows(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """One row per event; sentences are whole, other content is cut short."""
    return [(str(e["seq"]), e["at"][:19] + (f" ({e['clock']})" if e["clock"] else ""), e["kind"], _short(e["body"]),
             e["hash"][:12]) for e in events]  # fmt: skip


def _short(body: Mapping[str, Any]) -> str:
    for key in ("sentence", "reason", "method"):
        if body.get(key):
            return str(body[key])
    text = ", ".join(f"{key} {value}" for key, value in body.items() if isinstance(value, str | int | bool))
    return text if len(text) <= SHORT else text[: SHORT - 3] + "..."


def to_answer(ledger: Ledger, request: int | None, everyone: bool) -> list[int]:
    """Numbers to be answered: the one that is named, or all without a verdict (what was interrupted or failed, too)."""
    if (request is None) != everyone:
        raise UsageError("Say which request: give its number, or --all for those that have no verdict yet.")
    if request is not None:
        return [request]
    return [r.id for r in requests(ledger) if r.state in WAITING and not r.outcome]
