"""Edits in force: which, in which order, and the model that they make together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from repforget.errors import LedgerError, UsageError
from repforget.requests.ledger import Event, Ledger
from repforget.store import Store, refusing

if TYPE_CHECKING:
    from repforget.artifact import Edit


@dataclass(frozen=True)
class Placed:
    """An edit in force: the row that says so, the requests it covers, its folder and digest."""

    seq: int
    covers: tuple[int, ...]
    path: Path
    digest: str
    hooked: bool
    sharded: bool  # all adapters of a sharded training, on its base


def workplace(ledger: Ledger) -> Path:
    """The folder beside the ledger that holds runs, edits and the model in force: its whole name with ".files".

    Earlier versions dropped the ledger's suffix, so that two ledgers might share a folder; a ledger that has such a
    folder for itself keeps it.  LedgerError where two have.
    """
    path = ledger.path
    own, old = path.with_name(f"{path.name}.files"), path.with_suffix(".files")
    if own.exists() or not old.is_dir() or not ledger.begun:
        return own
    for other in path.parent.iterdir():
        if other != path and other.is_file() and other.with_suffix(".files") == old and _claims(other):
            raise LedgerError(f"The folder '{old}' holds edits of the ledgers '{path.name}' and '{other.name}', which "
                              f"an earlier version put there: copy it to '{own.name}'.")  # fmt: skip
    return old


def _claims(path: Path) -> bool:
    """Whether a file is a ledger whose edits lie where earlier versions put them."""
    if path.with_name(f"{path.name}.files").exists():
        return False
    try:
        with Ledger(path) as other:
            return other.begun
    except LedgerError:
        return False


def opened(ledger: Ledger, note: Callable[[str], None]) -> Store:
    """The workplace, made where there is none and closed to others; ``note`` is told where that cannot be."""
    root = workplace(ledger)
    with refusing(root):
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if root.stat().st_mode & 0o077:
        try:
            root.chmod(0o700)
        except OSError as error:
            note(f"Others than its owner may read '{root}', which holds texts while a run lasts, and that cannot be "
                 f"changed ({error.strerror}): have its owner do so.")  # fmt: skip
        else:
            note(f"'{root}' was open to others than its owner and no longer is.")
    return Store(root, note=note)


def in_force(ledger: Ledger, request: int | None = None) -> tuple[Placed, ...]:
    """The edits in force, in the order in which they are applied: now, or after the last answer to ``request``."""
    rows = {event.seq: event for event in ledger.events(kinds=("edit", "verdict"))}
    stack: tuple[int, ...] = ()
    newest: dict[int, Event] = {}
    for event in rows.values():
        if event.kind == "edit":
            newest[event.request] = event
        elif event.body["in_force"] and (request is None or event.request == request):
            edit = newest.get(event.request)  # none where nothing is left of a training: its base alone
            stack = () if edit is None else (*edit.body["under"], edit.seq)
    root = workplace(ledger)
    return tuple(Placed(seq, tuple(rows[seq].body["covers"]), root / rows[seq].body["path"], rows[seq].body["digest"],
                        rows[seq].body["artifact"] != "weights", rows[seq].body["mode"] == "sharded")
                 for seq in stack)  # fmt: skip


def composed(ledger: Ledger, request: int) -> Edit:
    """The edit of the ledger's model that answers requests 1 to ``request``: everything in force after its answer.

    ``composed(ledger, n).applied_to(load(ledger.facts["model"]))`` is the model of that time, so that the requests
    before can be checked again.  UsageError where no edit of the request is in force; LedgerError where a saved edit
    is not the one that was recorded.  Cost: the edits are read; no forward pass.
    """
    stack = in_force(ledger, request)
    if not stack:
        raise UsageError(f"No edit of request {request} is in force: 'repforget request show {request}' says what "
                         "became of it.")  # fmt: skip
    return piled_up(stack)


def sequence(ledger: Ledger) -> Iterator[tuple[int, Edit]]:
    """(number, :func:`composed` edit) of every request with an edit in force, in the order of their last answers."""
    answered = [event.request for event in ledger.events(kinds=("verdict",)) if event.body["in_force"]]
    for number in reversed(dict.fromkeys(reversed(answered))):
        if in_force(ledger, number):
            yield number, composed(ledger, number)


def piled_up(stack: Sequence[Placed]) -> Edit:
    from repforget.artifact import load_edit

    edits = []
    for placed in stack:
        if not placed.path.is_dir():
            raise LedgerError(f"The edit that row {placed.seq} of the ledger records is no longer in '{placed.path}': "
                              "restore that folder from a copy.")  # fmt: skip
        edit = load_edit(placed.path)
        if edit.digest != placed.digest:
            raise LedgerError(f"The edit in '{placed.path}' is not the one that row {placed.seq} of the ledger records"
                              ": restore it from a copy.")  # fmt: skip
        edits.append(edit)
    return reduce(lambda first, second: first.then(second, stacked=True), edits)
