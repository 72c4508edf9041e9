"""A request taken down: who asks (as a pseudonym), for what (by reference), why, and until when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from repforget.errors import UsageError
from repforget.knowledge_files import load_knowledge
from repforget.requests import matching
from repforget.requests.ledger import Ledger, stamp
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
        return Ledger.create(path, {"model": model, "source": source})
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
        raise UsageError("A request about a training names records or clusters: give --what.")
    known = matching.named(source)
    kept = matching.references(names, known, ledger.pseudonym)
    ids, unknown = matching.matched(kept, matching.index(known, ledger.pseudonym))
    if not kept:
        ids = tuple(item.id for item in load_knowledge(source).forget)
    basis = basis.strip()
    basis = basis if basis in BASES else matching.hidden(basis, known)
    body = {"who": who if named or not who else ledger.pseudonym(who), "names": kept, "source": source,
            "basis": basis, "deadline": stamp(until(deadline, ledger.clock())), "keep": keep}  # fmt: skip
    events: list[tuple[str, dict[str, object]]] = [("asked", body)]
    told = ""
    if unknown:
        events.append(("refused", {"reason": matching.meaningless(unknown, len(kept), source)}))
        everyone = {name for entry in known for name in entry.names}
        told = matching.hint(next(name for name in names if name not in everyone), known)
    else:
        others = [r for r in requests(ledger) if r.keep != keep and r.state not in ("refused", "conflict")]
        against = matching.overlapping(ledger, ids, others)
        numbers = ", ".join(map(str, against))
        if keep and against:
            reason = f"Some of it is to be forgotten by request {numbers}: a person has to decide."
            events.append(("conflict", {"with": against, "reason": reason}))
        elif against:
            told = f"Some of it is to be kept by request {numbers}: a person has to decide."
        body["against"] = list(against)
    number = ledger.record_all(events)[0].request
    return requests(ledger, number)[0], told


def split(given: Sequence[str], source: str) -> tuple[str, ...]:
    """Names as they were typed: one per option, or several with commas between."""
    known = {name for entry in matching.named(source) for name in entry.names}
    names = [part.strip() for text in given for part in ([text] if text in known else text.split(","))]
    return tuple(dict.fromkeys(name for name in names if name))
