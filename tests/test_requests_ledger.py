"""The ledger of requests: nothing acknowledged is lost, nothing written is changed unseen, order is by number."""

from __future__ import annotations

import os
import random
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from repforget.errors import LedgerError, ResourceError, UsageError
from repforget.requests.ledger import RULES, SCHEMA, Ledger, stamp
from repforget.requests.states import Request, requests, until

NOON = datetime(2030, 1, 1, 12, tzinfo=UTC)
FACTS = {"model": "organism:bios", "source": "bios-people"}


def asked(names: tuple[str, ...] = ("p003",), deadline: datetime = NOON, keep: bool = False) -> dict[str, object]:
    return {"who": "", "names": list(names), "source": "bios-people", "basis": "erasure", "deadline": stamp(deadline),
            "keep": keep}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger.create(tmp_path / "requests.sqlite", FACTS) as opened:
        yield opened


@pytest.fixture
def filled(ledger: Ledger) -> Ledger:
    for _ in range(3):
        ledger.record_all([("asked", asked())])
    ledger.record("started", 2, {"mode": "sequential"})
    ledger.record("refused", 2, {"reason": "nothing matches"})
    return ledger


def _tamper(path: Path, *statements: str) -> None:
    """Write with another hand, which first takes the rules away and puts them back afterwards."""
    base = sqlite3.connect(path)
    for name in RULES:
        base.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        base.execute(statement)
    for rule in RULES.values():
        base.execute(rule)
    base.commit()
    base.close()


def test_a_new_ledger_is_whole_private_and_one_file(ledger: Ledger) -> None:
    assert ledger.faults() == ()
    assert ledger.facts["model"] == "organism:bios" and len(ledger.facts["salt"]) == 32
    assert ledger.path.stat().st_mode & 0o077 == 0
    assert [path.name for path in ledger.path.parent.iterdir()] == ["requests.sqlite"]


def test_a_commit_outlives_a_loss_of_power(ledger: Ledger) -> None:
    """What no test can pull the plug for: the folder is synced, and no second file holds what was acknowledged."""
    said = [ledger._base.execute(f"PRAGMA {name}").fetchone()[0] for name in ("synchronous", "journal_mode")]
    assert said == [3, "delete"]


def test_an_existing_ledger_is_opened_and_keeps_its_salt(filled: Ledger) -> None:
    with Ledger.create(filled.path, {"model": "another"}) as again:
        assert again.facts == filled.facts and again.head == filled.head


@pytest.mark.parametrize("statement", [
    "UPDATE events SET body = '{}' WHERE seq = 2", "DELETE FROM events WHERE seq = 6",
    "INSERT INTO events SELECT 9, request, kind, at, clock, body, before, hash FROM events WHERE seq = 6",
    "INSERT OR REPLACE INTO events SELECT 2, request, kind, at, clock, body, before, hash FROM events WHERE seq = 3",
])  # fmt: skip
def test_rows_are_only_ever_added(filled: Ledger, statement: str) -> None:
    base = sqlite3.connect(filled.path)
    with pytest.raises(sqlite3.IntegrityError, match=r"rows stay|at the end"):
        base.execute(statement)
    base.close()
    assert filled.faults() == ()


@pytest.mark.parametrize(("column", "value"), [("request", "1"), ("kind", "'asked'"), ("at", "'2000'"),
                                               ("clock", "'x'"), ("body", "'{}'")])  # fmt: skip
def test_a_changed_row_is_named_with_its_content(filled: Ledger, column: str, value: str) -> None:
    _tamper(filled.path, f"UPDATE events SET {column} = {value} WHERE seq = 5")
    assert filled.faults() == ("row 5: its content differs from its hash",)


def test_a_row_written_again_with_a_hash_of_its_own_breaks_the_link_of_the_next(filled: Ledger) -> None:
    from repforget.requests.ledger import _hash

    row = sqlite3.connect(filled.path).execute(
        "SELECT seq, request, kind, at, clock, body, before FROM events WHERE seq = 4").fetchone()  # fmt: skip
    changed = (*row[:5], row[5].replace("erasure", "safety"), row[6])
    _tamper(filled.path, f"UPDATE events SET body = '{changed[5]}', hash = '{_hash(changed)}' WHERE seq = 4")
    assert filled.faults() == ("row 5: its link differs from the hash of row 4",)


