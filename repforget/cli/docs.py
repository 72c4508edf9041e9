"""Regenerate the blocks of the documentation that come from the code: ``python -m repforget.cli.docs [--check]``.

A block lies between ``<!-- generated: NAME -->`` and ``<!-- end generated -->``; NAME is ``methods`` with a room,
``help``, ``attacks``, ``quickstart`` (from the committed verdict of that experiment), ``calibration`` (from the shipped
calibration, of which the picture in docs/ is drawn too), or one of the tables of training (cli/_training_docs.py).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z ]+) -->\n)(?P<body>.*?)(<!-- end generated -->)", re.DOTALL)
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "docs")


def documents(root: Path) -> list[Path]:
    """Markdown files that may hold generated blocks."""
    found = [root / name for name in DOCUMENTS]
    inside = [path for entry in found for path in sorted(entry.rglob("*.md"))]
    return [path for path in (*found, *inside) if path.is_file()]


def help_block() -> str:
    """What each command does, from its own docstring."""
    from repforget.cli import _app

    lines = ["| command | what it does |", "| --- | --- |"]
    for entry in _app.app.registered_commands:
        text = (entry.callback.__doc__ or "").split("\n\n")[0] if entry.callback else ""
        lines.append(f"| `repforget {entry.name}` | {' '.join(text.split())} |")
    return "\n".join(lines) + "\n"


def quickstart_block() -> str:
    """The verdict of the committed quickstart run: the sentence, and one row per measure with a vote."""
    from repforget.records import Verdict
    from repforget.store import read_json

    verdict = Verdict.from_json(read_json(Path(__file__).parents[2] / "experiments" / "quickstart" / "verdict.json"))
    head = f"**{verdict.outcome.upper()}** ({verdict.split} split, artifact: {verdict.artifact})"
    lines = [f"{head}. {verdict.sentence}", "",
             "| measure | original | never knew | placebo | edit | share left (95 % limits) | status |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for claim in verdict.claims:
        if claim.status not in ("pass", "fail", "inconclusive"):
            continue
        levels = (f"{claim.levels[arm]:.3f}" for arm in ("original", "floor", "placebo", "edit"))
        share = f"{claim.rho:.1%} ({claim.rho_low:.1%} to {claim.rho_high:.1%})"
        kind = "" if claim.kind == "knowledge" else " lost"
        lines.append(f"| {claim.name} | {' | '.join(levels)} | {share}{kind} | {claim.status} |")
    return "\n".join(lines) + "\n"


def attacks_block() -> str:
    """Every verifier by family: where it takes part, who can do it, what it tells the model, and what votes."""
    from repforget.discover import methods
    from repforget.verify._calibration import may_vote
    from repforget.verify.battery import FAMILIES

    order = {family: place for place, family in enumerate(FAMILIES)}
    lines = ["| family | verifier | from level | access | teaches | votes | describes |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for method in sorted(methods("verify"), key=lambda m: (order.get(m.family, len(order)), m.name)):
        measures = method.constant("MEASURES")
        voting = [name for name, i in measures.items() if i.votes and may_vote(f"{method.name}.{name}")]
        level = method.constant("JOINS") or "where named"
        taught = dict.fromkeys(i.teaches for i in measures.values())
        cells = (method.family if method.family in order else "", f"`{method.name}`",
                 f"{level}, sealed split alone" if method.constant("HELD_OUT") else level,
                 ", ".join(dict.fromkeys(i.access for i in measures.values())),
                 "; ".join(t for t in taught if t != "nothing") or "nothing", ", ".join(voting) or "–",
                 ", ".join(name for name in measures if name not in voting) or "–")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def calibration_block() -> str:
    """The table of ``calibration.json``, as shipped."""
    from repforget.calibration.table import markdown
    from repforget.verify._calibration import NEEDED, calibrated

    found = calibrated()
    head = f"Budget `{found['budget']}`, {found['items']} forget items, {len(found['organisms'])} models.\n\n"
    return head + markdown(found["measures"], NEEDED)


def calibration_picture() -> str:
    from repforget.calibration.plot import picture
    from repforget.verify._calibration import NEEDED, calibrated

    return picture(calibrated()["measures"], calibrated()["organisms"], NEEDED)


FOLDERS = {"retain terms": "retain", "ways of combining": "combine", "robust wrappers": "robust"}
PICTURES: Mapping[str, Callable[[], str]] = {"docs/calibration.svg": calibration_picture}


def makers() -> Mapping[str, Callable[[], str]]:
    from repforget.cli import _describe as d
    from repforget.cli import _training_docs as t

    tables = {f"methods {room}": lambda room=room: d.markdown_table(room) for room in d.ROOMS}
    parts = {name: lambda folder=folder: t.parts_block(folder) for name, folder in FOLDERS.items()}
    return {**tables, **parts, "help": help_block, "quickstart": quickstart_block, "attacks": attacks_block,
            "calibration": calibration_block, "objectives": t.objectives_block, "trained editors": t.editors_block,
            "gradients": t.gradients_block, "training settings": t.shared_block,
            "leaderboard": t.leaderboard_block}  # fmt: skip


def regenerated(text: str) -> str:
    """The document with every generated block brought up to date; an unknown block name is an error."""
    known = makers()

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in known:
            raise SystemExit(f"There is no generated block '{name}': choose one of {', '.join(known)}.")
        return match[1] + known[name]() + match[4]

    return BLOCK.sub(fill, text)


def stale(root: Path) -> list[Path]:
    """Documents whose generated blocks differ from what the code says now."""
    texts = {path: path.read_text("utf-8") for path in documents(root)}
    pictures = [root / name for name, draw in PICTURES.items()
                if (root / name).with_suffix(".md") in texts and _read(root / name) != draw()]  # fmt: skip
    return [*(path for path, text in texts.items() if regenerated(text) != text), *pictures]


def _read(path: Path) -> str | None:
    return path.read_text("utf-8") if path.is_file() else None


def main() -> None:
    root = Path(__file__).parents[2]
    outdated = stale(root)
    if "--check" in sys.argv[1:]:
        sys.exit(f"Outdated: {', '.join(map(str, outdated))}; run 'make docs'." if outdated else 0)
    for path in outdated:
        draw = PICTURES.get(path.relative_to(root).as_posix())
        path.write_text(draw() if draw else regenerated(path.read_text("utf-8")), encoding="utf-8")
        print(f"updated {path.relative_to(root)}")


if __name__ == "__main__":
    main()
