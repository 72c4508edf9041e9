"""The picture of result.json; ``python experiments/influence/draw.py`` makes it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from repforget.report.svg import FAINT, GRID, number, svg, text

HERE = Path(__file__).parent
LEFT, WIDE, TOP, ROW = 270.0, 470.0, 46.0, 30.0
LOW, HIGH = -0.2, 1.0
SHOWN = (("all", "#0b3c6f", "over all halves"), ("within", "#c2571a", "among halves with as many of the fact's own "
                                                                     "records"))  # fmt: skip


def picture(body: dict[str, Any]) -> str:
    """Per method the mean score with its interval; random scores stand at 0."""
    rows = dict(sorted(body["lds"].items(), key=lambda pair: -pair[1]["all"]["mean"]))
    height = TOP + ROW * len(rows)

    def at(value: float) -> float:
        return LEFT + WIDE * (min(max(value, LOW), HIGH) - LOW) / (HIGH - LOW)

    parts = []
    for k in range(7):
        value = round(LOW + (HIGH - LOW) * k / 6, 9) + 0.0
        parts += [f"<line x1='{number(at(value))}' x2='{number(at(value))}' y1='{number(TOP)}' y2='{number(height)}' "
                  f"stroke='{FAINT if abs(value) < 1e-9 else GRID}'/>",
                  text(at(value), height + 16, f"{value:.1f}", size=11, anchor="middle")]  # fmt: skip
    for k, (name, row) in enumerate(rows.items()):
        parts.append(text(LEFT - 10, TOP + ROW * (k + 0.5) + 4, name, anchor="end"))
        for place, (key, colour, _) in enumerate(SHOWN):
            found = row[key]
            if found["mean"] is None:
                continue
            y = number(TOP + ROW * (k + 0.35 + 0.3 * place))
            parts += [f"<line x1='{number(at(found['low']))}' x2='{number(at(found['high']))}' y1='{y}' y2='{y}' "
                      f"stroke='{colour}' stroke-width='2.5'/>",
                      f"<circle cx='{number(at(found['mean']))}' cy='{y}' r='4' fill='{colour}'><title>"
                      f"{found['mean']:.3f}</title></circle>"]  # fmt: skip
    for place, (_, colour, words) in enumerate(SHOWN):
        parts.append(text(LEFT + 150 * place, TOP - 12, words, fill=colour))
    parts.append(text(LEFT + WIDE / 2, height + 36, "Spearman correlation of foretold and measured, mean over queries",
                      anchor="middle"))  # fmt: skip
    return svg(LEFT + WIDE + 30, height + 48, parts, "Linear datamodelling score by method")


if __name__ == "__main__":
    (HERE / "lds.svg").write_text(picture(json.loads((HERE / "result.json").read_text())))