def test_a_row_written_again_and_linked_again_changes_the_content_of_the_next(filled: Ledger) -> None:
    from repforget.requests.ledger import _hash

    row = sqlite3.connect(filled.path).execute(
        "SELECT seq, request, kind, at, clock, body, before FROM events WHERE seq = 4").fetchone()  # fmt: skip
    changed = (*row[:5], row[5].replace("erasure", "safety"), row[6])
    _tamper(filled.path, f"UPDATE events SET body = '{changed[5]}', hash = '{_hash(changed)}' WHERE seq = 4",
            f"UPDATE events SET before = '{_hash(changed)}' WHERE seq = 5")  # fmt: skip
    assert filled.faults() == ("row 5: its content differs from its hash",)


def test_missing_rows_are_named(filled: Ledger) -> None:
    _tamper(filled.path, "DELETE FROM events WHERE seq IN (3, 4)")
    assert filled.faults() == ("rows 3 to 4 are missing",)


def test_exchanged_rows_are_named(filled: Ledger) -> None:
    _tamper(filled.path, "UPDATE events SET seq = 99 WHERE seq = 3", "UPDATE events SET seq = 3 WHERE seq = 4",
            "UPDATE events SET seq = 4 WHERE seq = 99")  # fmt: skip
    found = " ".join(filled.faults())
    assert "row 3: its link" in found and "row 3: its content" in found and "row 4: its content" in found


def test_a_cut_tail_shows_only_to_whoever_kept_the_head(filled: Ledger) -> None:
    kept = filled.head
    filled.record("started", 3, {})
    assert filled.faults(kept) == () and filled.faults(filled.head) == ()  # rows added since are no fault
    _tamper(filled.path, "DELETE FROM events WHERE seq >= 6")
    assert filled.faults() == ()
    assert "rows at the end are missing" in filled.faults(kept)[0]


def test_a_missing_rule_is_a_fault(filled: Ledger) -> None:
    sqlite3.connect(filled.path).execute("DROP TRIGGER no_loss")
    assert filled.faults() == ("the rule 'no_loss' of the ledger is missing or changed",)


def test_a_part_of_the_file_that_does_not_belong_there_is_a_fault(filled: Ledger) -> None:
    base = sqlite3.connect(filled.path)
    base.executescript("CREATE TABLE copies (body); CREATE TRIGGER spy AFTER INSERT ON events BEGIN "
                       "INSERT INTO copies VALUES (NEW.body); END; DROP INDEX by_request; ANALYZE")  # fmt: skip
    missing, *others = filled.faults()
    assert missing == "the part 'by_request' of the ledger is missing or changed"
    assert others == [f"'{name}' in the file is no part of a ledger" for name in ("copies", "spy")]


def test_a_row_that_is_swallowed_is_never_acknowledged(filled: Ledger) -> None:
    sqlite3.connect(filled.path).execute(
        "CREATE TRIGGER mute BEFORE INSERT ON events BEGIN SELECT RAISE(IGNORE); END")  # fmt: skip
    head = filled.head
    with pytest.raises(LedgerError, match="takes no rows"):
        filled.record("started", 1, {})
    assert filled.head == head and "'mute' in the file" in filled.faults()[0]


@pytest.mark.parametrize("given", ["", "6", "6:abc", "abc", "6:" + "0" * 63 + "g"])
def test_what_is_no_head_is_not_taken_for_a_missing_row(filled: Ledger, given: str) -> None:
    with pytest.raises(UsageError, match="is no head of a ledger"):
        filled.faults(given)


def test_a_chain_that_is_written_anew_shows_only_to_whoever_kept_a_head(filled: Ledger) -> None:
    from repforget.requests.ledger import _hash

    kept, before = filled.head, ""
    rows = sqlite3.connect(filled.path).execute("SELECT * FROM events ORDER BY seq").fetchall()
    for seq, *content, own_before, _ in rows:
        content[-1] = content[-1].replace("erasure", "safety")
        link = before or own_before
        before = _hash((seq, *content, link))
        _tamper(filled.path, f"UPDATE events SET body = '{content[-1]}', before = '{link}', hash = '{before}' "
                f"WHERE seq = {seq}")  # fmt: skip
    assert filled.faults() == () and filled.head != kept and "written again" in filled.faults(kept)[0]


@pytest.mark.parametrize("harm", ["DELETE FROM events WHERE seq = 3", "UPDATE events SET body = '{}' WHERE seq = 3",
                                  "UPDATE events SET kind = 'started' WHERE seq = 3"])  # fmt: skip
def test_rows_that_do_not_fit_each_other_are_one_sentence(filled: Ledger, harm: str) -> None:
    _tamper(filled.path, harm)
    with pytest.raises(LedgerError, match=r"Row \d of the ledger .* does not fit"):
        requests(filled)


