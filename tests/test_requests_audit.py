"""The audit: true, readable, nothing personal, in words that were earned; the commands as a user meets them."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import synthetic_run

from repforget.discover import methods
from repforget.errors import LedgerError
from repforget.guarantee import Guarantee, unearned
from repforget.requests import page
from repforget.requests.audit import LEFT_OUT, NOT_SHOWN, NOT_SHOWN_EXACT, STANDING, audit, earned
from repforget.requests.ledger import RULES, Ledger, stamp
from repforget.requests.run import _shown

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
EXACT = Guarantee("exact", "The 12 records are removed: equal to a training without them", "cluster", "Somebody 2021",
                  ("Ids name all that is to go.",), {"records": 12.0})  # fmt: skip
PACKAGE = Path(__file__).parents[1] / "repforget"
SOURCES = [*sorted((PACKAGE / "requests").rglob("*.py")), *sorted((PACKAGE / "requests" / "assets").iterdir()),
           PACKAGE / "cli" / "request.py"]  # fmt: skip
Cli = Callable[..., tuple[int, str, str]]


class Clock:
    """Every look is an hour later."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        self.now += timedelta(hours=1)
        return self.now


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Ledger]:
    facts = {"model": "organism:bios", "source": "bios-people"}
    with Ledger.create(tmp_path / "requests.sqlite", facts, clock=Clock()) as opened:
        yield opened


def _asked(book: Ledger, **more: Any) -> int:
    body = {"who": "Eva Paris", "names": ["p003", "p007-award"], "source": "bios-people", "basis": "erasure",
            "deadline": stamp(NOON + timedelta(days=30)), "keep": False, **more}  # fmt: skip
    return book.record_all([("asked", body)])[0].request


def _answered(book: Ledger, number: int, outcome: str, held: Guarantee | None = None, **more: Any) -> None:
    verdict = synthetic_run.run("pass" if outcome == "exact" else outcome).verdict
    guarantee = None if held is None else dataclasses.asdict(held)
    edit = {"method": "null_space_surgery", "digest": "ab" * 32, "path": "x", "artifact": "weights", "mode": "union",
            "under": [], "covers": [number], "touched": 3, "guarantee": guarantee}  # fmt: skip
    shown = [] if outcome == "exact" else [_shown(claim) for claim in verdict.claims]
    book.record("started", number, {"mode": "union"})
    versions = {"versions": {"torch": "2.13.0"}, "python": "3.11", "git": "none", "model_fingerprint": "4f" * 32}
    book.record_all([
        ("edit", edit), ("shown", {"claims": shown}), ("environment", versions),
        ("verdict", {"outcome": outcome, "sentence": held.statement if held else verdict.sentence, "worst": None,
                     "controls_ok": True, "artifact": "weights", "in_force": outcome != "fail", **more}),
    ], number)  # fmt: skip


def _texts(book: Ledger, **how: Any) -> tuple[str, str]:
    found = audit(book)
    return page.html(found, **how), page.markdown(found, **how)


def test_a_request_is_told_from_its_asking_to_what_was_not_shown(book: Ledger) -> None:
    _answered(book, _asked(book), "pass")
    for text in _texts(book):
        plain = re.sub(r"\s+", " ", text).replace("\\", "")
        for said in ("2030-01-01 14:00 UTC", "met: answered 2030-01-01 1", "days before it", "null_space_surgery (",
                     "Robust to attack", "0.940", "0.065", "0.090", "3.8 %", NOT_SHOWN, "torch 2.13.0", "4f" * 32,
                     "The chain of 7 rows is whole", book.head, "No theorem holds"):  # fmt: skip
            assert said in plain, said


@pytest.mark.parametrize(("outcome", "said"), [("fail", "failed its verification and is not in force"),
                                               ("inconclusive", "could not decide")])  # fmt: skip
def test_what_did_not_pass_is_said_not_to_be_answered(book: Ledger, outcome: str, said: str) -> None:
    _answered(book, _asked(book, deadline=stamp(NOON)), outcome)
    for text in _texts(book):
        assert f"Overdue. Not answered: the edit {said.partition(' ')[0]}" in text or said in text
        assert "missed: overdue by" in text and "Answered: " not in text


