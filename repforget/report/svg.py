"""Static pictures as SVG text: what report.md shows, and what report.html shows before its script has run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from repforget.records import Claim
from repforget.report.series import Chart, Panel, Value, finite, status_colour

INK, FAINT, GRID = "#1f2933", "#6b7480", "#e3e7ec"
FONT = "font-family='system-ui,-apple-system,Segoe UI,Roboto,sans-serif'"
SCALE = ((247, 250, 252), (189, 214, 235), (92, 150, 199), (11, 60, 111))  # pale to deep blue, even in lightness
KNOWLEDGE_AXIS = (-0.25, 1.15)  # share left: 0 is the floor, 1 the original
LEGEND_COLUMNS = 3
COLLATERAL_AXIS = (-0.05, 0.2)  # share lost: 0 is as before; larger losses stand at the edge


def number(value: float) -> str:
    """A coordinate with two decimals at most, so that equal pictures have equal bytes."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def shade(share: Value) -> str:
    """Colour of a share between 0 and 1; a missing value is hatched grey."""
    if share is None:
        return "#eceff2"
    place = min(max(share, 0.0), 1.0) * (len(SCALE) - 1)
    left = min(int(place), len(SCALE) - 2)
    mixed = (a + (b - a) * (place - left) for a, b in zip(SCALE[left], SCALE[left + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", fill: str = INK) -> str:
    return (f"<text x='{number(x)}' y='{number(y)}' font-size='{size}' text-anchor='{anchor}' fill='{fill}'>"
            f"{escape(words)}</text>")  # fmt: skip


def svg(width: float, height: float, parts: Sequence[str], label: str) -> str:
    body = "\n".join(parts)
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {number(width)} {number(height)}' "
            f"width='{number(width)}' height='{number(height)}' role='img' aria-label='{escape(label, quote=True)}' "
            f"{FONT}>\n{body}\n</svg>\n")  # fmt: skip


def heat_map(panels: Sequence[Panel], *, width: float = 960.0, row: float = 30.0) -> str:
    """Panels side by side with shared row names; deep colour is more knowledge."""
    names = [profile.title for profile in panels[0].rows]
    left = 16 + 7.0 * max((len(name) for name in names), default=0)
    gap = 22.0
    inner = (width - left - gap * len(panels)) / len(panels)
    parts = [text(left - 10, 43 + row * (k + 0.5), name, anchor="end") for k, name in enumerate(names)]
    for index, panel in enumerate(panels):
        x0 = left + index * (inner + gap)
        parts.append(text(x0, 22, panel.title, size=13))
        cell = inner / max(len(panel.layers), 1)
        for k, profile in enumerate(panel.rows):
            for column, (value, share) in enumerate(zip(profile.values, profile.shade, strict=True)):
                shown = "not measured" if value is None else f"{value:.3g}"
                parts.append(
                    f"<rect x='{number(x0 + column * cell)}' y='{number(40 + row * k)}' width='{number(cell - 1)}' "
                    f"height='{number(row - 2)}' fill='{shade(share)}'><title>{escape(profile.title)}, "
                    f"layer {escape(panel.layers[column])}: {shown}</title></rect>"
                )
        every = max(1, -(-len(panel.layers) // 8))
        bottom = 40 + row * len(panel.rows) + 14
        parts += [text(x0 + (c + 0.5) * cell, bottom, name, size=11, anchor="middle", fill=FAINT)
                  for c, name in enumerate(panel.layers) if c % every == 0]  # fmt: skip
    height = 40 + row * max(len(panel.rows) for panel in panels) + 26
    return svg(width, height, parts, "Knowledge by layer and measure")


def _axis(kind: str) -> tuple[tuple[float, float], tuple[tuple[float, str], ...]]:
    if kind == "knowledge":
        return KNOWLEDGE_AXIS, ((0.0, "floor"), (1.0, "original"))
    return COLLATERAL_AXIS, ((0.0, "as before"), (0.1, "10 % lost"))


def _place(value: float, kind: str, width: float) -> float:
    low, high = _axis(kind)[0]
    return 6 + (min(max(value, low), high) - low) / (high - low) * (width - 12)


def interval_parts(claim: Claim, width: float, height: float) -> list[str]:
    """One line of the forest plot: rho with its limits, the reference lines, and the margin as a green band."""
    middle, colour = height / 2, status_colour(claim.status)
    start = _place(-claim.margin if claim.kind == "knowledge" else COLLATERAL_AXIS[0], claim.kind, width)
    end = _place(claim.margin, claim.kind, width)
    parts = [f"<rect x='{number(start)}' y='3' width='{number(end - start)}' height='{number(height - 6)}' "
             "fill='#dcefe6'/>"]  # fmt: skip
    for reference, _ in _axis(claim.kind)[1]:
        x = number(_place(reference, claim.kind, width))
        parts.append(f"<line x1='{x}' x2='{x}' y1='1' y2='{number(height - 1)}' stroke='#aab3bc'/>")
    rho, low, high = finite(claim.rho), finite(claim.rho_low), finite(claim.rho_high)
    if low is not None and high is not None:
        x1, x2 = (number(_place(value, claim.kind, width)) for value in (low, high))
        parts.append(f"<line x1='{x1}' x2='{x2}' y1='{number(middle)}' y2='{number(middle)}' stroke='{colour}' "
                     "stroke-width='2.5' stroke-linecap='round'/>")  # fmt: skip
    if rho is not None:
        parts.append(_mark(rho, claim.kind, width, middle, colour))
    return parts


def _mark(rho: float, kind: str, width: float, y: float, colour: str) -> str:
    """A dot where the share is, or an arrow at the edge that it lies beyond."""
    x, (low, high) = _place(rho, kind, width), _axis(kind)[0]
    if low <= rho <= high:
        return f"<circle cx='{number(x)}' cy='{number(y)}' r='4.5' fill='{colour}'/>"
    tip = 5 if rho > high else -5
    corners = f"{number(x + tip)},{number(y)} {number(x - tip)},{number(y - 5)} {number(x - tip)},{number(y + 5)}"
    return f"<polygon points='{corners}' fill='{colour}'/>"


def interval(claim: Claim, *, width: float = 200.0, height: float = 22.0) -> str:
    """The line of one claim as a picture of its own."""
    rho = finite(claim.rho)
    label = f"{claim.name}: " + ("no share" if rho is None else f"share {rho:.2f}")
    return svg(width, height, interval_parts(claim, width, height), label)


def forest(claims: Sequence[Claim], *, row: float = 26.0, width: float = 960.0) -> str:
    """Claims of one kind under each other with their limits, reference lines and outcome."""
    kind = claims[0].kind
    left = 24 + 7.0 * max(len(claim.name) for claim in claims)
    plot = width - left - 120
    parts = [text(left + _place(x, kind, plot), 20, name, size=11, anchor="middle", fill=FAINT)
             for x, name in _axis(kind)[1]]  # fmt: skip
    for k, claim in enumerate(claims):
        y = 30 + row * k
        parts.append(text(left - 8, y + row * 0.58, claim.name, anchor="end"))
        inner = "\n".join(interval_parts(claim, plot, row - 4))
        parts.append(f"<g transform='translate({number(left)} {number(y)})'>\n{inner}\n</g>")
        parts.append(text(width - 112, y + row * 0.58, claim.status, fill=status_colour(claim.status)))
    return svg(width, 30 + row * len(claims) + 8, parts, f"Share {'left' if kind == 'knowledge' else 'lost'}")


def ticks(low: float, high: float) -> list[float]:
    """Four to seven round values that cover ``low`` to ``high``."""
    if high <= low:
        return [low, low + 1.0]
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough)
    return [k * step for k in range(math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9) + 1)]


def line_chart(chart: Chart, *, width: float = 470.0, height: float = 280.0) -> str:
    """Lines over one pair of axes with a legend below; gaps where a value is missing."""
    points = [(x, y) for line in chart.lines for x, y in zip(line.x, line.y, strict=False) if y is not None]
    if not points:
        return svg(width, 40, [text(8, 24, f"{chart.title}: nothing was measured", fill=FAINT)], chart.title)
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_ticks = ticks(min(0.0, *(y for _, y in points)), max(y for _, y in points))
    y_low, y_high = y_ticks[0], y_ticks[-1]
    legend_rows = -(-len(chart.lines) // LEGEND_COLUMNS)
    left, right, top, bottom = 52.0, width - 24, 36.0, height - 48
    height += 18 * legend_rows

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x_low) / (x_high - x_low or 1) * (right - left),
                bottom - (y - y_low) / (y_high - y_low or 1) * (bottom - top))  # fmt: skip

    parts = [text(8, 18, chart.title, size=13)]
    for y in y_ticks:
        level = number(at(x_low, y)[1])
        parts.append(f"<line x1='{number(left)}' x2='{number(right)}' y1='{level}' y2='{level}' stroke='{GRID}'/>")
        parts.append(text(left - 6, at(x_low, y)[1] + 4, f"{y:.3g}", size=11, anchor="end", fill=FAINT))
    for x in ticks(x_low, x_high):
        if x_low - 1e-9 * abs(x_low) <= x <= x_high + 1e-9 * abs(x_high):
            parts.append(text(at(x, y_low)[0], bottom + 16, f"{x:.3g}", size=11, anchor="middle", fill=FAINT))
    parts.append(text((left + right) / 2, bottom + 32, chart.x_label, size=11, anchor="middle", fill=FAINT))
    for k, line in enumerate(chart.lines):
        path = [f"{number(px)},{number(py)}" for x, y in zip(line.x, line.y, strict=False) if y is not None
                for px, py in [at(x, y)]]  # fmt: skip
        dashes = " stroke-dasharray='5 4'" if line.dashed else ""
        parts.append(f"<polyline points='{' '.join(path)}' fill='none' stroke='{line.colour}' stroke-width='2'"
                     f"{dashes}/>")  # fmt: skip
        x = left + k % LEGEND_COLUMNS * (right - left) / LEGEND_COLUMNS
        parts.append(_legend(line.name, line.colour, dashes, x, bottom + 52 + 18 * (k // LEGEND_COLUMNS)))
    return svg(width, height, parts, chart.title)


def _legend(name: str, colour: str, dashes: str, x: float, y: float) -> str:
    stroke = (f"<line x1='{number(x)}' x2='{number(x + 18)}' y1='{number(y - 4)}' y2='{number(y - 4)}' "
              f"stroke='{colour}' stroke-width='2'{dashes}/>")  # fmt: skip
    return stroke + text(x + 23, y, name, size=10)
