"""The page of a localization: one file without requests that shows every edge of the circuit, or the heat maps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from repforget.locate._graph import Graph, circuit, component_scores, edge_order
from repforget.records import Edge, Localization, RandomBand
from repforget.report.circuit import curve, drawing, html, picture

BAND = RandomBand(2, 20, 0.5, 0.1, 0.2, "effect of the top 2")


def localization(graph: Graph, size: int) -> Localization:
    scores = np.random.default_rng(0).standard_normal(graph.exists.shape) * graph.exists
    kept = circuit(graph, edge_order(graph, scores, "greedy"), size)
    edges = [Edge(graph.senders[s], graph.receivers[r], float(scores[s, r]))
             for s, r in zip(*np.nonzero(kept), strict=True)]  # fmt: skip
    sums = component_scores(graph, scores)[1:]
    tables = {"faithfulness by number of edges: 5, 10": [[0.5, 0.9]], "by head": [[0.1, 0.2]]}
    return Localization("eap", graph.senders[1:], tuple(map(float, sums)), BAND, tables=tables, notes=("a < b",),
                        edges=tuple(edges))  # fmt: skip


@pytest.mark.parametrize("shape", [(4, 4, 2, False), (3, 2, 2, True), (40, 16, 1, False)])
def test_every_edge_and_every_sender_is_drawn_inside_the_picture(shape: tuple[int, int, int, bool]) -> None:
    found = localization(Graph(*shape), 30)
    assert len(found.edges) > 3
    drawn = ElementTree.fromstring(picture(found, shape[2]))
    paths = [p for p in drawn.iter() if p.get("class") == "edge"]
    assert sorted(p[0].text.split(":")[0] for p in paths if p[0].text) == sorted(map(str, found.edges))
    assert {str(e.source) for e in found.edges} < {str(g.get("data-node")) for g in drawn.iter() if g.get("data-node")}
    width, height = (float(drawn.get(side) or 0) for side in ("width", "height"))
    for path in paths:
        numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d") or "")]
        assert all(0 <= x <= width for x in numbers[::2]) and all(0 <= y <= height for y in numbers[1::2])
        assert numbers[1] > numbers[-1]  # from below to above
        ends = (path.get("data-ends") or "").split()
        assert len(ends) == 2 or (shape[1] > shape[2] and len(ends) == 1 + shape[1] // shape[2])
    widths = {str(e): abs(e.score) for e in found.edges}
    order = sorted(paths, key=lambda p: float(p.get("stroke-width") or 0))
    assert str(order[-1][0].text).startswith(max(widths, key=widths.__getitem__))


def test_without_the_number_of_key_value_heads_the_smallest_that_fits_is_drawn() -> None:
    found = localization(Graph(4, 4, 2, False), 60)
    assert drawing(found).groups == 2 and drawing(found, 4).groups == 4


def test_the_page_leaves_no_request_and_escapes_what_it_shows() -> None:
    page = html(localization(Graph(2, 2, 1, False), 10))
    assert "a &lt; b" in page and "default-src 'none'" in page
    assert not re.search(r"(?:src|href)\s*=\s*['\"]?(?:http|//)", page)
    assert page.count("class='edge'") and "Plotly" not in page and curve(localization(Graph(2, 2, 1, False), 10))


def test_a_localization_without_edges_is_shown_by_its_heat_maps(cli: Callable[..., tuple[int, str, str]]) -> None:
    code, _, error = cli("locate", "attribution_patching", "--html", "page.html", "--out", "where.json", "--json",
                         "--set", "items=4", "--set", "draws=20", "--set", "steps=1")  # fmt: skip
    assert code == 0, error
    page, where = Path("page.html").read_text(), json.loads(Path("where.json").read_text())
    assert page.count("data-figure=") == len(where["tables"]) > 0 and "Plotly" in page and "class='edge'" not in page
