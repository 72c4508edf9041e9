"""The matrix of requests and states as a picture, with what must stay below it."""

from __future__ import annotations

from repforget.report.series import Chart, Line
from repforget.report.svg import FAINT, line_chart, number, shade, svg, text
from repforget.requests.stability import Stability

CELL, LEFT, TOP = 46.0, 96.0, 64.0


def matrix(found: Stability, title: str = "Knowledge left of every request") -> str:
    """States downwards, requests to the right; deep is known, pale is as in a model that never knew."""
    parts = [text(8, 20, title, size=14), text(LEFT, TOP - 22, "request", fill=FAINT, size=11),
             text(LEFT - 12, TOP - 8, "after", anchor="end", fill=FAINT, size=11)]  # fmt: skip
    numbers, states = ([name.removeprefix("request ") for name in names] for names in (found.names, found.states))
    parts += [text(LEFT + CELL * (k + 0.5), TOP - 8, own, anchor="middle", size=11) for k, own in enumerate(numbers)]
    for j, row in enumerate(found.left):
        y = TOP + CELL * 0.7 * j
        parts.append(text(LEFT - 12, y + CELL * 0.45, states[j - 1] if j else "none", anchor="end", size=11))
        for k, share in enumerate(row):
            x, value = LEFT + CELL * k, float(share)
            parts.append(f"<rect x='{number(x)}' y='{number(y)}' width='{number(CELL - 2)}' "
                         f"height='{number(CELL * 0.7 - 2)}' fill='{shade(value)}'/>")  # fmt: skip
            parts.append(text(x + CELL / 2 - 1, y + CELL * 0.45, f"{value:.2f}", anchor="middle", size=11,
                              fill="#ffffff" if value > 0.6 else "#1f2933"))  # fmt: skip
    height = TOP + CELL * 0.7 * len(found.left) + 12
    return svg(LEFT + CELL * len(found.names) + 16, height, parts, title)


def kept(curves: dict[str, Stability]) -> str:
    """What must stay over the requests, one line per way of answering them."""
    colours = ("#0b3c6f", "#c05621", "#2f855a", "#805ad5", "#718096")
    lines = tuple(Line(name, tuple(map(float, range(len(each.kept)))), tuple(map(float, each.kept)), colour, False)
                  for (name, each), colour in zip(curves.items(), colours, strict=False))  # fmt: skip
    return line_chart(Chart("What must stay", "requests answered", "share still known", lines), width=560)
