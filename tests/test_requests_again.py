"""Earlier requests checked again: the models of the ledger, in the order of the answers, and what is recorded of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import contract_tools
import numpy as np
import pytest
from request_tools import FakeLoop
from test_requests_run import _answer, fake, quick  # noqa: F401
from test_requests_stability import a_look

from repforget.errors import ResourceError, UsageError
from repforget.guarantee import unearned
from repforget.knowledge_files import load_knowledge
from repforget.models.load import load
from repforget.report.tables import share
from repforget.requests import asking, matching, page
from repforget.requests._picture import matrix
from repforget.requests.again import again
from repforget.requests.audit import audit
from repforget.requests.ledger import Ledger
from repforget.requests.run import composed, in_force, sequence
from repforget.requests.stability import Look, Stability, stability
from repforget.requests.states import requests


@pytest.fixture
def book(tmp_path: Path) -> Ledger:
    model = contract_tools.tiny_model("llama")
    model.module.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    probe = matching.write_probe(contract_tools.tiny_knowledge(), tmp_path / "probe")
    return Ledger.create(tmp_path / "requests.sqlite", {"model": str(tmp_path / "model"), "source": str(probe)})


def asked(book: Ledger, surname: str) -> int:
    knowledge = load_knowledge(str(book.facts["source"]))
    people = sorted({item.cluster for item in knowledge.forget if item.cluster.endswith(surname)})
    return asking.ask(book, people)[0].id


def test_states_are_the_models_in_force_and_what_came_back_is_recorded(book: Ledger, fake: FakeLoop) -> None:  # noqa: F811
    assert _answer(book, asked(book, "36"), asked(book, "37")) == ["pass", "pass"]
    knowledge = load_knowledge(str(book.facts["source"]))
    found = again(book, knowledge)
    assert found.names == ("request 1", "request 2") and found.left.shape == (3, 2)
    base = load(str(book.facts["model"]))
    last = composed(book, 2).applied_to(base)
    np.testing.assert_allclose(found.left[0], 1.0)
    straight = again_by_hand(knowledge, base, last)
    np.testing.assert_allclose(found.left[2], straight, rtol=1e-6)
    (event,) = [e for e in book.events(1) if e.kind == "reverified"]
    assert event.body["after"] == 2 and event.body["came_back"] == pytest.approx(found.re_emerged[0].point)
    assert requests(book, 1)[0].rechecked == event.body["outcome"] in ("pass", "fail", "inconclusive")
    assert not [e for e in book.events(2) if e.kind == "reverified"]  # nothing came after it


def again_by_hand(knowledge: object, base: object, last: object) -> list[float]:
    """Shares left of both requests in the last state, from the verifier's own measure."""
    from repforget.verify import _asking as ask

    shares = []
    for surname in ("36", "37"):
        items = [i for i in knowledge.forget if i.cluster.endswith(surname)]  # type: ignore[attr-defined]
        floor = ask.prior(items, knowledge, 31).mean()  # type: ignore[arg-type]
        first, then = (ask.contrast(m, items, knowledge, forms=2, limit=31).probability.mean()  # type: ignore[arg-type]
                       for m in (base, last))  # fmt: skip
        shares.append(float((then - floor) / (first - floor)))
    return shares


def test_what_cannot_be_checked_again_is_said(book: Ledger, fake: FakeLoop, tmp_path: Path) -> None:  # noqa: F811
    knowledge = load_knowledge(str(book.facts["source"]))
    _answer(book, asked(book, "36"))
    with pytest.raises(UsageError, match="1 requests .* two are needed"):
        again(book, knowledge)
    _answer(book, asked(book, "37"))
    with pytest.raises(UsageError, match="Request 1 names nothing in the probe"):
        again(book, load_knowledge("bios-people"))


