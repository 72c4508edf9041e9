"""Write the report of a run: the same records give the same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from repforget.errors import KnowledgeError
from repforget.report import figures, series, svg, tables
from repforget.report.data import RESULT_FILE, ReportData, as_saved, save
from repforget.report.markdown import markdown
from repforget.store import json_bytes, write_atomic

OUTCOME_WORDS = {"pass": "Pass", "fail": "Fail", "inconclusive": "Inconclusive"}
SHOWN_ITEMS = 10


def write(folder: Path, run: ReportData, show_texts: bool = False) -> Path:
    """Write result.json, report.html, report.md and plots/ below ``folder``; return the path of report.html.

    No forget text is written unless ``show_texts``; the texts then come from the knowledge probe, which must be
    the one that was judged (KnowledgeError otherwise). ResourceError when the folder cannot be written.
    """
    folder, run = Path(folder), as_saved(run)
    texts = leaking_items(run, forget_texts(run)) if show_texts else ()
    save(folder, run)
    plots = {f"{name}.svg": picture.encode() for name, picture in static_plots(run).items()}
    plots |= {f"{name}.json": json_bytes(figure) for name, figure in interactive_plots(run).items()}
    for name, content in plots.items():
        write_atomic(folder / "plots" / name, content)
    for stale in sorted((folder / "plots").glob("*")):
        if stale.name not in plots:  # of an earlier report with other measures
            stale.unlink()
    write_atomic(folder / "report.md", markdown(run, tuple(static_plots(run)), texts).encode())
    write_atomic(folder / "report.html", html(run, texts).encode())
    return folder / "report.html"


def static_plots(run: ReportData) -> dict[str, str]:
    """Name -> SVG of every picture of the report."""
    panels = series.knowledge_panels(run.evidence)
    found = {"knowledge": svg.heat_map(panels)} if panels else {}
    claims = series.sorted_claims(run.verdict.claims)
    for kind in ("knowledge", "collateral"):
        chosen = [claim for claim in claims if claim.kind == kind]
        if chosen:
            found[f"shares-{kind}"] = svg.forest(chosen)
    for k, chart in enumerate(series.charts(run.evidence)):
        found[f"curve-{k}"] = svg.line_chart(chart)
    return found


def interactive_plots(run: ReportData) -> dict[str, figures.Figure]:
    """Name -> Plotly figure (data and layout) of the heat maps and the curves."""
    panels = series.knowledge_panels(run.evidence)
    found = {"knowledge": figures.heat_map(panels)} if panels else {}
    for k, chart in enumerate(series.charts(run.evidence)):
        found[f"curve-{k}"] = figures.line_chart(chart)
    for localization in run.localizations:
        for k, panel in enumerate(series.table_panels(localization)):
            found[f"locate-{localization.method}-{k}"] = figures.heat_map([panel], across="")
    return found


def forget_texts(run: ReportData) -> Mapping[str, tuple[str, str]]:
    """Item id -> (prompt, answer) of the forget set that this run judged."""
    from repforget.knowledge_files import load_knowledge

    knowledge = load_knowledge(run.recipe["knowledge"], int(run.recipe.get("seed", 0)))
    judged = run.environment.get("knowledge_digest")
    if judged is not None and judged != knowledge.digest:
        raise KnowledgeError(f"The knowledge probe '{run.recipe['knowledge']}' has changed since this run: its texts "
                             "would not be those judged; restore it, or leave --show-texts out.")  # fmt: skip
    return {item.id: (item.prompt, item.answer) for item in knowledge.forget}


def leaking_items(run: ReportData, texts: Mapping[str, tuple[str, str]]) -> tuple[tuple[str, str, str], ...]:
    """(prompt, answer, value) of the forget items that stand out most on the edit in the worst measure."""
    worst = next((e for e in run.evidence if e.name == run.verdict.worst and e.kind == "knowledge"), None)
    if worst is None:
        return ()
    scores = worst.arms["edit"]
    ranked = sorted(zip(scores.ids, scores.values, scores.valid, strict=True), key=lambda row: (-row[1], row[0]))
    shown = [(*texts[i], f"{v:.3g}") for i, v, valid in ranked if valid and i in texts]
    return tuple(shown[:SHOWN_ITEMS])


@cache
def asset(name: str) -> str:
    """Text of a file in assets/."""
    return (files("repforget.report") / "assets" / name).read_text(encoding="utf-8")


@cache
def plotly_js() -> str:
    """The script that draws figures."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def csp_hash(script: str) -> str:
    """What a page's policy names a script by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def embedded(figure: figures.Figure) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(figure, sort_keys=True, allow_nan=False, ensure_ascii=True, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def html(run: ReportData, texts: tuple[tuple[str, str, str], ...] = ()) -> str:
    """The report as one self-contained page: no request leaves it, and its policy forbids any."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(asset("report.html.j2"))
    plots = interactive_plots(run)
    scripts = [plotly_js(), asset("report.js")] if plots else []
    return template.render(
        run=run, verdict=run.verdict, tables=tables, **tables.names(run.recipe),
        outcome=OUTCOME_WORDS[run.verdict.outcome] if run.verdict.controls_ok else "No verdict",
        rows=tables.claim_rows(run.verdict, run.evidence), unscored=tables.unscored(run.evidence),
        interval=lambda claim: Markup(svg.interval(claim)), texts=texts, result_file=RESULT_FILE,
        static={name: Markup(picture) for name, picture in static_plots(run).items()},
        figures={name: Markup(embedded(figure)) for name, figure in plots.items()},
        curves=[name for name in plots if name.startswith("curve-")],
        located=_located(run), style=Markup(asset("report.css")), scripts=[Markup(s) for s in scripts],
        policy=" ".join(f"'{csp_hash(script)}'" for script in scripts) or "'none'",
    )  # fmt: skip


def _located(run: ReportData) -> list[dict[str, Any]]:
    return [
        {"record": loc, "rows": tables.location_rows(loc), "sentence": tables.location_sentence(loc),
         "figures": [f"locate-{loc.method}-{k}" for k in range(len(series.table_panels(loc)))]}
        for loc in run.localizations
    ]  # fmt: skip
