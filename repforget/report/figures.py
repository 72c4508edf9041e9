"""Interactive pictures as plain Plotly figures (data and layout): no plotly import, the same bytes every time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from repforget.report.series import Chart, Panel
from repforget.report.svg import SCALE

FONT = {"family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif", "size": 12, "color": "#1f2933"}
COLOURS = [[k / (len(SCALE) - 1), "rgb({}, {}, {})".format(*colour)] for k, colour in enumerate(SCALE)]
BASE: dict[str, Any] = {"font": FONT, "paper_bgcolor": "#ffffff", "plot_bgcolor": "#ffffff"}
Figure = dict[str, Any]


def heat_map(panels: Sequence[Panel], *, across: str = "layer") -> Figure:
    """Panels side by side: one heat map each, shared rows and colours, raw values when hovered."""
    n, gap = len(panels), 0.03
    width = (1 - gap * (n - 1)) / n
    data: list[Figure] = []
    layout: Figure = {**BASE, "annotations": [], "showlegend": False}
    rows = max(len(panel.rows) for panel in panels)
    longest = max(len(row.title) for panel in panels for row in panel.rows)
    layout["margin"] = {"l": 20 + round(6.6 * longest), "r": 90, "t": 40, "b": 52}
    layout["height"] = 92 + max(rows * 34, 60)
    layout["coloraxis"] = {"colorscale": COLOURS, "cmin": 0, "cmax": 1,
                           "colorbar": {"thickness": 10, "outlinewidth": 0, "tickvals": [0, 1],
                                        "ticktext": ["least", "most"], "tickfont": {"size": 11}}}  # fmt: skip
    for k, panel in enumerate(panels):
        suffix = "" if k == 0 else str(k + 1)
        start = k * (width + gap)
        data.append({
            "type": "heatmap", "x": list(panel.layers), "y": [_plain(row.title) for row in panel.rows],
            "z": [list(row.shade) for row in panel.rows], "customdata": [list(row.values) for row in panel.rows],
            "coloraxis": "coloraxis", "xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "xgap": 1, "ygap": 2,
            "hoverongaps": False, "name": _plain(panel.title),
            "hovertemplate": f"%{{y}}<br>{across} %{{x}}<br>"
                             "value %{customdata:.4g}<extra>%{fullData.name}</extra>",
        })  # fmt: skip
        layout[f"xaxis{suffix}"] = {"domain": [start, start + width], "anchor": f"y{suffix}", "type": "category",
                                    "title": {"text": across, "font": {"size": 11}}, "nticks": 12, "ticks": "",
                                    "showgrid": False, "fixedrange": True}  # fmt: skip
        layout[f"yaxis{suffix}"] = {"anchor": f"x{suffix}", "autorange": "reversed", "showticklabels": k == 0,
                                    "showgrid": False, "ticks": "outside", "ticklen": 6, "tickcolor": "#ffffff",
                                    "fixedrange": True}  # fmt: skip
        layout["annotations"].append({"text": _plain(panel.title), "x": start, "y": 1, "xref": "paper", "yref": "paper",
                                      "xanchor": "left", "yanchor": "bottom", "yshift": 6, "showarrow": False,
                                      "font": {"size": 13}})  # fmt: skip
    return {"data": data, "layout": layout}


def line_chart(chart: Chart) -> Figure:
    """One chart: original and edit drawn through, controls dashed."""
    data = [
        {"type": "scatter", "mode": "lines+markers", "name": _plain(line.name), "x": list(line.x), "y": list(line.y),
         "line": {"color": line.colour, "width": 2, "dash": "dash" if line.dashed else "solid"},
         "marker": {"size": 5, "color": line.colour}, "connectgaps": False}
        for line in chart.lines
    ]  # fmt: skip
    axis = {"gridcolor": "#e3e7ec", "zerolinecolor": "#aab3bc", "ticks": "", "automargin": True, "exponentformat": "e"}
    layout = {
        **BASE, "height": 320, "margin": {"l": 56, "r": 16, "t": 44, "b": 48}, "hovermode": "x unified",
        "title": {"text": _plain(chart.title), "font": {"size": 13}, "x": 0, "xanchor": "left", "xref": "paper"},
        "legend": {"orientation": "h", "y": -0.24, "x": 0, "font": {"size": 11}},
        "xaxis": {**axis, "title": {"text": _plain(chart.x_label), "font": {"size": 11}}},
        "yaxis": {**axis, "title": {"text": _plain(chart.y_label), "font": {"size": 11}}, "rangemode": "tozero"},
    }  # fmt: skip
    return {"data": data, "layout": layout}


def _plain(words: str) -> str:
    """Plotly reads a small HTML dialect in titles; show the characters themselves."""
    return words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