def test_nothing_is_added_behind_a_changed_row(filled: Ledger) -> None:
    _tamper(filled.path, "UPDATE events SET body = '{}' WHERE seq = 6")
    with pytest.raises(LedgerError, match="Row 6 of the ledger was changed"):
        filled.record("started", 1, {})
    assert filled.head.startswith("6:")


def test_events_of_one_commit_are_all_there_or_none(filled: Ledger) -> None:
    head = filled.head
    with pytest.raises(UsageError, match="'forgotten' is not known"):
        filled.record_all([("started", {}), ("forgotten", {})], 1)
    with pytest.raises(UsageError, match="no request 4 .* newest is 3"):
        filled.record("started", 4, {})
    assert filled.head == head


def test_a_clock_that_goes_backwards_is_noted_and_order_is_by_number(tmp_path: Path) -> None:
    times = iter(NOON + timedelta(seconds=s) for s in (0, 10, 7.5, 8, 20))
    with Ledger.create(tmp_path / "l.sqlite", FACTS, clock=lambda: next(times)) as opened:
        for _ in range(4):
            opened.record_all([("asked", asked())])
        found = list(opened.events())
        assert [event.clock for event in found] == ["", "", "backwards by 2.5 s", "", ""]
        assert [event.seq for event in found] == [1, 2, 3, 4, 5] and found[2].at < found[1].at
        assert [request.clock for request in requests(opened)] == ["", "backwards by 2.5 s", "", ""]
        assert opened.faults() == ()


def test_pseudonyms_are_the_same_within_a_ledger_and_others_in_another(ledger: Ledger, tmp_path: Path) -> None:
    assert ledger.pseudonym("Ada Berg") == ledger.pseudonym(" ada berg") != ledger.pseudonym("Ada Borg")
    with Ledger.create(tmp_path / "other.sqlite", FACTS) as other:
        assert other.pseudonym("Ada Berg") != ledger.pseudonym("Ada Berg")


