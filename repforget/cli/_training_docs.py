"""The generated blocks of docs/training.md: every objective with its source, cost and weakness, and what is around."""

from __future__ import annotations

import inspect
import re
from typing import Any

from repforget.cli._describe import cell


def objectives_block() -> str:
    """Every objective to forget with: what it does and reads, its reduction, source, cost and weakness."""
    from repforget.edit.train._objective import find, part_names

    lines = ["| objective | what it does | reads | reduced by | source | cost | weakness |", "|---" * 7 + "|"]
    for name in part_names("objectives"):
        made = find(name)
        own = inspect.cleandoc(made.function.__doc__ or "")
        cells = (f"`{name}`", _first(own), ", ".join(made.reads), made.reduction, sentence(own, "Source"),
                 sentence(own, "Cost"), sentence(own, "Weakness"))  # fmt: skip
        lines.append("| " + " | ".join(cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def editors_block() -> str:
    """The trained editors that are no single loss."""
    from repforget.discover import methods

    lines = ["| editor | what it does | source | cost | weakness |", "|---|---|---|---|---|"]
    for method in methods("edit"):
        if method.family not in ("train", "arithmetic") or hasattr(method.function, "objective"):
            continue
        own = inspect.getdoc(method.function) or ""
        cells = (f"`{method.name}`", method.summary, sentence(own, "Source"), sentence(own, "Cost"),
                 sentence(own, "Weakness"))  # fmt: skip
        lines.append("| " + " | ".join(cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def parts_block(folder: str) -> str:
    """The files of a folder around the objectives: what each does, its settings and its source."""
    from repforget.edit.train._objective import Objective, load_part, part_names

    lines = ["| name | what it does | settings | source |", "|---|---|---|---|"]
    for name in part_names(folder):
        part = load_part(folder, name)
        made = getattr(part, "objective", None)
        function: Any = made.function if isinstance(made, Objective) else part
        own = inspect.cleandoc(function.__doc__ or "")
        given = ("metric", "losses", "probe", "seed", "done", "norms", "rest")
        settings = [f"`{p.name}={p.default!r}`" for p in inspect.signature(function).parameters.values()
                    if p.kind is p.KEYWORD_ONLY and p.name not in given]  # fmt: skip
        cells = (f"`{name}`", _first(own), ", ".join(settings) or "none", sentence(own, "Source"))
        lines.append("| " + " | ".join(cell(text) for text in cells) + " |")
    return "\n".join(lines) + "\n"


def gradients_block() -> str:
    """How hard each objective pushes on a token, computed from the objectives themselves."""
    from repforget.edit.train.objectives._cheat_sheet import cheat_sheet

    at = (0.999, 0.9, 0.5, 0.1, 0.001)
    sheet = cheat_sheet(at)
    lines = ["| p | " + " | ".join(sheet) + " |", "|---|" + "--:|" * len(sheet)]
    for k, p in enumerate(at):
        lines.append(f"| {p:g} | " + " | ".join(f"{values[k]:.3f}" for values in sheet.values()) + " |")
    return "\n".join(lines) + "\n"


def shared_block() -> str:
    """The settings that all trained editors have, with their defaults."""
    from dataclasses import fields

    from repforget.edit.train._settings import Settings

    return ", ".join(f"`{f.name}={f.default!r}`" for f in fields(Settings)) + "\n"


def leaderboard_block() -> str:
    """The table of the committed leaderboard."""
    from pathlib import Path

    return (Path(__file__).parents[2] / "experiments" / "leaderboard" / "table.md").read_text("utf-8")


def _first(text: str) -> str:
    return text.split("\n\n")[0]


def sentence(text: str, word: str) -> str:
    """What a docstring says after "Word:", to the end of the paragraph or the next such word."""
    end = r"\n\n|\b(?:Source|Cost|Weakness|Memory|Args)s?: |\bRaises |\Z"
    found = re.search(rf"\b{word}s?: (.*?)(?={end})", text, re.S)
    return " ".join(found[1].split()) if found else "–"
