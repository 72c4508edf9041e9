"""Intervals, table and picture of the study; ``python experiments/does-localisation-help/draw.py`` draws them again."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from repforget.report.svg import FAINT, GRID, INK, number, svg, text

HERE = Path(__file__).parent
ATTACKS = ("behaviour", "relearn", "soft_prompt", "quantize")
HEADS = {"behaviour": "asked", "relearn": "relearned", "soft_prompt": "soft prompt", "quantize": "4-bit"}
COLUMNS = ("selection", "runs", "strength", *HEADS.values(), "lost", "relearned, against random sites (95 %)", "surely")
BASE = "random sites"
DRAWS = 2000
CONTROLS = ("random sites", "random units", "all")


def _levels(known: list[dict[str, Any]], world: str, seed: int) -> dict[str, tuple[float, float]]:
    """Mean of the original and of the models that never knew, per attack."""
    own = [k for k in known if k["world"] == world and (world == "organism" or k["seed"] == seed)]

    def mean(attack: str, original: bool) -> float:
        return fmean(fmean(k["judged"][attack]["values"]) for k in own if (k["arm"] == "original") is original)

    return {attack: (mean(attack, True), mean(attack, False)) for attack in ATTACKS}


def _kept(known: list[dict[str, Any]], row: dict[str, Any]) -> float:
    """The largest share lost of what must stay."""
    original = next(k for k in known if k["world"] == row["world"] and k["arm"] == "original"
                    and (row["world"] == "organism" or k["seed"] == row["seed"]))  # fmt: skip
    base = original["judged"]["kept"]
    return max(1 - row["judged"]["kept"][k] / base[k] for k in base)


def _shares(known: list[dict[str, Any]], row: dict[str, Any]) -> dict[str, tuple[np.ndarray, list[str]]]:
    """Share of the knowledge left per item (only means say anything: 0 as never known, 1 as in the original)."""
    levels = _levels(known, row["world"], row["seed"])
    return {a: ((np.array(row["judged"][a]["values"]) - low) / (high - low), row["judged"][a]["clusters"])
            for a, (high, low) in levels.items()}  # fmt: skip


def _by_person(values: np.ndarray, clusters: list[str]) -> np.ndarray:
    names = sorted(set(clusters))
    return np.array([values[[c == n for c in clusters]].mean() for n in names])


def difference(own: list[np.ndarray], base: list[np.ndarray], seed: int = 0) -> tuple[float, float, float]:
    """Mean of ``own`` less mean of ``base`` (arrays over people), with a 95 % interval over people and runs.

    People are drawn jointly for both sides, runs (seeds and random selections) for each side.
    """
    a, b = np.stack(own), np.stack(base)
    rng = np.random.default_rng(seed)
    found = np.empty(DRAWS)
    for k in range(DRAWS):
        people = rng.integers(a.shape[1], size=a.shape[1])
        rows_a, rows_b = rng.integers(len(a), size=len(a)), rng.integers(len(b), size=len(b))
        found[k] = a[rows_a][:, people].mean() - b[rows_b][:, people].mean()
    low, high = np.quantile(found, [0.025, 0.975])
    return float(a.mean() - b.mean()), float(low), float(high)


def summary(rows: list[dict[str, Any]], known: list[dict[str, Any]]) -> dict[str, Any]:
    """Per world, editor and locator: shares left, what was lost, and differences to random sites with intervals."""
    found: list[dict[str, Any]] = []
    worlds = sorted({r["world"] for r in rows})
    for world in worlds:
        for editor in dict.fromkeys(r["editor"] for r in rows):
            mine = [r for r in rows if r["world"] == world and r["editor"] == editor]
            good = [r | {"shares": _shares(known, r)} for r in mine if "judged" in r]
            people = {id(r): {a: _by_person(*r["shares"][a]) for a in ATTACKS} for r in good}
            base = [r for r in good if r["locator"] == BASE]
            for locator in dict.fromkeys(r["locator"] for r in sorted(mine, key=lambda r: r["locator"])):
                own = [r for r in good if r["locator"] == locator]
                refused = sorted({r["refused"] for r in mine if r["locator"] == locator and "refused" in r})
                entry: dict[str, Any] = {"world": world, "editor": editor, "locator": locator, "runs": len(own),
                                         "refused": refused}  # fmt: skip
                if own:
                    entry["left"] = {a: [float(r["shares"][a][0].mean()) for r in own] for a in ATTACKS}
                    worst = [max(float(r["shares"][a][0].mean()) for a in ATTACKS) for r in own]
                    entry |= {"worst": worst, "lost": [_kept(known, r) for r in own],
                              "seconds": [r["seconds"] for r in own],
                              "strength": [r["judged"]["strength"] for r in own]}  # fmt: skip
                if own and base and locator != BASE:
                    both = {a: [[people[id(r)][a] for r in side] for side in (own, base)] for a in ATTACKS}
                    entry["against random"] = {a: difference(*sides) for a, sides in both.items()}
                    entry["lost against random"] = fmean(entry["lost"]) - fmean(_kept(known, r) for r in base)
                found.append(entry)
    twins = {w: {a: [list(_levels(known, w, s)[a]) for s in sorted({k["seed"] for k in known if k["world"] == w})]
                 for a in ATTACKS} for w in worlds}  # fmt: skip
    return {"levels": twins, "rows": found}


def spread(values: list[float]) -> str:
    if max(values) - min(values) < 0.015:
        return f"{fmean(values):.2f}"
    return f"{fmean(values):.2f} ({min(values):.2f}–{max(values):.2f})"


def sure(entry: dict[str, Any]) -> str:
    """The attacks whose interval against random sites does not hold zero."""
    signs = {a: (d[1] > 0) - (d[2] < 0) for a, d in entry["against random"].items()}
    words = [f"{HEADS[a]} {'more' if s > 0 else 'less'} left" for a, s in signs.items() if s]
    return "; ".join(words) or "not told apart"


def table(body: dict[str, Any]) -> str:
    """Markdown: one block per world and editor, the selections that leave least under relearning first."""
    lines: list[str] = []
    keys = list(dict.fromkeys((r["world"], r["editor"]) for r in body["rows"]))
    for world, editor in keys:
        own = [r for r in body["rows"] if (r["world"], r["editor"]) == (world, editor)]
        good = sorted((r for r in own if "left" in r), key=lambda r: fmean(r["left"]["relearn"]))
        lines += [f"**{world}, {editor}**", "", "| " + " | ".join(COLUMNS) + " |", "|---|" + "--:|" * 7 + "---|---|"]
        for r in good:
            name = f"*{r['locator']}*" if r["locator"] in CONTROLS else r["locator"]
            told = ["", ""]
            if "against random" in r:
                mean, low, high = r["against random"]["relearn"]
                told = [f"{mean:+.2f} ({low:+.2f} to {high:+.2f})", sure(r)]
            cells = [spread(r["left"][a]) for a in ATTACKS]
            lost = f"{100 * fmean(r['lost']):.1f} %"
            if "lost against random" in r:
                lost += f" ({100 * r['lost against random']:+.1f})"
            row = [name, str(r["runs"]), spread(r["strength"]), *cells, lost, *told]
            lines.append("| " + " | ".join(row) + " |")
        lines += [f"\n{r['locator']}: refused ({r['refused'][0]})" for r in own if r["refused"]]
        lines.append("")
    return "\n".join(lines)


def picture(body: dict[str, Any]) -> str:
    """Per world and editor: knowledge left after relearning less that of random sites, with its interval."""
    keys = list(dict.fromkeys((r["world"], r["editor"]) for r in body["rows"]))
    names = list(dict.fromkeys(r["locator"] for r in body["rows"] if r["locator"] != BASE))
    wide, gap, left, high = 150.0, 18.0, 150.0, 18.0
    reach = 0.6
    worlds = list(dict.fromkeys(w for w, _ in keys))
    parts: list[str] = []
    for w, world in enumerate(worlds):
        top = 60.0 + w * (high * len(names) + 70)
        parts += [text(left - 12, top + high * (k + 0.75), n, anchor="end", size=11) for k, n in enumerate(names)]
        for e, (_, editor) in enumerate(k for k in keys if k[0] == world):
            x0 = left + e * (wide + gap)
            middle = x0 + wide / 2
            parts += [text(middle, top - 8, f"{world}: {editor}", anchor="middle", size=11),
                      f"<rect x='{number(x0)}' y='{number(top)}' width='{number(wide)}' "
                      f"height='{number(high * len(names))}' fill='none' stroke='{GRID}'/>",
                      f"<line x1='{number(middle)}' y1='{number(top)}' x2='{number(middle)}' "
                      f"y2='{number(top + high * len(names))}' stroke='{FAINT}'/>"]  # fmt: skip
            for k, n in enumerate(names):
                found = [r for r in body["rows"] if (r["world"], r["editor"], r["locator"]) == (world, editor, n)]
                if not found or "against random" not in found[0]:
                    continue
                mean, low, upper = (middle + min(max(v, -reach), reach) * wide / 2 / reach
                                    for v in found[0]["against random"]["relearn"])  # fmt: skip
                y = top + high * (k + 0.6)
                told = low > middle or upper < middle
                colour = "#0b3c6f" if told else "#9aa5b1"
                parts += [f"<line x1='{number(low)}' y1='{number(y)}' x2='{number(upper)}' y2='{number(y)}' "
                          f"stroke='{colour}' stroke-width='2'/>",
                          f"<circle cx='{number(mean)}' cy='{number(y)}' r='3.5' fill='{colour}'/>"]  # fmt: skip
    width = left + 5 * (wide + gap)
    height = 60.0 + len(worlds) * (high * len(names) + 70)
    title = (f"Knowledge left after relearning, less that of random sites at one budget and damage (left: better; "
             f"±{reach:g} at the frame; 95 % over people and runs)")  # fmt: skip
    parts.append(text(12, 20, title, size=12, fill=INK))
    return svg(width, height, parts, "Effect of localisation on what relearning brings back")


if __name__ == "__main__":
    made = json.loads((HERE / "result.json").read_text())
    (HERE / "table.md").write_text(table(made))
    (HERE / "effect.svg").write_text(picture(made))
