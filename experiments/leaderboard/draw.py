"""The table and the picture of result.json; ``python experiments/leaderboard/draw.py`` makes both again."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from repforget.report.svg import FAINT, GRID, INK, number, svg, text

HERE = Path(__file__).parent
COLUMNS = ("behaviour.contrastive", "logit_lens.best_layer", "reprobe.linear", "patch_depth.carried", "quantize.nf4",
           "relearn.best_step")  # fmt: skip
HEADS = ("answers", "logit lens", "probes", "patching", "4-bit", "relearned")
WIDE, HIGH, LEFT, TOP = 700.0, 460.0, 70.0, 30.0
NAMED = 0.75  # share left up to which a row is named in the picture
MOST = (1.1, 0.12)  # right and upper ends of the axes: share left, share lost


def spread(values: list[float]) -> str:
    return f"{fmean(values):.2f}" if max(values) - min(values) < 0.015 else \
        f"{fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"  # fmt: skip


def front(rows: list[dict[str, Any]]) -> set[str]:
    """Names of the rows that no other beats in one respect without losing in the other."""
    points = {r["name"]: (fmean(r["worst"]), max(0.0, fmean(r["lost"]))) for r in rows if "worst" in r}
    return {n for n, (x, y) in points.items()
            if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points.values())}  # fmt: skip


def table(body: dict[str, Any]) -> str:
    """Markdown: rows in order of the worst attack, those within 2 % of utility first."""
    good = [r for r in body["rows"] if "worst" in r]
    best = front(good)
    good.sort(key=lambda r: (fmean(r["lost"]) > 0.02, fmean(r["worst"])))
    head = ["editor", "worst attack", *HEADS, "lost", "CPU s", "MB"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    for k, twin in enumerate(body["twins"]):
        top = max(twin, key=lambda name: twin[name])
        cells = [f"{twin[c]:.2f}" for c in COLUMNS]
        cells = [f"*twin {k} (never knew)*", f"{top} {twin[top]:.2f}", *cells, "", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    for r in good:
        name = f"**{r['name']}**" if r["name"] in best else r["name"]
        at = max(range(len(r["worst"])), key=lambda k: r["worst"][k])
        cells = [spread(r["left"][c]) for c in COLUMNS]
        lines.append("| " + " | ".join([
            name, f"{r['worst attack'][at]} {spread(r['worst'])}", *cells, f"{100 * fmean(r['lost']):.1f} %",
            f"{fmean(r['seconds']):.0f}", f"{r['bytes'] / 1e6:.1f}"]) + " |")  # fmt: skip
    for r in body["rows"]:
        if "worst" not in r:
            lines.append(f"| {r['name']} | refused: {r['refused'][0]} |" + " |" * (len(head) - 2))
    return "\n".join(lines) + "\n"


def picture(body: dict[str, Any]) -> str:
    """What the worst attack still finds (right is worse) against what was lost (up is worse); the front is dark."""
    good = [r for r in body["rows"] if "worst" in r]
    best = front(good)
    parts = []
    for k in range(6):
        x, y = LEFT + WIDE * k / 5, TOP + HIGH * k / 5
        parts += [f"<line x1='{number(x)}' y1='{TOP}' x2='{number(x)}' y2='{TOP + HIGH}' stroke='{GRID}'/>",
                  f"<line x1='{LEFT}' y1='{number(y)}' x2='{LEFT + WIDE}' y2='{number(y)}' stroke='{GRID}'/>",
                  text(x, TOP + HIGH + 18, f"{MOST[0] * k / 5:.2f}", anchor="middle", size=11),
                  text(LEFT - 8, y + 4, f"{100 * MOST[1] * (1 - k / 5):.1f} %", anchor="end", size=11)]  # fmt: skip
    taken: list[tuple[float, float]] = []
    for r in sorted(good, key=lambda r: r["name"] not in best):
        x = LEFT + WIDE * min(max(fmean(r["worst"]), 0), MOST[0]) / MOST[0]
        y = TOP + HIGH * (1 - min(max(fmean(r["lost"]), 0), MOST[1]) / MOST[1])
        colour = "#0b3c6f" if r["name"] in best else "#9aa5b1"
        parts.append(f"<circle cx='{number(x)}' cy='{number(y)}' r='4.5' fill='{colour}'>"
                     f"<title>{escape(r['name'])}</title></circle>")  # fmt: skip
        if r["name"] not in best and fmean(r["worst"]) > NAMED:
            continue
        place = y + 4
        while any(abs(place - b) < 12 and abs(x - a) < 100 for a, b in taken):
            place -= 12
        taken.append((x, place))
        parts.append(text(x + 9, place, r["name"], size=11, fill=INK if r["name"] in best else FAINT))
    axis = "knowledge left under the worst attack (0: as in models that never knew, 1: as in the original)"
    parts.append(text(LEFT + WIDE / 2, TOP + HIGH + 40, axis, anchor="middle"))
    what = f"lost of what must stay (at the edge: that or more); rows right of {NAMED:g} are named in the table"
    parts.append(text(LEFT, TOP - 12, what, fill=FAINT))
    return svg(LEFT + WIDE + 60, TOP + HIGH + 60, parts, "Forgetting under the worst attack against utility")


if __name__ == "__main__":
    made = json.loads((HERE / "result.json").read_text())
    (HERE / "table.md").write_text(table(made))
    (HERE / "pareto.svg").write_text(picture(made))
