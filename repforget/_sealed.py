"""The sealed check, run as a process of its own: ``python -m repforget._sealed STAGE_FOLDER``.

Reads ``job.json`` in the stage folder, loads everything from disk and writes ``evidence.json`` and ``verdict.json``.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

from repforget._session import open_session
from repforget.errors import RepforgetError
from repforget.recipe import build_recipe
from repforget.store import Store, read_json, write_json


def _end_with_parent() -> None:
    """Stop when the run that asked for this check is gone, so that a killed run leaves no process behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check(folder: Path) -> None:
    """Judge the saved edit that ``folder/job.json`` names, on the sealed split."""
    job = read_json(folder / "job.json")
    session = open_session(build_recipe(job["recipe"]), Store(Path(job["store"])), None, lambda line: None)
    edit = Path(job["edit"])
    evidence = session.measure(edit, "sealed", session.recipe.verify)
    write_json(folder / "evidence.json", [e.to_json() for e in evidence])
    write_json(folder / "verdict.json", session.verdict(edit, evidence, "sealed").to_json())


def main() -> int:
    _end_with_parent()
    try:
        check(Path(sys.argv[1]))
    except RepforgetError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