def test_a_request_that_was_never_known_is_named_and_the_others_are_checked(
    book: Ledger, fake: FakeLoop, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    from repforget.requests import again as module

    assert _answer(book, *(asked(book, surname) for surname in ("36", "37", "38"))) == ["pass"] * 3
    prior = module._prior

    def knows_the_first(*given: Any) -> Look:
        known = prior(*given)
        first = known.requests["request 1"]
        sure = dataclasses.replace(first, values=tuple(1.0 for _ in first.ids))
        return dataclasses.replace(known, requests={**known.requests, "request 1": sure})

    monkeypatch.setattr(module, "_prior", knows_the_first)
    code, out, _ = cli("request", "check", "--ledger", str(book.path))
    second = next(book.events(2, kinds=("reverified",))).body
    assert "Request 1 was known no better before any request" in out and "request 2" in out
    assert code == (10 if second["outcome"] == "fail" else 11)
    first = next(book.events(1, kinds=("reverified",))).body
    assert first["outcome"] == "inconclusive" and first["reason"] in audit(book).sections[0].again[0]
    assert requests(book, 1)[0].state == "done" and "came_back" in second


@pytest.mark.parametrize(("left_out", "code"), [({}, 0), ({"c": "C was never known."}, 11)])
def test_where_one_was_left_out_the_check_is_no_pass(
    book: Ledger, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch,
    left_out: dict[str, str], code: int,
) -> None:  # fmt: skip
    levels = [(0.9, 0.9, 0.9), (0.1, 0.9, 0.9), (0.1, 0.1, 0.9), (0.1, 0.1, 0.1)]
    *looks, floor = (Look({name: own for name, own in each.requests.items() if name not in left_out}, each.keep)
                     for each in (*map(a_look, levels), a_look((0.1, 0.1, 0.1))))  # fmt: skip
    made = stability(looks, floor, ("a", "b", "c"), left_out)
    monkeypatch.setattr("repforget.requests.again.again", lambda *given, **more: made)
    found = cli("request", "check", "--ledger", str(book.path), "--json")
    assert found[0] == code and json.loads(found[1])["outcomes"] == ["pass", "pass"]


def test_what_changed_while_it_was_asked_is_not_recorded_as_checked(
    book: Ledger, fake: FakeLoop, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    from repforget.requests import again as module

    assert _answer(book, asked(book, "36"), asked(book, "37")) == ["pass", "pass"]
    third, made = asked(book, "38"), stability

    def meanwhile(*given: Any) -> Stability:
        with Ledger(book.path) as other:
            assert _answer(other, third) == ["pass"]
        return made(*given)

    monkeypatch.setattr(module, "stability", meanwhile)
    with pytest.raises(ResourceError, match="changed what is in force .* check again"):
        again(book, load_knowledge(str(book.facts["source"])))
    assert not [*book.events(kinds=("reverified",))]


def test_the_command_prints_the_matrix_and_its_exit_code_says_what_came_back(
    book: Ledger, fake: FakeLoop, cli: Callable[..., tuple[int, str, str]], tmp_path: Path  # noqa: F811
) -> None:
    assert _answer(book, asked(book, "36"), asked(book, "37")) == ["pass", "pass"]
    options = ("--ledger", str(book.path), "--svg", str(tmp_path / "matrix.svg"))
    code, out, _ = cli("request", "check", *options)
    (event,) = [e for e in book.events(1) if e.kind == "reverified"]
    assert code == {"pass": 0, "fail": 10, "inconclusive": 11}[event.body["outcome"]]
    assert "what must stay" in out and "Most came back of" in out and f"head: {book.head}" in out
    assert (tmp_path / "matrix.svg").read_text().startswith("<svg")
    again_code, out, _ = cli("request", "check", *options[:2], "--json")
    found = json.loads(out)
    assert again_code == code and found["outcomes"] == [event.body["outcome"]] and found["head"] == book.head
    assert np.array(found["left"]).shape == (3, 2) and found["re_emerged"][0]["point"] == event.body["came_back"]
    for text in (page.html(audit(book)), page.markdown(audit(book))):
        assert text.count("after request 2: ") == 2 and share(event.body['came_back']) in text
        assert unearned(text) == ()
    code, _, said = cli("request", "check", *options[:2], "--knowledge", "bios-peple")
    assert code == 2 and "did you mean 'bios-people'" in said


def test_states_come_in_the_order_of_the_last_answers(book: Ledger, fake: FakeLoop) -> None:  # noqa: F811
    first, second = asked(book, "36"), asked(book, "37")
    fake.outcomes = ["inconclusive", "pass", "pass"]
    assert _answer(book, first, second) == ["inconclusive", "pass"] and _answer(book, first) == ["pass"]
    last = list(sequence(book))
    assert [number for number, _ in last] == [second, first]
    assert last[-1][1].digest == composed(book, first).digest and len(in_force(book)) == 3


def test_pictures_and_tables_name_requests_by_their_numbers(book: Ledger, fake: FakeLoop) -> None:  # noqa: F811
    asked(book, "38")
    assert _answer(book, asked(book, "36"), asked(book, "37")) == ["pass", "pass"]
    found = again(book, load_knowledge(str(book.facts["source"])))
    drawn = matrix(found)
    assert ">3</text>" in drawn and ">1</text>" not in drawn
    assert [row[0] for row in found.rows()] == ["none", "request 2", "request 3"]
    assert unearned(" ".join(found.sentences())) == ()
