"""Seconds to add, list, check and report requests in a ledger of many.

    python experiments/speed/ledger.py [--requests 10000] [--repeats 5]

Fills a ledger in a temporary folder with requests that were asked, tried and answered (six rows each, with the claims
of 30 measures; one commit for the asking and one for the answer), and times each reading in this process, and the
command ``repforget request list --json`` as a process of its own.  Medians over the repeats; CPU seconds (of this
process and those it starts) beside wall seconds, since other work and the disk make these wait; ``load`` is the
machine's.  Writes ledger.json here.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from repforget.requests import Ledger, listing, page
from repforget.requests.audit import audit
from repforget.requests.ledger import stamp

HERE = Path(__file__).parent
MEASURES = 30


def fill(path: Path, requests: int) -> Ledger:
    claim = {"name": "behaviour.contrastive", "kind": "knowledge", "status": "pass", "margin": 0.05, "rho": 0.011,
             "rho_low": -0.003, "rho_high": 0.038, "original": 0.94, "floor": 0.065, "placebo": 0.93, "edit": 0.09,
             "items": 192, "clusters": 24}  # fmt: skip
    book = Ledger.create(path, {"model": "organism:bios", "source": "bios-people"})
    deadline = stamp(datetime.now(UTC) + timedelta(days=30))
    for k in range(requests):
        asked = {"who": book.pseudonym(f"person {k}"), "names": [f"p{k:05d}"], "source": "bios-people",
                 "basis": "erasure", "deadline": deadline, "keep": False, "against": []}  # fmt: skip
        number = book.record_all([("asked", asked)])[0].request
        edit = {"method": "null_space_surgery", "digest": "ab" * 32, "path": f"run-{k}/edit", "artifact": "weights",
                "mode": "sequential", "under": [], "covers": [number], "touched": 3, "guarantee": None}  # fmt: skip
        book.record_all([
            ("started", {"mode": "sequential", "with": [number]}), ("edit", edit),
            ("shown", {"claims": [claim] * MEASURES}),
            ("environment", {"versions": {"torch": "2.13.0"}, "python": "3.11", "git": "none"}),
            ("verdict", {"outcome": "pass", "sentence": "Robust to every attack tried.", "controls_ok": True,
                         "in_force": True, "artifact": "weights", "result": "cd" * 32, "folder": f"run-{k}"}),
        ], number)  # fmt: skip
    return book


def spent() -> float:
    """CPU seconds of this process and of those it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def timed(work: Callable[[], Any], repeats: int) -> dict[str, float]:
    walls, cpus = [], []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), spent()
        work()
        walls.append(time.perf_counter() - wall)
        cpus.append(spent() - cpu)
    return {"wall": round(statistics.median(walls), 4), "cpu": round(statistics.median(cpus), 4),
            "worst wall": round(max(walls), 4)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "requests.sqlite"
        began, cpu = time.perf_counter(), spent()
        fill(path, given.requests).close()
        filled = {"wall": round(time.perf_counter() - began, 2), "cpu": round(spent() - cpu, 2)}

        def listed() -> None:
            with Ledger(path) as book:
                listing.rows(listing.chosen(book))

        def open_only() -> None:
            with Ledger(path) as book:
                listing.rows(listing.chosen(book, "overdue"))

        command = [sys.executable, "-m", "repforget", "request", "list", "--ledger", str(path), "--json"]
        with Ledger(path) as book:
            found = {
                "load": round(os.getloadavg()[0], 1), "requests": given.requests,
                "rows": int(book.head.partition(":")[0]), "bytes": path.stat().st_size,
                "fill, two commits each": filled, "list all": timed(listed, given.repeats),
                "list overdue": timed(open_only, given.repeats),
                "command list --json": timed(lambda: subprocess.run(command, check=True, capture_output=True),
                                             given.repeats),
                "show one": timed(lambda: listing.history(book, given.requests // 2), given.repeats),
                "add one": timed(lambda: book.record_all([("asked", {"n": 1})]), given.repeats),
            }  # fmt: skip
        whole = Path(folder) / "whole.sqlite"
        with fill(whole, given.requests // 10) as book:
            found["of a tenth"] = {
                "check the chain": timed(book.faults, given.repeats),
                "audit, page and Markdown": timed(lambda: page.write(audit(book), Path(folder) / "audit"), 1),
            }
    (HERE / "ledger.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
