"""The ledger of requests: an SQLite file that is only ever added to, each row carrying the hash of the one before.

Rows are events, never states; what a request's state is follows from its events (:mod:`repforget.requests.states`).
The hash over a row covers its content and the hash before it, so that a changed, missing or exchanged row is named by
its number.  No key is in it: who may write the file can cut its tail, put an older copy in its place or compute all
hashes anew, and only whoever kept a ``head`` elsewhere sees it.

Journal mode DELETE keeps the ledger one file: with WAL, rows that were acknowledged lie in a second file that a copy
may miss.  ``synchronous=EXTRA`` (FULL, and the folder synced when the journal goes) makes a commit outlive a power
loss: under FULL alone the journal may come back and take the last commit with it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import sqlite3
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from repforget.errors import LedgerError, ResourceError, UsageError
from repforget.store import _sync_folder, canonical

APPLICATION = 0x72666C67  # in the header of the file: a ledger, not any other database
SCHEMA = 1
START = "0" * 64  # the hash before the first row
WAIT = 5.0  # seconds for another process to end its write
KINDS = ("opened", "asked", "started", "edit", "shown", "verdict", "environment", "refused", "conflict", "failed",
         "reverified")  # fmt: skip
COLUMNS = "seq, request, kind, at, clock, body, before, hash"
TABLE = """CREATE TABLE events (seq INTEGER PRIMARY KEY, request INTEGER NOT NULL, kind TEXT NOT NULL, at TEXT NOT NULL,
clock TEXT NOT NULL, body TEXT NOT NULL, before TEXT NOT NULL, hash TEXT NOT NULL)"""
INDEX = "CREATE INDEX by_request ON events (request, seq)"
RULES = {
    "no_change": "CREATE TRIGGER no_change BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'rows stay'); END",
    "no_loss": "CREATE TRIGGER no_loss BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'rows stay'); END",
    "at_the_end": "CREATE TRIGGER at_the_end BEFORE INSERT ON events WHEN NEW.seq <> (SELECT ifnull(max(seq), 0) + 1 "
                  "FROM events) BEGIN SELECT RAISE(ABORT, 'rows are added at the end'); END",
}  # fmt: skip
PARTS = {"events": TABLE, "by_request": INDEX, **RULES}  # all that a ledger consists of
_HEAD = re.compile(r"\d+:[0-9a-f]{64}")


@dataclass(frozen=True)
class Event:
    """One row: what happened to which request (0: to the ledger itself), when by the clock (UTC), in which place.

    ``seq`` alone is the order; ``clock`` says where the time ran backwards.
    """

    seq: int
    request: int
    kind: str
    at: str
    clock: str
    body: Mapping[str, Any]
    before: str
    hash: str


def utc_now() -> datetime:
    return datetime.now(UTC)


def stamp(time: datetime) -> str:
    """The time as the ledger writes it: UTC, microseconds, sorting as text."""
    return time.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def moment(text: str) -> datetime:
    """The time of a stamp."""
    return datetime.fromisoformat(text)


def _hash(row: tuple[Any, ...]) -> str:
    """sha256 of (seq, request, kind, at, clock, body as text, hash before)."""
    return hashlib.sha256(json.dumps(row, separators=(",", ":"), default=repr).encode()).hexdigest()


def _text(body: Mapping[str, Any]) -> str:
    text = json.dumps(canonical(body), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode(errors="replace").decode()  # names of files may hold bytes that are no text


def folded(name: str) -> str:
    """A name without what does not tell people apart: blanks around it, capitals, the forms of a letter in Unicode."""
    return unicodedata.normalize("NFKC", name).strip().casefold()


class Ledger:
    """An open ledger: ``record`` adds an event, ``events`` reads them, ``faults`` checks the chain, ``head`` ends it.

    Make a file with :meth:`create`.  Opening refuses a file that is damaged, of something else or of a newer format
    (LedgerError), and one that another process holds for longer than ``wait`` seconds (ResourceError).
    """

    def __init__(self, path: str | Path, *, wait: float = WAIT, clock: Callable[[], datetime] = utc_now) -> None:
        self.path, self.wait, self.clock = Path(path), wait, clock
        if not self.path.is_file():
            raise LedgerError(f"There is no ledger '{path}': name another with --ledger, or make one with "
                              "'repforget request add'.")  # fmt: skip
        with self._speaking():
            self._base = sqlite3.connect(f"{self.path.absolute().as_uri()}?mode=rw", timeout=wait,
                                         isolation_level=None, uri=True)  # fmt: skip
            try:
                self._refuse_foreign()
                self._base.execute("PRAGMA journal_mode=DELETE")
                self._base.execute("PRAGMA synchronous=EXTRA")
            except BaseException:
                self._base.close()
                raise

    @classmethod
    def create(cls, path: str | Path, facts: Mapping[str, Any], *, clock: Callable[[], datetime] = utc_now) -> Ledger:
        """A new ledger whose first row holds ``facts`` and the salt of its pseudonyms; an existing file is opened.

        The file appears whole or not at all, and only its owner may read it.
        """
        path = Path(path)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(fresh, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            base = sqlite3.connect(fresh, isolation_level=None)
            base.executescript(";".join(("PRAGMA synchronous=EXTRA", "BEGIN", f"PRAGMA application_id={APPLICATION}",
                                         f"PRAGMA user_version={SCHEMA}", TABLE, INDEX,
                                         "")))  # fmt: skip
            for rule in RULES.values():
                base.execute(rule)
            _add(base, "opened", 0, {**facts, "salt": secrets.token_hex(16)}, clock())
            base.execute("COMMIT")
            base.close()
            with suppress(FileExistsError):  # another process was first: its ledger is the ledger
                os.link(fresh, path)
            _sync_folder(path.parent)
        except (OSError, sqlite3.Error) as error:
            raise ResourceError(f"The ledger '{path}' cannot be made ({error}): choose a place that you may write "
                                "to with --ledger.") from None  # fmt: skip
        finally:
            fresh.unlink(missing_ok=True)
        return cls(path, clock=clock)

    def record(self, kind: str, request: int, body: Mapping[str, Any]) -> Event:
        """Add one event at the end; when this returns it is on the disk.  ``request`` must have been asked before."""
        return self.record_all([(kind, body)], request)[-1]

    def record_all(
        self, events: Iterable[tuple[str, Mapping[str, Any]]], requests: int | Sequence[int] | None = None
    ) -> list[Event]:
        """Add events, the same for each of ``requests``, in one commit, all or none; without any they begin a new
        request."""
        events = list(events)
        with self.writing():
            newest = self.newest
            own = [newest + 1] if requests is None else [requests] if isinstance(requests, int) else requests
            unknown = [number for number in own if not 0 < number <= newest + (requests is None)]
            if unknown:
                raise UsageError(f"There is no request {unknown[0]} in '{self.path}': the newest is {newest}.")
            return [_add(self._base, kind, number, body, self.clock()) for number in own for kind, body in events]

    @contextmanager
    def writing(self) -> Iterator[None]:
        """One commit: no other process writes until the block ends, so that what it reads still holds when its rows
        are added; an error takes them all back."""
        if self._base.in_transaction:
            yield
            return
        with self._speaking():
            self._base.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._base.execute("COMMIT")
            except BaseException:
                if self._base.in_transaction:
                    self._base.execute("ROLLBACK")
                raise

    def events(self, request: int | None = None, *, kinds: Iterable[str] | None = None) -> Iterator[Event]:
        """Events in order, of one request or of all, of some kinds or of all."""
        wanted = () if kinds is None else tuple(kinds)
        where = ("1" if kinds is None else f"kind IN ({','.join('?' * len(wanted))})") + (
            "" if request is None else " AND request = ?")  # fmt: skip
        values = wanted if request is None else (*wanted, request)
        for seq, own, kind, at, clock, body, before, own_hash in self._rows(where, values):
            yield Event(seq, own, kind, at, clock, self._body(seq, body), before, own_hash)

    @cached_property
    def facts(self) -> Mapping[str, Any]:
        """What the first row says: the model that the ledger is about, the probe that names come from, the salt."""
        opened = next(self.events(0, kinds=("opened",)), None)
        if opened is None:
            raise LedgerError(f"The ledger '{self.path}' has lost its first row: restore a copy of it.")
        return opened.body

    def pseudonym(self, name: str) -> str:
        """A short salted hash of a name as it is :func:`folded`.

        The salt is in the ledger: who has both can test names against it.
        """
        salt = str(self.facts["salt"]).encode()
        return "#" + hmac.new(salt, folded(name).encode(errors="surrogatepass"), hashlib.sha256).hexdigest()[:16]

    @property
    def newest(self) -> int:
        """Number of the newest request, 0 before the first."""
        return int(next(self._rows_of("SELECT ifnull(max(request), 0) FROM events"))[0])

    @property
    def begun(self) -> bool:
        """Whether an answer to any request was ever begun."""
        return next(self._rows("kind = 'started' LIMIT 1", (), "seq"), None) is not None

    @property
    def head(self) -> str:
        """``<number of rows>:<hash of the last>``: kept elsewhere, it shows later whether rows at the end are gone."""
        seq, own_hash = next(self._rows("1 ORDER BY seq DESC LIMIT 1", (), "seq, hash"), (0, START))
        return f"{seq}:{own_hash}"

    def faults(self, expect_head: str | None = None) -> tuple[str, ...]:
        """What is wrong with the chain, one clause each, first to last; nothing where it is whole.

        ``expect_head`` is an earlier :attr:`head`; it must be in the chain.  Cost: one hash per row.  It does not show
        that what was written was true, nor, where no head was kept, a tail that is cut off or a chain that is written
        anew.  UsageError for a text that is no head.
        """
        if expect_head is not None and not _HEAD.fullmatch(expect_head):
            raise UsageError(f"'{expect_head}' is no head of a ledger: give the number of rows, a colon and 64 digits "
                             "of a hash, as 'repforget request show' and 'audit' print it.")  # fmt: skip
        found: list[str] = []
        parts = dict(self._rows_of("SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_stat%'"))
        found += [f"the {'rule' if name in RULES else 'part'} '{name}' of the ledger is missing or changed"
                  for name, part in PARTS.items() if parts.get(name) != part]  # fmt: skip
        found += [f"'{name}' in the file is no part of a ledger" for name in sorted(parts.keys() - PARTS.keys())]
        found += [f"the file: {text}" for (text,) in self._rows_of("PRAGMA integrity_check(3)") if text != "ok"]
        before, expected, hashes = START, 1, set[str]()
        for seq, *content, own_before, own_hash in self._rows("1", ()):
            if seq != expected:
                missing = f"row {expected} is" if seq == expected + 1 else f"rows {expected} to {seq - 1} are"
                found.append(f"{missing} missing")
            elif own_before != before:
                found.append(f"row {seq}: its link differs from the hash of row {seq - 1}")
            if _hash((seq, *content, own_before)) != own_hash:
                found.append(f"row {seq}: its content differs from its hash")
            before, expected = own_hash, seq + 1
            hashes.add(f"{seq}:{own_hash}")
        if expect_head is not None and expect_head not in hashes:
            found.append(f"the head '{expect_head[:24]}...' is not in the chain: rows at the end are missing or were "
                         "written again")  # fmt: skip
        return tuple(found)

    def refuse_broken(self) -> None:
        """LedgerError where the chain has a fault or a newer version has written: no model is changed by what another
        hand may have written, or by what is not understood."""
        self.refuse_newer()
        if found := self.faults():
            raise LedgerError(f"The chain of the ledger '{self.path}' is broken ({found[0]}): restore a copy that "
                              "'repforget request audit' finds whole.")  # fmt: skip

    def refuse_newer(self) -> None:
        """LedgerError where a row is of a kind that a newer version has added: what it changes is not known here."""
        unknown = f"kind NOT IN ({','.join('?' * len(KINDS))}) LIMIT 1"
        for seq, kind in self._rows(unknown, KINDS, "seq, kind"):
            raise LedgerError(f"Row {seq} of the ledger '{self.path}' is of the kind '{kind}', which this version of "
                              "repforget does not know: install a newer one.")  # fmt: skip

    def close(self) -> None:
        self._base.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _rows(self, where: str, values: tuple[Any, ...], columns: str = COLUMNS) -> Iterator[tuple[Any, ...]]:
        order = "" if "LIMIT" in where else " ORDER BY seq"
        return self._rows_of(f"SELECT {columns} FROM events WHERE {where}{order}", values)

    def _rows_of(self, query: str, values: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        with self._speaking():
            rows = self._base.execute(query, values).fetchall()
        return iter(rows)

    def _body(self, seq: int, text: str) -> Mapping[str, Any]:
        try:
            body = json.loads(text)
        except ValueError:
            body = None
        if not isinstance(body, dict):
            raise LedgerError(f"Row {seq} of the ledger '{self.path}' cannot be read, so that another hand has written "
                              "it: 'repforget request audit' says which rows differ.")  # fmt: skip
        return body

    def _refuse_foreign(self) -> None:
        self._base.execute("BEGIN")  # while it reads, no process writes into the file
        number, version, pages, size = (self._base.execute(f"PRAGMA {name}").fetchone()[0]
                                        for name in ("application_id", "user_version", "page_count",
                                                     "page_size"))  # fmt: skip
        missing = pages * size - self.path.stat().st_size
        self._base.execute("COMMIT")
        if number != APPLICATION:
            raise LedgerError(f"'{self.path}' is no ledger of requests (an empty file, or a database of something "
                              "else): name the right file with --ledger.")  # fmt: skip
        if version > SCHEMA:
            raise LedgerError(f"The ledger '{self.path}' has format {version} and this version of repforget reads "
                              f"{SCHEMA}: install a newer one.")  # fmt: skip
        if missing > 0:  # SQLite itself reads a page that is cut off as zeros
            raise LedgerError(f"The ledger '{self.path}' is damaged ({missing} bytes at its end are missing): restore "
                              "a copy of it.")  # fmt: skip

    @contextmanager
    def _speaking(self) -> Iterator[None]:
        """Turn what SQLite says into one sentence."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            text = str(error)
            if "locked" in text:
                raise ResourceError(f"The ledger '{self.path}' is being written by another process, which did not end "
                                    f"within {self.wait:g} s: 'fuser {self.path}' names it; run the command again when "
                                    "it has ended.") from None  # fmt: skip
            if isinstance(error, sqlite3.OperationalError):
                raise ResourceError(f"The ledger '{self.path}' cannot be read or written ({text}): check the disk and "
                                    "the rights on the file and its folder.") from None  # fmt: skip
            if isinstance(error, sqlite3.IntegrityError):
                raise LedgerError(f"The ledger '{self.path}' refused the row ({text}).") from None
            raise LedgerError(f"The ledger '{self.path}' is damaged or no ledger ({text}): restore a copy of it; "
                              "'--expect-head' shows whether the copy is complete.") from None  # fmt: skip


