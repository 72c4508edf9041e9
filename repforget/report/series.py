"""Which numbers go into which picture: layer profiles, curves and rankings taken from the records."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from repforget.records import Claim, Curve, Evidence, Localization

Value = float | None
SOLID = ("original", "edit")  # drawn through; controls are dashed
ARM_COLOURS = {"original": "#1f2933", "edit": "#c2410c", "placebo": "#8a94a0", "twin": "#1d5fa8"}
STATUS_COLOURS = {"pass": "#1a7f5a", "fail": "#b3261e", "inconclusive": "#8a6100"}
STATUS_SIGNS = {"pass": "●", "fail": "▲", "inconclusive": "◆", "no power": "○", "descriptive": "·"}
SHOWN_COMPONENTS = 12


@dataclass(frozen=True)
class Profile:
    """One measure along the layers on one arm group; ``shade`` is the value as a share of the measure's range."""

    title: str
    values: tuple[Value, ...]
    shade: tuple[Value, ...]


@dataclass(frozen=True)
class Panel:
    """One picture of the heat map: every measure (rows) at every layer (columns), for one arm."""

    title: str
    layers: tuple[str, ...]
    rows: tuple[Profile, ...]


@dataclass(frozen=True)
class Line:
    """One named line of a chart with its colour; dashed for controls."""

    name: str
    x: tuple[float, ...]
    y: tuple[Value, ...]
    colour: str
    dashed: bool


@dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: tuple[Line, ...]


def arm_order(arms: Iterable[str]) -> list[str]:
    """Arms in reading order: original, placebo, edit, then the twins."""
    order = {"original": 0, "placebo": 1, "edit": 2}
    return sorted(arms, key=lambda arm: (order.get(arm, 3), arm))


def arm_label(arm: str) -> str:
    return f"never knew ({arm})" if arm.startswith("twin") else arm


def arm_colour(arm: str) -> str:
    return ARM_COLOURS.get(arm, ARM_COLOURS["twin"] if arm.startswith("twin") else "#6b7480")


def status_colour(status: str) -> str:
    return STATUS_COLOURS.get(status, "#8a94a0")


def finite(value: object) -> Value:
    """The number, or None for a missing or non-finite one."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def _curves(evidence: Sequence[Evidence]) -> list[tuple[str, Curve]]:
    """(verifier, curve), each once although several measures of a verifier may carry the same one."""
    found = {(e.verifier, c.title): c for e in evidence for c in e.curves}
    return [(verifier, curve) for (verifier, _), curve in found.items()]


def _by_layer(curve: Curve) -> bool:
    return "layer" in curve.x_label.lower()


def _twin_mean(curve: Curve) -> tuple[Value, ...] | None:
    twins = [series for arm, series in curve.y.items() if arm.startswith("twin")]
    columns = zip(*twins, strict=True) if twins else ()
    means = [[value for value in map(finite, column) if value is not None] for column in columns]
    return tuple(math.fsum(m) / len(m) if m else None for m in means) if twins else None


def knowledge_panels(evidence: Sequence[Evidence]) -> tuple[Panel, ...]:
    """Before, after and never-knew panels over all measures that were taken layer by layer; empty if none was."""
    curves = [(verifier, curve) for verifier, curve in _curves(evidence) if _by_layer(curve)]
    layers = sorted({x for _, curve in curves for x in curve.x})
    titles = ("before (original)", "after (edit)", "never knew (twins)")
    panels: list[tuple[str, list[Profile]]] = [(title, []) for title in titles]
    for verifier, curve in curves:
        arms = [curve.y.get("original"), curve.y.get("edit"), _twin_mean(curve)]
        known = [v for series in arms if series for v in map(finite, series) if v is not None]
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        for (_, rows), series in zip(panels, arms, strict=True):
            if series is not None:
                at = dict(zip(curve.x, map(finite, series), strict=False))
                values = tuple(at.get(layer) for layer in layers)
                shade = tuple(None if v is None else (v - low) / (high - low or 1.0) for v in values)
                rows.append(Profile(_row_title(verifier, curve, len(curves)), values, shade))
    names = tuple(f"{layer:g}" for layer in layers)
    return tuple(Panel(title, names, tuple(rows)) for title, rows in panels if rows)


def _row_title(verifier: str, curve: Curve, n: int) -> str:
    said = verifier.replace("_", " ").lower() in curve.title.replace("_", " ").lower()
    return curve.title if said or n == 1 else f"{verifier}: {curve.title}"


def charts(evidence: Sequence[Evidence]) -> tuple[Chart, ...]:
    """Every other series (relearning steps, budgets): one chart each, one line per arm."""
    return tuple(
        Chart(f"{verifier}: {curve.title}", curve.x_label, curve.y_label, tuple(_lines(curve)))
        for verifier, curve in _curves(evidence)
        if not _by_layer(curve)
    )


def _lines(curve: Curve) -> list[Line]:
    return [
        Line(arm_label(arm), curve.x, tuple(map(finite, curve.y[arm])), arm_colour(arm), arm not in SOLID)
        for arm in arm_order(curve.y)
    ]


def table_panels(localization: Localization) -> tuple[Panel, ...]:
    """The locator's own tables as panels, rows are layers unless there is one; shaded by the table's range."""
    panels = []
    for title, table in sorted(localization.tables.items()):
        values = [[finite(v) for v in row] for row in table]
        known = [v for row in values for v in row if v is not None]
        if not known:
            continue
        low = min(known)
        span = max(known) - low or 1.0
        names = [f"layer {k}" for k in range(len(values))] if len(values) > 1 else [""]
        rows = tuple(
            Profile(name, tuple(row), tuple(None if v is None else (v - low) / span for v in row))
            for name, row in zip(names, values, strict=True)
        )
        panels.append(Panel(title, _columns(title, max(map(len, values))), rows))
    return tuple(panels)


def _columns(title: str, width: int) -> tuple[str, ...]:
    """Column names where the title lists them after its colon, else their numbers."""
    named = tuple(name.strip() for name in title.rpartition(":")[2].split(","))
    return named if len(named) == width else tuple(str(k) for k in range(width))


def sorted_claims(claims: Sequence[Claim]) -> list[Claim]:
    """Worst first within knowledge and collateral; measures without a vote last."""
    order = {"fail": 0, "inconclusive": 1, "pass": 2, "no power": 3, "descriptive": 4}
    return sorted(claims, key=lambda c: (order[c.status] > 2, c.kind != "knowledge", order[c.status],
                                         -(finite(c.rho_high) or 0.0), c.name))  # fmt: skip


def total_cost(
    localizations: Sequence[Localization], evidence: Sequence[Evidence]
) -> list[tuple[str, Mapping[str, float]]]:
    """(stage, counts) of everything that says what it cost: forward passes, steps, tokens; never seconds."""
    located = [(f"locate: {loc.method}", loc.cost) for loc in localizations if loc.cost]
    budgets = {f"verify: {e.verifier}": e.budget for e in evidence if e.budget}
    return [*located, *budgets.items()]
