"""A localization as one page: its circuit drawn layer by layer where it has edges, otherwise its heat maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from repforget.records import Component, Edge, Localization
from repforget.report import figures, series, svg, tables
from repforget.report.render import asset, csp_hash, embedded, plotly_js

WIDTH, LEFT, MLP_X = 1080.0, 96.0, 930.0
USED, UNUSED = 112.0, 13.0  # height of a layer with and without a node of the circuit
RAISES, LOWERS = "#1d5fa8", "#c2410c"
LISTED_EDGES = 60
CURVE = "faithfulness by number of edges"
Point = tuple[float, float]


@dataclass(frozen=True)
class Drawing:
    """Where the nodes of a circuit lie; heads of one group share a key and a value."""

    heads: int
    groups: int
    layers: int
    rows: Mapping[int, float]  # layer -> top of its row, for layers with a node
    height: float

    @property
    def slot(self) -> float:
        """Room for one head."""
        return min(150.0, (MLP_X - 110 - LEFT) / self.heads)

    @property
    def head_width(self) -> float:
        return min(48.0, 0.8 * self.slot)

    def head(self, layer: int, head: int) -> Point:
        """Centre of a head."""
        start = LEFT + ((MLP_X - 110 - LEFT) - self.slot * self.heads) / 2
        return start + (head + 0.5) * self.slot, self.rows[layer] + 70

    def group(self, layer: int, group: int) -> tuple[Point, Point]:
        """Centres of the first and the last head of a group."""
        each = self.heads // self.groups
        return self.head(layer, group * each), self.head(layer, (group + 1) * each - 1)

    def leaves(self, source: Component) -> Point:
        """Where edges of a sender start."""
        site = source.site
        if site.kind == "embed":
            return WIDTH / 2, self.height - 52
        if site.kind == "mlp_out":
            return MLP_X, self.rows[site.layer] + 17
        x, y = self.head(site.layer, site.head or 0)
        return x, y - 10

    def enters(self, target: Component) -> Point:
        """Where edges into a receiver end."""
        site = target.site
        if site.kind == "logits":
            return WIDTH / 2, 52
        if site.kind == "mlp_in":
            return MLP_X, self.rows[site.layer] + 39
        if self.groups == self.heads:
            x, y = self.head(site.layer, site.head or 0)
            return x + {"q": -1, "k": 0, "v": 1}[site.kind] * self.head_width / 3, y + 10
        if site.kind == "q":
            x, y = self.head(site.layer, site.head or 0)
            return x, y + 10
        (first, y), (last, _) = self.group(site.layer, site.head or 0)
        return (first + last) / 2 + (-1 if site.kind == "k" else 1) * self.head_width / 4, y + 27


def drawing(localization: Localization, key_value_heads: int | None = None) -> Drawing:
    """Lay out the layers from the embedding (below) to the logits; without the number of key/value heads, the smallest
    that fits the edges is drawn."""
    sites = [c.site for c in localization.components]
    edges = localization.edges
    heads = 1 + max((s.head or 0) for s in sites)
    shared = [e.target.site.head or 0 for e in edges if e.target.site.kind in ("k", "v")]
    fits = [k for k in range(1, heads + 1) if heads % k == 0 and k > max(shared, default=heads - 1)]
    layers = 1 + max(s.layer for s in sites)
    used = {c.site.layer for e in edges for c in (e.source, e.target)}
    rows, y = {}, 84.0
    for layer in reversed(range(layers)):
        if layer in used:
            rows[layer] = y
        y += USED if layer in used else UNUSED
    return Drawing(heads, key_value_heads or fits[0], layers, rows, y + 72)


def nodes_of(place: Drawing, target: Component) -> list[str]:
    """The nodes an edge leads to: a head, every head of a group, an MLP or the logits."""
    site = target.site
    if site.kind == "mlp_in":
        return [f"mlp_out.{site.layer}"]
    if site.kind == "logits":
        return ["logits"]
    each = place.heads // place.groups
    head = site.head or 0
    heads = [head] if site.kind == "q" else range(head * each, (head + 1) * each)
    return [f"attn_z.{site.layer}.h{h}" for h in heads]


def _edge(place: Drawing, edge: Edge, largest: float) -> str:
    (x1, y1), (x2, y2) = place.leaves(edge.source), place.enters(edge.target)
    rise = max(y1 - y2, 1.0)
    bend = max(18.0, 0.42 * rise)
    bow = min(24 + 0.1 * rise, WIDTH - MLP_X - 12) if abs(x1 - x2) < 20 and rise > 70 else 0.0
    n = svg.number
    curve = f"M{n(x1)},{n(y1)} C{n(x1 + 1.3 * bow)},{n(y1 - bend)} {n(x2 + 1.3 * bow)},{n(y2 + bend)} {n(x2)},{n(y2)}"
    colour = RAISES if edge.score >= 0 else LOWERS
    ends = escape(" ".join([str(edge.source), *nodes_of(place, edge.target)]), quote=True)
    return (f"<path class='edge' data-ends='{ends}' d='{curve}' fill='none' stroke='{colour}' stroke-opacity='0.6' "
            f"stroke-width='{n(0.8 + 6 * (abs(edge.score) / largest) ** 0.5)}'><title>{escape(str(edge))}: "
            f"{edge.score:+.3g} of the gap</title></path>")  # fmt: skip


def _node(name: str, words: str, at: Point, size: Point, share: float | None, tip: str) -> str:
    """A labelled box, deep where the node is strong; ``share`` None for a node that has no score."""
    n, (x, y), (w, h) = svg.number, at, size
    fill = "#ffffff" if share is None else svg.shade(share)
    label = svg.text(x, y + 4, words, size=11, anchor="middle", fill="#ffffff" if (share or 0) > 0.6 else svg.INK)
    return (f"<g class='node' data-node='{escape(name, quote=True)}'><rect x='{n(x - w / 2)}' y='{n(y - h / 2)}' "
            f"width='{n(w)}' height='{n(h)}' rx='5' fill='{fill}' stroke='#56606b'/>"
            f"{label if w > 20 else ''}<title>{escape(tip)}</title></g>")  # fmt: skip


def _places(place: Drawing, layer: int) -> list[tuple[str, str, Point, Point]]:
    """Name, label, centre and size of every node of a layer."""
    heads = [(f"attn_z.{layer}.h{h}", f"h{h}", place.head(layer, h), (place.head_width, 20.0))
             for h in range(place.heads)]  # fmt: skip
    return [*heads, (f"mlp_out.{layer}", "mlp", (MLP_X, place.rows[layer] + 28), (62.0, 22.0))]


def _frame(place: Drawing, layer: int, kept: set[str]) -> list[str]:
    """What lies behind the edges: the layer's name, a dot for each node without a part, and the groups of heads."""
    n, bottom = svg.number, svg.number(place.rows[layer] + 104)
    parts = [f"<line x1='12' x2='{n(WIDTH - 12)}' y1='{bottom}' y2='{bottom}' stroke='{svg.GRID}'/>",
             svg.text(14, place.rows[layer] + 62, f"layer {layer}", fill=svg.FAINT)]  # fmt: skip
    parts += [f"<circle cx='{n(x)}' cy='{n(y)}' r='2.5' fill='#c8ced5'><title>{name}: no part</title></circle>"
              for name, _, (x, y), _ in _places(place, layer) if name not in kept]  # fmt: skip
    for group in range(place.groups if place.groups < place.heads else 0):
        (x1, y), (x2, _) = place.group(layer, group)
        half = place.head_width / 2
        parts.append(f"<path d='M{n(x1 - half)},{n(y + 16)} v6 H{n(x2 + half)} v-6' fill='none' stroke='#aab3bc'/>")
    return parts