def _add(base: sqlite3.Connection, kind: str, request: int, body: Mapping[str, Any], now: datetime) -> Event:
    """Insert one row behind the last; refuses to write behind a last row that was changed."""
    if kind not in KINDS:
        raise UsageError(f"An event of the kind '{kind}' is not known: use one of {', '.join(KINDS)}.")
    last = base.execute(f"SELECT {COLUMNS} FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    if last is not None and _hash(last[:-1]) != last[-1]:
        raise LedgerError(f"Row {last[0]} of the ledger was changed after it was written, so that nothing is added "
                          "behind it: restore a copy that 'repforget request audit' finds whole.")  # fmt: skip
    seq, before, clock = (1, START, "") if last is None else (last[0] + 1, last[-1], _backwards(last[3], now))
    row = (seq, request, kind, stamp(now), clock, _text(body), before)
    event = Event(*row[:5], json.loads(row[5]), before, _hash(row))
    if base.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, event.hash)).rowcount != 1:
        raise LedgerError("The file of the ledger takes no rows, so that another hand has changed it: 'repforget "
                          "request audit' names what does not belong to it.")  # fmt: skip
    return event


def _backwards(last: str, now: datetime) -> str:
    seconds = (moment(last) - now).total_seconds()
    return f"backwards by {seconds:.6g} s" if seconds > 0 else ""
