"""The calibration as one static picture: AUC with limits per measure, and what each organism scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from repforget.calibration.table import ranked
from repforget.report.svg import FAINT, GRID, INK, number, shade, svg, text

ROW, LEFT, AXIS, TOP, CELL, GAP = 19.0, 232.0, 250.0, 148.0, 17.0, 40.0
VOTES, DESCRIBES = "#0b3c6f", "#b0b8c1"


def picture(measures: Mapping[str, Mapping[str, Any]], organisms: Sequence[Mapping[str, str]], needed: float) -> str:
    """SVG: one row per measure, best first; deep colour is a value near the highest of the row."""
    rows = ranked(measures)
    pool = [o for o in organisms if o["role"] == "pool"]
    order = [o["name"] for truth in ("knows", "never knew", "neither") for o in pool if o["truth"] == truth]
    x_cells = LEFT + AXIS + GAP
    height = TOP + ROW * len(rows) + 34
    width = x_cells + CELL * len(order) + 70
    parts = [_axis(height, needed), *_headings(pool, order, x_cells)]
    for k, (name, m) in enumerate(rows):
        y = TOP + ROW * k + ROW / 2
        colour = VOTES if m["declared"] and m["auc"] >= needed else DESCRIBES
        parts.append(text(LEFT - 10, y + 4, name, anchor="end", size=11))
        parts.append(_line(_x(m["low"]), y, _x(m["high"]), y, colour))
        parts.append(f"<circle cx='{number(_x(m['auc']))}' cy='{number(y)}' r='4' fill='{colour}'/>")
        parts += _cells(m["values"], order, x_cells, y)
    parts.append(text(LEFT, height - 10, "AUC: knows against never knew (95 % over organisms); dark: may vote",
                      size=11, fill=FAINT))  # fmt: skip
    return svg(width, height, parts, "Calibration of every measure on organisms whose truth is known")


def _x(auc: float) -> float:
    return LEFT + AXIS * min(max(auc, 0.0), 1.0)


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (f"<line x1='{number(x1)}' y1='{number(y1)}' x2='{number(x2)}' y2='{number(y2)}' stroke='{colour}' "
            "stroke-width='2'/>")  # fmt: skip


def _axis(height: float, needed: float) -> str:
    bottom = height - 30
    marks = [_line(_x(at), TOP - 6, _x(at), bottom, GRID) + text(_x(at), TOP - 12, f"{at:g}", anchor="middle", size=11)
             for at in (0.0, 0.5, 1.0)]  # fmt: skip
    return "\n".join([*marks, _line(_x(needed), TOP - 6, _x(needed), bottom, "#c8553d"),
                      text(_x(needed), TOP - 24, f"{needed:g}", anchor="middle", size=11, fill="#c8553d")])  # fmt: skip


def _headings(pool: Sequence[Mapping[str, str]], order: Sequence[str], x0: float) -> list[str]:
    truth = {o["name"]: o["truth"] for o in pool}
    colours = {"knows": VOTES, "never knew": "#3c7a4e", "neither": FAINT}
    return [f"<g transform='translate({number(x0 + CELL * (k + 0.7))},{number(TOP - 8)}) rotate(-55)'>"
            + text(0, 0, name, size=10, fill=colours.get(truth[name], INK)) + "</g>"
            for k, name in enumerate(order)]  # fmt: skip


def _cells(values: Mapping[str, float | None], order: Sequence[str], x0: float, y: float) -> list[str]:
    shown = [values.get(name) for name in order]
    finite = [v for v in shown if v is not None]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    spread = (high - low) or 1.0
    return [f"<rect x='{number(x0 + CELL * k)}' y='{number(y - 8)}' width='{number(CELL - 1)}' height='16' "
            f"fill='{shade(None if v is None else (v - low) / spread)}'/>" for k, v in enumerate(shown)]  # fmt: skip
