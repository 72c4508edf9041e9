"""The requests under somebody who wants them to break: two processes at once, files moved, odd names, newer rows."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from request_tools import FakeLoop
from test_requests_run import _answer, _ask, _clusters, base, book, fake, probe, quick  # noqa: F401

from repforget.errors import LedgerError, ResourceError
from repforget.knowledge_files import load_knowledge
from repforget.requests import asking, matching
from repforget.requests.ledger import Ledger
from repforget.requests.run import Order, answer, composed, in_force, workplace
from repforget.requests.stack import opened


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


def test_a_workplace_that_cannot_be_made_is_one_sentence(book: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    workplace(book).write_text("a file in its place")
    with pytest.raises(ResourceError, match="cannot be written"):
        opened(book, print)
