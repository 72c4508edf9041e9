"""Earlier requests checked again: the models of the ledger, in the order of the answers, and what is recorded of it."""

from __future__ import annotations

from pathlib import Path

import contract_tools
import numpy as np
import pytest
from test_requests_run import FakeLoop, _answer, fake, quick  # noqa: F401

from repforget.errors import UsageError
from repforget.knowledge_files import load_knowledge
from repforget.models.load import load
from repforget.requests import asking, matching
from repforget.requests.again import again
from repforget.requests.ledger import Ledger
from repforget.requests.run import composed
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
