"""Several locators on one page: their heat maps side by side, and how far their rankings agree."""

from __future__ import annotations

import math
from collections.abc import Sequence

from repforget.locate._compare import PARTS, Comparison, unit_scores
from repforget.records import Localization
from repforget.report import figures, tables
from repforget.report.render import asset, csp_hash, embedded, plotly_js
from repforget.report.series import Panel, Profile, Value, finite

PER_ROW = 3  # heat maps side by side
Rows = list[tuple[str, ...]]


def _number(value: float | None, form: str = ".2f") -> str:
    return tables.MISSING if value is None or not math.isfinite(value) else format(value, form)


def method_table(result: Comparison) -> tuple[tuple[str, ...], Rows]:
    """Headings and one row per method: best components, band, cost in passes and CPU seconds."""
    headings = ("method", "best components", "top", "random (95 %)", "beats random", "facts", "forwards", "backwards",
                "CPU s")  # fmt: skip
    rows: Rows = []
    for name, where in result.localizations.items():
        band = where.band
        row = [name, ", ".join(map(str, where.components[:3])), f"{band.top:.3g}", f"{band.low:.3g} to {band.high:.3g}",
               "yes" if band.beats_random else "no"]  # fmt: skip
        row += [f"{where.cost.get(key, 0):.0f}" for key in ("facts", "forwards", "backwards")]
        rows.append((*row, _number(result.seconds.get(name), ".1f")))
    return headings, rows


def truth_table(result: Comparison) -> tuple[tuple[str, ...], Rows]:
    """Headings and one row per method: the share of the true components it finds, and where it ranks each."""
    headings = ("method", *(f"rank of {c}" for c in result.truth), "truth found")
    rows: Rows = []
    for name in result.localizations if result.truth else ():
        ranks = [f"{f.rank} of {f.count} ({f.unit})" if f.count else f.unit for f in result.found(name)]
        rows.append((name, *ranks, _number(result.accuracy(name), ".0%")))
    return headings, rows


def agreement_table(result: Comparison) -> tuple[tuple[str, ...], Rows]:
    """Headings and one row per pair of methods."""
    headings = ("method", "beside", "on", "units", "Spearman", "top", "overlap of tops")
    return headings, [(a.one, a.other, a.units, str(a.count), _number(a.spearman), str(a.k), _number(a.overlap))
                      for a in result.agreements]  # fmt: skip


def unit_panels(localizations: Sequence[Localization]) -> tuple[Panel, ...]:
    """One panel per method: its best score in every part of every layer, shaded by the method's own range."""
    scores = [unit_scores(where) for where in localizations]
    layers = range(1 + max((layer for own in scores for layer, _ in own), default=-1))
    parts = [p for p in PARTS if any(part == p for own in scores for _, part in own)]
    panels = []
    for where, own in zip(localizations, scores, strict=True):
        low, high = (min(own.values()), max(own.values())) if own else (0.0, 1.0)
        rows = []
        for part in parts:
            values = tuple(finite(own.get((layer, part))) for layer in layers)
            shade: tuple[Value, ...] = tuple(None if v is None else (v - low) / (high - low or 1.0) for v in values)
            rows.append(Profile(part, values, shade))
        panels.append(Panel(where.method, tuple(map(str, layers)), tuple(rows)))
    return tuple(panels)


def agreement_panels(result: Comparison) -> tuple[Panel, ...]:
    """Spearman correlations and overlaps of every pair as two square panels."""
    names = tuple(result.localizations)
    both = {(x, y): a for a in result.agreements for x, y in ((a.one, a.other), (a.other, a.one))}
    panels = []
    for title, key, least in (("Spearman correlation", "spearman", -1.0), ("overlap of the tops", "overlap", 0.0)):
        rows = []
        for one in names:
            values = tuple(1.0 if one == other else finite(getattr(both[one, other], key)) for other in names)
            shade = tuple(None if v is None else (v - least) / (1.0 - least) for v in values)
            rows.append(Profile(one, values, shade))
        panels.append(Panel(title, names, tuple(rows)))
    return tuple(panels)


def _square(panels: Sequence[Panel]) -> figures.Figure:
    """Panels with room for the names of methods below."""
    figure = figures.heat_map(panels, across="")
    below = 20 + 5 * max(len(name) for name in panels[0].layers)
    figure["layout"]["height"] += below - figure["layout"]["margin"]["b"]
    figure["layout"]["margin"]["b"] = below
    return figure


def html(result: Comparison) -> str:
    """The comparison as one self-contained page: no request leaves it, and its policy forbids any."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    panels = unit_panels(list(result.localizations.values()))
    wide = math.ceil(len(panels) / math.ceil(len(panels) / PER_ROW)) if panels else 1
    maps = {f"maps-{k}": figures.heat_map(panels[k : k + wide]) for k in range(0, len(panels), wide)}
    matrix = {"agreement": _square(agreement_panels(result))} if result.agreements else {}
    scripts = [plotly_js(), asset("report.js")] if panels else []
    return environment.from_string(asset("locators.html.j2")).render(
        result=result, methods=method_table(result), truths=truth_table(result), agreements=agreement_table(result),
        maps=list(maps), matrix=list(matrix), figures={k: Markup(embedded(f)) for k, f in {**maps, **matrix}.items()},
        style=Markup(asset("report.css")), scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'{csp_hash(script)}'" for script in scripts) or "'none'",
    )  # fmt: skip
