"""The experiment of eight requests: its table is its result, its audit holds nothing personal."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from repforget.knowledge_files import load_knowledge

FOLDER = Path(__file__).parents[1] / "experiments" / "right-to-be-forgotten"


def test_the_table_is_that_of_the_result_and_stands_in_the_text() -> None:
    spec = importlib.util.spec_from_file_location("requests_study", FOLDER / "study.py")
    assert spec is not None and spec.loader is not None
    study = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(study)
    table = study.table(json.loads((FOLDER / "result.json").read_text()))
    assert (FOLDER / "table.md").read_text() == table
    assert table in (FOLDER / "README.md").read_text()


def test_the_audit_names_nobody() -> None:
    knowledge = load_knowledge("bios-people")
    audit = (FOLDER / "audit.md").read_text()
    words = set(audit.replace("`", " ").split())
    assert not [item.id for item in knowledge.forget if item.subject in audit or item.id in audit]
    assert not {item.cluster for item in knowledge.forget} & words and "customer" not in audit
