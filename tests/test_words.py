"""Removed, deleted, guaranteed, certified: nowhere without a theorem, neither in reports nor in the documents."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import synthetic_run

from repforget.guarantee import Guarantee, unearned
from repforget.report import markdown, render

ROOT = Path(__file__).parents[1]
THEOREMS = ("guarantees.md", "right-to-be-forgotten", "private-training", "federated")  # these name theirs
WRITTEN = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("experiments/*/README.md"))]
PAGES = [str(p.relative_to(ROOT)) for p in WRITTEN if not any(name in str(p) for name in THEOREMS)]
EXACT = Guarantee("exact", "The records are removed: equal to training without them.", "record", "Somebody 2021",
                  ("The order of records follows from their ids.",))  # fmt: skip


@pytest.mark.parametrize("outcome", ["pass", "fail", "inconclusive"])
def test_a_report_has_only_the_words_it_has_earned(outcome: str) -> None:
    run = synthetic_run.run(outcome)
    for text in (render.html(run).replace(render.plotly_js(), ""), markdown.markdown(run, ())):
        assert unearned(text) == ()


def test_a_report_of_an_exact_edit_names_its_theorem() -> None:
    run = synthetic_run.run()
    proven = dataclasses.replace(run, edits=({**run.edits[0], "guarantee": dataclasses.asdict(EXACT)},))
    for text in (render.html(proven).replace(render.plotly_js(), ""), markdown.markdown(proven, ())):
        assert EXACT.statement in text and EXACT.theorem in text and EXACT.assumptions[0] in text
        assert unearned(text) == ("removed",)
        assert unearned(text, [EXACT]) == ()


@pytest.mark.parametrize("page", PAGES)
def test_documents_use_them_only_where_a_theorem_is_named(page: str) -> None:
    lines = (ROOT / page).read_text().splitlines()
    # A row of the tables of methods is that method's docstring, which names its source.
    said = [line for line in lines if not (page.startswith("docs/") and line.startswith("| `"))]
    assert unearned("\n".join(said)) == (), page
