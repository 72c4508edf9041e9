"""What the events of the ledger say about each request: asked, answered, late, refused, in conflict."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from repforget.errors import LedgerError, UsageError
from repforget.requests.ledger import Event, Ledger, moment

# open: nobody has tried; tried: an attempt ended without success, or what was forgotten came back (it may be run
# again); done: judged a pass, or equal by theorem to never having been trained on; kept: a request to keep something
# that nothing speaks against.
State = Literal["open", "tried", "done", "refused", "conflict", "kept"]
WAITING = ("open", "tried")
ASKED_KINDS = ("asked", "started", "verdict", "refused", "conflict", "failed", "reverified")  # the short rows
SUCCESS = ("pass", "exact")
BASES = ("erasure", "consent withdrawn", "objection", "unlawful processing", "copyright", "court order", "safety")
DEADLINE = "30d"
_SPAN = re.compile(r"(\d{1,5})\s*([hdw])")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}


@dataclass(frozen=True)
class Request:
    """One request as its events leave it; times are UTC.

    ``names`` are references (record ids, clusters, pseudonyms ``#...``), empty for the whole probe ``source``;
    ``outcome`` is that of the last attempt (pass, fail, inconclusive, exact), ``reason`` why there is no answer.
    """

    id: int
    who: str
    names: tuple[str, ...]
    source: str
    basis: str
    asked: datetime
    deadline: datetime
    keep: bool = False
    state: State = "open"
    outcome: str = ""
    reason: str = ""
    answered: datetime | None = None
    attempts: int = 0
    rechecked: str = ""  # outcome of the latest check after later requests
    clock: str = ""  # where a time of this request ran backwards

    def overdue(self, now: datetime) -> bool:
        """Still to be answered although the deadline has passed."""
        return self.state in WAITING and now > self.deadline

    @property
    def late(self) -> bool:
        """Answered, and after the deadline."""
        return self.answered is not None and self.answered > self.deadline


def requests(ledger: Ledger, only: int | None = None) -> tuple[Request, ...]:
    """All requests in order of their numbers, or one; UsageError where its number was never given.

    Cost: the short rows alone are read; no chain is checked.
    """
    if only is None:
        ledger.refuse_newer()
    elif not 0 < only <= ledger.newest:
        raise UsageError(f"There is no request {only} in '{ledger.path}': "
                         + (f"the newest is {ledger.newest}." if ledger.newest else "it holds none yet."))  # fmt: skip
    found: dict[int, dict[str, Any]] = {}  # fields: a record for every event would cost more than the reading
    for event in ledger.events(only, kinds=ASKED_KINDS):
        try:
            if event.kind == "asked":
                found[event.request] = _asked(event)
            else:
                _after(found[event.request], event)
        except (KeyError, TypeError, ValueError):
            raise LedgerError(f"Row {event.seq} of the ledger '{ledger.path}' does not fit those before it, so that "
                              "another hand has written: 'repforget request audit' says which rows differ.") from None
    return tuple(Request(**found[number]) for number in sorted(found))


def _asked(event: Event) -> dict[str, Any]:
    body = event.body
    return {"id": event.request, "who": body["who"], "names": tuple(body["names"]), "source": body["source"],
            "basis": body["basis"], "asked": moment(event.at), "deadline": moment(body["deadline"]),
            "keep": body["keep"], "state": "kept" if body["keep"] else "open", "attempts": 0,
            "clock": event.clock}  # fmt: skip


def _after(fields: dict[str, Any], event: Event) -> None:
    """What one more event changes of a request."""
    fields["clock"] = fields["clock"] or event.clock
    body = event.body
    if event.kind == "started":
        fields["attempts"] += 1
    elif event.kind == "verdict":
        done = body["outcome"] in SUCCESS
        fields |= {"state": "done" if done else "tried", "outcome": body["outcome"], "reason": "", "rechecked": "",
                   "answered": moment(event.at) if done else None}  # fmt: skip
    elif event.kind == "failed":
        fields |= {"state": "tried", "outcome": "", "reason": body["reason"]}
    elif event.kind == "reverified":
        fields["rechecked"] = body["outcome"]
        if (fields["outcome"], body["outcome"]) == ("pass", "fail"):  # what was measured then holds no longer
            fields |= {"state": "tried", "answered": None}
    else:
        fields |= {"state": event.kind, "reason": body["reason"], "answered": moment(event.at)}


def until(text: str, now: datetime) -> datetime:
    """The deadline that ``30d``, ``72h``, ``2w`` from now or a date (its end, UTC) means; UsageError for another."""
    span = _SPAN.fullmatch(text.strip())
    if span:
        return now + timedelta(**{_UNITS[span[2]]: int(span[1])})
    try:
        day = datetime.strptime(text.strip(), "%Y-%m-%d").replace(tzinfo=UTC)
    except ValueError:
        raise UsageError(f"'{text}' is no deadline: write 30d, 72h, 2w or a date such as 2030-12-31.") from None
    return day + timedelta(days=1, microseconds=-1)
