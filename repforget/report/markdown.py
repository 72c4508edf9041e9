"""The report as Markdown: the same rows as the page, with the static pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from repforget.report import tables
from repforget.report.data import RESULT_FILE, ReportData

PICTURES = {"shares-knowledge": "Share of the knowledge left", "shares-collateral": "Share of quality lost",
            "knowledge": "Knowledge by layer"}  # fmt: skip


def cell(value: str) -> str:
    """Text that cannot break out of a Markdown table cell."""
    flat = " ".join(value.split())
    for sign in "\\`*_[]<>|":
        flat = flat.replace(sign, "\\" + sign)
    return flat


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    body = ["| " + " | ".join(cell(str(entry)) for entry in row) + " |" for row in rows]
    return ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings), *body, ""] if body else ["None.", ""]


def _opening(run: ReportData) -> list[str]:
    verdict, named = run.verdict, tables.names(run.recipe)
    word = verdict.outcome.upper() if verdict.controls_ok else "NO VERDICT: a control came out wrong"
    return [
        f"# {cell(named['knowledge'])} in {cell(named['model'])}: {word}", "", cell(verdict.sentence), "",
        f"Artifact: **{verdict.artifact}** · judged on the **{verdict.split}** split · worst measure: "
        f"**{cell(verdict.worst or 'none')}**", "",
        "## Controls", "", *table(("control", "outcome"), tables.control_rows(verdict)),
    ]  # fmt: skip


def _claims(run: ReportData, pictures: Sequence[str]) -> list[str]:
    lines: list[str] = []
    rows = tables.claim_rows(run.verdict, run.evidence)
    for kind, title in (("knowledge", "What is left of the knowledge"), ("collateral", "What must stay")):
        chosen = [row for row in rows if row.claim.kind == kind]
        lines += [f"## {title}", "", *table(tables.HEADINGS, (row.cells for row in chosen))]
        lines += [f"- {cell(row.cells[0])}: {cell(row.reason)}" for row in chosen] + [""]
        lines += _picture(f"shares-{kind}", pictures)
    return [*lines, *(f"- {cell(line)}" for line in tables.unscored(run.evidence)), ""]


def _picture(name: str, pictures: Sequence[str]) -> list[str]:
    return [f"![{PICTURES.get(name, 'Curve')}](plots/{name}.svg)", ""] if name in pictures else []


def markdown(run: ReportData, pictures: Sequence[str], texts: Sequence[tuple[str, str, str]] = ()) -> str:
    """Render the report; ``pictures`` are the names of the SVG files below ``plots/``."""
    lines = [*_opening(run), *_claims(run, pictures)]
    if texts:
        lines += ["## Forget items that stand out most in the worst measure", "",
                  *table(("prompt", "answer", "value"), texts)]  # fmt: skip
    if worst := tables.standing_out(run.evidence):
        lines += ["## Items that stand out most", "", *table(("item", "cluster", "share left", "by"), worst)]
    if "knowledge" in pictures:
        lines += ["## Where the knowledge was, and is", "", *_picture("knowledge", pictures)]
    curves = [name for name in pictures if name.startswith("curve-")]
    if curves:
        lines += ["## What attacks bring back", "", *(line for name in curves for line in _picture(name, pictures))]
    for localization in run.localizations:
        rows = [row[:2] for row in tables.location_rows(localization)]
        lines += [f"## Where {cell(localization.method)} pointed", "", cell(tables.location_sentence(localization)), "",
                  *table(("component", "score"), rows)]  # fmt: skip
    for edit in map(tables.manifest_of, run.edits):
        lines += [f"## What {cell(str(edit.get('method', 'the edit')))} touched", "",
                  *table(("kind", "name", "relative size"), tables.touched_rows(edit)),
                  *table(("fact", "value"), tables.manifest_rows(edit))]  # fmt: skip
        if guarantee := tables.guarantee_rows(edit):
            lines += ["### What a theorem says of it", "", *table(("", ""), guarantee)]
    if run.rungs:
        keys = ("method", "split", "outcome", "sentence")
        lines += ["## What was tried", "", *table(keys, ([r.get(key, "") for key in keys] for r in run.rungs))]
    arms = tables.arms_of(run.evidence)
    if facts := tables.fact_rows(run.evidence, arms):
        lines += ["## Descriptive numbers", "", *table(("", *arms), facts)]
    lines += ["## Cost", "", *table(("stage", "counts"), tables.cost_rows(run.localizations, run.evidence))]
    lines += ["## Recipe and environment", "", *table(("key", "value"), tables.flat(run.recipe)),
              *table(("key", "value"), tables.flat(run.environment)), f"All numbers are in {RESULT_FILE}."]  # fmt: skip
    return "\n".join(lines) + "\n"
