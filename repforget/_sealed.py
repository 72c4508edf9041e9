"""The sealed check, run as a process of its own: ``python -m repforget._sealed`` with a job (JSON) on stdin.

A job names the recipe, the run folder, the saved edit and the arms to measure; everything is loaded from disk, and
the measurements become stages of the run folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repforget._session import open_session
from repforget.errors import RepforgetError
from repforget.recipe import build_recipe
from repforget.store import Store


def end_with_parent() -> None:
    """Stop when the run that asked for this check is gone, so that a killed run leaves no process behind."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def check(job: Mapping[str, Any]) -> None:
    """Measure the arms that the job names, on the sealed split."""
    session = open_session(build_recipe(job["recipe"]), Store(Path(job["store"])), None, lambda line: None)
    if session.base != job["base"]:
        changed = [name for name, value in session.base.items() if job["base"].get(name) != value]
        raise RepforgetError(f"The fresh process finds another {', '.join(changed)} than the run that asked for it: "
                             "leave models, probes and package alone while a run is going on.")  # fmt: skip
    edit = None if job["edit"] is None else Path(job["edit"])
    session.measure_arms(edit, "sealed", session.recipe.verify, only=job["arms"])


def main() -> int:
    end_with_parent()
    try:
        check(json.load(sys.stdin))
    except RepforgetError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