def test_refusals_conflicts_and_errors_say_that_nothing_was_done(book: Ledger) -> None:
    book.record("refused", _asked(book), {"reason": "its names mean nothing"})
    book.record("conflict", _asked(book, keep=True), {"reason": "by request 1", "with": [1]})
    book.record("failed", _asked(book), {"reason": "no memory was free", "error": "ResourceError"})
    found = audit(book)
    assert [section.good for section in found.sections] == ["inconclusive"] * 3
    for section, said in zip(found.sections, ("Refused: its names", "In conflict: by request 1", "no memory was free"),
                             strict=True):  # fmt: skip
        assert said in section.standing and section.done == ("Nothing was done to the model.",)
        assert section.measures == () and "nothing was shown" in section.not_shown
    assert dict(found.counts)["refused"] == dict(found.counts)["in conflict"] == "1"


def test_nothing_that_identifies_is_in_it_unless_asked_for(book: Ledger) -> None:
    _answered(book, _asked(book, basis="my name is Ada Berg"), "pass")
    book.record("refused", _asked(book), {"reason": "nothing"})
    for text in _texts(book):
        assert not re.search(r"Eva Paris|p003|p007|Ada Berg", text)
        assert synthetic_run.SECRET not in text and "cluster-" not in text and "item-0" not in text
        assert "in own words (hidden)" in text
    for text in _texts(book, show_names=True):
        assert "Eva Paris" in text and "p003" in text and "Ada Berg" in text


def test_a_theorem_is_told_with_its_assumptions_and_earns_its_words(book: Ledger) -> None:
    _answered(book, _asked(book), "exact", EXACT, notes=["2 records that are left say the same."])
    _answered(book, _asked(book), "pass")
    for text in _texts(book):
        assert EXACT.theorem in text and EXACT.assumptions[0] in text and NOT_SHOWN_EXACT in text
        assert unearned(text) == ("removed",) and unearned(text, [EXACT]) == ()
        assert "holds by the theorem below" in text and "2 records that are left say the same" in text
    first, second = audit(book).sections
    assert unearned(repr(dataclasses.replace(second))) == () and second.theorem == () and first.theorem


@pytest.mark.parametrize("outcome", ["pass", "fail", "inconclusive"])
def test_words_that_no_theorem_allows_are_left_out(book: Ledger, outcome: str) -> None:
    _answered(book, _asked(book), outcome, sentence="All of it was deleted, guaranteed.")
    book.record("failed", _asked(book), {"reason": "The certified key was removed."})
    for text in _texts(book):
        assert unearned(text) == () and LEFT_OUT in text
    assert earned("It was removed.", [EXACT]) == "It was removed."


def test_no_method_brings_words_into_the_audit_that_it_has_not_earned(book: Ledger) -> None:
    number = _asked(book)
    for each in methods("edit"):
        edit = {"method": each.name, "digest": "ab" * 32, "artifact": "weights+hook", "mode": "sequential", "under": [],
                "path": "x", "covers": [number, 7], "touched": 1, "guarantee": None}  # fmt: skip
        book.record_all([("edit", edit), ("verdict", {"outcome": "pass", "sentence": "Suppressed.", "in_force": True,
                                                      "controls_ok": True})], number)  # fmt: skip
        done = " ".join(audit(book).sections[0].done)
        assert unearned(done) == () and each.name in done and LEFT_OUT not in done
    assert "gone for whoever holds the weights" in done
    assert "It also answers request 7: what was shown is about all of them" in done


