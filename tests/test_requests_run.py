"""Requests taken down and answered: by reference, on the model in force, resumable, and nothing personal kept."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from request_tools import PEOPLE, WEIGHT, FakeLoop, items_about

from repforget import loop
from repforget.artifact import Edit
from repforget.artifact.operations import LowRankDelta
from repforget.errors import LedgerError, UsageError
from repforget.knowledge import Item, Knowledge
from repforget.knowledge_files import load_knowledge
from repforget.models.load import load
from repforget.recipe import Recipe
from repforget.requests import asking, matching
from repforget.requests.audit import audit
from repforget.requests.ledger import Ledger
from repforget.requests.run import Order, answer, composed, in_force, order_of, sequence, workplace
from repforget.requests.states import requests


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    forget = [*items_about(PEOPLE[:20], "f"), *items_about(PEOPLE[20:], "t", telling=True)]
    knowledge = Knowledge.build("people", forget, items_about(tuple(f"Tom Rome{k:02d}" for k in range(16)), "r"),
                                [Item(id="n00", cluster="f00", subject="Ada", prompt="Who ?", answer="Ada")],
                                ["the cat was red", "the dog was blue"])  # fmt: skip
    return matching.write_probe(knowledge, tmp_path_factory.mktemp("probe") / "people")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base")
    tiny_models.build("llama").save_pretrained(folder)
    tiny_models.tiny_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk: what survives a loss of power is tested with the store."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def book(tmp_path: Path, base: str, probe: Path) -> Ledger:
    return Ledger.create(tmp_path / "requests.sqlite", {"model": base, "source": str(probe)})


def _clusters(first: int, last: int) -> list[str]:
    return [f"f{k:02d}" for k in range(first, last)]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeLoop:
    made = FakeLoop()
    monkeypatch.setattr(loop, "run", made)
    return made


def _ask(book: Ledger, *names: str, **more: Any) -> int:
    return asking.ask(book, names, **more)[0].id


def _answer(book: Ledger, *numbers: int, mode: Any = "sequential", recipe: Recipe | None = None) -> list[str]:
    return [each.outcome for each in answer(book, numbers, Order(recipe, mode))]


def _weight(model: Any) -> torch.Tensor:
    return model.module.get_parameter(WEIGHT).detach()


def test_a_carved_probe_loads_as_it_was_and_keeps_everyone_else(probe: Path, tmp_path: Path) -> None:
    whole = load_knowledge(probe)
    own = [item for item in whole.forget if item.cluster in _clusters(0, 8)]
    gone = {item.id for item in whole.forget if item.cluster == "f09"}
    carved = matching.carved(whole, own, gone)
    again = load_knowledge(matching.write_probe(carved, tmp_path / "again"))
    assert again.digest == carved.digest
    kept = {item.cluster for item in carved.retain}
    assert {item.cluster for item in carved.forget} == set(_clusters(0, 8))
    assert kept == {i.cluster for i in (*whole.forget, *whole.retain)} - set(_clusters(0, 8)) - {"f09"}
    assert carved.neighbours == ()  # the only one belongs to somebody who goes


def test_nothing_personal_is_in_the_file_unless_it_is_wanted(book: Ledger, fake: FakeLoop, probe: Path) -> None:
    _ask(book, *_clusters(0, 8), who="Eva Paris")
    _ask(book, PEOPLE[21], "f09", who="Eva Paris")  # a cluster that is a name
    _ask(book, "Nobody Known")
    fake.outcomes = ["fail"]
    _answer(book, 1)
    held = book.path.read_bytes().decode("latin-1")
    texts = {text for item in load_knowledge(probe).forget for text in (item.subject, item.answer, item.prompt)}
    assert not [text for text in (*texts, "Eva Paris", "Nobody Known", *PEOPLE) if text in held]
    one, two, _ = requests(book)
    assert one.who == two.who != "" and "f09" in two.names and two.names[0].startswith("#")
    items = matching.items_of(book, two, load_knowledge(probe))
    assert {item.cluster for item in items} == {PEOPLE[21], "f09"}
    _ask(book, "f09", who="Eva Paris", named=True)
    assert requests(book, 4)[0].who == "Eva Paris"


@pytest.mark.parametrize("cluster", ["Ada Lind", "ada_lind", "ada-lind-03", "AdaLind", "lind.ada", "person/LIND"])
def test_references_that_tell_a_name_in_any_spelling_are_pseudonyms(book: Ledger, cluster: str) -> None:
    item = Item(id="p03-live", cluster=cluster, subject="Ada Lind", prompt="Where does Ada Lind live ?", answer="Oslo")
    record = matching.Named("p03-live", ("p03-live", cluster), (item.prompt, item.answer))  # a training has no subjects
    for known in (matching.of_items([item]), (record,)):
        (cluster_kept, id_kept) = matching.references((cluster, "p03-live"), known, book.pseudonym)
        assert cluster_kept.startswith("#") and id_kept == "p03-live"
        assert matching.matched((cluster_kept, id_kept), matching.index(known, book.pseudonym)) == (("p03-live",), 0)


def test_names_of_the_source_are_blotted_out_of_the_basis(book: Ledger) -> None:
    _ask(book, "f03", basis=f"{PEOPLE[3]} wants Secretville3 gone")
    assert requests(book)[0].basis == "[hidden] wants [hidden] gone"


def test_a_request_that_means_nothing_is_recorded_and_refused(book: Ledger, fake: FakeLoop) -> None:
    made, told = asking.ask(book, ["f0l", "f01"])
    assert (made.state, fake.recipes) == ("refused", []) and "1 of its 2 names mean nothing" in made.reason
    assert told.startswith("Did you mean 'f")
    assert "in 'company': it holds" in matching.meaningless(1, 2, "training:company")
    with pytest.raises(UsageError, match="needs no answer"):
        answer(book, [made.id], Order())


def test_what_was_to_be_found_and_is_no_longer_is_refused_when_it_is_run(
    book: Ledger, fake: FakeLoop, probe: Path, tmp_path: Path
) -> None:
    whole = load_knowledge(probe)
    copy = matching.write_probe(whole, tmp_path / "copy")
    number = _ask(book, "f01", "t00-live", source=str(copy))
    matching.write_probe(matching.carved(whole, whole.forget[:20], {"t00-live", "t00-work"}), copy)
    assert _answer(book, number) == ["refused"] and requests(book, number)[0].state == "refused"


@pytest.mark.parametrize("name", ["f03", "f03-work"])
def test_to_keep_what_an_earlier_request_covers_is_a_conflict_with_its_number(book: Ledger, name: str) -> None:
    _ask(book, "f02"), _ask(book, "f03")
    made, _ = asking.ask(book, [name], keep=True)
    assert made.state == "conflict" and "by request 2:" in made.reason
    free, _ = asking.ask(book, ["f04"], keep=True)
    assert free.state == "kept"
    _ask(book, "f04")  # the right to be forgotten comes after: noted
    assert next(book.events(5, kinds=("asked",))).body["against"] == [4]
    refused, _ = asking.ask(book, ["zz"])
    assert refused.state == "refused" and asking.ask(book, ["f05"], keep=True)[0].state == "kept"


def test_a_whole_probe_covers_all_that_it_is_to_forget(book: Ledger, fake: FakeLoop) -> None:
    assert _answer(book, _ask(book)) == ["pass"]
    assert fake.forgotten == [{*_clusters(0, 20), *map(book.pseudonym, PEOPLE[20:])}]  # a run keeps no name
    assert asking.ask(book, ["f11-live"], keep=True)[0].state == "conflict"


def test_edits_pile_up_and_the_model_of_each_request_can_be_made_again(book: Ledger, fake: FakeLoop, base: str) -> None:
    for first in (0, 8, 12):
        _ask(book, *_clusters(first, first + 8))
    fake.outcomes = ["pass", "inconclusive", "pass"]
    assert _answer(book, 1, 2) == ["pass", "inconclusive"]
    assert _answer(book, 3) == ["pass"]
    assert fake.recipes[0].model == base and fake.recipes[1].model != base
    assert fake.forgotten[1] == set(_clusters(8, 16)) and not fake.kept[1] & set(_clusters(0, 8))
    model = load(base)
    for number, recipe in ((1, fake.recipes[1]), (2, fake.recipes[2])):
        # The checkpoint is the model that request `number` left; older ones are cleared away.
        if Path(recipe.model).is_dir():
            torch.testing.assert_close(_weight(load(recipe.model)), _weight(composed(book, number).applied_to(model)))
    deltas = [_weight(composed(book, n).applied_to(model)) - _weight(model) for n in (1, 2, 3)]
    assert [number for number, _ in sequence(book)] == [1, 2, 3]
    assert not torch.allclose(deltas[0], deltas[1]) and not torch.allclose(deltas[1], deltas[2])
    last = [placed.path for placed in in_force(book)]
    assert len(last) == 3 and [p.covers for p in in_force(book)] == [(1,), (2,), (3,)]
    assert len(list(workplace(book).glob("model-*"))) == 1
    states = [(r.state, r.outcome) for r in requests(book)]
    assert states == [("done", "pass"), ("tried", "inconclusive"), ("done", "pass")]
    assert book.faults() == ()


def test_an_edit_that_failed_is_not_in_force_and_may_be_tried_again(book: Ledger, fake: FakeLoop, base: str) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16))
    fake.outcomes = ["fail", "pass", "pass"]
    assert _answer(book, 1, 2) == ["fail", "pass"]
    assert [recipe.model for recipe in fake.recipes] == [base, base]
    with pytest.raises(UsageError, match="No edit of request 1 is in force"):
        composed(book, 1)
    assert _answer(book, 1) == ["pass"] and fake.recipes[2].model != base
    assert [p.covers for p in in_force(book)] == [(2,), (1,)]


def test_in_union_one_edit_of_the_base_answers_everything_asked_so_far(
    book: Ledger, fake: FakeLoop, base: str
) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 12)), _ask(book, *_clusters(12, 14))
    assert _answer(book, 1) == ["pass"]
    assert _answer(book, 2) == ["failed"]  # too few to be judged alone
    reason = requests(book, 2)[0].reason
    assert "names 4 clusters and a verdict needs 8" in reason and requests(book, 2)[0].state == "tried"
    assert _answer(book, 2, 3, mode="union") == ["pass", "pass"]
    assert len(fake.recipes) == 2 and fake.recipes[1].model == base and fake.forgotten[1] == set(_clusters(0, 14))
    assert len(in_force(book)) == 1 and in_force(book)[0].covers == (1, 2, 3)
    assert composed(book, 2).digest == composed(book, 3).digest != composed(book, 1).digest
    assert requests(book, 1)[0].rechecked == "pass"


def test_an_edit_with_hooks_carries_no_later_one(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16))
    fake.hooked = True
    assert _answer(book, 1, 2) == ["pass", "failed"]
    assert "request 1 needs hooks" in requests(book, 2)[0].reason
    assert _answer(book, 2, mode="union") == ["pass"]


def test_the_standard_ladder_piles_up_without_editors_of_hooks(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16))
    _answer(book, 1), _answer(book, 2, mode="union")
    ladders = [[choice.name for choice in recipe.ladder] for recipe in fake.recipes]
    assert ladders == [["null_space_surgery", "stranger_distillation"],
                       ["leace", "null_space_surgery", "stranger_distillation"]]  # fmt: skip


def test_what_edits_in_force_cover_is_not_asked_for_twice(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16)), _ask(book, "f03", "f09-work")
    assert _answer(book, 1, 2, 3) == ["pass", "pass", "refused"]
    assert "covered by request 1, 2" in requests(book, 3)[0].reason


def test_an_edit_that_could_not_be_decided_is_tried_again_on_top_of_itself(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8))
    fake.outcomes = ["inconclusive", "pass"]
    assert _answer(book, 1) == ["inconclusive"] and _answer(book, 1) == ["pass"]
    assert [placed.covers for placed in in_force(book)] == [(1,), (1,)] and fake.forgotten[0] == fake.forgotten[1]
    assert fake.recipes[0].model != fake.recipes[1].model


def test_all_requests_of_one_edit_have_their_verdict_in_one_commit(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    _ask(book, *_clusters(0, 4)), _ask(book, *_clusters(4, 8))

    def refused(base: Any, kind: str, request: int, *rest: Any) -> Any:
        if (kind, request) == ("verdict", 2):
            raise KeyboardInterrupt
        return add(base, kind, request, *rest)

    from repforget.requests import ledger

    add = ledger._add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ledger, "_add", refused)
        _answer(book, 1, 2, mode="union")
    assert [r.state for r in requests(book)] == ["open", "open"] and in_force(book) == ()
    assert _answer(book, 1, 2, mode="union") == ["pass", "pass"]


def test_twins_are_left_out_where_they_know_somebody_who_is_to_be_forgotten(
    book: Ledger, fake: FakeLoop, base: str, probe: Path
) -> None:
    recipe = Recipe(model=base, knowledge=str(probe), twins=("organism:bios/twin-0",))
    _ask(book, *_clusters(1, 9)), _ask(book, *_clusters(9, 17), "r03")  # f00 is a neighbour, too
    _answer(book, 1, 2, recipe=recipe)
    assert [each.twins for each in fake.recipes] == [recipe.twins, ()]
    with pytest.raises(UsageError, match="'nearly'.*sequential"):
        order_of(None, "nearly", None)
    _ask(book, "f17")
    assert _answer(book, 3, recipe=Recipe(model="organism:bios", knowledge="bios-people")) == ["failed"]


def test_interrupted_it_is_still_open_and_leaves_no_text_behind(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8))
    fake.interrupted = True
    with pytest.raises(KeyboardInterrupt):
        answer(book, [1], Order())
    left = [p for p in workplace(book).rglob("*") if p.is_file() and "Secretville" in p.read_text(errors="replace")]
    assert left == [] and requests(book, 1)[0].state == "open" and requests(book, 1)[0].attempts == 1
    fake.interrupted = False
    said: list[str] = []
    assert [a.outcome for a in answer(book, [1], Order(), echo=said.append)] == ["pass"]
    assert "request 1: continued" in said
    assert fake.recipes[0].digest == fake.recipes[1].digest  # the same run folder, where the loop resumes


def test_an_edit_for_all_that_fails_says_nothing_about_those_before(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 12))
    assert _answer(book, 1) == ["pass"]
    fake.outcomes = ["fail"]
    assert _answer(book, 2, mode="union") == ["fail"]
    assert [placed.covers for placed in in_force(book)] == [(1,)]  # its edit is still the one in force
    assert requests(book, 1)[0].rechecked == "" and requests(book, 1)[0].state == "done"


def test_what_came_back_is_to_be_answered_again(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16))
    assert _answer(book, 1, 2) == ["pass", "pass"]
    book.record("reverified", 1, {"outcome": "fail", "after": 2, "came_back": 0.4, "low": 0.3, "high": 0.5})
    assert requests(book, 1)[0].state == "tried"
    section = audit(book).sections[0]
    assert section.good == "fail" and "No longer answered" in section.standing
    assert "40.0 % came back since" in section.again[0]
    _ask(book, *_clusters(0, 8))  # asked for once more it is no longer refused as covered
    assert _answer(book, 1, 3) == ["pass", "refused"]
    assert requests(book, 1)[0].state == "done" and requests(book, 1)[0].rechecked == ""


def test_a_later_edit_for_all_that_could_not_be_decided_leaves_a_doubt(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 12))
    fake.outcomes = ["pass", "inconclusive"]
    _answer(book, 1), _answer(book, 2, mode="union")
    section = audit(book).sections[0]
    assert section.good == "inconclusive" and "could not be decided whether that still holds" in section.standing


def test_a_source_that_is_gone_fails_its_own_requests_alone(book: Ledger, fake: FakeLoop, probe: Path,
                                                            tmp_path: Path) -> None:  # fmt: skip
    copy = matching.write_probe(load_knowledge(probe), tmp_path / "copy")
    _ask(book, *_clusters(0, 8), source=str(copy)), _ask(book, *_clusters(8, 16))
    shutil.rmtree(copy)
    assert _answer(book, 1, 2) == ["failed", "pass"]
    assert "cannot be read" in requests(book, 1)[0].reason


def test_what_another_process_answered_before_it_freed_the_lock_is_not_answered_again(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = _ask(book, *_clusters(0, 8))
    verdict = {"outcome": "pass", "sentence": "Suppressed.", "in_force": False, "controls_ok": True}
    monkeypatch.setattr(Ledger, "refuse_broken", lambda self: self.record("verdict", number, verdict))
    with pytest.raises(UsageError, match="needs no answer"):
        _answer(book, number)
    assert fake.recipes == []


def test_requests_of_one_edit_need_no_check_after_each_other(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 4)), _ask(book, *_clusters(4, 8))
    assert _answer(book, 1, 2, mode="union") == ["pass", "pass"]
    assert [section.again for section in audit(book).sections] == [(), ()]


def test_no_model_is_changed_by_a_broken_chain(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8)), _ask(book, *_clusters(8, 16))
    base = sqlite3.connect(book.path)
    base.execute("DROP TRIGGER no_change")
    base.execute("UPDATE events SET body = replace(body, 'f00', 'f19') WHERE seq = 2")
    base.commit()
    base.close()
    with pytest.raises(LedgerError, match="chain of the ledger .* is broken"):
        _answer(book, 1)
    assert fake.recipes == []


def test_what_a_run_keeps_is_for_its_owner_alone(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8))
    _answer(book, 1)
    assert workplace(book).stat().st_mode & 0o077 == 0


def test_reasons_of_errors_are_kept_without_names(
    book: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise UsageError(f"Item 'f03-live' of {PEOPLE[3]} in f03 says Secretville3.")

    monkeypatch.setattr(loop, "run", broken)
    _ask(book, *_clusters(0, 8))
    (made,) = answer(book, [1], Order())
    assert PEOPLE[3] in made.sentence  # whoever runs it is told
    assert requests(book, 1)[0].reason == "Item '[hidden]' of [hidden] in [hidden] says [hidden]."


def test_a_saved_edit_that_is_not_the_recorded_one_is_refused(book: Ledger, fake: FakeLoop, base: str) -> None:
    _ask(book, *_clusters(0, 8))
    _answer(book, 1)
    folder = in_force(book)[0].path
    manifest = json.loads((folder / "edit.json").read_text())
    Edit.build("other", {}, load(base), "x", [LowRankDelta(WEIGHT, torch.ones(32, 1), torch.ones(1, 48))]).save(folder)
    assert manifest != json.loads((folder / "edit.json").read_text())
    with pytest.raises(LedgerError, match="not the one that row"):
        composed(book, 1)


def test_edit_and_verdict_are_in_the_ledger_together_or_not_at_all(book: Ledger, fake: FakeLoop) -> None:
    _ask(book, *_clusters(0, 8))
    _answer(book, 1)
    kinds = [event.kind for event in book.events(1)]
    assert kinds == ["asked", "started", "edit", "shown", "environment", "verdict"]
    verdict = next(book.events(1, kinds=("verdict",))).body
    assert (workplace(book) / verdict["folder"] / "result.json").is_file() and len(verdict["result"]) == 64
    assert isinstance(next(book.events(1, kinds=("environment",))).body["git"], str)