def _reads(place: Drawing, edges: Sequence[Edge]) -> list[str]:
    """The letters q, k and v where some edge is read."""
    if place.slot < 26:
        return []
    parts = []
    for target in sorted({e.target for e in edges if e.target.site.kind in ("q", "k", "v")}):
        x, y = place.enters(target)
        parts += [f"<circle cx='{svg.number(x)}' cy='{svg.number(y + 2)}' r='6.5' fill='#ffffff' stroke='#aab3bc'/>",
                  svg.text(x, y + 5, target.site.kind, size=9, anchor="middle")]  # fmt: skip
    return parts


def picture(localization: Localization, key_value_heads: int | None = None) -> str:
    """SVG of a circuit: width of an edge is its |score|, colour its sign, from the embedding up to the logits."""
    place, edges = drawing(localization, key_value_heads), localization.edges
    score = {str(c): s for c, s in zip(localization.components, localization.scores, strict=True)}
    kept = {str(e.source) for e in edges}
    largest = max(abs(e.score) for e in edges) or 1.0
    parts = [part for layer in place.rows for part in _frame(place, layer, kept)]
    parts += [_edge(place, edge, largest) for edge in reversed(edges)]
    deepest = max(score.values()) or 1.0
    parts += [_node(name, words, at, size, score.get(name, 0.0) / deepest,
                    f"{name}: summed |score| of its edges {score.get(name, 0.0):.3g}")
              for layer in place.rows for name, words, at, size in _places(place, layer) if name in kept]  # fmt: skip
    parts += [_node("logits", "logits", (WIDTH / 2, 41), (70, 22), None, "what the final norm reads"),
              _node("embed", "embedding", (WIDTH / 2, place.height - 41), (86, 22), None, "token embeddings"),
              *_reads(place, edges)]  # fmt: skip
    empty = place.layers - len(place.rows)
    for x, colour, words in ((14, RAISES, "raises the answer"), (160, LOWERS, "lowers it")):
        parts += [f"<rect x='{x}' y='12' width='18' height='4' fill='{colour}'/>", svg.text(x + 24, 18, words)]
    if empty:
        parts.append(svg.text(270, 18, f"{empty} of {place.layers} layers have no part in it", fill=svg.FAINT))
    return svg.svg(WIDTH, place.height, parts, f"Circuit of {len(edges)} edges")


