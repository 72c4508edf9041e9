"""A request answered by the loop itself, killed on the way and run again: one verdict, a whole chain, no text left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from repforget.knowledge_files import load_knowledge
from repforget.requests import Ledger, asking, requests
from repforget.requests.run import composed, workplace

RECIPE = """
model: organism:bios
knowledge: bios-people
locate: [{random_sites: {draws: 20}}]
ladder:
  - {mean_direction: {sites: [mlp_out.2]}}
verify:
  - {behaviour: {forms: 1, max_items: 8, samples: 1}}
"""


def _command(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    # The probe is found in the repository, not in the folder: the command is at home anywhere.
    return subprocess.Popen([sys.executable, "-m", "repforget", "request", *arguments], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip


@pytest.mark.slow
def test_killed_while_it_is_answered_a_request_is_answered_once(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    people = sorted({item.cluster for item in load_knowledge("bios-people").forget})[:8]
    with asking.opened(tmp_path / "requests.sqlite", None, "bios-people") as book:
        asking.ask(book, people)
    run = ("run", "1", "--recipe", "recipe.yaml", "--json")
    process = _command(tmp_path, *run)
    while process.poll() is None and not (tmp_path / "requests.files" / "probe").exists():  # it has begun
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=300)
    with Ledger(tmp_path / "requests.sqlite") as book:
        assert book.faults() == () and [r.state for r in requests(book)] == ["open"]
    process = _command(tmp_path, *run)
    out, said = process.communicate(timeout=600)
    assert process.returncode in (0, 10, 11), out + said
    (answered,) = json.loads(out)["answers"]
    with Ledger(tmp_path / "requests.sqlite") as book:
        assert book.faults(json.loads(out)["head"]) == ()
        kinds = [event.kind for event in book.events(1)]
        assert kinds == ["asked", "started", "started", "edit", "shown", "environment", "verdict"]
        verdict, edit, where, shown = (next(book.events(1, kinds=(kind,))).body
                                       for kind in ("verdict", "edit", "environment", "shown"))  # fmt: skip
        assert verdict["outcome"] == answered["outcome"] and verdict["split"] == "sealed"
        assert edit["method"] == "mean_direction" and edit["base_fingerprint"] == where["model_fingerprint"]
        claim = next(c for c in shown["claims"] if c["name"] == "behaviour.contrastive")
        assert claim["original"] > 0.5 > claim["floor"]  # ceiling and floor of these people
        if verdict["in_force"]:
            assert composed(book, 1).digest == edit["digest"]
        names = {item.subject for item in load_knowledge("bios-people").forget if item.cluster in people}
        for path in (book.path, *workplace(book).rglob("*")):
            text = path.read_bytes().decode("latin-1") if path.is_file() else ""
            assert not [name for name in names if name in text], path