def test_a_locked_ledger_is_a_sentence_that_says_how_to_find_the_holder(filled: Ledger) -> None:
    holder = sqlite3.connect(filled.path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    with pytest.raises(ResourceError, match="being written by another process.*fuser"):
        Ledger(filled.path, wait=0.05)
    holder.execute("ROLLBACK")
    holder.execute("BEGIN IMMEDIATE")  # reading beside a writer is allowed, writing is not
    with Ledger(filled.path, wait=0.05) as second:
        assert second.head == filled.head
        with pytest.raises(ResourceError, match="being written"):
            second.record("started", 1, {})
    holder.close()


def test_writers_side_by_side_wait_for_each_other(filled: Ledger) -> None:
    def write(_: int) -> list[int]:
        with Ledger(filled.path) as own:
            return [own.record_all([("asked", asked())])[0].request for _ in range(15)]

    with ThreadPoolExecutor(4) as pool:
        numbers = [number for made in pool.map(write, range(4)) for number in made]
    assert sorted(numbers) == list(range(4, 64)) and filled.faults() == ()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _foreign(path: Path) -> None:
    path.unlink()
    sqlite3.connect(path).executescript("CREATE TABLE events (seq); INSERT INTO events VALUES (1)")


def _newer(path: Path) -> None:
    sqlite3.connect(path).execute(f"PRAGMA user_version={SCHEMA + 1}")


@pytest.mark.parametrize(("harm", "said"), [
    (_cut, "damaged or no ledger"), (lambda path: path.write_bytes(b""), "no ledger of requests"),
    (lambda path: path.write_text("a diary, and no database at all\n" * 40), "damaged or no ledger"),
    (_foreign, "no ledger of requests"), (_newer, f"has format {SCHEMA + 1}"), (Path.unlink, "There is no ledger"),
])  # fmt: skip
def test_what_is_no_readable_ledger_is_refused_in_one_sentence(
    filled: Ledger, harm: Callable[[Path], None], said: str
) -> None:
    filled.close()
    harm(filled.path)
    with pytest.raises(LedgerError, match=said) as refused:
        Ledger(filled.path)
    assert str(refused.value).count(". ") == 0 and str(refused.value).endswith(".")


def test_a_file_cut_anywhere_is_never_opened(filled: Ledger, tmp_path: Path) -> None:
    whole = filled.path.read_bytes()
    copy = tmp_path / "copy.sqlite"
    for size in (*random.Random(0).sample(range(len(whole)), 30), len(whole) - 1):
        copy.write_bytes(whole[:size])
        with pytest.raises(LedgerError):
            Ledger(copy)
    copy.write_bytes(whole)
    with Ledger(copy) as opened:
        assert opened.faults(filled.head) == ()


def test_states_follow_from_events(ledger: Ledger) -> None:
    now = datetime.now(UTC)
    for deadline in (now + timedelta(days=1), now - timedelta(seconds=1), now - timedelta(days=1)):
        ledger.record_all([("asked", asked(deadline=deadline))])
    ledger.record("verdict", 3, {"outcome": "pass", "sentence": "Suppressed."})
    for outcome in ("fail", "inconclusive"):
        ledger.record("started", 1, {})
        ledger.record("verdict", 1, {"outcome": outcome, "sentence": ""})
    one, two, three = requests(ledger)
    assert (one.state, one.outcome, one.attempts, one.answered) == ("tried", "inconclusive", 2, None)
    assert [r.overdue(now) for r in (one, two, three)] == [False, True, False]
    assert (three.state, three.late) == ("done", True)
    ledger.record("failed", 1, {"reason": "interrupted"})
    ledger.record("refused", 2, {"reason": "nothing matches"})
    ledger.record("reverified", 3, {"outcome": "fail"})
    assert [r.state for r in requests(ledger)] == ["tried", "refused", "tried"] and requests(ledger, 3)[0].late is False
    assert (requests(ledger, 1)[0].reason, requests(ledger, 3)[0].rechecked) == ("interrupted", "fail")
    with pytest.raises(UsageError, match="no request 9 .* newest is 3"):
        requests(ledger, 9)


def test_a_check_that_fails_later_does_not_undo_a_theorem(ledger: Ledger) -> None:
    for outcome in ("pass", "exact"):
        number = ledger.record_all([("asked", asked())])[0].request
        ledger.record("verdict", number, {"outcome": outcome, "sentence": ""})
        ledger.record("reverified", number, {"outcome": "fail", "after": 9})
    measured, proved = requests(ledger)
    assert (measured.state, measured.answered) == ("tried", None)
    assert (proved.state, proved.rechecked) == ("done", "fail") and proved.answered is not None


def test_who_reads_before_writing_keeps_others_from_both(ledger: Ledger) -> None:
    with Ledger(ledger.path, wait=0.0) as other:
        with ledger.writing():
            with pytest.raises(ResourceError, match="written by another process"), other.writing():
                pytest.fail("two read what both then build upon")
            ledger.record_all([("asked", asked())])
        with other.writing():
            assert other.newest == 1


@pytest.mark.parametrize(("text", "end"), [
    ("30d", NOON + timedelta(days=30)), ("72 h", NOON + timedelta(hours=72)), ("2w", NOON + timedelta(days=14)),
    ("2030-02-03", datetime(2030, 2, 3, 23, 59, 59, 999999, tzinfo=UTC)),
])  # fmt: skip
def test_deadlines_are_spans_or_dates(text: str, end: datetime) -> None:
    assert until(text, NOON) == end
    with pytest.raises(UsageError, match="30d, 72h, 2w or a date"):
        until("soon", NOON)


def test_a_request_is_a_plain_frozen_record(filled: Ledger) -> None:
    assert isinstance(requests(filled)[0], Request) and requests(filled)[0].names == ("p003",)


WRITER = """
import os, random, sys, time
sys.path.insert(0, sys.argv[2])
from repforget.requests.ledger import Ledger
dice = random.Random(0)
acknowledged = 0
for attempt in range(50):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with Ledger(sys.argv[1]) as ledger:
            while True:
                made = ledger.record_all([("asked", {"number": 1}), ("started", {"text": "x" * 3000})])
                os.write(write, b"%d\\n" % made[0].request)
    os.close(write)
    said = os.read(read, 1)  # it has begun
    time.sleep(dice.random() * 0.02)
    os.kill(child, 9)
    os.waitpid(child, 0)
    said = (said + os.read(read, 1 << 20)).decode()
    with Ledger(sys.argv[1]) as ledger:
        kept = ledger.newest
        assert ledger.faults() == (), ledger.faults()
        acknowledged = max([acknowledged, *(int(n) for n in said.split("\\n")[:-1])])
        assert kept >= acknowledged, (kept, acknowledged)
        counts = [len(list(ledger.events(n))) for n in range(max(1, kept - 3), kept + 1)]
        assert set(counts) <= {2}, counts
print(acknowledged)
"""


@pytest.mark.slow
def test_killed_at_fifty_random_points_it_loses_nothing_that_was_acknowledged(ledger: Ledger) -> None:
    ledger.close()
    root = Path(__file__).parents[1]
    ended = subprocess.run([sys.executable, "-c", WRITER, str(ledger.path), str(root)], capture_output=True, text=True,
                           timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) >= 50, "the writers were killed before they had written anything"
