"""From measurements on organisms to one row per measure: does it tell knowing from not knowing, and how robustly?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repforget.calibration.pool import Organism
from repforget.discover import methods
from repforget.records import ItemScores
from repforget.verify import statistics as st
from repforget.verify.arms import MeasureInfo

Found = Mapping[Organism, Mapping[str, Mapping[str, Any]]]
HIDDEN = "original, refusal training"


@dataclass(frozen=True)
class Row:
    """One measure. ``auc``: chance that an organism that knows scores above one that never knew (95 % limits
    over organisms); ``missed``: those that know and score no higher than the highest that never knew;
    ``relearning`` and ``rounding``: 1 where the measure moves alike on a model that hides and on one that never knew.
    """

    name: str
    family: str
    access: str
    declared: bool  # the verifier offers it as a vote
    auc: float
    low: float
    high: float
    missed: tuple[str, ...]
    relearning: float
    rounding: float
    seconds: float  # CPU seconds of the whole verifier, mean over organisms
    values: Mapping[str, float]

    def to_json(self) -> dict[str, Any]:
        plain = {k: v for k, v in vars(self).items() if k not in ("name", "values", "missed")}
        rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in plain.items()}
        return {**rounded, "missed": list(self.missed), "values": dict(self.values)}


def table(found: Found) -> list[Row]:
    """One row per knowledge measure, best first."""
    rows = [row for method in methods("verify")
            for row in _rows(method.name, method.family, method.constant("MEASURES"), found)]  # fmt: skip
    rows += _rows("tofu", "benchmark", _benchmark(found), found)
    return sorted(rows, key=lambda row: (-row.auc, row.name))


def _benchmark(found: Found) -> dict[str, MeasureInfo]:
    names = {name for by in found.values() for name in by.get("tofu", {}).get("scores", {})}
    return {name: MeasureInfo("knowledge", "black-box" if "rouge" in name else "logits", votes=False)
            for name in sorted(names)}  # fmt: skip


def _rows(verifier: str, family: str, measures: Mapping[str, MeasureInfo], found: Found) -> list[Row]:
    per_organism = {organism: by[verifier] for organism, by in found.items() if verifier in by}
    if not per_organism:
        return []
    seconds = float(np.mean([entry["seconds"] for entry in per_organism.values()]))
    rows = []
    for measure, info in measures.items():
        if info.kind != "knowledge" or any(measure not in entry["scores"] for entry in per_organism.values()):
            continue
        means = {o: ItemScores.from_json(entry["scores"][measure]).mean for o, entry in per_organism.items()}
        values = {o: float(f"{mean:.6g}") for o, mean in means.items()}  # rounding noise is a tie, not a difference
        rows.append(_row(f"{verifier}.{measure}", family, info, values, seconds))
    return rows


def _row(name: str, family: str, info: MeasureInfo, values: Mapping[Organism, float], seconds: float) -> Row:
    pool = {o: v for o, v in values.items() if o.role == "pool"}
    knows = np.array([v for o, v in pool.items() if o.truth == "knows"])
    never = np.array([v for o, v in pool.items() if o.truth == "never knew"])
    sure = st.auc_interval(knows, never, [f"k{k}" for k in range(len(knows))], [f"n{k}" for k in range(len(never))],
                           alpha=0.025)  # fmt: skip
    missed = tuple(o.name for o, v in pool.items() if o.truth == "knows" and not v > never.max())
    plain = {o.name: v for o, v in values.items()}
    return Row(name, family, info.access, info.votes, sure.point, sure.low, sure.high, missed,
               _relearning(plain), _rounding(plain), seconds, plain)  # fmt: skip


def _symmetric(a: float, b: float) -> float:
    """1 - |a - b| / (|a| + |b|): 1 where both are the same, 0 where one is zero or they have opposite signs."""
    total = abs(a) + abs(b)
    return math.nan if total == 0.0 else 1.0 - abs(a - b) / total


def _at(values: Mapping[str, float], name: str) -> float:
    return values.get(name, math.nan)


def _relearning(values: Mapping[str, float]) -> float:
    """Gain by relearning other subjects, on a model that hides against one that never knew: equal gains mean that the
    measure had seen before what relearning brought back (the later symmetric form, spec W11)."""
    hidden = _at(values, f"{HIDDEN}, relearning") - _at(values, HIDDEN)
    never = _at(values, "twin-0, relearning") - _at(values, "twin-0")
    return _symmetric(hidden, never)


def _rounding(values: Mapping[str, float]) -> float:
    """Agreement before and after rounding to NF4, mean over a model that knows, one that hides, one that never knew."""
    pairs = [(_at(values, n), _at(values, f"{n}, rounded")) for n in ("original", HIDDEN, "twin-1")]
    return float(np.mean([_symmetric(a, b) for a, b in pairs]))


def markdown(measures: Mapping[str, Mapping[str, Any]], needed: float) -> str:
    """The table of the documentation from the entries of ``calibration.json``."""
    lines = ["| measure | access | AUC (95 %) | says | missed | relearning | rounding | CPU s |",
             "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name, m in ranked(measures):
        says = "votes" if m["declared"] and m["auc"] >= needed else "descriptive"
        missed = ", ".join(m["missed"]) or "none"
        cells = (f"`{name}`", m["access"], f"{m['auc']:.2f} ({m['low']:.2f} to {m['high']:.2f})", says, missed,
                 _number(m["relearning"]), _number(m["rounding"]), f"{m['seconds']:.1f}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None or math.isnan(value) else f"{value:.2f}"


def ranked(measures: Mapping[str, Mapping[str, Any]]) -> Sequence[tuple[str, Mapping[str, Any]]]:
    """The entries, best first."""
    return sorted(measures.items(), key=lambda entry: (-entry[1]["auc"], entry[0]))