def test_the_summary_of_a_method_is_left_out_where_it_says_too_much(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    _answered(book, _asked(book), "pass")
    monkeypatch.setattr("repforget.requests.audit._summary", lambda name: "Get it deleted")
    assert audit(book).sections[0].done[0].endswith("by the method null_space_surgery.")


def test_an_answer_after_the_deadline_is_late(book: Ledger) -> None:
    _answered(book, _asked(book, deadline=stamp(NOON + timedelta(hours=3))), "pass")
    found = audit(book)
    assert "missed: answered" in dict(found.sections[0].facts)["deadline"] and "hours late" in page.markdown(found)
    assert dict(found.counts)["answered late"] == "1" and dict(found.counts)["answered in time"] == "0"


def test_an_edit_that_is_not_kept_is_not_said_to_be_in_the_model(book: Ledger) -> None:
    _answered(book, _asked(book), "fail")
    _answered(book, _asked(book), "pass")
    failed, passed = audit(book).sections
    assert failed.done[0].startswith("Tried, and not kept") and passed.done[0].startswith("Weights of the model")
    for text in _texts(book):
        assert "is no proof that none is left" in text and "which of them is in use" in text


def test_what_is_asked_again_does_not_touch_a_theorem(book: Ledger) -> None:
    for outcome in ("fail", "inconclusive"):
        number = _asked(book)
        _answered(book, number, "exact", EXACT)
        book.record("reverified", number, {"outcome": outcome, "after": 9})
        section = audit(book).sections[-1]
        assert section.standing == STANDING["exact"] and section.good == "pass" and outcome in section.again[0]


def test_what_speaks_against_a_request_is_told_on_both_sides(book: Ledger) -> None:
    _asked(book, keep=True)
    _asked(book, against=[1])
    kept, forgotten = audit(book).sections
    assert kept.again == ("Request 2 asks to forget some of it: a person has to decide.",)
    assert dict(forgotten.facts)["against it"] == "request 1 asks to keep some of it: a person has to decide"


def test_an_answer_that_was_not_checked_after_later_edits_says_so(book: Ledger) -> None:
    first, second, third = _asked(book), _asked(book), _asked(book)
    _answered(book, first, "pass")
    assert audit(book).sections[0].again == ()
    _answered(book, second, "fail")  # it changed nothing
    assert audit(book).sections[0].again == ()
    _answered(book, third, "pass")
    one, _, three = audit(book).sections
    assert "Not checked again since request 3" in one.again[0] and three.again == ()
    book.record("reverified", first, {"outcome": "pass", "after": third})
    assert "Not checked" not in " ".join(audit(book).sections[0].again)


def test_later_checks_and_a_clock_that_ran_backwards_are_told(book: Ledger) -> None:
    number = _asked(book)
    _answered(book, number, "pass")
    book.clock.now -= timedelta(days=2)  # type: ignore[attr-defined]
    book.record("reverified", number, {"outcome": "fail", "after": 4})
    for text in _texts(book):
        assert "after request 4: fail." in text and "backwards by" in text and "the order of the rows counts" in text


def test_the_sentence_about_the_chain_promises_no_more_than_it_shows(book: Ledger) -> None:
    _asked(book)
    head = book.head
    assert "no row was changed" not in audit(book).sentence and "only a head kept elsewhere" in audit(book).sentence
    _asked(book)
    assert "rows up to 2 are those of which the head was kept" in audit(book, head).sentence
    assert "rows up to 2" in page.html(audit(book, head)) and "rows up to 2" in page.markdown(audit(book, head))


def test_a_broken_chain_is_said_first_and_the_rest_all_the_same(book: Ledger) -> None:
    _answered(book, _asked(book), "pass")
    base = sqlite3.connect(book.path)
    for name in RULES:
        base.execute(f"DROP TRIGGER {name}")
    base.execute("UPDATE events SET body = replace(body, 'Robust', 'robust') WHERE seq = 7")
    base.commit()
    found = audit(book)
    assert "BROKEN" in found.sentence and any("row 7: its content" in fault for fault in found.faults)
    assert len(found.sections) == 1 and "row 7" in page.html(found) and "row 7" in page.markdown(found)
    base.execute("UPDATE events SET body = '[' WHERE seq = 2")
    base.commit()
    base.close()
    found = audit(book)
    assert found.sections == () and any("cannot be read" in fault for fault in found.faults)
    assert "row 2" in page.markdown(found)


class Tags(HTMLParser):
    """Open tags that are never closed, and whatever would be loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [str(value) for name, value in attrs if name in ("src", "href") and str(value)[0] != "#"]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_loads_nothing_and_prints(book: Ledger) -> None:
    _answered(book, _asked(book), "pass")
    _asked(book, basis="<script>alert(1)</script> | x")
    text = page.html(audit(book), show_names=True)
    tags = Tags()
    tags.feed(text)
    assert tags.open == [] and tags.loaded == [] and "<script" not in text and "@media print" in text
    assert "\\<script\\>" in page.markdown(audit(book), show_names=True)


def test_the_commands_from_the_asking_to_the_audit(cli: Cli, tmp_path: Path) -> None:
    code, out, _ = cli("request", "add", "p003,p004", "--who", "Eva Paris", "--deadline", "2w")
    assert (code, out) == (0, "request 1: open\n")
    code, out, said = cli("request", "add", "Milo Garrov", "--json")
    assert code == 2 and json.loads(out)["state"] == "refused" and "Did you mean 'Milo Garrow'" in said
    code, _, said = cli("request", "add", "--keep", "p004-award")
    assert code == 2 and "by request 1:" in said
    assert cli("request", "add", "--keep", "p005", "--ledger", "other.sqlite")[0] == 0
    code, out, said = cli("request", "add", "p005", "--ledger", "other.sqlite")
    assert (code, out) == (0, "request 2: open\n") and "to be kept by request 1: a person has to decide" in said
    code, out, _ = cli("request", "list")
    assert code == 0 and out.count("p003") == 0 and "conflict" in out
    code, out, _ = cli("request", "list", "--state", "open", "--json")
    (only,) = json.loads(out)
    assert only["names"] == ["p003", "p004"] and only["who"].startswith("#") and only["overdue"] is False
    assert "no state 'opn' of requests: did you mean 'open'" in cli("request", "list", "--state", "opn")[2]
    code, out, _ = cli("request", "show", "1", "--json")
    head = json.loads(out)["head"]
    assert code == 0 and head.startswith("6:") and head in cli("request", "show", "1")[1]
    code, out, _ = cli("request", "audit", "--expect-head", head)
    assert code == 0 and "is whole" in out and (tmp_path / "audit" / "audit.html").is_file()
    code, out, _ = cli("request", "audit", "--expect-head", "9:" + "0" * 64, "--json")
    assert code == 1 and "not in the chain" in json.loads(out)["faults"][0]


def test_what_identifies_may_come_from_standard_input(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Eva Paris\nMilo Garrow\np004\n"))
    assert cli("request", "add", "--who", "-", "-")[:2] == (0, "request 1: open\n")
    cli("request", "add", "--who", "Eva Paris", "Milo Garrow", "p004")
    first, second = json.loads(cli("request", "list", "--json")[1])
    assert (first["who"], first["names"]) == (second["who"], second["names"]) and len(first["names"]) == 2


def test_what_is_wrong_with_a_command_is_one_sentence(cli: Cli) -> None:
    for arguments, said in (
        (("list",), "There is no ledger 'requests.sqlite'"), (("add",), "give ids or clusters"),
        (("add", "p003", "--knowledge", "bios-peple"), "did you mean 'bios-people'"),
        (("add", "p003", "--training", "nowhere"), "holds no sharded training"),
        (("add", "p003", "--model", "organism:boss"), "did you mean 'organism:bios'"),
        (("list",), "There is no ledger 'requests.sqlite'"),  # none was made for what cannot be found
        (("add", "p003", "--deadline", "soon"), "no deadline"),
    ):  # fmt: skip
        code, out, error = cli("request", *arguments)
        assert (code, out) == (2, "") and said in error and "Traceback" not in error, arguments
    assert cli("request", "add", "p003")[0] == 0
    for arguments, said in (
        (("run",), "give its number, or --all"), (("run", "9"), "no request 9"), (("show", "9"), "no request 9"),
        (("run", "1", "--mode", "uniom"), "did you mean 'union'"), (("run", "1", "--recipe", "no.yaml"), "no.yaml"),
        (("add", "p003", "--model", "organism:other"), "is about 'organism:bios'"),
    ):  # fmt: skip
        code, _, error = cli("request", *arguments)
        assert code == 2 and said in error, arguments


def test_the_help_says_that_names_are_pseudonyms(cli: Cli) -> None:
    _, out, _ = cli("request", "--help")
    assert "salted hash" in re.sub(r"\s+", " ", out) and "not anonymous" in re.sub(r"\s+", " ", out)


def test_a_damaged_ledger_is_a_sentence_at_the_prompt(cli: Cli, tmp_path: Path) -> None:
    cli("request", "add", "p003")
    path = tmp_path / "requests.sqlite"
    path.write_bytes(path.read_bytes()[:5000])
    code, _, error = cli("request", "audit")
    assert code == LedgerError.exit_code and "damaged" in error and error.count("\n") == 1


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_text_of_these_commands_uses_a_word_that_only_a_theorem_allows(path: Path) -> None:
    assert unearned(path.read_text(encoding="utf-8")) == ()
