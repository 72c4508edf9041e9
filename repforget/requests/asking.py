"""A request taken down: who asks (as a pseudonym), for what (by reference), why, and until when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repforget.errors import UsageError
from repforget.requests import matching
from repforget.requests.ledger import Event, Ledger, folded, stamp
from repforget.requests.sharded import SCHEME
from repforget.requests.states import BASES, DEADLINE, Request, requests, until

MODEL, SOURCE = "organism:bios", "bios-people"


def opened(path: str | Path, model: str | None, source: str) -> Ledger:
    """The ledger at ``path``, made where there is none; UsageError where it is about another model.

    A new one is made only for a model and a source that can be found: its first row stays.  Of a sharded training the
    model is its base.
    """
    if not Path(path).exists():
        from repforget.models._files import locate

        if model is None and source.startswith(SCHEME):
            from repforget.shards import opened as training

            model = str(training(source.removeprefix(SCHEME)).base["model"])
        model = model or MODEL
        locate(model)
        matching.named(source)
        ledger = Ledger.create(path, {"model": model, "source": source})  # or that which another process has made
    else:
        ledger = Ledger(path)
    own = str(ledger.facts["model"])
    if model not in (None, own):
        ledger.close()
        raise UsageError(f"The ledger '{path}' is about '{own}', not '{model}': leave --model out, or give another "
                         "--ledger.")  # fmt: skip
    return ledger


def ask(
    ledger: Ledger, names: Sequence[str] = (), *, source: str | None = None, who: str = "", named: bool = False,
    basis: str = "erasure", deadline: str = DEADLINE, keep: bool = False,
) -> tuple[Request, str]:  # fmt: skip
    """Record a request to forget (or to ``keep``) and return it as it stands then, with a hint where a name is unknown
    or an earlier request asks to keep some of it.

    ``names`` are ids or clusters of records in ``source`` (a probe, or "training:FOLDER"); none means the whole forget
    set of a probe.  ``who`` becomes a salted hash unless ``named``; names and texts of the source are blotted out of
    ``basis``.  What means nothing is recorded and refused at
    once; to keep what an earlier request covers is recorded as a conflict with that request's number.
    """
    source = source or str(ledger.facts["source"])
    if not names and source.startswith(SCHEME):
        raise UsageError("A request about a training names records or clusters: give their names.")
    known = matching.named(source)
    kept = matching.references(names, known, ledger.pseudonym)
    index = matching.index(known, ledger.pseudonym)
    unknown = matching.matched(kept, index)[1]
    who, basis = _printable(who), _printable(basis)
    if basis not in BASES:
        basis = matching.hidden(basis, known if named else [*known, matching.Named("", (who,), ())])
    now = ledger.clock()
    due = until(deadline, now)
    body = {"who": who if named or not who else ledger.pseudonym(who), "names": kept, "source": source,
            "basis": basis, "deadline": stamp(due), "keep": keep}  # fmt: skip
    told = ["Its deadline has passed already."] if due <= now and not keep else []
    told += matching.other_spellings(names, kept, known)
    if unknown:
        reason = matching.meaningless(unknown, len(kept), source)
        made = ledger.record_all([("asked", body), ("refused", {"reason": reason})])
        everyone = {folded(name) for entry in known for name in entry.names}
        told.append(matching.hint(next(name for name in names if folded(name) not in everyone), known))
    else:
        made = _settled(ledger, body, told)
    return requests(ledger, made[0].request)[0], " ".join(filter(None, told))


def _printable(text: str) -> str:
    """The text without what would steer a terminal."""
    return "".join(sign if sign.isprintable() else " " for sign in text).strip()


def _settled(ledger: Ledger, body: dict[str, Any], told: list[str]) -> list[Event]:
    """Record a request beside those that say the opposite, which no other process can add to meanwhile."""
    keep, source = body["keep"], body["source"]
    known: dict[str, matching.Index | None] = {}

    def opposite() -> list[Request]:
        found = [r for r in requests(ledger) if r.keep != keep and r.state not in ("refused", "conflict")]
        for each in {source, *(r.source for r in found)} - known.keys() if found else ():
            known[each] = matching.readable(each, ledger.pseudonym)
        return found

    opposite()  # reads the sources, so that other writers wait for the comparison alone
    with ledger.writing():
        others = opposite()
        against, unread = matching.overlapping(source, body["names"], others, known)
        numbers, dark = ", ".join(map(str, against)), ", ".join(map(str, unread))
        reasons = [f"Some of it is to be {'forgotten' if keep else 'kept'} by request {numbers}: a person has to "
                   "decide."] if against else []  # fmt: skip
        reasons += [f"The source of request {dark} cannot be read, so that nobody knows whether it asks for the "
                    "opposite."] if unread else []  # fmt: skip
        if keep and reasons:
            conflict = {"with": [*against, *unread], "reason": " ".join(reasons)}
            return ledger.record_all([("asked", {**body, "against": against}), ("conflict", conflict)])
        told += reasons
        return ledger.record_all([("asked", {**body, "against": against})])


def split(given: Sequence[str], source: str) -> tuple[str, ...]:
    """Names as they were typed: one per option, or several with commas between."""
    known = {folded(name) for entry in matching.named(source) for name in entry.names}
    names = [part.strip() for text in given for part in ([text] if folded(text) in known else text.split(","))]
    return tuple(dict.fromkeys(name for name in names if name))
