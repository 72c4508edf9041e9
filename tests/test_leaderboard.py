"""The committed leaderboard: table and picture follow from the result, and no editor is left out."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from repforget import discover

BOARD = Path(__file__).parents[1] / "experiments" / "leaderboard"


def part(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"leaderboard_{name}", BOARD / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def body() -> dict[str, Any]:
    return json.loads((BOARD / "result.json").read_text())  # type: ignore[no-any-return]


def test_table_and_picture_are_those_of_the_result(body: dict[str, Any]) -> None:
    draw = part("draw")
    assert (BOARD / "table.md").read_text() == draw.table(body)
    assert (BOARD / "pareto.svg").read_text() == draw.picture(body)


def test_every_editor_has_a_row_and_every_row_a_result(body: dict[str, Any]) -> None:
    rows = yaml.safe_load((BOARD / "methods.yaml").read_text())["rows"]
    anywhere = {m.name for m in discover.methods("edit") if not m.constant("TRAINED_BY")}
    missing = anywhere - {row["editor"] for row in rows} - {"trained"}
    assert not missing, f"no row in methods.yaml for {sorted(missing)}"
    assert [row["name"] for row in rows] == [row["name"] for row in body["rows"]]
    assert all(len(row["worst"]) == len(body["seeds"]) for row in body["rows"] if not row["refused"])


def test_rows_are_valid_requests() -> None:
    for row in part("board").rows():
        for settings in row["tries"]:
            discover.method("edit", row["editor"]).settings(settings)
        assert len(row["tries"]) <= 3


def test_the_front_holds_what_nothing_beats() -> None:
    points = {"a": (0.1, 0.5), "b": (0.5, 0.1), "c": (0.6, 0.2), "d": (0.1, 0.6), "e": (0.3, 0.3)}
    rows = [{"name": name, "worst": [x], "lost": [y]} for name, (x, y) in points.items()]
    assert part("draw").front(rows) == {"a", "b", "e"}


def test_controls_come_out_right(body: dict[str, Any]) -> None:
    """The twins are the floor by definition; the placebo is told apart from nothing."""
    assert all(abs(value) < 0.05 for twin in body["twins"] for value in twin.values())
    (placebo,) = [row for row in body["rows"] if row["name"] == "placebo"]
    assert min(placebo["worst"]) > 0.8
