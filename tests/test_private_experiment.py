"""The experiment on private training: its page shows what was stored."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "experiments" / "private-training"


def test_the_page_shows_the_stored_result() -> None:
    spec = importlib.util.spec_from_file_location("private_training_measure", FOLDER / "measure.py")
    assert spec is not None and spec.loader is not None
    measure = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(measure)
    result = json.loads((FOLDER / "result.json").read_text())
    assert measure.table(result) in (FOLDER / "README.md").read_text()
    assert result["people"] * measure.DELTA < 1
    private = {name: arm for name, arm in result["arms"].items() if "epsilon" in arm}
    assert all(arm["epsilon"] <= measure.ARMS[name] for name, arm in private.items())