def curve(localization: Localization) -> str:
    """SVG of faithfulness by number of edges; empty where the localization has no such table."""
    for title, rows in localization.tables.items():
        if title.startswith(CURVE):
            sizes = tuple(float(n) for n in title.rpartition(":")[2].split(","))
            lines = (series.Line("circuit", sizes, tuple(map(series.finite, rows[0])), RAISES, False),)
            return svg.line_chart(series.Chart("Faithfulness on facts that did not rank the edges", "edges",
                                               "faithfulness", lines))  # fmt: skip
    return ""


def html(localization: Localization, key_value_heads: int | None = None) -> str:
    """The localization as one self-contained page: no request leaves it, and its policy forbids any."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    drawn = bool(localization.edges)
    plots = {} if drawn else {
        f"table-{k}": figures.heat_map([panel], across="") for k, panel in enumerate(series.table_panels(localization))
    }  # fmt: skip
    scripts = [asset("circuit.js")] if drawn else [plotly_js(), asset("report.js")] if plots else []
    return environment.from_string(asset("circuit.html.j2")).render(
        record=localization, sentence=tables.location_sentence(localization), rows=tables.location_rows(localization),
        picture=Markup(picture(localization, key_value_heads)) if drawn else "", curve=Markup(curve(localization)),
        edges=localization.edges[:LISTED_EDGES], figures={k: Markup(embedded(f)) for k, f in plots.items()},
        style=Markup(asset("report.css")), scripts=[Markup(script) for script in scripts],
        policy=" ".join(f"'{csp_hash(script)}'" for script in scripts) or "'none'",
    )  # fmt: skip
