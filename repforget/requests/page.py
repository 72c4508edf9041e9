"""The audit as one printable page and as Markdown: the same sections, the same words."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path

from repforget.report.markdown import cell, table
from repforget.report.render import asset
from repforget.requests.audit import HOW_TO_READ, MEASURED, Audit, Section
from repforget.store import write_atomic

NO_THEOREM = "No theorem holds for this: the words above are about what was measured."
READING = (
    "Before is the model as it was (the ceiling); never knew is a model that was never trained on it, or guessing (the "
    "floor). The share left is where the edited model lies between them, at most is its one-sided 95 % limit."
)


@cache
def _template() -> str:
    return (files("repforget.requests") / "assets" / "audit.html.j2").read_text(encoding="utf-8")


def write(audit: Audit, folder: str | Path, *, show_names: bool = False) -> Path:
    """Write ``audit.html`` and ``audit.md`` into ``folder``; return the page. ``show_names``: with what identifies, for
    their owner alone."""
    folder, mode = Path(folder), 0o600 if show_names else 0o666
    write_atomic(folder / "audit.md", markdown(audit, show_names).encode(), mode)
    write_atomic(folder / "audit.html", html(audit, show_names).encode(), mode)
    return folder / "audit.html"


def html(audit: Audit, show_names: bool = False) -> str:
    """One self-contained page, to be read and printed: no script, nothing is loaded."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_template()).render(
        audit=audit, show_names=show_names, style=Markup(asset("report.css")), headings=MEASURED, reading=READING,
        no_theorem=NO_THEOREM, how_to_read=HOW_TO_READ, made=audit.made.strftime("%Y-%m-%d %H:%M UTC"),
    )  # fmt: skip


def markdown(audit: Audit, show_names: bool = False) -> str:
    """The same as Markdown."""
    lines = [f"# Requests to forget: {cell(audit.model)}", "", f"Made {audit.made:%Y-%m-%d %H:%M} UTC.", "",
             f"**{cell(audit.sentence)}**", "", *(f"- {cell(fault)}" for fault in audit.faults), "",
             f"Head of the chain: `{audit.head}`", "", *table(("requests", "number"), audit.counts),
             HOW_TO_READ, ""]  # fmt: skip
    for section in audit.sections:
        lines += _lines(section, show_names)
    return "\n".join(lines) + "\n"


def _lines(section: Section, show_names: bool) -> list[str]:
    own = section.own if show_names else ()
    lines = [f"## Request {section.request.id}", "", f"**{cell(section.standing)}**", "",
             *table(("", ""), (*section.facts, *own)), "### What was done", "",
             *(cell(text) + "\n" for text in section.done)]  # fmt: skip
    if section.shown:
        lines += ["### What was shown", "", *(cell(text) + "\n" for text in section.shown)]
    if section.measures:
        lines += [*table(MEASURED, section.measures), READING, ""]
    lines += ["### What was not shown", "", section.not_shown, ""]
    if section.theorem:
        lines += ["### The theorem", "", *table(("", ""), section.theorem)]
    elif section.measures:
        lines += [NO_THEOREM, ""]
    if section.again:
        lines += ["### After later requests", "", *(cell(text) + "\n" for text in section.again)]
    if section.environment:
        lines += ["### Environment", "", *table(("", ""), section.environment)]
    return lines
