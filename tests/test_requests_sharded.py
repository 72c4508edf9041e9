"""Requests about a sharded training: taken out by theorem, killed anywhere and finished, and nobody left behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import shard_tools
import tiny_models

from repforget import shards
from repforget.artifact import Edit
from repforget.errors import UsageError
from repforget.knowledge import Item, Knowledge
from repforget.models.load import load
from repforget.requests import asking, matching, page
from repforget.requests.audit import audit
from repforget.requests.ledger import Ledger
from repforget.requests.run import Order, answer, composed, in_force, sequence, workplace
from repforget.requests.states import requests

PEOPLE = shard_tools.people()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what survives a loss of power is tested with the store."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_models.build("llama").save_pretrained(folder)
    tiny_models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(base: str, tmp_path_factory: pytest.TempPathFactory) -> shards.Training:
    return shard_tools.trained(tmp_path_factory.mktemp("whole") / "t", load(base), PEOPLE)


@pytest.fixture
def training(whole: shards.Training, tmp_path: Path) -> Path:
    return shard_tools.copied(whole, tmp_path / "training").root


@pytest.fixture
def book(tmp_path: Path, base: str, training: Path) -> Ledger:
    return Ledger.create(tmp_path / "requests.sqlite", {"model": base, "source": f"training:{training}"})


def _scratch(root: Path, base: str, *gone: str) -> Edit:
    """The edit of a training that never had some records."""
    left = [record for record in PEOPLE if not {record.id, record.cluster} & set(gone)]
    model = load(base)
    return shards.combined(shard_tools.trained(root, model, left), model)


def _same(one: Edit, other: Edit) -> bool:
    return [(op.weight, op.u.tolist(), op.v.tolist()) for op in one.operations] == [  # type: ignore[union-attr]
        (op.weight, op.u.tolist(), op.v.tolist()) for op in other.operations]  # type: ignore[union-attr]  # fmt: skip


def test_the_edit_in_force_is_that_of_a_training_that_never_had_the_records(
    book: Ledger, training: Path, base: str, tmp_path: Path
) -> None:
    asking.ask(book, ["w31", "w34-job"]), asking.ask(book, ["w36"])
    first, second = answer(book, [1, 2], Order())
    assert (first.outcome, second.outcome) == ("exact", "exact") and first.sentence.startswith("3 records were taken")
    assert _same(composed(book, 1), _scratch(tmp_path / "one", base, "w31", "w34-job"))
    assert _same(composed(book, 2), _scratch(tmp_path / "two", base, "w31", "w34-job", "w36"))
    assert [placed.covers for placed in in_force(book)] == [(2,)]  # the adapters as a whole, on the base
    held = composed(book, 2).manifest.guarantee
    assert held is not None and held.kind == "exact"
    assert [r.state for r in requests(book)] == ["done", "done"]
    told = [dict(section.theorem)["holds"] for section in audit(book).sections]
    assert told[1] == held.statement and "3 records" in told[0]
    kept = ["edit-1) stay" in " ".join(section.shown) for section in audit(book).sections]
    assert kept == [False, True], "the first edit's adapters have seen what the second request takes out"
    left = b"".join(shard_tools.texts_in(training))
    assert b"w31" not in left and b"w36" not in left and b"w32" in left


def test_names_in_the_records_are_kept_as_pseudonyms_and_found_again(book: Ledger) -> None:
    made, _ = asking.ask(book, ["w32"])  # told in its own records
    assert made.names[0].startswith("#") and b"w32" not in book.path.read_bytes()
    assert answer(book, [1], Order())[0].outcome == "exact"
    assert b"w32" not in b"".join(shard_tools.texts_in(workplace(book)))


@pytest.mark.parametrize("place", ["edited", "taken out", "recorded"])
def test_killed_anywhere_the_same_command_finishes(
    book: Ledger, training: Path, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asking.ask(book, ["w33"])

    def then(do: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            do(*args, **kwargs)
            raise KeyboardInterrupt

        return run

    with monkeypatch.context() as patch:
        if place == "edited":
            patch.setattr(Edit, "save", then(Edit.save))
        elif place == "taken out":
            patch.setattr(shards, "take_out", then(shards.take_out))
        else:
            patch.setattr("repforget.requests.sharded.tidy", lambda *_: None)
            record_all = Ledger.record_all
            patch.setattr(Ledger, "record_all", lambda self, events, request=None: then(record_all)(
                self, events, request) if len(tuple(events)) > 1 else record_all(self, events, request))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            answer(book, [1], Order())
    if place != "recorded":
        assert requests(book)[0].state == "open"
        assert answer(book, [1], Order())[0].outcome == "exact"
    asking.ask(book, ["w35"])
    assert answer(book, [2], Order())[0].outcome == "exact"  # and clears what was left of the first
    assert requests(book)[0].state == "done" and len(list(book.events(1, kinds=("verdict",)))) == 1
    assert _same(composed(book, 1), _scratch(tmp_path / "scratch", base, "w33"))
    assert not list(workplace(book).glob("pending-*"))


@pytest.mark.parametrize("place", ["edited", "taken out"])
def test_an_interrupted_request_finished_after_another_has_neither(
    book: Ledger, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    asking.ask(book, ["w33"]), asking.ask(book, ["w36"])

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        take_out = shards.take_out
        patch.setattr(shards, "take_out", stop if place == "edited" else lambda *a: stop(take_out(*a)))
        answer(book, [1], Order())
    assert [a.outcome for a in answer(book, [2, 1], Order())] == ["exact", "exact"]
    # What the first call had saved still knows w36.
    assert _same(composed(book, 1), _scratch(tmp_path / "scratch", base, "w33", "w36"))
    held = composed(book, 1).manifest.guarantee
    assert held is not None and "3 records" in held.statement and in_force(book)[-1].covers == (1,)


def test_what_was_never_trained_on_or_is_gone_is_refused(book: Ledger) -> None:
    assert asking.ask(book, ["w99"])[0].state == "refused"
    asking.ask(book, ["w31"]), asking.ask(book, ["w31-city"])
    assert [a.outcome for a in answer(book, [2, 3], Order())] == ["exact", "refused"]
    assert "taken out before" in requests(book, 3)[0].reason
    with pytest.raises(UsageError, match="names records or clusters"):
        asking.ask(book)


def test_when_all_are_taken_out_the_base_is_what_is_left(book: Ledger) -> None:
    asking.ask(book, ["w31"]), asking.ask(book, [record.id for record in PEOPLE if record.cluster != "w31"])
    assert [made.outcome for made in answer(book, [1, 2], Order())] == ["exact", "exact"]
    assert in_force(book) == () and len(in_force(book, 1)) == 1 and [number for number, _ in sequence(book)] == [1]
    section = audit(book).sections[1]
    assert "the base model is what is left" in section.done[0] and section.theorem


def test_the_loop_does_not_edit_what_a_training_serves(book: Ledger) -> None:
    asking.ask(book, ["w31"]), asking.ask(book, source="bios-people")
    assert [made.outcome for made in answer(book, [1, 2], Order())] == ["exact", "failed"]
    assert "is a sharded training" in requests(book, 2)[0].reason


def _towns(folder: Path) -> str:
    """A probe about the cities of eight people of the training, and of twelve others."""

    def item(name: str) -> Item:
        return Item(id=f"{name}-city", cluster=name, prompt=f"Where is city {name} ?", answer="Rome")

    probe = Knowledge.build("towns", [item(f"w3{k}") for k in range(8)], [item(f"r{k}") for k in range(12)])
    return str(matching.write_probe(probe, folder))


def test_a_request_about_a_probe_is_answered_by_a_training_on_it(
    book: Ledger, training: Path, tmp_path: Path, base: str
) -> None:
    names = [f"w3{k}" for k in range(8)]
    source = _towns(tmp_path / "towns")
    asking.ask(book, ["w33"], source=source), asking.ask(book, source=source), asking.ask(book, ["r3"], source=source)
    outcomes = [a.outcome for a in answer(book, [1, 3], Order(training=training))]
    assert outcomes == ["exact", "refused"]
    (rest,) = answer(book, [2], Order(training=training))  # what is left of the probe in the training
    assert rest.outcome == "exact"
    asked = {r.id for r in PEOPLE if r.id.endswith("-city") and r.cluster in names}
    assert _same(composed(book, 2), _scratch(tmp_path / "scratch", base, "w33", *asked))
    asking.ask(book, ["w33"], source=source)
    assert answer(book, [4], Order(training=training))[0].outcome == "refused"
    assert "taken out before" in requests(book, 4)[0].reason


def test_in_union_every_request_of_a_training_is_taken_out_itself(book: Ledger, training: Path, base: str,
                                                                  tmp_path: Path) -> None:  # fmt: skip
    asking.ask(book, ["w31"]), asking.ask(book, ["w36"])
    assert [a.outcome for a in answer(book, [1, 2], Order(mode="union"))] == ["exact", "exact"]
    assert _same(composed(book, 2), _scratch(tmp_path / "both", base, "w31", "w36"))
    left = b"".join(shard_tools.texts_in(training))
    assert b"w31" not in left and b"w36" not in left and [p.covers for p in in_force(book)] == [(2,)]


def test_a_new_ledger_of_a_training_is_about_its_base(tmp_path: Path, base: str, training: Path) -> None:
    with asking.opened(tmp_path / "new.sqlite", None, f"training:{training}") as made:
        assert made.facts["model"] == shards.opened(training).base["model"] == base


def test_a_training_has_no_questions_to_check_with(cli: Callable[..., tuple[int, str, str]], book: Ledger) -> None:
    code, _, said = cli("request", "check", "--ledger", str(book.path))
    assert code == 2 and "has no questions: give --knowledge, a probe to ask from" in said


def test_a_training_and_a_probe_are_about_the_same_people(book: Ledger, training: Path, tmp_path: Path) -> None:
    source = _towns(tmp_path / "towns")
    asking.ask(book, ["w31"])  # of the training
    assert asking.ask(book, ["w32"], source=source, keep=True)[0].state == "kept"
    made, _ = asking.ask(book, ["w31"], source=source, keep=True)
    assert made.state == "conflict" and "by request 1:" in made.reason
    assert answer(book, [1], Order())[0].outcome == "exact"  # nothing is left in the training to compare with
    assert asking.ask(book, ["w31"], source=source, keep=True)[0].state == "conflict"


def test_a_training_that_was_moved_fails_without_its_path_and_is_answered_where_it_is(
    book: Ledger, training: Path, tmp_path: Path
) -> None:
    asking.ask(book, ["w31"])
    training.rename(tmp_path / "moved")
    (failed,) = answer(book, [1], Order())
    assert failed.outcome == "failed" and str(training) in failed.sentence
    reason = requests(book, 1)[0].reason
    assert "The source 'training' cannot be read" in reason and str(tmp_path) not in reason
    assert str(tmp_path) not in page.markdown(audit(book), True)
    assert answer(book, [1], Order(training=tmp_path / "moved"))[0].outcome == "exact"
