"""A request answered by the loop itself: one sealed verdict, a whole chain, no text left behind."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from repforget.knowledge_files import load_knowledge
from repforget.requests import asking
from repforget.requests.run import answer, composed, order_of, workplace

RECIPE = """
model: organism:bios
knowledge: bios-people
locate: [{random_sites: {draws: 20}}]
ladder:
  - {mean_direction: {sites: [mlp_out.2]}}
verify:
  - {behaviour: {forms: 1, max_items: 8, samples: 1}}
"""


@pytest.mark.slow
def test_a_request_is_answered_by_a_sealed_verdict_beside_ceiling_and_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)  # one process for the sealed check; several: test_loop.py
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    people = sorted({item.cluster for item in load_knowledge("bios-people").forget})[:8]
    with asking.opened(tmp_path / "requests.sqlite", None, "bios-people") as book:
        asking.ask(book, people)
        (answered,) = answer(book, [1], order_of(tmp_path / "recipe.yaml", "sequential", None))
        assert book.faults() == ()
        kinds = [event.kind for event in book.events(1)]
        assert kinds == ["asked", "started", "edit", "shown", "environment", "verdict"]
        verdict, edit, where, shown = (next(book.events(1, kinds=(kind,))).body
                                       for kind in ("verdict", "edit", "environment", "shown"))  # fmt: skip
        assert verdict["outcome"] == answered.outcome and verdict["split"] == "sealed"
        assert edit["method"] == "mean_direction" and edit["base_fingerprint"] == where["model_fingerprint"]
        claim = next(c for c in shown["claims"] if c["name"] == "behaviour.contrastive")
        assert claim["original"] > 0.5 > claim["floor"]  # ceiling and floor of these people
        if verdict["in_force"]:
            assert composed(book, 1).digest == edit["digest"]
        names = {item.subject for item in load_knowledge("bios-people").forget if item.cluster in people}
        for path in (book.path, *workplace(book).rglob("*")):
            text = path.read_bytes().decode("latin-1") if path.is_file() else ""
            assert not [name for name in names if name in text], path
