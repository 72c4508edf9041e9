"""What the calibration found about each measure: below this AUC it describes and cannot carry a verdict."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

NEEDED = 0.9
FILE = Path(__file__).with_name("calibration.json")


@cache
def calibrated() -> Mapping[str, Any]:
    """The shipped ``calibration.json``; ``repforget calibrate`` makes it."""
    found: dict[str, Any] = json.loads(FILE.read_text("utf-8"))
    return found


def may_vote(name: str) -> bool:
    """Whether ``verifier.measure`` tells knowing from not knowing well enough; one never calibrated may."""
    entry = calibrated()["measures"].get(name)
    return entry is None or bool(entry["auc"] >= NEEDED)
