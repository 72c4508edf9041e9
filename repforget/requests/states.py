"""What the events of the ledger say about each request: asked, answered, late, refused, in conflict."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Literal

from repforget.errors import UsageError
from repforget.requests.ledger import Event, Ledger, moment

# open: nobody has tried; tried: an attempt ended without success (it may be run again); done: judged a pass, or equal
# by theorem to never having been trained on; kept: a request to keep something that nothing speaks against.
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
    found: dict[int, Request] = {}
    for event in ledger.events(only, kinds=ASKED_KINDS):
        found[event.request] = _asked(event) if event.kind == "asked" else _after(found[event.request], event)
    if only is not None and not found:
        newest = ledger.newest
        raise UsageError(f"There is no request {only} in '{ledger.path}': "
                         + (f"the newest is {newest}." if newest else "it holds none yet."))  # fmt: skip
    return tuple(found[number] for number in sorted(found))


def _asked(event: Event) -> Request:
    body = event.body
    return Request(event.request, body["who"], tuple(body["names"]), body["source"], body["basis"], moment(event.at),
                   moment(body["deadline"]), body["keep"], "kept" if body["keep"] else "open",
                   clock=event.clock)  # fmt: skip


def _after(request: Request, event: Event) -> Request:
    """The request after one more event."""
    request = replace(request, clock=request.clock or event.clock)
    body, at = event.body, moment(event.at)
    if event.kind == "started":
        return replace(request, attempts=request.attempts + 1)
    if event.kind == "verdict":
        done = body["outcome"] in SUCCESS
        return replace(request, state="done" if done else "tried", outcome=body["outcome"], reason="",
                       answered=at if done else None)  # fmt: skip
    if event.kind == "failed":
        return replace(request, state="tried", outcome="", reason=body["reason"])
    if event.kind == "reverified":
        return replace(request, rechecked=body["outcome"])
    return replace(request, state="refused" if event.kind == "refused" else "conflict", reason=body["reason"],
                   answered=at)  # fmt: skip


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


def waiting(found: Iterable[Request]) -> tuple[Request, ...]:
    """Those that still need an answer."""
    return tuple(request for request in found if request.state in WAITING)
