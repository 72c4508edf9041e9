"""The audit: what was asked, when, what was done and shown and not shown, for whoever has to account for it.

Everything comes from the ledger alone.  No name, reference or text of a record is in it unless asked for, and only
words that a theorem allows where it allows them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

from repforget.discover import method
from repforget.errors import LedgerError, UnknownNameError
from repforget.guarantee import Guarantee, unearned
from repforget.report.tables import level, share
from repforget.requests.ledger import Event, Ledger, moment
from repforget.requests.sharded import SCHEME
from repforget.requests.states import BASES, WAITING, Request, requests

Rows = tuple[tuple[str, str], ...]
LEFT_OUT = "(left out: it uses a word that only a theorem allows)"
MEASURED = ("measure", "before (ceiling)", "never knew (floor)", "after", "share left", "at most", "allowed", "outcome")
NOT_SHOWN = (
    "A pass says what was tried, with which budget; it does not show that no other attack works. It says nothing about "
    "what other records left in the training data say of the same, about copies, backups and earlier versions of the "
    "model, about which of them is in use, or about systems that store the data outside the model."
)
NOT_SHOWN_EXACT = (
    "The theorem is about this training and these records. It says nothing about what the base model or other records "
    "know of the same, about copies, backups and earlier versions of the model, about which of them is in use, or "
    "about systems that store the data outside the model."
)
HOW_TO_READ = (
    "Answered by measurement: the attacks that were tried found no more knowledge than allowed, which is no proof that "
    "none is left. Answered by theorem: what is stated holds if what it assumes is true. In force is an edit that is "
    "part of the model of this ledger; which model is in use, and whether an answer is what the law asks for, is for "
    "people to see to."
)
NOTHING_SHOWN = "Nothing was done to the model for this request, so that nothing was shown."
UNSEEN = (
    "Every row fits the one before it, and none is missing between them. That alone does not show rows cut off at the "
    "end, an older copy of the file or one that was written anew: only a head kept elsewhere does."
)
SEEN = (
    "Its rows up to {} are those of which the head was kept; of later ones it shows no more than that they fit each "
    "other."
)
STANDING = {
    "pass": "Answered by measurement: the edit passed its verification.",
    "exact": "Answered by theorem: if what it assumes is true, the model is as one never trained on the records.",
    "fail": "Not answered: the edit failed its verification and is not in force.",
    "inconclusive": "Not answered: the edit is in force, and its verification could not decide.",
}
CAME_BACK = "No longer answered: checked again after a later request, too much of the knowledge had come back."
UNDECIDED = " Checked again after a later request, it could not be decided whether that still holds."
MODES = {
    "sequential": "made on the model that the edits of earlier requests left",
    "union": "one new edit of the model for everything that was asked so far",
    "sharded": "all adapters of the training, those that had seen the records trained again without them",
}


@dataclass(frozen=True)
class Section:
    """One request in words; ``own`` holds what is shown only when asked for."""

    request: Request
    standing: str
    good: str  # pass, fail or inconclusive: how the standing is marked
    facts: Rows
    done: tuple[str, ...]
    shown: tuple[str, ...]
    measures: tuple[tuple[str, ...], ...]
    not_shown: str
    theorem: Rows
    again: tuple[str, ...]
    environment: Rows
    own: Rows = ()


@dataclass(frozen=True)
class Audit:
    """The state of a ledger at one time; ``faults`` are those of its chain, ``head`` its end, ``kept`` the head that
    was expected."""

    model: str
    made: datetime
    head: str
    faults: tuple[str, ...]
    sections: tuple[Section, ...]
    counts: Rows = field(default=())
    kept: str | None = None

    @property
    def rows(self) -> int:
        return int(self.head.partition(":")[0])

    @property
    def sentence(self) -> str:
        if not self.faults:
            return f"The chain of {self.rows} rows is whole. " + (UNSEEN if self.kept is None else SEEN.format(
                self.kept.partition(":")[0]))  # fmt: skip
        more = f" (and {len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
        return f"The chain is BROKEN: {self.faults[0]}{more}. What follows is what the rows say now."


def audit(ledger: Ledger, expect_head: str | None = None) -> Audit:
    """Check the chain and put every request into words.

    A row that can no longer be read leaves the report without sections, and its fault named.  Cost: reads the ledger
    once and hashes every row; no model is loaded.
    """
    now, faults = ledger.clock(), ledger.faults(expect_head)
    try:
        found = requests(ledger)
        events: dict[int, list[Event]] = {}
        for event in ledger.events():
            events.setdefault(event.request, []).append(event)
        later = _later(found, events)
        sections = tuple(_section(request, events[request.id], now, later.get(request.id, ())) for request in found)
        model = str(ledger.facts["model"])
    except (LedgerError, KeyError, ValueError, TypeError) as error:
        if not faults and isinstance(error, LedgerError):
            raise
        if not faults:
            raise LedgerError(f"The rows of the ledger '{ledger.path}' say what this version of repforget does not "
                              f"know ({type(error).__name__}: {error}): install a newer one.") from None  # fmt: skip
        return Audit("unknown", now, ledger.head, (*faults, f"requests cannot be read ({error})"), ())
    return Audit(model, now, ledger.head, faults, sections, _counts(found, now), expect_head)


def _counts(found: Sequence[Request], now: datetime) -> Rows:
    counted = {
        "asked": len(found), "answered in time": sum(r.state == "done" and not r.late for r in found),
        "answered late": sum(r.state == "done" and r.late for r in found),
        "to be answered": sum(r.state in WAITING and not r.overdue(now) for r in found),
        "overdue": sum(r.overdue(now) for r in found), "refused": sum(r.state == "refused" for r in found),
        "in conflict": sum(r.state == "conflict" for r in found), "to keep": sum(r.state == "kept" for r in found),
    }  # fmt: skip
    return tuple((name, str(n)) for name, n in counted.items())


def _later(found: Sequence[Request], events: Mapping[int, Sequence[Event]]) -> dict[int, list[str]]:
    """What later requests mean for earlier ones, where the rows of those do not say it."""
    told: dict[int, list[str]] = {}
    for request in found:
        if not request.keep and request.state != "refused":
            for earlier in events[request.id][0].body.get("against", ()):
                told.setdefault(earlier, []).append(
                    f"Request {request.id} asks to forget some of it: a person has to decide.")
    edit: Event | None = None
    newest: tuple[int, int, Sequence[int]] = (0, 0, ())  # of the edit made last: its row, its request, what it covers
    for event in sorted((event for own in events.values() for event in own), key=lambda event: event.seq):
        if event.kind == "edit":
            edit = event
        elif event.kind == "verdict" and event.body["in_force"] and edit is not None:
            newest = event.seq, event.request, edit.body["covers"]
    for request in found:
        checked = max((e.seq for e in events[request.id] if e.kind in ("verdict", "reverified")), default=0)
        if request.outcome == "pass" and checked < newest[0] and request.id not in newest[2]:
            told.setdefault(request.id, []).append(
                f"Not checked again since request {newest[1]} changed the model ('repforget request check').")
    return told


def _section(request: Request, events: Sequence[Event], now: datetime, later: Sequence[str]) -> Section:
    last: dict[str, Mapping[str, Any]] = {event.kind: event.body for event in events}
    verdict, edit = last.get("verdict"), last.get("edit")
    if request.state in ("refused", "conflict"):
        verdict = edit = None
    theorem = _guarantee(verdict, edit)
    held = [theorem] if theorem else []
    shown: list[str] = [] if verdict is None else [f"Verdict: {verdict['sentence']}"]
    claims = last.get("shown", {}).get("claims", ()) if verdict is not None and "shown" in last else ()
    if verdict is not None and not verdict["controls_ok"]:
        shown.append("A control came out wrong, so that the measures cannot be trusted.")
    if verdict is not None and not claims:
        shown += ["Nothing was measured: what holds, holds by the theorem below.", *verdict.get("notes", ())]
    standing, good = _standing(request, now)
    return Section(
        request, earned(standing, held), good, _facts(request, events, now),
        tuple(earned(text, held) for text in _done(request, verdict, edit, held)),
        tuple(earned(text, held) for text in shown), tuple(_measure(c) for c in claims if _counts_in(c)),
        NOTHING_SHOWN if verdict is None else NOT_SHOWN_EXACT if theorem and not claims else NOT_SHOWN,
        () if theorem is None else theorem.lines(), tuple(earned(text, held) for text in (*_again(events), *later)),
        _environment(last.get("environment")), _own(request),
    )  # fmt: skip


def earned(text: str, guarantees: Iterable[Guarantee]) -> str:
    """``text``, or a note that it was left out because of words that no theorem allows here."""
    return LEFT_OUT if unearned(text, guarantees) else text


def _guarantee(verdict: Mapping[str, Any] | None, edit: Mapping[str, Any] | None) -> Guarantee | None:
    bodies = (body.get("guarantee") for body in (verdict, edit) if body is not None)
    return next((Guarantee.from_json(body) for body in bodies if body is not None), None)


def _standing(request: Request, now: datetime) -> tuple[str, str]:
    if request.state == "refused":
        return f"Refused: {request.reason}", "inconclusive"
    if request.state == "conflict":
        return f"In conflict: {request.reason}", "inconclusive"
    if request.state == "kept":
        return "To be kept: no request to forget it was there before.", "pass"
    late = request.overdue(now)
    mark, before = "pass" if request.state == "done" else "fail" if late else "inconclusive", "Overdue. " * late
    if request.state == "tried" and request.outcome == "pass":
        return before + CAME_BACK, "fail"
    if request.outcome:
        doubt = UNDECIDED if (request.outcome, request.rechecked) == ("pass", "inconclusive") else ""
        return before + STANDING[request.outcome] + doubt, "inconclusive" if doubt else mark
    if request.reason:
        return f"{before}Not answered, the last attempt ended with an error: {request.reason}", mark
    return f"{before}To be answered: {'an attempt was begun' if request.attempts else 'nothing was done yet'}.", mark


def _facts(request: Request, events: Sequence[Event], now: datetime) -> Rows:
    count = len(request.names)
    about = f"{count} name{'s' * (count > 1)} in" if request.names else "all that is to be forgotten of"
    kind = "the training" if request.source.startswith(SCHEME) else "the probe"
    basis = request.basis if request.basis in BASES else "in own words (hidden)"
    facts = [
        ("taken down", _time(request.asked)), ("deadline", f"{_time(request.deadline)}; {_met(request, now)}"),
        ("basis", basis), ("about", f"{about} {kind} '{Path(request.source.removeprefix(SCHEME)).name}'"),
        ("attempts", str(request.attempts)), ("rows of the ledger", ", ".join(str(event.seq) for event in events)),
    ]  # fmt: skip
    if not request.keep and (against := events[0].body.get("against")):
        numbers = ", ".join(map(str, against))
        facts.append(("against it", f"request {numbers} asks to keep some of it: a person has to decide"))
    if request.clock:
        facts.append(("clock", f"a time in these rows went {request.clock}; the order of the rows counts"))
    return tuple(facts)


def _met(request: Request, now: datetime) -> str:
    """Whether the deadline was met, in words."""
    if request.keep:
        return "a request to keep has none to meet"
    if request.answered is not None:
        return f"{'missed' if request.late else 'met'}: answered {_time(request.answered)}, " + (
            f"{_span(request.answered - request.deadline)} {'late' if request.late else 'before it'}")  # fmt: skip
    return f"{'missed: overdue by' if request.overdue(now) else 'not yet:'} {_span(request.deadline - now)}" + (
        "" if request.overdue(now) else " left")  # fmt: skip


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC")


def _span(span: timedelta) -> str:
    hours = abs(span.total_seconds()) / 3600
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.1f} days"


def _done(
    request: Request, verdict: Mapping[str, Any] | None, edit: Mapping[str, Any] | None, held: Sequence[Guarantee]
) -> list[str]:
    """What was done to the model, in plain words."""
    if verdict is None:
        return ["Nothing was done to the model."]
    if edit is None:
        return ["All records of the training were taken out: the base model is what is left."]
    name = str(edit["method"])
    summary = _summary(name)
    kind = "Weights" if edit["artifact"] == "weights" else "Weights and states at run time"
    tried = "" if verdict["in_force"] else "Tried, and not kept, so that the model does not have it: "
    lines = [f"{tried}{kind} of the model were changed in {edit['touched']} places by the method {name}"
             + (f" ({summary.rstrip('.')})." if summary and not unearned(summary, held) else "."),
             f"The edit is {MODES.get(edit['mode'], edit['mode'])}; its digest is {edit['digest'][:16]}."]  # fmt: skip
    if edit["artifact"] != "weights":
        lines.append("Part of it acts while the model runs: it is gone for whoever holds the weights.")
    others = [number for number in edit["covers"] if number != request.id]
    if others:
        lines.append(f"It also answers request {', '.join(map(str, others))}: what was shown is about all of them "
                     "together, and a request with few names may differ from the rest.")  # fmt: skip
    return lines


@cache
def _summary(name: str) -> str:
    """What an editor does, in its own first line; nothing where it is not installed here."""
    try:
        return method("edit", name).summary
    except UnknownNameError:
        return ""


def _counts_in(claim: Mapping[str, Any]) -> bool:
    return claim["status"] in ("pass", "fail", "inconclusive")


def _measure(claim: Mapping[str, Any]) -> tuple[str, ...]:
    """One measure in words; for what must stay the floor is empty and the share is of quality lost."""
    verifier, _, measure = str(claim["name"]).partition(".")
    words = f"{verifier}: {measure}".replace("_", " ") + ("" if claim["kind"] == "knowledge" else " (must stay)")
    lost = "" if claim["kind"] == "knowledge" else " lost"
    return (words, level(claim["original"]), level(claim["floor"]), level(claim["edit"]), share(claim["rho"]) + lost,
            share(claim["rho_high"]), share(claim["margin"]), str(claim["status"]))  # fmt: skip


def _again(events: Sequence[Event]) -> list[str]:
    return [f"Checked again on {_time(moment(event.at))}, after request {event.body.get('after', '?')}: "
            f"{event.body['outcome']}. {_came_back(event.body)}" for event in events
            if event.kind == "reverified"]  # fmt: skip


def _came_back(body: Mapping[str, Any]) -> str:
    """What was found when a request was checked again, in words."""
    if "came_back" in body:
        return (f"Of what the model knew before any request {share(body['came_back'])} came back since this one was "
                f"answered (limits {share(body['low'])} to {share(body['high'])}); it was asked and not attacked.")
    if "reason" in body:
        return str(body["reason"])
    if body.get("together"):
        return "The edit made then replaces the one for this request, and this is its verdict for all that it covers."
    return ""


def _environment(body: Mapping[str, Any] | None) -> Rows:
    if body is None:
        return ()
    versions = ", ".join(f"{name} {version}" for name, version in body.get("versions", {}).items())
    facts = (("versions", versions), ("python", body.get("python")), ("device", body.get("device")),
             ("base model", body.get("model_fingerprint")), ("code", body.get("git")))  # fmt: skip
    return tuple((name, str(value)) for name, value in facts if value)


def _own(request: Request) -> Rows:
    """What identifies; shown only when asked for."""
    own = (("asked by", request.who), ("names", ", ".join(request.names)),
           ("basis", "" if request.basis in BASES else request.basis))  # fmt: skip
    return tuple((name, value) for name, value in own if value)
