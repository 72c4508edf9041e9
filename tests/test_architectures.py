"""The table of methods and architectures: it is whole, it is the document, and a part of it holds when tried again."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import tiny_models

from repforget import discover

FOLDER = Path(__file__).parents[1] / "experiments" / "architectures"
RESULT: dict[str, dict[str, str]] = json.loads((FOLDER / "result.json").read_text())
PART = 25  # one cell in so many is tried again


def _script() -> Any:
    spec = importlib.util.spec_from_file_location("architecture_table", FOLDER / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _drawn() -> list[tuple[str, str]]:
    cells = [(key, a) for key, row in sorted(RESULT.items()) for a in row]
    return [c for c in cells if int(hashlib.sha256("/".join(c).encode()).hexdigest(), 16) % PART == 0]


def test_every_method_has_a_row_with_every_architecture() -> None:
    assert set(RESULT) == {f"{room}.{name}" for room, name in _script().names()}
    assert {f"locate.{name}" for name in discover.names("locate")} < set(RESULT)
    assert all(tuple(row) == tuple(sorted(tiny_models.ARCHITECTURES)) for row in RESULT.values())


def test_the_document_is_what_the_result_says() -> None:
    script = _script()
    assert script.DOCUMENT.read_text() == script.table(RESULT)


@pytest.mark.parametrize(("key", "architecture"), _drawn())
def test_a_cell_holds_when_tried_again(key: str, architecture: str) -> None:
    room, _, name = key.partition(".")
    said = _script().tried(room, name, architecture)
    assert bool(said) == bool(RESULT[key][architecture]), said
