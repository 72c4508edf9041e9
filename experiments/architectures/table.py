"""Which locator and which editor works on which architecture, by trying: the table in docs/architectures.md.

    python experiments/architectures/table.py [--jobs 2] [--only NAME ...] [--draw]

Every method runs once on a tiny model of each architecture that has learned a few facts, with the small settings of the
contract tests.  A refusal is the sentence a user gets; anything else than a result or a refusal ends the run.  Writes
result.json here; --draw makes the document from it again.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
DOCUMENT = ROOT / "docs" / "architectures.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
WORKS = ""
ABOUT = (
    "Made by `python experiments/architectures/table.py`, which runs every method once on a tiny model of each",
    "architecture that has learned a few facts; tests try a part of it again.  `✓`: it ran and gave a result, which",
    "says nothing about how good it is on a real model.  Numbers are refusals, in the words a user gets.  Editors that",
    "train are run on all of them by the tests of the trainer.",
)
SMALL = {"items": 24, "draws": 20, "partners": 1, "steps": 4, "texts": 64, "sae_steps": 60}


def names() -> list[tuple[str, str]]:
    from repforget import discover

    found = [*discover.methods("locate"), *discover.methods("edit")]
    # Those that train are tests of the trainer; those that need a training of ours, of that training.
    return [(m.room, m.name) for m in found if m.family != "train" and not m.constant("TRAINED_BY")]


def tried(room: str, name: str, architecture: str) -> str:
    """WORKS, or the sentence of the refusal."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    import contract_tools
    import tiny_models

    from repforget import discover
    from repforget.errors import RepforgetError
    from repforget.locate._dispatch import locate
    from repforget.models.load import wrap

    model = contract_tools.tiny_model(architecture)
    try:
        if room == "edit":
            contract_tools.made(name, model)
        else:
            twin = wrap(tiny_models.build(architecture), model.tokenizer, "twin")  # as it was before it learned
            known = discover.method(room, name).hyperparameters
            settings = {key: value for key, value in SMALL.items() if key in known}
            locate(model, contract_tools.tiny_knowledge(), name, twins=(twin,), **settings)
    except RepforgetError as reason:
        return str(reason)
    return WORKS


def row(room: str, name: str) -> tuple[str, dict[str, str]]:
    import tiny_models

    return f"{room}.{name}", {a: tried(room, name, a) for a in tiny_models.ARCHITECTURES}


def table(found: dict[str, dict[str, str]]) -> str:
    """Markdown: a table for each room, and below it what each refusal says."""
    lines = ["# Methods and architectures", "", *ABOUT]
    for room, title in (("locate", "Locators"), ("edit", "Editors")):
        own = {key.partition(".")[2]: cells for key, cells in sorted(found.items()) if key.startswith(f"{room}.")}
        architectures = list(next(iter(own.values())))
        sentences: dict[str, int] = {}
        lines += ["", f"## {title}", "", "| | " + " | ".join(architectures) + " |",
                  "|---" * (len(architectures) + 1) + "|"]  # fmt: skip
        for name, cells in own.items():
            marks = [str(sentences.setdefault(said, len(sentences) + 1)) if said else "✓" for said in cells.values()]
            lines.append(f"| `{name}` | " + " | ".join(marks) + " |")
        lines += ["", *(f"{number}. {said}" for said, number in sentences.items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="names of methods; result.json keeps the others")
    parser.add_argument("--draw", action="store_true", help="only write the document from result.json")
    chosen = parser.parse_args()
    path = HERE / "result.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() and (chosen.only or chosen.draw) else {}
    if not chosen.draw:
        todo = [(room, name) for room, name in names() if chosen.only is None or name in chosen.only]
        with ProcessPoolExecutor(chosen.jobs, get_context("spawn")) as workers:
            running = [workers.submit(row, room, name) for room, name in todo]
            for number, future in enumerate(as_completed(running), 1):
                key, cells = future.result()
                found[key] = cells
                print(f"{number}/{len(todo)} {key}: refused on {sum(map(bool, cells.values()))}", flush=True)
        known = {f"{room}.{name}" for room, name in names()}
        found = {key: cells for key, cells in found.items() if key in known}
        path.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    DOCUMENT.write_text(table(found))


if __name__ == "__main__":
    main()
