"""The requests under somebody who wants them to break: two processes at once, files moved, odd names, newer rows."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from request_tools import PEOPLE, FakeLoop
from test_requests_run import _answer, _ask, _clusters, base, book, fake, probe, quick  # noqa: F401

from repforget import loop
from repforget.errors import LedgerError, ResourceError, UsageError
from repforget.knowledge_files import load_knowledge
from repforget.requests import asking, ledger, listing, matching, page
from repforget.requests.audit import audit
from repforget.requests.ledger import Ledger, stamp
from repforget.requests.run import Order, answer, composed, in_force, workplace
from repforget.requests.stack import opened
from repforget.requests.states import requests, until

Cli = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize("keep", [True, False])
def test_of_two_processes_that_ask_for_the_opposite_one_is_told_of_the_other(
    book: Ledger, monkeypatch: pytest.MonkeyPatch, keep: bool  # noqa: F811
) -> None:
    """The other asks between the reading of the sources and the writing of the row."""
    writing = Ledger.writing

    def interleaved(self: Ledger) -> Any:
        monkeypatch.setattr(Ledger, "writing", writing)
        with Ledger(book.path) as other:
            assert asking.ask(other, ["f03"], keep=not keep)[0].state == ("open" if keep else "kept")
        return writing(self)

    monkeypatch.setattr(Ledger, "writing", interleaved)
    made, told = asking.ask(book, ["f03-live"], keep=keep)
    assert made.id == 2 and "by request 1: a person has to decide" in (made.reason if keep else told)
    assert made.state == ("conflict" if keep else "open")


def test_while_one_decides_no_other_writes_and_an_error_takes_all_back(book: Ledger) -> None:  # noqa: F811
    head = book.head
    with pytest.raises(KeyboardInterrupt), book.writing():
        _ask(book, "f03")
        with Ledger(book.path, wait=0.05) as other, pytest.raises(ResourceError, match="being written"):
            _ask(other, "f04")
        raise KeyboardInterrupt
    assert book.head == head and _ask(book, "f04") == 1


def test_a_request_whose_source_is_gone_is_compared_by_its_names_and_said_not_to_be_known(
    book: Ledger, probe: Path, tmp_path: Path  # noqa: F811
) -> None:
    copy = matching.write_probe(load_knowledge(probe), tmp_path / "copy")
    _ask(book, "f01", source=str(copy))
    shutil.rmtree(copy)
    for name, reason in (("f01", "to be forgotten by request 1"), ("f02", "source of request 1 cannot be read")):
        made, _ = asking.ask(book, [name], keep=True)
        assert made.state == "conflict" and reason in made.reason
    assert asking.ask(book, ["f05"])[0].state == "open"


@pytest.mark.parametrize(("source", "names", "said"), [
    ("training:t", ("p3-city#s0",), ([7], [])), ("training:t", ("p4-city#s0",), ([], [])),
    ("people", ("p3-job",), ([], [])), ("people", ("p3-city",), ([7], [])), ("people", (), ([7], [])),
    ("gone", ("p3-city",), ([], [7])), ("gone", ("p3",), ([7], [])),
])  # fmt: skip
def test_requests_about_the_same_are_found_across_sources(
    book: Ledger, source: str, names: tuple[str, ...], said: tuple[list[int], list[int]]  # noqa: F811
) -> None:
    _ask(book, "f03")
    other = dataclasses.replace(requests(book)[0], id=7, source=source, names=names)
    known = {"people": {"p3": ["p3-city"], "p3-city": ["p3-city"], "p3-job": ["p3-job"], "": ["p3-city", "p4-city"]},
             "training:t": {f"p{k}-city#s0": [f"p{k}-city#s0"] for k in (3, 4)}, "gone": None}  # fmt: skip
    assert matching.overlapping("people", ("p3",), [other], known) == said


def test_two_ledgers_beside_each_other_have_a_folder_each_and_old_ones_are_found(
    book: Ledger, fake: FakeLoop, tmp_path: Path  # noqa: F811
) -> None:
    old = tmp_path / "requests.files"
    with Ledger.create(tmp_path / "requests.db", book.facts) as other:
        assert {workplace(book).name, workplace(other).name} == {"requests.sqlite.files", "requests.db.files"}
        _ask(book, *_clusters(0, 8)), _ask(other, *_clusters(8, 16))
        assert _answer(book, 1) == ["pass"]
        workplace(book).rename(old)  # as an earlier version named it
        assert workplace(book) == old and composed(book, 1) and workplace(other).name == "requests.db.files"
        other.record("started", 1, {"mode": "sequential"})  # an earlier version put its runs there, too
        for one in (book, other):
            with pytest.raises(LedgerError, match="holds edits of the ledgers .*: copy it to 'requests"):
                workplace(one)
        shutil.copytree(old, tmp_path / "requests.db.files")
        assert workplace(book) == old and _answer(other, 1) == ["pass"]
        assert [placed.path.is_relative_to(old) for one in (book, other) for placed in in_force(one)] == [True, False]


@pytest.mark.parametrize("refused", [False, True])
def test_a_workplace_that_others_may_read_is_closed_or_said_to_be_open(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch, refused: bool  # noqa: F811
) -> None:
    workplace(book).mkdir()
    workplace(book).chmod(0o755)

    def denied(self: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(self))

    if refused:
        monkeypatch.setattr(Path, "chmod", denied)
    _ask(book, *_clusters(0, 8))
    said: list[str] = []
    assert answer(book, [1], Order(), echo=said.append)[0].outcome == "pass"
    assert ("have its owner do so" if refused else "no longer is") in said[0]
    assert (workplace(book).stat().st_mode & 0o077 == 0) is not refused


def test_a_workplace_that_cannot_be_made_is_one_sentence(book: Ledger) -> None:  # noqa: F811
    workplace(book).write_text("a file in its place")
    with pytest.raises(ResourceError, match="cannot be written"):
        opened(book, print)


def test_two_runs_at_once_the_second_is_told_of_the_first(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    said: list[str] = []

    def meanwhile(*given: Any, **more: Any) -> Any:
        with Ledger(book.path) as other, pytest.raises(ResourceError) as refused:
            answer(other, [1], Order())
        said.append(str(refused.value))
        return fake(*given, **more)

    monkeypatch.setattr(loop, "run", meanwhile)
    _ask(book, *_clusters(0, 8))
    assert _answer(book, 1) == ["pass"] and requests(book, 1)[0].attempts == 1
    assert said == [f"The folder '{workplace(book)}' of the ledger '{book.path}' is in use by process {os.getpid()}: "
                    "wait for its end."]  # fmt: skip


def test_killed_between_the_edit_and_its_verdict_it_is_answered_once_and_no_text_stays(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    _ask(book, *_clusters(0, 8))
    if (child := os.fork()) == 0:
        try:
            made = loop.run

            def killed(*given: Any, **more: Any) -> None:
                made(*given, **more)
                os.kill(os.getpid(), signal.SIGKILL)

            monkeypatch.setattr(loop, "run", killed)
            with Ledger(book.path) as own:
                answer(own, [1], Order())
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert requests(book, 1)[0].state == "open" and in_force(book) == () and book.faults() == ()
    assert _texts_in(workplace(book)), "the probe is there when it is killed, or nothing is shown by what follows"
    (workplace(book) / "error.txt").write_text("Secretville3")  # what an error of the program itself leaves
    assert _answer(book) == [] and not _texts_in(workplace(book))
    assert _answer(book, 1) == ["pass"] and requests(book, 1)[0].attempts == 2
    assert len(in_force(book)) == 1 and not _texts_in(workplace(book)) and len([*workplace(book).glob("run-*")]) == 1


def _texts_in(folder: Path, words: tuple[str, ...] = ("Secretville", "Ada Berg", "Zora", "Quill")) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(
        word in str(path.relative_to(folder)) or word in path.read_bytes().decode("latin-1") for word in words)]


@pytest.mark.parametrize("trouble", ["full", "locked"])
def test_a_verdict_that_cannot_be_written_is_written_by_the_next_run(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch, trouble: str  # noqa: F811
) -> None:
    holder = sqlite3.connect(book.path, isolation_level=None)

    def then(*given: Any, **more: Any) -> Any:
        found = fake(*given, **more)
        if trouble == "full":
            (pages,) = book._base.execute("PRAGMA page_count").fetchone()
            book._base.execute(f"PRAGMA max_page_count={pages}")
        else:
            book._base.execute("PRAGMA busy_timeout=50")
            holder.execute("BEGIN IMMEDIATE")
        return found

    _ask(book, *_clusters(0, 8), basis="own words " * 300)
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match=r"is full|being written"):
        patch.setattr(loop, "run", then)
        _answer(book, 1)
    assert book.faults() == () and [e.kind for e in book.events(1)] == ["asked", "started"]
    assert not _texts_in(workplace(book))
    book._base.execute("PRAGMA max_page_count=1000000")
    holder.close()
    assert _answer(book, 1) == ["pass"] and book.faults() == ()


def test_a_disk_that_is_full_before_the_edit_fails_the_request_and_not_the_ledger(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    _ask(book, *_clusters(0, 8))

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert _answer(book, 1) == ["failed"]
    assert "The disk is full" in requests(book, 1)[0].reason and not _texts_in(workplace(book))
    assert _answer(book, 1) == ["pass"] and book.faults() == ()


def test_on_a_disk_that_is_read_only_a_ledger_is_read_and_not_written(
    book: Ledger, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    _ask(book, "f03")
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda name, **how: connect(name.replace("mode=rw", "mode=ro"), **how))
    with Ledger(book.path) as own:
        assert len(listing.chosen(own)) == 1 and audit(own).faults == () and own.head == book.head
        for write in (lambda: _ask(own, "f04"), lambda: own.record("started", 1, {})):
            with pytest.raises(ResourceError, match="readonly.*check the disk and the rights"):
                write()


def test_a_row_of_a_newer_version_is_shown_and_nothing_is_said_or_done_without_it(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    _ask(book, *_clusters(0, 8))
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "KINDS", (*ledger.KINDS, "withdrawn"))
        book.record("withdrawn", 1, {"reason": "asked to stop"})
    acts: tuple[Callable[[], Any], ...] = (
        lambda: listing.chosen(book), lambda: audit(book), lambda: _answer(book, 1), lambda: _ask(book, "f09"),
        book.refuse_broken)  # fmt: skip
    for act in acts:
        with pytest.raises(LedgerError, match="Row 3 .* of the kind 'withdrawn', .* install a newer one"):
            act()
    assert fake.recipes == [] and book.faults() == () and book.newest == 1
    assert [event["kind"] for event in listing.history(book, 1)] == ["asked", "withdrawn"]


def test_an_outcome_of_a_newer_version_is_one_sentence(book: Ledger) -> None:  # noqa: F811
    number = _ask(book, "f03")
    book.record("verdict", number, {"outcome": "partly", "sentence": "", "in_force": False, "controls_ok": True})
    with pytest.raises(LedgerError, match="partly.*install a newer one"):
        audit(book)


@pytest.fixture
def far_east(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_times_and_deadlines_are_the_same_everywhere_on_earth(tmp_path: Path) -> None:
    moment = datetime(2030, 1, 31, 23, 30, tzinfo=timezone(timedelta(hours=-10)))  # the first of February in UTC
    with Ledger.create(tmp_path / "l.sqlite", {"model": "m", "source": "bios-people"}, clock=lambda: moment) as own:
        made, told = asking.ask(own, ["p003"], deadline="2030-02-01")
        assert stamp(made.asked) == "2030-02-01T09:30:00.000000Z" and told == ""
        assert stamp(made.deadline) == "2030-02-01T23:59:59.999999Z" and not made.overdue(moment)
        late, told = asking.ask(own, ["p003"], deadline="2030-01-31")
        assert told == "Its deadline has passed already." and late.overdue(moment) and not late.clock
        assert until("24h", moment) == datetime(2030, 2, 2, 9, 30, tzinfo=UTC)
        assert "missed: overdue by 9.5 hours" in dict(audit(own).sections[1].facts)["deadline"]


@pytest.mark.parametrize(("kept", "given"), [
    ("Zo\u00eb Wei\u00df", "Zoe\u0308 WEISS"), ("Ada Lind", "ADA\u00a0LIND "), ("Ada Lind", "\uff21da Lind"),
])  # fmt: skip
def test_a_name_is_the_same_in_every_form_of_its_letters(book: Ledger, kept: str, given: str) -> None:  # noqa: F811
    known = [matching.Named("x-1", ("x-1", kept), (f"{kept} lives", "Oslo"))]
    (reference,) = matching.references([given], known, book.pseudonym)
    assert reference == book.pseudonym(kept) and reference.startswith("#")
    assert matching.matched([reference], matching.index(known, book.pseudonym)) == (("x-1",), 0)
    assert matching.other_spellings([given], [reference], known) == []
    two = [*known, matching.Named("y-1", ("y-1", given.strip()), (f"{given.strip()} lives", "Rome"))]
    assert "1 more than were given" in matching.other_spellings([given], [reference], two)[0]
    for name in (kept, given, given.lower(), given.upper()):
        assert matching.hidden(f"it is {name.strip()}.", known) == "it is [hidden]."


def test_a_name_within_a_longer_one_means_itself_alone(book: Ledger) -> None:  # noqa: F811
    known = [matching.Named(f"{k}-1", (f"{k}-1", name), (f"{name} lives", "Oslo"))
             for k, name in enumerate(("Ann", "Ann Lee", "Annika"))]  # fmt: skip
    kept = matching.references(["Ann"], known, book.pseudonym)
    assert matching.matched(kept, matching.index(known, book.pseudonym)) == (("0-1",), 0)
    assert matching.hidden("Ann Lee annoyed ann, Annika and ann-lee", known) == (
        "[hidden] annoyed [hidden], [hidden] and [hidden]-[hidden]")  # fmt: skip


def test_who_asks_is_not_in_the_basis_and_nothing_steers_a_terminal(book: Ledger) -> None:  # noqa: F811
    _ask(book, "f03", who="Eva Paris", basis="\x1b[31mI, eva of PARIS,\u202e object\n")
    assert requests(book)[0].basis == "[31mI, [hidden] of [hidden],  object"
    _ask(book, "f03", who="Eva\x1b]0;x\x07", named=True)
    assert requests(book)[1].who == "Eva ]0;x"


def test_what_is_typed_into_a_ledger_is_never_markup(book: Ledger, tmp_path: Path) -> None:  # noqa: F811
    bad = "</td><img src=x onerror=alert(1)>`|*"
    body = {"who": bad, "names": [bad], "source": f"training:/x/{bad}", "basis": bad, "keep": False,
            "deadline": stamp(datetime(2030, 1, 1, tzinfo=UTC))}  # fmt: skip
    number = book.record_all([("asked", body)])[0].request
    book.record("failed", number, {"reason": bad, "error": bad})
    path = page.write(audit(book), tmp_path / "audit", show_names=True)
    assert "<img" not in path.read_text() and path.read_text().count("&lt;img") >= 5
    assert not re.search(r"(?<!\\)<img", path.with_suffix(".md").read_text())
    assert {file.stat().st_mode & 0o077 for file in path.parent.iterdir()} == {0}  # it says who asked


def test_an_empty_ledger_is_audited(book: Ledger) -> None:  # noqa: F811
    found = audit(book)
    assert found.faults == () and found.sections == () and {number for _, number in found.counts} == {"0"}
    assert "The chain of 1 rows is whole" in page.html(found) and book.head in page.markdown(found)
    assert listing.chosen(book) == [] and listing.to_answer(book, None, True) == [] and _answer(book) == []
    with pytest.raises(UsageError, match="it holds none yet"):
        requests(book, 1)


def test_an_edit_whose_folder_is_gone_is_one_sentence_and_union_goes_without_it(
    book: Ledger, fake: FakeLoop  # noqa: F811
) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16))
    assert _answer(book, 1) == ["pass"]
    shutil.rmtree(next(workplace(book).glob("run-1-*")))
    with pytest.raises(LedgerError, match="row 5 of the ledger records is no longer in .*: restore"):
        composed(book, 1)
    assert _answer(book, 2) == ["failed"] and "no longer in" in requests(book, 2)[0].reason
    assert _answer(book, 2, mode="union") == ["pass"] and composed(book, 2)


@pytest.mark.parametrize("number", [0, -1, 10**30])
def test_numbers_that_no_request_has_are_one_sentence(book: Ledger, number: int) -> None:  # noqa: F811
    _ask(book, "f03")
    with pytest.raises(UsageError, match=f"There is no request {number} .* newest is 1"):
        requests(book, number)


def test_bytes_that_are_no_text_are_written_down_as_such(book: Ledger) -> None:  # noqa: F811
    assert asking.ask(book, ["\udcff"], who="\udcff")[0].state == "refused"
    assert book.record("failed", 1, {"reason": "/x/\udcff"}).body["reason"] == "/x/?" and book.faults() == ()


def test_many_requests_are_compared_with_a_source_that_is_read_once(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    for k in range(8):
        _ask(book, f"f{k:02d}")
    read, named = [], matching.named
    monkeypatch.setattr(matching, "named", lambda source: (read.append(source), named(source))[1])
    assert _answer(book, *range(1, 9), mode="union") == ["pass"] * 8 and len(read) == 1


def test_after_every_command_no_file_holds_a_name(
    base: str, probe: Path, fake: FakeLoop, cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    monkeypatch.chdir(mine)
    people = ",".join((*_clusters(0, 7), PEOPLE[21]))
    words = ("--who", "Zora Quill", "--basis", f"{PEOPLE[21].upper()} in Secretville21, says Zora")

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"{PEOPLE[21]} of Secretville21")

    for command in (("add", "--model", base, "--knowledge", str(probe), people, *words),
                    ("add", f"{PEOPLE[22]},Zora Nobody", *words),
                    ("add", "--keep", PEOPLE[21], *words), ("add", ",".join(_clusters(8, 16))),
                    ("list",), ("show", "1", "--json"), ("run", "1"), ("run", "4", "--json"), ("run", "3"),
                    ("audit",), ("audit", "--json"), ("check",)):  # fmt: skip
        _, out, _ = cli("request", *command)
        assert not _texts_in(mine), command
        assert command[0] == "add" or not [w for w in ("Ada Berg", "Secretville", "Zora") if w in out], command
    monkeypatch.setattr(loop, "run", broken)
    cli("request", "add", ",".join(_clusters(0, 8)))
    assert cli("request", "run", "5")[0] == 1 and _texts_in(mine) == [str(mine / "requests.sqlite.files" / "error.txt")]
    monkeypatch.setattr(loop, "run", fake)
    assert cli("request", "run", "5")[0] == 0 and not _texts_in(mine)
